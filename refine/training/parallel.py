"""Many devices: PyTorch's own DDP and FSDP2, put around a model from outside.

Knows processes, sharding and which dtype travels; of the method only that a document may be shared. A step calls
the wrapped model like a bare one: all its passes go through ``forward``, and every process makes the same number
of them.

What stays in float32 with bf16 parameters under FSDP2: gradients on the wire, the optimizer's copy of the
parameters, norms' statistics, log-probs, rewards and fast-weight states. States are inputs of later calls, and
FSDP2 would cast every float32 input, inside dataclasses too: that casting is off, and nothing needs it, since
activations have the parameters' dtype from the embeddings on.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from refine.method import ContextParallel
from refine.models.adapters import base_of

MODES = ("none", "ddp", "fsdp2", "context")


@dataclass(frozen=True)
class World:
    """The processes of a run, this one among them."""

    mode: str = "none"
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The means over all processes; every process must give the same names."""
        if self.size == 1:
            return values
        table = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(table)
        return dict(zip(values, (table / self.size).tolist()))

    def total(self, value: int) -> int:
        """The sum over all processes."""
        if self.size == 1:
            return value
        table = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(table)
        return int(table)

    def any(self, value: bool) -> bool:
        """Whether it holds in one process at least: all then do the same."""
        return self.total(int(value)) > 0

    def from_main(self, value: Any) -> Any:
        """What the main process holds, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    @property
    def readers(self) -> tuple[int, int]:
        """(rank, world size) for the data: processes that share documents read the same."""
        return (0, 1) if self.mode == "context" else (self.rank, self.size)

    @property
    def context(self) -> ContextParallel | None:
        """How this process hands a document on, where processes share documents."""
        return ContextParallel(self.rank, self.size) if self.mode == "context" and self.size > 1 else None

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_world(mode: str, device: torch.device) -> World:
    """Join the processes that ``torchrun`` has started: gloo on CPUs, nccl on GPUs.

    Args:
        mode: ``none``, ``ddp``, ``fsdp2``, or ``context``: one document over all processes.
        device: what this process would use alone; with several on GPUs each takes that of its local rank.

    Raises:
        ValueError: several processes with ``none``, or another mode outside ``torchrun``.
    """
    if mode not in MODES:
        raise ValueError(f"parallel must be one of {', '.join(MODES)}, got {mode!r}")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdigit():
            raise ValueError(
                f"the environment variable {name} must be a whole number, it is {os.environ[name]!r}"
            )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "none":
        if size > 1:
            raise ValueError(
                f"torchrun has started {size} processes, but parallel is none: give ddp or fsdp2"
            )
        return World(device=device)
    if "RANK" not in os.environ:
        raise ValueError(
            f"parallel is {mode}, but torchrun has not started this process: "
            "torchrun --nproc_per_node N -m refine.train ..."
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(mode, dist.get_rank(), dist.get_world_size(), device)


def wrap(model: nn.Module, world: World, param_dtype: torch.dtype | None = None) -> nn.Module:
    """The model under the world's parallelism; the bare model where there is none.

    Args:
        model: on its device, the same weights in every process.
        param_dtype: with fsdp2, what parameters are gathered and used in (bf16); gradients are reduced in
            float32 and the optimizer sees float32 shards. None: the parameters' own.
    """
    if world.mode == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if world.mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # about in-place changes of a call's outputs; nobody here makes one
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in base_of(model).model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # embeddings, the last norm and the head: used in every call, so they stay gathered between calls
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def accumulating(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around forward and backward of one micro-batch: gradients are reduced with the last one alone."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP (FSDP2 changes the model in place): for its configuration and for saving only."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale all gradients so that their norm over all shards is at most ``largest``; the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def full_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole model's weights, or those of its adapters alone, gathered on the CPU of rank 0 (None elsewhere,
    under fsdp2)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    bare = unwrap(model)
    adapters_alone = base_of(bare) is not bare
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters_alone)
    return get_model_state_dict(bare, options=options) or None
