"""Context parallelism: one document over several processes, each with a run of its segments.

The state at a border goes to the next process, its gradient comes back: what segments hand to one another in one
process (:mod:`refine.method.segmented_pass`) is handed over the wire. The processes work one after the other on a
document, so this buys memory for parameters' activations and states, not time: with N processes a step takes as
long as in one, plus 2 (N - 1) transfers of one state (at DeltaNet-1.3B 25 MiB a sequence in float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from refine.models.state import float_tensors, map_state


@dataclass(frozen=True)
class _Placeholder:
    """Where a tensor of a state goes: the state's structure travels without its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share a document, this one among them. The model is not wrapped; gradients are summed
    over the processes when they are complete (:meth:`sum_gradients`).
    """

    rank: int
    size: int

    @classmethod
    def of_all(cls) -> ContextParallel:
        """Every process of the default group."""
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, segments: int) -> range:
        """The segments of this process."""
        return range(segments * self.rank // self.size, segments * (self.rank + 1) // self.size)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        dist.all_reduce(value)
        return value

    def largest(self, value: int, device: torch.device) -> int:
        """The largest over all processes."""
        table = torch.tensor(value, device=device)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        return int(table)

    def send_state(self, state) -> None:
        """To the next process."""
        tensors: list[torch.Tensor] = []

        def take_out(x: torch.Tensor) -> _Placeholder:
            tensors.append(x.detach().contiguous())
            return _Placeholder(tuple(x.shape), x.dtype)

        structure = map_state(state, take_out)
        dist.send_object_list([structure], self.rank + 1)
        for x in tensors:
            dist.send(x, self.rank + 1)

    def receive_state(self, device: torch.device):
        """From the process before."""
        received = [None]
        dist.recv_object_list(received, self.rank - 1)

        def fill(place: _Placeholder) -> torch.Tensor:
            x = torch.empty(place.shape, dtype=place.dtype, device=device)
            dist.recv(x, self.rank - 1)
            return x

        return map_state(received[0], fill, leaf=_Placeholder)

    def send_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Of the state at this process's start, to the process before."""
        known = torch.tensor([g is not None for g in gradients], dtype=torch.int64)
        dist.send(known.to(_device_of(gradients)), self.rank - 1)
        for gradient in gradients:
            if gradient is not None:
                dist.send(gradient.contiguous(), self.rank - 1)

    def receive_gradients(self, state) -> list[torch.Tensor | None]:
        """Of the state that was sent, in the order of its float tensors."""
        tensors = float_tensors(state)
        known = torch.empty(len(tensors), dtype=torch.int64, device=_device_of(tensors))
        dist.recv(known, self.rank + 1)
        gradients: list[torch.Tensor | None] = []
        for x, is_known in zip(tensors, known.tolist()):
            gradients.append(torch.empty_like(x, memory_format=torch.contiguous_format) if is_known else None)
            if is_known:
                dist.recv(gradients[-1], self.rank + 1)
        return gradients

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Before the optimizer: every process gets the gradient of the whole document."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


def _device_of(tensors: list[torch.Tensor | None]) -> torch.device:
    return next((x.device for x in tensors if x is not None), torch.device("cpu"))
