"""What a fast-weight model remembers, as one small explicit type.

A *state* is everything a model needs to go on after some tokens: per layer the fast weights and whatever
else the layer carries (convolution inputs, window keys and values), and the number of tokens read. It can be
selected by row (which clones it: states are never written in place), detached, and continued by calling the
model with it. A *trace* is what one forward pass over true sequences leaves behind so that the state at any
(row, position) can be had afterwards, inside the autograd graph.

What a layer's state consists of, and how it is recovered from a trace, is the layer's own business: it
implements the two protocols below. The rest of the project asks through this module alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Protocol

import torch


class LayerState(Protocol):
    """One layer's memory of N sequences."""

    def select(self, rows: torch.Tensor) -> LayerState:
        """The states of ``rows`` [M] (int64), as M states of their own; gradients flow through."""

    def detach(self) -> LayerState:
        """The same state outside the autograd graph."""


class LayerTrace(Protocol):
    """What one layer kept of a forward pass over B sequences of T tokens."""

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> LayerState:
        """The state after the first ``positions`` [M] tokens of sequences ``rows`` [M], inside the graph."""


@dataclass
class FastWeightState:
    """The state of N sequences, ready to be continued.

    Attributes:
        layers: one state a layer.
        position: [N] int64, tokens read by each sequence.

    It also answers the few calls that ``transformers``' generation makes of a cache.
    """

    layers: list[LayerState]
    position: torch.Tensor  # [N]

    def select(self, rows: torch.Tensor) -> FastWeightState:
        """Clone by index: M states that go on independently of one another and of this one."""
        return FastWeightState([layer.select(rows) for layer in self.layers], self.position[rows])

    def detach(self) -> FastWeightState:
        """The same state outside the autograd graph."""
        return FastWeightState([layer.detach() for layer in self.layers], self.position)

    def __len__(self) -> int:
        return self.position.shape[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest sequence read, in tokens (``transformers``' name for it)."""
        return int(self.position.max())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row ``beam_idx[i]``."""
        beam_idx = beam_idx.to(self.position.device, torch.int64)
        self.layers = [layer.select(beam_idx) for layer in self.layers]
        self.position = self.position[beam_idx]


@dataclass
class StateTrace:
    """What a forward pass over B true sequences left behind; :meth:`gather` gives the state at any position.

    Attributes:
        layers: one trace a layer.
        start: [B] int64, tokens that had been read before this pass.
    """

    layers: list[LayerTrace]
    start: torch.Tensor  # [B]

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> FastWeightState:
        """The states after the first ``positions`` [M] tokens of this pass over sequences ``rows`` [M].

        Exact, inside the autograd graph, and free of parameters: no module is called.
        """
        layers = [layer.gather(rows, positions) for layer in self.layers]
        return FastWeightState(layers, self.start[rows] + positions)


def map_state(state, function, leaf: type = torch.Tensor):
    """``function`` of every tensor in a state, and the state made of the results (None and numbers stay).

    ``leaf`` says what stands in a tensor's place, where that is not a tensor.
    """
    if isinstance(state, leaf):
        return function(state)
    if type(state) in (list, tuple):
        return type(state)(map_state(item, function, leaf) for item in state)
    if is_dataclass(state):
        changed = {f.name: map_state(getattr(state, f.name), function, leaf) for f in fields(state)}
        return replace(state, **changed)
    return state


def float_tensors(state) -> list[torch.Tensor]:
    """The tensors of a state that can carry a gradient, in a fixed order."""
    found: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    map_state(state, note)
    return found
