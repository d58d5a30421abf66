"""What LaCT remembers: the fast weights of a chunk, and the tokens of a chunk that is still open."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from refine_kernels.lact.layout import Widths


@dataclass
class LaCTWeights:
    """Fast weights, flat (:mod:`refine_kernels.lact.layout`), in float32 (float64 for float64 inputs).

    Attributes:
        applied: ``[..., P]``, what tokens are read with.
        unnormalised: ``[..., P]``, the sum of all updates, with pre-norm; None: ``applied`` is what is updated.
        momentum: ``[..., P]``, or None without momentum.
    """

    applied: torch.Tensor
    unnormalised: torch.Tensor | None = None
    momentum: torch.Tensor | None = None

    @classmethod
    def first(cls, initial: torch.Tensor, prenorm: bool, momentum: bool) -> LaCTWeights:
        """Before any update, from the packed initial weights ``[..., P]``."""
        return cls(initial, initial if prenorm else None, torch.zeros_like(initial) if momentum else None)

    def map(self, function) -> LaCTWeights:
        """``function`` of each tensor there is."""
        return LaCTWeights(*(None if x is None else function(x) for x in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """applied, unnormalised, momentum."""
        return self.applied, self.unnormalised, self.momentum


@dataclass
class LaCTState:
    """Where reading stopped, for N rows that have read equally many tokens; reading goes on exactly.

    The update of a chunk waits for the first token after it, so an open chunk holds 1 to ``chunk_size`` tokens
    (0 before the first).

    Attributes:
        weights: of the open chunk, tensors ``[N, P]``.
        k, v: ``[N, s, dk]`` and ``[N, s, dv]``, the open chunk's.
        lr0, lr1, lr2: ``[N, s, 1]``.
        momentum: ``[N, s, 1]``, the rates of the open chunk's tokens, or None.
        chunk_size, widths: what the state belongs to.
    """

    weights: LaCTWeights
    k: torch.Tensor
    v: torch.Tensor
    lr0: torch.Tensor
    lr1: torch.Tensor
    lr2: torch.Tensor
    momentum: torch.Tensor | None
    chunk_size: int
    widths: Widths

    @property
    def tokens(self) -> int:
        """Tokens of the open chunk, s."""
        return self.k.shape[1]

    def select(self, rows: torch.Tensor) -> LaCTState:
        """The states of ``rows`` [M] (int64): cloned by index, gradients flow through."""
        return self._map(lambda x: x[rows])

    def detach(self) -> LaCTState:
        """The same state outside the autograd graph."""
        return self._map(torch.Tensor.detach)

    def followed_by(self, *tokens: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """k, v, lr0, lr1, lr2, momentum with those of the open chunk before them."""
        before = (self.k, self.v, self.lr0, self.lr1, self.lr2, self.momentum)
        return tuple(
            None if new is None else torch.cat([old.to(new.dtype), new], dim=1)
            for old, new in zip(before, tokens)
        )

    def _map(self, function) -> LaCTState:
        changed = {
            f.name: function(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, weights=self.weights.map(function), **changed)
