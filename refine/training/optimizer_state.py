"""The optimizer's state by parameter name, so that any number of processes can go on with it, sharded or not.

Under FSDP2 each process writes its own shards to ``optimizer-RANK-of-SIZE.pt`` and nothing is gathered; without
sharding the state is part of the training state. Either can be read by either, by any number of processes.
Shards are pieces along the first dimension in the order of ranks. Files hold tensors and plain values only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refine.finite import first_not_finite

_SHARD = re.compile(r"optimizer-(\d+)-of-(\d+)\.pt")


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``{"groups": each group's settings, "state": {parameter name: its state}}``; of DTensors this rank's part."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        names[parameter]: {key: _local(value) for key, value in values.items()}
        for parameter, values in optimizer.state.items()
    }
    groups = [
        {k: v for k, v in group.items() if k != "params"} | {"names": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"groups": groups, "state": state}


def load_state_by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], updates: int
) -> None:
    """Put back what :func:`state_by_name` gave without sharding; each rank of FSDP2 takes its own part.

    Settings of the groups (rates, betas, decay) stay those of ``optimizer``.

    Args:
        updates: that the saved state has seen; with any, it cannot be empty.

    Raises:
        ValueError: a name, shape or number that does not fit; nothing is changed.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, other in zip(optimizer.param_groups, saved["groups"], strict=True):
        ours = [names[p] for p in group["params"]]
        theirs = other.get("names", ours)  # earlier versions did not write them
        if ours != theirs:
            odd = sorted(set(ours) ^ set(theirs)) or ["the order of the parameters"]
            raise ValueError(f"{odd[0]} is in one of the two alone")
    parameters = dict(model.named_parameters())
    for name, values in saved["state"].items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}")
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameters[name].shape:
                raise ValueError(
                    f"{key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(parameters[name].shape)}"
                )
    if updates > 0 and not saved["state"]:
        raise ValueError(f"it is empty after {updates} updates")
    if broken := first_not_finite(
        {
            f"{key} of {name}": value
            for name, values in saved["state"].items()
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        }
    ):
        raise ValueError(f"{broken} is not finite")
    for name, parameter in parameters.items():
        if name in saved["state"]:
            optimizer.state[parameter] = {
                key: _like(parameter, value) for key, value in saved["state"][name].items()
            }


def shard_path(folder: Path, rank: int, size: int) -> Path:
    """Where a rank's shards go."""
    return folder / f"optimizer-{rank}-of-{size}.pt"


def read_shards(folder: Path) -> dict[str, Any]:
    """The whole state, put together from the shards of a folder.

    Raises:
        FileNotFoundError: a rank's file is missing.
    """
    sizes = {int(m[2]) for path in folder.iterdir() if (m := _SHARD.fullmatch(path.name))}
    if not sizes:
        raise FileNotFoundError(f"{folder} holds no optimizer state")
    size = max(sizes)
    paths = [shard_path(folder, rank, size) for rank in range(size)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the optimizer's state has {size} parts")
    parts = [torch.load(path, weights_only=True, map_location="cpu", mmap=True) for path in paths]
    state = {
        name: {
            key: torch.cat([part["state"][name][key] for part in parts]) if value.ndim else value
            for key, value in values.items()
        }
        for name, values in parts[0]["state"].items()
    }
    return {"groups": parts[0]["groups"], "state": state}


def _local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def _like(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """A state tensor on the parameter's device, sharded as the parameter is."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device, copy=True)
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    pieces = value.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    local = pieces[rank] if rank < len(pieces) else value[:0]
    return DTensor.from_local(
        local.to(parameter.device, copy=True), mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
