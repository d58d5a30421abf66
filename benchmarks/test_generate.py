"""Generation: one more token from a state, beside reading the whole prefix again (the public way with LaCT).

The model of ``step_cost``'s tables after 2,048 tokens, float32, batch 1. Numbers first: both give the same logits.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.conftest import add_ratio
from benchmarks.step_cost import MODELS, model_of_the_table
from benchmarks.timing import paired_ratio
from tests.numerics import assert_close

PROMPT = 2048


@functools.cache
def prepared(name: str):
    model = model_of_the_table(name).eval()
    ids = torch.randint(4096, (1, PROMPT + 1))
    with torch.no_grad():
        state = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def from_state() -> torch.Tensor:
        return model(ids[:, PROMPT:], past_key_values=state, use_cache=True).logits

    @torch.no_grad()
    def from_text() -> torch.Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    assert_close(from_state(), from_text(), 1e-5, "logits")
    return name, from_state, from_text


@pytest.fixture(params=MODELS)
def ready(request):
    return prepared(request.param)


@pytest.mark.benchmark(group=f"one token after {PROMPT}")
@pytest.mark.parametrize("way", ["from the state", "from the text"])
def test_one_token(benchmark, ready, way):
    function = ready[1] if way == "from the state" else ready[2]
    benchmark.pedantic(function, rounds=3, iterations=1, warmup_rounds=1)


def test_from_the_text_over_from_the_state(benchmark, ready, visit):
    model, from_state, from_text = ready
    both, limits = (from_text, from_state), {"budget": 2.5}
    ratio = benchmark.pedantic(paired_ratio, both, limits, rounds=1, iterations=1)
    add_ratio(f"one token from the text, {model}", "from the state", ratio)
