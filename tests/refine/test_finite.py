"""A NaN or an infinity is found wherever it stands, in every dtype."""

from __future__ import annotations

import pytest
import torch

from refine.finite import first_not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_it_is_found_at_every_place(dtype, bad):
    named = {"whole": torch.randn(37, dtype=dtype), "empty": torch.empty(0), "counts": torch.ones(3).long()}
    assert first_not_finite(named) is None
    for place in (0, 500, 1000):
        x = torch.randn(1001, dtype=dtype)
        x[place] = bad
        assert first_not_finite(named | {"x": x, "later": x}) == "x"


def test_large_numbers_are_finite():
    assert first_not_finite({"x": torch.full((1000,), 3e38)}) is None
