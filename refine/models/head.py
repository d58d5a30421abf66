"""What to compute from the last hidden states, so that logits are never materialised.

The language-model head is the largest matrix of a step. A caller says what it wants of it with one of the
requests below, passes it to the model's ``forward(head=...)``, and gets just that. Going through ``forward``
keeps the head's weight inside the hooks of DDP and FSDP. A request is called with hidden states [B, T, D] and the
head's weight [V, D], where it ``needs_weight`` (see :func:`refine.models.wrapped.head_operands`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refine_kernels import linear_cross_entropy, linear_logprob


@dataclass(frozen=True)
class HiddenOnly:
    """The hidden states are enough; the head is not used."""

    needs_weight: ClassVar[bool] = False

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}


@dataclass(frozen=True)
class NextTokenLoss:
    """``loss`` = sum over positions of ``row_weight * cross-entropy``, and the entropies from the same pass.

    Attributes:
        targets: [B, T] int64, the token that position t predicts; -100 where there is none.
        row_weight: [B, T] float32, the weight of each position's loss.
        entropy: also return ``entropy`` [B, T] float32 (without a gradient).
    """

    targets: torch.Tensor
    row_weight: torch.Tensor
    entropy: bool = True
    needs_weight: ClassVar[bool] = True

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        targets, row_weight = self.targets, self.row_weight
        if (
            not self.entropy and hidden.device.type == "cpu"
        ):  # elsewhere, to count them would wait for the device
            counted = (row_weight != 0) & (targets != -100)
            if 0 < counted.sum() < counted.numel() / 2:
                hidden, targets, row_weight = hidden[counted], targets[counted], row_weight[counted]
        result = linear_cross_entropy(
            hidden,
            weight,
            targets,
            reduction="sum",
            row_weight=row_weight,
            return_entropy=self.entropy,
        )
        return {"loss": result[0], "entropy": result[1]} if self.entropy else {"loss": result}


@dataclass(frozen=True)
class TokenLogprob:
    """``logprob`` [B, T] float32 of ``targets`` [B, T] under softmax(logits / temperature); differentiable.

    Attributes:
        entropy: also return ``entropy`` [B, T] float32 of the same distributions; differentiable too.
    """

    targets: torch.Tensor
    temperature: float = 1.0
    entropy: bool = False
    needs_weight: ClassVar[bool] = True

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        out = linear_logprob(
            hidden, weight, self.targets, temperature=self.temperature, return_entropy=self.entropy
        )
        if not self.entropy:
            return {"logprob": out.logprob}
        return {"logprob": out.logprob, "entropy": out.entropy}


@dataclass(frozen=True)
class SampleToken:
    """``token`` [B, T] int64 drawn from softmax(logits / temperature), one seed a position.

    Temperature 0 takes the most likely token. With ``targets``, ``logprob`` [B, T] is that of the target at
    temperature 1, and the token comes from the same pass.
    """

    seeds: torch.Tensor | None = None  # [B, T] int64; not needed at temperature 0
    temperature: float = 1.0
    targets: torch.Tensor | None = None
    needs_weight: ClassVar[bool] = True

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        seed = 0 if self.seeds is None else self.seeds
        out = linear_logprob(
            hidden, weight, self.targets, temperature=self.temperature, sample=True, seed=seed
        )
        return {"token": out.token, "logprob": out.logprob}


HeadRequest = HiddenOnly | NextTokenLoss | TokenLogprob | SampleToken
