"""What a fast-weight model remembers, as one small explicit type.

A *state* is everything a model needs to go on after some tokens: per layer the fast weights and whatever
else the layer carries (convolution inputs, window keys and values), and the number of tokens read. It can be
selected by row (which clones it: states are never written in place), detached, and continued by calling the
model with it. A *trace* is what one forward pass over true sequences leaves behind, so that the state at any
(row, position) can be recovered afterwards, inside the autograd graph.

What a layer's state consists of, and how it is recovered from a trace, is the layer's own matter: it
implements the two protocols below. The rest of the project goes through this module alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import ClassVar, Protocol

import torch
from transformers.cache_utils import Cache

from refine.models.layout import BatchLayout


class LayerState(Protocol):
    """One layer's memory of N sequences.

    Attributes:
        fixed_size: its size does not depend on the tokens read.
        graph_capturable: what a continuation does depends on shapes alone, so that a CUDA graph can repeat it.
    """

    fixed_size: ClassVar[bool]
    graph_capturable: ClassVar[bool]

    def select(self, rows: torch.Tensor) -> LayerState:
        """The states of ``rows`` [M] (int64), as M states of their own; gradients flow through."""

    def detach(self) -> LayerState:
        """The same state outside the autograd graph."""


class LayerTrace(Protocol):
    """What one layer kept of a forward pass over B sequences of T tokens."""

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> LayerState:
        """The state after the first ``positions`` [M] tokens of sequences ``rows`` [M], inside the graph."""


@dataclass
class FastWeightState(Cache):
    """The state of N sequences, ready to be continued: a ``transformers`` cache that is never written in place.

    A forward pass returns a new state, and leaves the one that it was given as it is. ``FastWeightState()`` has
    read nothing yet and fits any number of sequences.

    Attributes:
        layers: one state a layer; empty when nothing has been read.
        position: [N] int64, tokens read by each sequence.
        padding: [N] int64, columns of the batch that were padding to each sequence; None: none.
    """

    layers: list[LayerState] = field(default_factory=list)
    position: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [N]
    padding: torch.Tensor | None = None  # [N]

    def __post_init__(self):
        # set here and not by Cache.__init__, which is made for layers that are written in place
        self.layer_class_to_replicate, self.offloading = None, False

    @property
    def started(self) -> bool:
        """Whether anything has been read."""
        return len(self.layers) > 0

    @property
    def fixed_size(self) -> bool:
        """Whether no layer grows with the tokens read."""
        return all(layer.fixed_size for layer in self.layers)

    @property
    def graph_capturable(self) -> bool:
        """Whether every layer's continuation depends on shapes alone."""
        return all(layer.graph_capturable for layer in self.layers)

    def select(self, rows: torch.Tensor) -> FastWeightState:
        """Clone by index: M states that go on independently of one another and of this one."""
        padding = None if self.padding is None else self.padding[rows]
        return FastWeightState([layer.select(rows) for layer in self.layers], self.position[rows], padding)

    def detach(self) -> FastWeightState:
        """The same state outside the autograd graph."""
        return FastWeightState([layer.detach() for layer in self.layers], self.position, self.padding)

    def __len__(self) -> int:
        """Sequences, N."""
        return self.position.shape[0]

    # ---- what ``transformers`` asks of a cache -------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that have been read, padding included."""
        if not len(self):
            return 0
        return int((self.position if self.padding is None else self.position + self.padding).max())

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before anything has been read."""
        return len(self) or -1

    @property
    def is_compileable(self) -> bool:
        """False: every pass returns a new state."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: tokens read into a fast weight cannot be taken out again."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """No layer is a plain sliding window."""
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        """False for all: a state knows how many tokens it has read, so that what follows can be cut off."""
        return [False] * max(1, len(self.layers))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything has been read."""
        return self.started

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i goes on from row ``beam_idx[i]``."""
        if self.started:
            new = self.select(beam_idx.to(self.position.device, torch.int64))
            self.layers, self.position, self.padding = new.layers, new.position, new.padding

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.reorder_cache(torch.arange(len(self)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self.layers, self.position, self.padding = [], self.position[:0], None

    def crop(self, tokens_to_remove: int) -> None:
        """Only 0 tokens can be removed.

        Raises:
            ValueError: tokens are to be taken out of a fast weight.
        """
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove must be 0: a fast-weight state cannot be cut, got {tokens_to_remove}"
            )


def check_state(
    state: FastWeightState | None,
    layers: int,
    rows: torch.Tensor,  # [B, T, ...], what the layers are about to read
    layout: BatchLayout,
) -> None:
    """Whether ``rows`` can go on from ``state``.

    Raises:
        ValueError: it is of another number of sequences, or of another model.
    """
    if state is None:
        return
    count = len(layout.document_lengths) if layout.packed else rows.shape[0]
    if len(state) != count:
        raise ValueError(f"past_key_values holds {len(state)} sequences, but {count} are to go on from it")
    if len(state.layers) != layers:
        raise ValueError(
            f"past_key_values is the state of {len(state.layers)} layers, but there are {layers}"
        )


def position_before(
    state: FastWeightState | None, rows: torch.Tensor, layout: BatchLayout
) -> torch.Tensor:  # [N] int64
    """Tokens that each sequence had read before a pass over ``rows``."""
    return torch.zeros_like(layout.tokens_read(rows)) if state is None else state.position


def state_after(
    state: FastWeightState | None, layers: list[LayerState], rows: torch.Tensor, layout: BatchLayout
) -> FastWeightState:
    """The state after a pass over ``rows``, of its layers' new states."""
    read = layout.tokens_read(rows)
    padding = None if state is None else state.padding
    if layout.lengths is not None:
        new = rows.shape[1] - read
        padding = new if padding is None else padding + new
    return FastWeightState(layers, position_before(state, rows, layout) + read, padding)


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

        Of a packed batch, rows are the numbers of documents, and positions count from a document's first token.
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
    tensors: list[torch.Tensor] = []

    def collect(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            tensors.append(x)
        return x

    map_state(state, collect)
    return tensors
