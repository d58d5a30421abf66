"""What a full-attention layer remembers, and how branches share it.

Keys and values of P sequences lie in blocks, one after the other; column j holds the token at position j. A state
is a place in them: a row, the number of its tokens read, and the few tokens read since, which the state owns. So a
branch copies nothing of the prefix: it owns 2 G d numbers per token and layer (G key/value heads of size d), five
tokens of Qwen3.5-0.8B 123 kB over its six attention layers in float32.

Blocks are never written and never joined to longer ones while they are long: states at several places of one
document share them, which keeps the memory of a document read in segments linear in its length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

MAX_OWN_TOKENS = 64  # more than these become part of the blocks
_SHORT_BLOCK = 1024  # shorter blocks at the end are joined, so that decoding does not leave many


@dataclass
class AttentionState:
    """N places in the keys and values of P sequences. ``select`` shares them; continuing never writes them."""

    keys: tuple[torch.Tensor, ...]  # blocks [P, G, L_i, d], rotated
    values: tuple[torch.Tensor, ...]  # blocks [P, G, L_i, d]
    rows: torch.Tensor | None = None  # [N] each state's sequence; None: N = P, in order
    read: torch.Tensor | None = None  # [N] tokens of the blocks that were read; None: all
    own_k: torch.Tensor | None = None  # [N, G, S, d], read since
    own_v: torch.Tensor | None = None  # [N, G, S, d]

    fixed_size: ClassVar[bool] = False
    graph_capturable: ClassVar[bool] = False  # rows are grouped by their sequence, whose number is data

    def select(self, rows: torch.Tensor) -> AttentionState:
        """The states of ``rows``, sharing this one's blocks."""
        return replace(
            self,
            rows=rows if self.rows is None else self.rows[rows],
            read=None if self.read is None else self.read[rows],
            own_k=None if self.own_k is None else self.own_k[rows],
            own_v=None if self.own_v is None else self.own_v[rows],
        )

    def detach(self) -> AttentionState:
        """The same state outside the autograd graph."""
        return replace(
            self,
            keys=tuple(k.detach() for k in self.keys),
            values=tuple(v.detach() for v in self.values),
            own_k=None if self.own_k is None else self.own_k.detach(),
            own_v=None if self.own_v is None else self.own_v.detach(),
        )

    @property
    def own_tokens(self) -> int:
        """Tokens that each row owns."""
        return 0 if self.own_k is None else self.own_k.shape[2]

    @property
    def bytes_owned(self) -> int:
        """Memory that belongs to these N states and not to the sequences that they branch from."""
        return sum(x.numel() * x.element_size() for x in (self.own_k, self.own_v) if x is not None)

    @property
    def columns(self) -> int:
        """Tokens that the blocks hold."""
        return sum(k.shape[2] for k in self.keys)

    def position(self) -> torch.Tensor:
        """[N] tokens read, own ones included ([1] where all rows have read equally many)."""
        device = self.keys[0].device
        read = torch.tensor([self.columns], device=device) if self.read is None else self.read
        return read + self.own_tokens

    def with_own(
        self,
        k: torch.Tensor,  # [N, G, T, d]
        v: torch.Tensor,  # [N, G, T, d]
    ) -> AttentionState:
        """T more tokens of every row, owned by the states."""
        if self.own_k is None:
            return replace(self, own_k=k, own_v=v)
        return replace(self, own_k=torch.cat([self.own_k, k], 2), own_v=torch.cat([self.own_v, v], 2))

    def settle(self, read: torch.Tensor | None = None) -> AttentionState:
        """The same states with all their tokens in blocks, and none of their own.

        Rows that have read all of their sequence's blocks go on in them: the blocks stay as they are and the own
        tokens become one more. Other rows get a copy of what they have read.

        Args:
            read: [N] how many tokens of each row, own ones included, count; default: all.
        """
        if self.own_k is None and read is None:
            return self
        if self.rows is None and self.read is None:
            keys, values = _appended(self.keys, self.own_k), _appended(self.values, self.own_v)
            return AttentionState(keys, values, None, read)
        position = self.position()
        columns = torch.arange(int(position.max()), device=position.device)
        own = columns >= self.read[:, None] if self.read is not None else (columns >= self.columns)[None]
        left = self.columns if self.read is None else self.read[:, None]
        index = torch.where(own, self.columns + columns - left, columns)  # [N, L]
        index = index.clamp_max(self.columns + self.own_tokens - 1)

        def compact(blocks: tuple[torch.Tensor, ...], mine: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            table = torch.cat(blocks, 2)
            table = table if self.rows is None else table[self.rows]
            everything = table if mine is None else torch.cat([table, mine], 2)
            at = index[:, None, :, None].expand(len(everything), everything.shape[1], -1, everything.shape[3])
            return (everything.gather(2, at),)

        ends = position.expand(len(index)) if read is None else read
        if read is None and bool((ends == ends[0]).all()):
            ends = None
        return AttentionState(compact(self.keys, self.own_k), compact(self.values, self.own_v), None, ends)


def _appended(blocks: tuple[torch.Tensor, ...], more: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    if more is None:
        return blocks
    if blocks and blocks[-1].shape[2] < _SHORT_BLOCK:
        return *blocks[:-1], torch.cat([blocks[-1], more], 2)
    return *blocks, more


@dataclass
class AttentionTrace:
    """What a layer keeps of a pass over N true sequences: all of it is alive for the backward anyway."""

    keys: tuple[torch.Tensor, ...]  # blocks [N, G, L_i, d], what was read before the pass included
    values: tuple[torch.Tensor, ...]
    start: torch.Tensor  # [N] tokens that had been read before the pass

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> AttentionState:
        """The state after the first ``positions`` [M] tokens of sequences ``rows`` [M]: a place, no copy."""
        return AttentionState(self.keys, self.values, rows, self.start[rows] + positions)
