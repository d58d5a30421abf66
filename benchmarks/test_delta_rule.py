"""The delta rule on a CPU against the PyTorch fallback of transformers (Qwen3-Next), float32.

The ratios are what counts on a shared machine: both take turns in one process, and the median over pairs is
shown at the end. Every timed case first has its numbers checked against the definition, in float64.
"""

from __future__ import annotations

import inspect
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import add_ratio
from refine_kernels import reference
from refine_kernels.delta_rule import chunk_delta_rule
from tests.numerics import assert_close

SHAPES = [(1, 8192, 4, 128), (4, 2048, 16, 64)]  # B, T, H, D
CHECKED = (slice(0, 1), slice(0, 100), slice(0, 2))  # rows, tokens, heads


def ours(q, k, v, beta, g):
    return chunk_delta_rule(q, k, v, beta, g=g, backend="torch")[0]


def transformers(q, k, v, beta, g):
    """The function itself: the name would lead to fla where that is installed."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    function = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    return function(q, k, v, torch.zeros_like(beta) if g is None else g, beta)[0]


def make_inputs(shape, rule):
    b, t, h, d = shape
    q, k, v = torch.randn(b, t, h, d), F.normalize(torch.randn(b, t, h, d), dim=-1), torch.randn(b, t, h, d)
    beta = torch.rand(b, t, h)
    g = F.logsigmoid(torch.randn(b, t, h) + 3) if rule == "gated" else None
    return [x if x is None else x.requires_grad_() for x in (q, k, v, beta, g)], torch.randn_like(v)


def step(provider, inputs, d_o, mode):
    if mode == "forward":
        with torch.no_grad():
            return provider(*inputs), ()
    o = provider(*inputs)
    return o.detach(), torch.autograd.grad(o, [x for x in inputs if x is not None], d_o)


def check(provider, inputs, d_o, mode):
    """The first tokens of one row and two heads, where the definition is still quick."""
    few = [None if x is None else x.detach()[CHECKED].double().requires_grad_() for x in inputs]
    d_few = d_o[CHECKED]
    o, gradients = step(lambda *x: reference.chunk_delta_rule(*x[:4], g=x[4])[0], few, d_few.double(), mode)
    few = [None if x is None else x.detach().float().requires_grad_() for x in few]
    actual, actual_gradients = step(provider, few, d_few, mode)
    assert_close(actual, o, 1e-5, "o")
    for name, x, y in zip("qkvbg", actual_gradients, gradients):
        assert_close(x, y, 1e-5, f"d{name}")


@pytest.mark.parametrize("provider", [ours, transformers], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_time(benchmark, shape, mode, provider):
    inputs, d_o = make_inputs(shape, "gated")
    check(provider, inputs, d_o, mode)
    benchmark.group = f"delta_rule {mode} {shape} gated"
    benchmark.pedantic(step, (provider, inputs, d_o, mode), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("rule", ["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratio(benchmark, shape, rule, pairs=3):
    inputs, d_o = make_inputs(shape, rule)
    for provider in (ours, transformers):
        check(provider, inputs, d_o, "forward_backward")

    def seconds(provider) -> float:
        start = time.perf_counter()
        step(provider, inputs, d_o, "forward_backward")
        return time.perf_counter() - start

    def measure() -> float:
        seconds(ours), seconds(transformers)
        return statistics.median(seconds(transformers) / seconds(ours) for _ in range(pairs))

    ratio = benchmark.pedantic(measure, rounds=1, iterations=1)
    what = f"transformers' fallback, {rule} {shape}"
    add_ratio(what, "chunk_delta_rule, fwd + bwd", ratio, "goal: at least 2")
