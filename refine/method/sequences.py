"""The sequences of a batch, wherever padding or packing has put them.

A batch is rows of tokens: one sequence a row, padded on either side or both, or several sequences packed one after
the other into a single row. The method speaks of sequences and of positions counted from a sequence's first token;
this module is the one place that knows in which row and column they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class LabelledTokens(NamedTuple):
    """Rows of tokens, and what each position is trained to predict."""

    input_ids: torch.Tensor  # [B, T] int64
    targets: torch.Tensor  # [B, T] int64, -100 where there is none
    row_weight: torch.Tensor  # [B, T] float32, the weight of each position's cross-entropy


@dataclass(frozen=True)
class Sequences:
    """S sequences of a batch. Made by :meth:`of`, which checks what it is given."""

    input_ids: torch.Tensor  # [B, T]: each row begins with its first token, or, packed, [1, T] holds all
    lengths: torch.Tensor  # [S] int64, tokens of each sequence
    cu_seqlens: torch.Tensor | None = None  # [S + 1] int64, where packed sequences begin and end
    left: torch.Tensor | None = None  # [B] int64, columns of padding on the left in the caller's rows
    loss_weight: torch.Tensor | None = None  # [B, T] as input_ids lie, float32; None: the loss is a mean

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
    ) -> Sequences:
        """Find the sequences of a batch.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 1 for tokens, 0 for padding on either side of a row. None: no padding.
            cu_seqlens: [S + 1] int, 0 to T: the row (B = 1) holds S sequences packed one after the other.
            loss_weight: [B, T] float, at least 0: what each token's cross-entropy counts in the next-token loss,
                which is their weighted sum. None: the mean over a sequence's tokens, then over sequences.

        Raises:
            ValueError: a shape that does not fit, a row without tokens or with a hole between tokens, borders of
                packed sequences that do not rise from 0 to T.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
        batch, tokens = input_ids.shape
        if loss_weight is not None:
            loss_weight = _checked_weight(loss_weight, input_ids)
        if cu_seqlens is not None:
            return cls._packed(input_ids, attention_mask, cu_seqlens, loss_weight)
        if attention_mask is None:
            lengths = torch.full((batch,), tokens, device=input_ids.device)
            return cls(input_ids, lengths, loss_weight=loss_weight)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        lengths, left = mask.sum(1), mask.long().argmax(1)
        column = torch.arange(tokens, device=input_ids.device)
        run = (column >= left[:, None]) & (column < (left + lengths)[:, None])
        if not torch.equal(mask, run):
            row = int((mask != run).any(1).nonzero()[0])
            raise ValueError(
                f"attention_mask has a hole in row {row}: the tokens of a row must follow one another, with "
                "padding (0) before or behind them"
            )
        if not bool(left.any()):
            return cls(input_ids, lengths, loss_weight=loss_weight)
        loss_weight = None if loss_weight is None else _rolled(loss_weight, left)
        return cls(_rolled(input_ids, left), lengths, left=left, loss_weight=loss_weight)

    @classmethod
    def _packed(cls, input_ids, attention_mask, cu_seqlens, loss_weight) -> Sequences:
        tokens = input_ids.shape[1]
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens exclude each other: a packed row has no padding")
        borders = torch.as_tensor(cu_seqlens, device=input_ids.device).long()
        fits = borders.ndim == 1 and len(borders) > 1 and len(input_ids) == 1
        if not fits or borders[0] != 0 or borders[-1] != tokens or not bool((borders.diff() > 0).all()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {tokens} tokens of a single row, got {borders.tolist()} for "
                f"input_ids of shape {tuple(input_ids.shape)}"
            )
        return cls(input_ids, borders.diff(), borders, loss_weight=loss_weight)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def places(self) -> dict[str, Any]:
        """What a model's ``forward`` has to be told beside ``input_ids``.

        Padding on the right needs no mask: a causal model reads it last, and nothing looks at what it finds.
        """
        return {} if self.cu_seqlens is None else {"cu_seqlens": self.cu_seqlens}

    def labelled(self) -> LabelledTokens:
        """The next token of each position, and its weight in the loss."""
        padded = self.padded()
        targets, weight = next_token_targets(padded.input_ids, padded.lengths)
        if padded.loss_weight is not None:
            weight = padded.loss_weight.roll(-1, dims=1).masked_fill(targets == -100, 0)
        if self.cu_seqlens is not None:
            targets, weight = self._packed_row(targets), self._packed_row(weight)
        return LabelledTokens(self.input_ids, targets, weight)

    def padded(self) -> Sequences:
        """The same sequences, one a row, padded on the right (with copies of some token)."""
        if self.cu_seqlens is None:
            return self
        weight = None if self.loss_weight is None else self.by_sequence(self.loss_weight)
        return Sequences(self.by_sequence(self.input_ids), self.lengths, loss_weight=weight)

    def packed(self) -> Sequences:
        """The same sequences, one after the other in one row."""
        if self.cu_seqlens is not None:
            return self
        borders = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        weight = None if self.loss_weight is None else self._packed_row(self.loss_weight)
        return Sequences(self._packed_row(self.input_ids), self.lengths, borders, loss_weight=weight)

    def by_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] of the rows -> [S, L, ...] from each sequence's first token on; behind its end, anything."""
        if self.cu_seqlens is None:
            return x
        column = torch.arange(int(self.lengths.max()), device=x.device)
        index = (self.cu_seqlens[:-1, None] + column).clamp_max(x.shape[1] - 1)
        return x[0, index]

    def in_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[S, L, ...] from each sequence's first token on -> [B, T, ...] as the caller's rows lie."""
        if self.cu_seqlens is not None:
            return self._packed_row(x)
        return x if self.left is None else _rolled(x, -self.left)

    def _packed_row(self, x: torch.Tensor) -> torch.Tensor:
        column = torch.arange(x.shape[1], device=x.device)
        return x[column < self.lengths[:, None]][None]

    def take(self, x: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
        """``count`` entries of ``x`` [B, T, ...] from each of ``positions`` [S, c] on: [S, c, count, ...]."""
        index = positions[..., None] + torch.arange(count, device=x.device)
        if self.cu_seqlens is not None:
            return x[0, index + self.cu_seqlens[:-1, None, None]]
        return x[torch.arange(len(x), device=x.device)[:, None, None], index]


def next_token_targets(
    input_ids: torch.Tensor,  # [B, T]
    lengths: torch.Tensor,  # [B]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [B, T] (-100 where there is none) and row weights [B, T] float32 of right-padded rows.

    The weights make the summed loss a mean over each sequence's valid targets, then over sequences. Padding
    never counts.
    """
    batch, tokens = input_ids.shape
    valid = torch.arange(1, tokens + 1, device=input_ids.device) < lengths[:, None]
    targets = input_ids.roll(-1, dims=1).masked_fill(~valid, -100)
    weight = valid / ((lengths - 1).clamp_min(1)[:, None] * batch)
    return targets, weight.float()


def _checked_weight(loss_weight: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    if loss_weight.shape != input_ids.shape:
        raise ValueError(
            f"loss_weight must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(loss_weight.shape)}"
        )
    weight = loss_weight.to(input_ids.device, torch.float32)
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("loss_weight must be finite and at least 0")
    return weight


def _rolled(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Row b of ``x`` [B, T] moved ``shift[b]`` columns to the left, around the end."""
    column = torch.arange(x.shape[1], device=x.device)
    return x.gather(1, (column + shift[:, None]) % x.shape[1])
