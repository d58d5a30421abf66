"""How the three fast-weight matrices of a row lie in memory: one flat vector, so that the state is one tensor.

``[w0 (dh x dk) | w2 (dh x dk) | w1 (dv x dh)]``. w0 and w2 stand together because both multiply the same input:
their stack is one ``[2 dh, dk]`` matrix. Momentum, the sum of an update and its addition are then single
operations over one tensor; only norms look at rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Widths(NamedTuple):
    """Sizes of one row's fast weight: keys, hidden units, values."""

    dk: int
    dh: int
    dv: int

    @property
    def size(self) -> int:
        """Elements of a flat fast weight, P."""
        return self.dh * (2 * self.dk + self.dv)

    @property
    def rows(self) -> int:
        """Rows of the three matrices together, R."""
        return 2 * self.dh + self.dv

    def pack(self, w0: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        """``[..., dh, dk], [..., dv, dh], [..., dh, dk] -> [..., P]``."""
        return torch.cat([w0.flatten(-2), w2.flatten(-2), w1.flatten(-2)], dim=-1)

    def unpack(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[..., P] ->`` views w0 ``[..., dh, dk]``, w1 ``[..., dv, dh]``, w2 ``[..., dh, dk]``."""
        w02, w1 = self.stacked(flat)
        return w02[..., : self.dh, :], w1, w02[..., self.dh :, :]

    def stacked(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[..., P] ->`` views of w0 above w2 ``[..., 2 dh, dk]`` and of w1 ``[..., dv, dh]``."""
        split = 2 * self.dh * self.dk
        w02 = flat[..., :split].unflatten(-1, (2 * self.dh, self.dk))
        return w02, flat[..., split:].unflatten(-1, (self.dv, self.dh))

    def batches(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """``[..., P] ->`` views that hold the matrices of one shape each: ``[..., 3, D, D]`` if all are square,
        else w0 and w2 ``[..., 2, dh, dk]`` and w1 ``[..., 1, dv, dh]``."""
        if self.dk == self.dh == self.dv:
            return [flat.unflatten(-1, (3, self.dh, self.dk))]
        w02, w1 = self.stacked(flat)
        return [w02.unflatten(-2, (2, self.dh)), w1.unsqueeze(-3)]

    def from_batches(self, batches: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`batches`: ``[..., P]``."""
        flat = [x.flatten(-3) for x in batches]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def row_norms(self, flat: torch.Tensor) -> torch.Tensor:
        """``[..., P] -> [..., R]``: the l2 norm of every row, in the order of the layout."""
        w02, w1 = self.stacked(flat)
        return torch.cat([w02.norm(dim=-1), w1.norm(dim=-1)], dim=-1)

    def row_dots(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``[..., P], [..., P] -> [..., R]``: the inner product of every row of a with its row of b."""
        w02, w1 = self.stacked(a * b)
        return torch.cat([w02.sum(-1), w1.sum(-1)], dim=-1)

    def scale_rows(self, flat: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """``[..., P], [..., R] -> [..., P]``: every row times its factor."""
        w02, w1 = self.stacked(flat)
        f02, f1 = factor[..., : 2 * self.dh, None], factor[..., 2 * self.dh :, None]
        return torch.cat([(w02 * f02).flatten(-2), (w1 * f1).flatten(-2)], dim=-1)

    def scale_rows_(self, flat: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """:meth:`scale_rows` in place."""
        w02, w1 = self.stacked(flat)
        w02 *= factor[..., : 2 * self.dh, None]
        w1 *= factor[..., 2 * self.dh :, None]
        return flat


def widths_of(w0: torch.Tensor, w1: torch.Tensor) -> Widths:
    """The widths of ``w0 [..., dh, dk]`` and ``w1 [..., dv, dh]``."""
    return Widths(w0.shape[-1], w0.shape[-2], w1.shape[-2])


def count_entries(tokens: int, chunk_size: int) -> int:
    """Fast weights that ``tokens`` tokens from a chunk's start are read with: chunks, the last one perhaps open."""
    return max(1, -(-tokens // chunk_size))
