"""The fused head as modules, for models that want one: a weight, and the settings of a function."""

from __future__ import annotations

import torch
from torch import nn

from refine_kernels.linear_logprob.op import linear_cross_entropy, linear_logprob
from refine_kernels.linear_logprob.reference import LinearLogprobOutput


class _Head(nn.Linear):
    """A linear head ``[V, D]`` whose forward takes settings with it; the state is that of ``nn.Linear``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.settings = settings

    @classmethod
    def tied_to(cls, head: nn.Linear, **settings) -> _Head:
        """One that shares the weight and bias of ``head``."""
        tied = cls(head.in_features, head.out_features, head.bias is not None, device="meta", **settings)
        tied.weight, tied.bias = head.weight, head.bias
        return tied

    def extra_repr(self) -> str:
        return ", ".join(
            [super().extra_repr(), *(f"{name}={value}" for name, value in self.settings.items())]
        )


class LinearLogprob(_Head):
    """:func:`refine_kernels.linear_logprob` with a weight of its own.

    Args:
        in_features: hidden size D.
        out_features: vocabulary V.
        bias: whether the head has one.
        settings: keyword arguments of ``linear_logprob`` (temperature, return_entropy, sample, ...).
    """

    def forward(
        self,
        x: torch.Tensor,  # [..., D]
        target: torch.Tensor | None = None,  # [...]
        **settings,
    ) -> LinearLogprobOutput:
        """Settings given here come before those of the module. Errors are those of ``linear_logprob``."""
        return linear_logprob(x, self.weight, target, bias=self.bias, **{**self.settings, **settings})


class LinearCrossEntropy(_Head):
    """:func:`refine_kernels.linear_cross_entropy` with a weight of its own.

    Args:
        in_features: hidden size D.
        out_features: vocabulary V.
        bias: whether the head has one.
        settings: keyword arguments of ``linear_cross_entropy`` (reduction, ignore_index, return_entropy, ...).
    """

    def forward(
        self,
        x: torch.Tensor,  # [..., D]
        target: torch.Tensor,  # [...]
        **settings,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Settings given here come before those of the module. Errors are those of ``linear_cross_entropy``."""
        return linear_cross_entropy(x, self.weight, target, bias=self.bias, **{**self.settings, **settings})
