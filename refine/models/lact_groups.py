"""LaCT over packed documents of different lengths: rows of similar length go together.

The window and the chunks of LaCT run over padded rows. Documents are put into groups in which the longest is at
most twice the shortest, so padding at most doubles a pass, however the lengths are spread; there are as many groups
as lengths have binary magnitudes. Each group has a memory of its own; a state of rows of several groups says for
each row which memory it is in, and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from refine.models.lact_state import LaCTLayerState, LaCTTrace
from refine.models.layout import BatchLayout


@dataclass
class LaCTGroups:
    """The state of N rows, each of which is one of a part's."""

    parts: list[LaCTLayerState]
    part: torch.Tensor  # [N] int64, the part that a row is in
    index: torch.Tensor  # [N] int64, its row there

    fixed_size: ClassVar[bool] = True
    graph_capturable: ClassVar[bool] = False

    def select(self, rows: torch.Tensor) -> LaCTGroups:
        """The states of ``rows``, sharing these parts."""
        return LaCTGroups(self.parts, self.part[rows], self.index[rows])

    def detach(self) -> LaCTGroups:
        """The same state outside the autograd graph."""
        return replace(self, parts=[part.detach() for part in self.parts])

    def split(self) -> Iterator[tuple[torch.Tensor, LaCTLayerState]]:
        """(rows [n], their state) for each part that has any."""
        for p, state in enumerate(self.parts):
            rows = (self.part == p).nonzero()[:, 0]
            if len(rows):
                yield rows, state.select(self.index[rows])


@dataclass
class LaCTGroupsTrace:
    """What a pass over packed documents leaves: one trace a group."""

    traces: list[LaCTTrace]
    part: torch.Tensor  # [N] the group of each document
    index: torch.Tensor  # [N] its row there

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> LaCTGroups:
        """The state after the first ``positions`` [M] tokens of documents ``rows`` [M]: places, no copy."""
        parts, order = [], []
        for p, trace in enumerate(self.traces):
            mine = (self.part[rows] == p).nonzero()[:, 0]
            parts.append(trace.gather(self.index[rows[mine]], positions[mine]))
            order.append(mine)
        return LaCTGroups(parts, *places(order))


def places(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(part [N], row there [N]) of every row, where the i-th row of part p is ``rows[p][i]`` of all."""
    count = sum(len(r) for r in rows)
    part, index = rows[0].new_empty(count), rows[0].new_empty(count)
    for p, mine in enumerate(rows):
        part[mine], index[mine] = p, torch.arange(len(mine), device=mine.device)
    return part, index


@dataclass(frozen=True)
class RowGroup:
    """Some documents of a packed row as rows of their own."""

    documents: torch.Tensor  # [n] their numbers
    source: (
        torch.Tensor
    )  # [n, L] each column's token in the packed row; behind a document's end, its last token
    read: torch.Tensor  # [n, L] bool, False behind a document's end

    def rows(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """[1, ..., T, ...] -> [n, ..., L, ...] along ``dim``."""
        x = x.movedim(dim, 1)[0].index_select(0, self.source.flatten())
        return x.unflatten(0, self.source.shape).movedim(1, dim)

    def tokens(self, rows: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The inverse but for the order: [n, ..., L, ...] -> [tokens, ...]."""
        return rows.movedim(dim, 1)[self.read]


def row_groups(layout: BatchLayout) -> list[RowGroup]:
    """The documents of a packed row, in groups of similar length, the shortest first."""
    lengths = layout.document_lengths
    magnitude = torch.frexp(lengths.double()).exponent
    groups = []
    for m in magnitude.unique().tolist():
        documents = (magnitude == m).nonzero()[:, 0]
        column = torch.arange(int(lengths[documents].max()), device=lengths.device)
        read = column < lengths[documents, None]
        source = layout.cu_seqlens[documents, None] + torch.minimum(column, lengths[documents, None] - 1)
        groups.append(RowGroup(documents, source, read))
    return groups


def into_packed(groups: list[RowGroup], rows: list[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """The rows of all groups as one packed row: [1, ..., T, ...] along ``dim``."""
    tokens = torch.cat([group.tokens(x, dim) for group, x in zip(groups, rows)])
    order = torch.cat([group.source[group.read] for group in groups]).argsort()
    return tokens.index_select(0, order)[None].movedim(1, dim)
