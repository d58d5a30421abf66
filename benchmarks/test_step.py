"""One REFINE step beside one SFT step, and beside full-prefix recomputation.

c = 8, k = 5, batch 1; DeltaNet hidden 256, 4 layers, 4 heads of 64, vocabulary 4096, float32. Forward and
backward, no optimizer. ``python -m benchmarks.step_cost`` has more lengths, positions and models.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import step_cost
from benchmarks.conftest import add_ratio
from benchmarks.timing import paired_ratio, peak_memory

TOKENS = 1024  # of the steps' own group


@functools.cache
def check() -> None:
    """Numbers first: both ways of the step have one loss."""
    small = step_cost.steps(1024)
    losses = [small[way]() for way in ("shared_prefix", "per_prefix")]
    assert torch.allclose(*losses, rtol=1e-5), "the two ways disagree: nothing to time"


@pytest.mark.benchmark(group=f"step, T={TOKENS}, c=8, k=5")
@pytest.mark.parametrize(
    "way", ["sft", "shared_prefix"]
)  # full-prefix recomputation takes turns with SFT below
def test_step(benchmark, way):
    check()
    benchmark.pedantic(step_cost.steps(TOKENS)[way], rounds=3, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize(
    ("way", "tokens", "note"),
    [
        ("shared_prefix", 4096, "goal at T=8192: at most 1.15"),
        ("per_prefix", 1024, "counted: 14.7"),
    ],
)
def test_over_sft(benchmark, way, tokens, note, visit):
    check()
    at = step_cost.steps(tokens)
    at["shared_prefix"]()  # takes what memory both will use
    ways, limits = (at[way], at["sft"]), {"least": 2, "most": 6, "budget": 6, "warm_up": False}
    found = benchmark.pedantic(paired_ratio, ways, limits, rounds=1, iterations=1)
    name = {"shared_prefix": "REFINE step", "per_prefix": "full-prefix recomputation"}[way]
    add_ratio(f"{name}, c=8, k=5, T={tokens}", "SFT step", found, note)


def test_memory(benchmark, tokens=2048):
    at = step_cost.steps(tokens)
    sft, refine = benchmark.pedantic(
        lambda: [peak_memory(at[way]) for way in ("sft", "shared_prefix")], rounds=1, iterations=1
    )
    add_ratio(f"peak memory of the REFINE step, T={tokens}", "SFT step", refine / sft, "goal: at most 1.25")
