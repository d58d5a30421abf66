"""The delta rule beside fla, fla's fallback in transformers (Qwen3-Next) and the definition in plain PyTorch.

The ratios are what counts on a shared machine: two take turns in one process, and the median over pairs is
shown at the end. Every timed case first has its numbers checked against the definition, in float64. On a CPU
float32; on a GPU bfloat16 at DeltaNet-1.3B's shape.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import add_ratio
from benchmarks.timing import paired_ratio, peak_memory
from refine_kernels import reference
from refine_kernels.delta_rule import chunk_delta_rule
from tests.numerics import assert_close

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SHAPES = (
    [(1, 4096, 16, 128), (1, 16384, 16, 128)] if GPU else [(1, 2048, 4, 128), (1, 1024, 16, 64)]
)  # B, T, H, D
CHECKED = (slice(0, 1), slice(0, 100), slice(0, 2))  # rows, tokens, heads
TOLERANCE = 2e-2 if GPU else 1e-5
RULES = ("gated", "plain")


def ours(q, k, v, beta, g):
    return chunk_delta_rule(q, k, v, beta, g=g, backend="triton" if GPU else "torch")[0]


def definition(q, k, v, beta, g):
    """Token by token, in plain PyTorch."""
    return reference.chunk_delta_rule(q, k, v, beta, g=g)[0]


def fla(q, k, v, beta, g):
    if g is None:
        return pytest.importorskip("fla.ops.delta_rule").chunk_delta_rule(q, k, v, beta)[0]
    return pytest.importorskip("fla.ops.gated_delta_rule").chunk_gated_delta_rule(q, k, v, g, beta)[0]


def transformers(q, k, v, beta, g):
    """The function itself: the name would lead to fla where that is installed."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    function = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    return function(q, k, v, torch.zeros_like(beta) if g is None else g, beta)[0]


PEERS = (fla, transformers, definition)


def require(provider, mode):
    """Skip, with the reason, what cannot run here."""
    if provider is fla:
        pytest.importorskip("fla", reason="fla is not installed: pip install flash-linear-attention")
        if not GPU:
            pytest.skip("fla needs a GPU: its fallback in transformers stands for it")
    if provider is definition and mode != "forward":
        pytest.skip("the definition keeps every token's state for its backward: only the forward is timed")


def make_inputs(shape, rule):
    b, t, h, d = shape
    new = lambda *sizes: torch.randn(*sizes, device=DEVICE)  # noqa: E731
    q, k, v = (x.to(DTYPE) for x in (new(b, t, h, d), F.normalize(new(b, t, h, d), dim=-1), new(b, t, h, d)))
    beta = torch.rand(b, t, h, device=DEVICE)
    g = F.logsigmoid(new(b, t, h) + 3) if rule == "gated" else None
    return [x if x is None else x.requires_grad_() for x in (q, k, v, beta, g)], torch.randn_like(v)


def step(provider, inputs, d_o, mode):
    if mode == "forward":
        with torch.no_grad():
            found = provider(*inputs), ()
    else:
        o = provider(*inputs)
        found = o.detach(), torch.autograd.grad(o, [x for x in inputs if x is not None], d_o)
    if GPU:
        torch.cuda.synchronize()
    return found


def check(provider, inputs, d_o, mode):
    """The first tokens of one row and two heads, where the definition is still quick."""
    few = [None if x is None else x.detach()[CHECKED].double().requires_grad_() for x in inputs]
    d_few = d_o[CHECKED]
    o, gradients = step(lambda *x: reference.chunk_delta_rule(*x[:4], g=x[4])[0], few, d_few.double(), mode)
    few = [None if x is None else x.detach().float() for x in few]
    few = [x if x is None else x.to(DTYPE if x.ndim == 4 else x.dtype).requires_grad_() for x in few]
    actual, actual_gradients = step(provider, few, d_few, mode)
    assert_close(actual, o, TOLERANCE, "o")
    for name, x, y in zip("qkvbg", actual_gradients, gradients):
        assert_close(x, y, TOLERANCE, f"d{name}")


@pytest.mark.parametrize("provider", [ours, *PEERS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_time(benchmark, shape, mode, provider):
    require(provider, mode)
    inputs, d_o = make_inputs(shape, "gated")
    check(provider, inputs, d_o, mode)
    benchmark.group = f"delta_rule {mode} {shape} gated"
    rounds = {ours: 3}.get(provider, 1)
    benchmark.pedantic(
        step, (provider, inputs, d_o, mode), rounds=rounds, warmup_rounds=1 if rounds > 1 else 0
    )


@pytest.mark.parametrize("peer", [fla, transformers], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratio(benchmark, shape, rule, peer, visit):
    require(peer, "forward_backward")
    inputs, d_o = make_inputs(shape, rule)
    for provider in (ours, peer) if visit == 1 else ():
        check(provider, inputs, d_o, "forward_backward")

    both = [functools.partial(step, provider, inputs, d_o, "forward_backward") for provider in (peer, ours)]
    ratio = benchmark.pedantic(paired_ratio, both, {"least": 4, "budget": 3}, rounds=1, iterations=1)
    name = {fla: "fla", transformers: "transformers' fallback"}[peer]
    goal = "goal: at least 1.8" if peer is fla else "goal: at least 2"
    add_ratio(f"{name}, {rule} {shape}", "chunk_delta_rule, fwd + bwd", ratio, goal)
    if visit == 1:
        theirs, mine = (peak_memory(function) for function in both)
        add_ratio(f"memory of {name}, {rule} {shape}", "chunk_delta_rule, fwd + bwd", theirs / mine)
