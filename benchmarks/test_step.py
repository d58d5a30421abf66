"""One REFINE step beside one SFT step, and beside the paper's own way of taking it.

T = 8192, c = 8, k = 5, batch 1; DeltaNet hidden 256, 4 layers, 4 heads of 64, vocabulary 4096, float32.
Forward and backward, no optimizer.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import step_cost
from benchmarks.conftest import add_ratio
from benchmarks.timing import paired_ratio

TOKENS = 8192


@pytest.fixture(scope="module")
def steps():
    found = step_cost.steps(TOKENS)
    small = step_cost.steps(1024)
    losses = [small[way]() for way in ("shared_prefix", "per_prefix")]
    assert torch.allclose(*losses, rtol=1e-5), "the two ways disagree: nothing to time"
    return found


@pytest.mark.benchmark(group=f"step, T={TOKENS}, c=8, k=5")
@pytest.mark.parametrize("way", step_cost.WAYS)
def test_step(benchmark, steps, way):
    rounds = 1 if way == "per_prefix" else 3
    benchmark.pedantic(steps[way], rounds=rounds, iterations=1, warmup_rounds=int(way != "per_prefix"))


@pytest.mark.parametrize("chunks", [8, 64])
def test_shared_prefix_over_sft(benchmark, chunks):
    at = step_cost.steps(TOKENS, chunks)
    found = benchmark.pedantic(
        paired_ratio, (at["shared_prefix"], at["sft"]), {"budget": 20}, rounds=1, iterations=1
    )
    goal = "goal: at most 1.15" if chunks == 8 else ""
    add_ratio(f"REFINE step, c={chunks}, k=5, T={TOKENS}", "SFT step", found, goal)


def test_per_prefix_over_sft(benchmark, steps):
    ways = steps["per_prefix"], steps["sft"]
    found = benchmark.pedantic(paired_ratio, ways, {"least": 1, "budget": 0}, rounds=1, iterations=1)
    add_ratio(f"the paper's way, c=8, k=5, T={TOKENS}", "SFT step", found, "counted: 14.7")


def test_memory(benchmark):
    found = benchmark.pedantic(
        lambda: {way: step_cost.peak_memory(way, TOKENS) for way in ("sft", "shared_prefix")},
        rounds=1,
        iterations=1,
    )
    ratio = found["shared_prefix"] / found["sft"]
    add_ratio(f"peak memory of the REFINE step, T={TOKENS}", "SFT step", ratio, "goal: at most 1.25")
