"""Rollouts: 64 branches of 5 tokens at a prefix of 4,096, from kept states and from the text.

The model of ``step_cost``'s tables, float32. Our way goes on from the states of a pass that the step makes
anyway; ``generate`` of transformers, on the same model with its cache, reads each prefix first (timed on two of
the 64 and multiplied). Numbers first: from the same seeds the sampled tokens are the most likely ones that
``generate`` finds.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.conftest import add_ratio
from benchmarks.step_cost import MODELS, model_of_the_table
from benchmarks.timing import paired_ratio
from refine.method.sampling import sample_rollouts
from refine.models.head import HiddenOnly

PREFIX, BRANCHES, LENGTH = 4096, 64, 5


@functools.cache
def prepared(name: str):
    model = model_of_the_table(name).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, 4096, (1, PREFIX + 64))  # 0 is the padding
    with torch.no_grad():
        output = model(ids, use_cache=False, head=HiddenOnly(), state_stride=64)
    positions = PREFIX + torch.arange(BRANCHES) % 64

    @torch.no_grad()
    def ours(temperature: float = 1.0) -> torch.Tensor:
        state = output.trace.gather(torch.zeros(BRANCHES, dtype=torch.int64), positions)
        context = output.last_hidden_state[0, positions - 1]
        seeds = torch.arange(BRANCHES * LENGTH).view(BRANCHES, LENGTH)
        return sample_rollouts(model, state, context, seeds, temperature)

    def generate(row: int) -> torch.Tensor:
        text = ids[:, : positions[row]]
        out = model.generate(text, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        return out[0, -LENGTH:]

    greedy = ours(temperature=0.0)
    for row in (0, 37):
        assert torch.equal(greedy[row], generate(row)), "the two ways disagree: nothing to time"
    return name, ours, generate


@pytest.fixture(params=MODELS)
def ready(request):
    return prepared(request.param)


@pytest.mark.benchmark(group=f"{BRANCHES} rollouts of {LENGTH} at {PREFIX}")
def test_ours(benchmark, ready):
    benchmark.pedantic(ready[1], rounds=3, iterations=1, warmup_rounds=1)


def test_generate_from_the_text_over_ours(benchmark, ready, visit):
    model, ours, generate = ready

    one = functools.partial(generate, 1)
    found = benchmark.pedantic(paired_ratio, (one, ours), {"least": 4, "budget": 3.5}, rounds=1, iterations=1)
    add_ratio(
        f"generate from the text, {model}",
        f"{BRANCHES} rollouts from kept states",
        found,
        "goal: at least 50",
        times=BRANCHES,
    )
