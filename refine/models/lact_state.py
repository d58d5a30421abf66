"""What a LaCT layer remembers, and how branches share it.

A layer's *memory* of P sequences is columns of tokens (window keys and values, fast keys, values and rates) and
the fast weights of every chunk that they cover. A *state* is a place in a memory: a row, the number of tokens read
of it, and the few tokens that have been read since, which it owns. So a branch copies nothing: it applies the
weights of its chunk and reads its parent's keys in place. What a branch owns is 4 d + 4 H numbers a token and
layer (d the hidden size, H fast-weight heads): at 760M five tokens are 1.5 MB in bfloat16, 3 MB in float32.

Only a branch that crosses a chunk's end gets fast weights of its own (and momentum): 7 MB each a layer at 760M.
The update waits for the first token behind the chunk, as in the full forward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from refine.models.window_attention import branch_attention, into_groups, out_of_groups, place_in_groups
from refine_kernels.lact import LaCTWeights, Widths, lact_apply, lact_scan

MAX_OWN_TOKENS = 64  # a state that owns more is settled into a memory of its own


@dataclass
class LaCTTokens:
    """What a layer keeps of T tokens of each of N sequences."""

    keys: torch.Tensor  # [N, T, heads, head_dim], of the window attention, rotated
    values: torch.Tensor  # [N, T, heads, head_dim]
    fast_k: torch.Tensor  # [N, H, T, D]
    fast_v: torch.Tensor  # [N, H, T, D]
    rates: torch.Tensor  # [N, H, T, 3 or 4] float32: lr0, lr1, lr2 and, with momentum, its rate

    def map(self, function) -> LaCTTokens:
        """``function(tensor, dimension of the tokens)`` of each tensor."""
        return LaCTTokens(*(function(getattr(self, f.name), _token_dim(f.name)) for f in fields(self)))

    def then(self, other: LaCTTokens) -> LaCTTokens:
        """These tokens and then those."""
        pairs = ((getattr(self, f.name), getattr(other, f.name), _token_dim(f.name)) for f in fields(self))
        return LaCTTokens(*(torch.cat([a, b], dim) for a, b, dim in pairs))

    def __len__(self) -> int:
        return self.keys.shape[1]


def _token_dim(name: str) -> int:
    return 1 if name in ("keys", "values") else 2


@dataclass(frozen=True)
class LaCTSettings:
    """What a layer's states have in common."""

    widths: Widths
    chunk_size: int
    window: int
    use_muon: bool

    @property
    def max_own_tokens(self) -> int:
        """Few enough that a branch crosses at most one chunk's end."""
        return min(MAX_OWN_TOKENS, self.chunk_size)


@dataclass
class LaCTMemory:
    """Columns of P sequences, and the fast weights of the chunks that they cover.

    The fast columns begin at a chunk's start; the window's columns may begin elsewhere.
    """

    tokens: LaCTTokens  # keys, values: [P, L, ...]; fast: [P, H, F, ...]
    weights: LaCTWeights  # [P H, S, size]
    norms: torch.Tensor  # [H, R], rows of the initial weights
    window_origin: torch.Tensor  # [P] position of the first key
    chunk_origin: torch.Tensor  # [P] position of the first fast column, a multiple of the chunk size

    def detach(self) -> LaCTMemory:
        """The same memory outside the autograd graph."""
        tokens = self.tokens.map(lambda x, _: x.detach())
        return replace(
            self, tokens=tokens, weights=self.weights.map(torch.Tensor.detach), norms=self.norms.detach()
        )


@dataclass
class LaCTLayerState:
    """N places in a memory. ``select`` shares it; continuing never writes it."""

    memory: LaCTMemory
    settings: LaCTSettings
    rows: torch.Tensor | None  # [N] row of the memory; None: N = P, in order
    position: torch.Tensor  # [N] tokens read, own ones included
    own: LaCTTokens | None = None  # [N, s, ...], read since the state left its memory
    crossed: LaCTWeights | None = None  # [M, H, size], of the rows that have passed a chunk's end since
    crossed_slot: torch.Tensor | None = None  # [N] index into ``crossed``, -1: none

    fixed_size: ClassVar[bool] = True  # a window and an open chunk at most
    graph_capturable: ClassVar[bool] = False  # it looks which rows cross a chunk's end

    def select(self, rows: torch.Tensor) -> LaCTLayerState:
        """The states of ``rows``, sharing this one's memory."""
        return replace(
            self,
            rows=rows if self.rows is None else self.rows[rows],
            position=self.position[rows],
            own=None if self.own is None else self.own.map(lambda x, _: x[rows]),
            crossed_slot=None if self.crossed_slot is None else self.crossed_slot[rows],
        )

    def detach(self) -> LaCTLayerState:
        """The same state outside the autograd graph."""
        return replace(
            self,
            memory=self.memory.detach(),
            own=None if self.own is None else self.own.map(lambda x, _: x.detach()),
            crossed=None if self.crossed is None else self.crossed.map(torch.Tensor.detach),
        )

    @property
    def own_tokens(self) -> int:
        """Tokens that each row owns."""
        return 0 if self.own is None else len(self.own)

    @property
    def bytes_owned(self) -> int:
        """Memory that belongs to these N states and not to their parents."""
        tensors = [] if self.own is None else [getattr(self.own, f.name) for f in fields(self.own)]
        if self.crossed is not None:
            tensors += [x for x in self.crossed.tensors() if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    def _row(self) -> torch.Tensor:
        if self.rows is not None:
            return self.rows
        return torch.arange(len(self.position), device=self.position.device)

    def _entry(self) -> torch.Tensor:
        """[N] the chunk, counted from the memory's first, whose weights a row reads until it crosses."""
        left = self.position - self.own_tokens - self.memory.chunk_origin[self._row()]
        return (left // self.settings.chunk_size).clamp_max(self.memory.weights.applied.shape[1] - 1)

    # ---- a few more tokens ---------------------------------------------------------------------------------

    def read(
        self,
        q: torch.Tensor,  # [N, T, heads, head_dim]
        fast_q: torch.Tensor,  # [N, H, T, D]
        new: LaCTTokens,  # [N, T, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, LaCTLayerState]:
        """T more tokens of every row, all that it owns together at most ``max_own_tokens``.

        Returns:
            The attention's output [N, T, heads, head_dim], the fast weights' [N, H, T, D], the state after.
        """
        memory, tokens = self.memory, q.shape[1]
        own = new if self.own is None else self.own.then(new)
        attended = branch_attention(
            q, memory.tokens.keys, memory.tokens.values, memory.window_origin, self.rows,
            self.position - self.own_tokens, own.keys, own.values, self.settings.window,
        )  # fmt: skip
        entry = self._entry()
        after = replace(self, position=self.position + tokens, own=own)
        border = memory.chunk_origin[self._row()] + (entry + 1) * self.settings.chunk_size  # [N]
        crossing = after.position > border
        o = self._apply_shared(fast_q, entry)
        if bool(crossing.any()):
            after._cross(crossing, entry)
            o = self._apply_crossed(o, fast_q, after, crossing, border)
        return attended, o, after

    def _apply_shared(self, fast_q: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """Every query with the weights of its row's chunk: rows of one chunk share one product."""
        stack = self.memory.weights.applied
        parents, entries, heads = len(self.memory.window_origin), stack.shape[1], fast_q.shape[1]
        if self.rows is None and entries == 1:
            place, width = None, 1
        else:
            place, width = place_in_groups(self._row() * entries + entry, parents * entries, len(fast_q))
        table = into_groups(fast_q, place, parents * entries, width)  # [P S, m, H, T, D]
        table = table.unflatten(0, (parents, entries)).permute(0, 3, 1, 2, 4, 5)  # [P, H, S, m, T, D]
        run = width * fast_q.shape[2]
        o = lact_apply(
            stack,
            table.reshape(parents * heads, entries * run, -1),
            widths=self.settings.widths,
            chunk_size=run,
        )
        o = o.view(parents, heads, entries, width, fast_q.shape[2], -1).permute(0, 2, 3, 1, 4, 5)
        return out_of_groups(o.flatten(0, 1), place)

    def _cross(self, crossing: torch.Tensor, entry: torch.Tensor) -> None:
        """Update the weights of rows that have passed a chunk's end and have not been updated yet."""
        if self.crossed_slot is None:
            self.crossed_slot = torch.full_like(self.position, -1)
        rows = (crossing & (self.crossed_slot < 0)).nonzero()[:, 0]  # [M]
        if not len(rows):
            return
        chunk, heads = self.settings.chunk_size, self.memory.norms.shape[0]
        start = self.memory.chunk_origin[self._row()[rows]] + entry[rows] * chunk
        closed = self._columns(rows, start, chunk, window=False)
        weights = self._shared_weights(rows, entry).map(lambda x: x.flatten(0, 1))
        rates = closed.rates.flatten(0, 1).split(1, dim=-1)
        updated = lact_scan(
            weights, self.memory.norms.repeat(len(rows), 1), closed.fast_k.flatten(0, 1),
            closed.fast_v.flatten(0, 1), *rates, widths=self.settings.widths, chunk_size=chunk, updates=1,
            use_muon=self.settings.use_muon,
        ).map(lambda x: x[:, 1].unflatten(0, (-1, heads)))  # fmt: skip
        before = 0 if self.crossed is None else len(self.crossed.applied)
        if self.crossed is not None:
            pairs = zip(self.crossed.tensors(), updated.tensors())
            updated = LaCTWeights(*(None if a is None else torch.cat([a, b]) for a, b in pairs))
        self.crossed = updated
        slots = torch.arange(before, before + len(rows), device=rows.device)
        self.crossed_slot = self.crossed_slot.index_copy(0, rows, slots)

    def _apply_crossed(self, o, fast_q, after, crossing, border) -> torch.Tensor:
        """Replace the outputs of tokens behind a chunk's end."""
        rows = crossing.nonzero()[:, 0]
        heads, tokens = fast_q.shape[1:3]
        weights = after.crossed.applied[after.crossed_slot[rows]].flatten(0, 1)[:, None]
        fresh = lact_apply(
            weights, fast_q[rows].flatten(0, 1), widths=self.settings.widths, chunk_size=tokens
        ).unflatten(0, (-1, heads))
        position = self.position[rows, None] + torch.arange(tokens, device=o.device)
        behind = (position >= border[rows, None])[:, None, :, None]
        return o.index_copy(0, rows, torch.where(behind, fresh, o[rows]))

    # ---- a memory of its own -------------------------------------------------------------------------------

    def settle(self) -> LaCTLayerState:
        """The same N states in a memory of their own that holds no more than they need.

        Rows that have read differently many tokens get columns for the longest; what a row does not need of
        them is never read.
        """
        chunk, window = self.settings.chunk_size, self.settings.window
        rows = torch.arange(len(self.position), device=self.position.device)
        longest = int(self.position.max())
        entry = self._entry()
        start = self.memory.chunk_origin[self._row()] + entry * chunk
        if self.crossed_slot is not None:
            start = start + (self.crossed_slot >= 0) * chunk
        weights = self._shared_weights(rows, entry)
        if self.crossed_slot is not None and bool((mine := self.crossed_slot >= 0).any()):
            pairs = zip(weights.tensors(), self.crossed.tensors())
            weights = LaCTWeights(
                *(
                    None if a is None else a.index_copy(0, rows[mine], b[self.crossed_slot[mine]])
                    for a, b in pairs
                )
            )
        kept = min(longest, window - 1)
        origin = self.position - kept
        seen = self._columns(rows, origin, kept, fast=False)
        opened = self._columns(rows, start, int((self.position - start).max()), window=False)
        memory = LaCTMemory(
            LaCTTokens(seen.keys, seen.values, opened.fast_k, opened.fast_v, opened.rates),
            weights.map(lambda x: x.flatten(0, 1)[:, None]),
            self.memory.norms,
            origin,
            start,
        )
        return LaCTLayerState(memory, self.settings, None, self.position)

    def _shared_weights(self, rows: torch.Tensor, entry: torch.Tensor) -> LaCTWeights:
        """[M, H, size]: those of the chunks that ``rows`` left the memory in."""
        heads = self.memory.norms.shape[0]
        parent, entry = self._row()[rows], entry[rows]
        return self.memory.weights.map(lambda x: x.unflatten(0, (-1, heads))[parent, :, entry])

    def _columns(
        self, rows: torch.Tensor, start: torch.Tensor, count: int, *, window: bool = True, fast: bool = True
    ) -> LaCTTokens:
        """Tokens ``start .. start + count`` of ``rows``, from the memory and then from what they own.

        Columns outside what is there repeat some other token; empty tensors for the kind not asked for.
        """
        parent = self._row()[rows]
        left = (self.position - self.own_tokens)[rows, None]  # [M, 1]
        token = start[:, None] + torch.arange(count, device=rows.device)  # [M, count]

        def take(table: torch.Tensor, row: torch.Tensor, column: torch.Tensor, dim: int) -> torch.Tensor:
            table = table.movedim(dim, 1)
            column = column.clamp(0, table.shape[1] - 1)
            return table[row[:, None], column].movedim(1, dim)

        def gather(name: str) -> torch.Tensor:
            dim = _token_dim(name)
            table = getattr(self.memory.tokens, name)
            if not (window if dim == 1 else fast):
                return table.new_empty(0)
            origin = self.memory.window_origin if dim == 1 else self.memory.chunk_origin
            own = None if self.own is None else getattr(self.own, name)
            if own is not None:
                recent = take(own, rows, token - left, dim)
                if not table.shape[dim]:  # a memory without tokens: everything read is the row's own
                    return recent
            old = take(table, parent, token - origin[parent, None], dim)
            if own is None:
                return old
            mine = (token >= left).view(len(rows), *(1,) * (dim - 1), count, *(1,) * (old.ndim - dim - 1))
            return torch.where(mine, recent, old)

        return LaCTTokens(*(gather(f.name) for f in fields(LaCTTokens)))


@dataclass
class LaCTTrace:
    """What a layer keeps of a pass over true sequences: all of it is alive for the backward anyway."""

    memory: LaCTMemory
    settings: LaCTSettings
    start: torch.Tensor  # [B] tokens that had been read before the pass

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> LaCTLayerState:
        """The state after the first ``positions`` [M] tokens of sequences ``rows`` [M]: a place, no copy."""
        return LaCTLayerState(self.memory, self.settings, rows, self.start[rows] + positions)
