"""How far is a tensor from its reference? Shared by every parity test."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """``||actual - reference|| / ||reference||`` in float64; infinite when anything is not finite."""
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)} against {tuple(reference.shape)}"
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - reference.detach().double()).norm()
    error = difference / reference.detach().double().norm().clamp_min(1e-30)
    return float("inf") if not torch.isfinite(error) else error.item()


def assert_close(
    actual: torch.Tensor, reference: torch.Tensor, tolerance: float, name: str = "tensor"
) -> None:
    """Fail unless the relative error is at most ``tolerance``; ``nan`` never passes."""
    error = relative_error(actual, reference)
    assert error <= tolerance, f"{name}: relative error {error:.2e} is over {tolerance:.0e}"
