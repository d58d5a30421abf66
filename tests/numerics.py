"""How far is a tensor from its reference? Shared by every parity test.

A bound has to hold on any processor, with any number of threads and for any seed. So an error is measured against
the size of what was summed: a tensor against its own norm where nothing cancels in it, gradients against the
gradient as a whole, of which one parameter's may nearly cancel.
"""

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


def assert_gradients_close(
    actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float, name: str = ""
) -> None:
    """Fail unless every parameter's gradient is within ``tolerance`` of the reference.

    The error is taken relative to the larger of the parameter's own gradient and its share of the whole gradient
    (root mean square over all parameters times the root of its size): rounding comes from the whole backward, and
    a gradient that is the small difference of large terms has an error of their size.
    """
    assert actual.keys() == reference.keys()
    count = sum(g.numel() for g in reference.values())
    mean_square = sum(g.double().square().sum().item() for g in reference.values()) / count
    for key, expected in reference.items():
        size = max(expected.double().norm().item(), (mean_square * expected.numel()) ** 0.5)
        error = (actual[key].double() - expected.double()).norm().item() / size
        assert error <= tolerance, f"{name} {key}: error {error:.2e} of the gradient is over {tolerance:.0e}"
