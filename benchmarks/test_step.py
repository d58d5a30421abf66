"""One REFINE step beside one SFT step, and beside the paper's own way of taking it.

c = 8, k = 5, batch 1; DeltaNet hidden 256, 4 layers, 4 heads of 64, vocabulary 4096, float32. Forward and
backward, no optimizer. ``python -m benchmarks.step_cost`` has more lengths, positions and models.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import step_cost
from benchmarks.conftest import add_ratio
from benchmarks.timing import paired_ratio

TOKENS = 4096
LONG = 8192  # where the goal was set


@pytest.fixture(scope="module")
def steps():
    found = step_cost.steps(TOKENS)
    small = step_cost.steps(1024)
    losses = [small[way]() for way in ("shared_prefix", "per_prefix")]
    assert torch.allclose(*losses, rtol=1e-5), "the two ways disagree: nothing to time"
    return found


@pytest.mark.benchmark(group=f"step, T={TOKENS}, c=8, k=5")
@pytest.mark.parametrize("way", ["sft", "shared_prefix"])  # the paper's way is timed once, below
def test_step(benchmark, steps, way):
    benchmark.pedantic(steps[way], rounds=3, iterations=1, warmup_rounds=1)


@pytest.mark.parametrize(("chunks", "tokens"), [(8, LONG), (64, TOKENS)])
def test_shared_prefix_over_sft(benchmark, chunks, tokens):
    at = step_cost.steps(tokens, chunks)
    ways, limits = (at["shared_prefix"], at["sft"]), {"budget": 20}
    found = benchmark.pedantic(paired_ratio, ways, limits, rounds=1, iterations=1)
    goal = "goal: at most 1.15" if chunks == 8 else ""
    add_ratio(f"REFINE step, c={chunks}, k=5, T={tokens}", "SFT step", found, goal)


def test_per_prefix_over_sft(benchmark, steps):
    ways, limits = (steps["per_prefix"], steps["sft"]), {"least": 2, "most": 2, "warm_up": False}
    found = benchmark.pedantic(paired_ratio, ways, limits, rounds=1, iterations=1)
    add_ratio(f"the paper's way, c=8, k=5, T={TOKENS}", "SFT step", found, "counted: 14.7")


def test_memory(benchmark):
    ways = ("sft", "shared_prefix")
    found = benchmark.pedantic(
        lambda: {way: step_cost.peak_memory(way, LONG) for way in ways}, rounds=1, iterations=1
    )
    ratio = found["shared_prefix"] / found["sft"]
    add_ratio(f"peak memory of the REFINE step, T={LONG}", "SFT step", ratio, "goal: at most 1.25")
