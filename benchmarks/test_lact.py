"""LaCT's fast weights against plain autograd over their definition, eager and compiled by ``torch.compile``.

The ratios are what counts on a shared machine: two take turns in one process, and the median over pairs is shown
at the end. Every timed case first has its numbers checked against the definition in float64. On a CPU float32
and small sizes; on a GPU bfloat16 tokens at the sizes of LaCT-760M (4 heads of 384, chunks of 2048), with the
memory that each takes and the share of the matrix rate that cuBLAS reaches there.
"""

from __future__ import annotations

import functools
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import add_ratio
from benchmarks.timing import paired_ratio, peak_memory, seconds
from refine_kernels import chunk_lact, reference
from tests.numerics import assert_close, relative_error

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# rows (batch x heads), tokens, width, chunk
SHAPES = (
    [(4 * batch, tokens, 384, 2048) for batch in (1, 4) for tokens in (16384, 32768)]
    if GPU
    else [(8, 1024, 128, 512), (1, 1536, 384, 512)]
)
CHECKED_ROWS, CHECKED_TOKENS, CHECKED_CHUNK = 2, 100, 32
BACKEND = "triton" if GPU else "torch"


def ours(*inputs, **options):
    return chunk_lact(*inputs[:9], momentum=inputs[9], backend=BACKEND, **options)


def eager(*inputs, **options):
    return reference.chunk_lact(*inputs[:9], momentum=inputs[9], **options)


@functools.cache
def compiled_reference():
    torch._dynamo.config.recompile_limit = 64  # every shape and option is a graph of its own
    return torch.compile(eager, fullgraph=True, dynamic=False)


def compiled(*inputs, **options):
    """``torch.compile`` of the definition; skips, with the reason, where that does not work."""
    try:
        return compiled_reference()(*inputs, **options)
    except Exception as error:  # whatever the compiler or its C++ compiler raises
        first = str(error).splitlines()[0]
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}: {first}")


def require(provider, shape, mode="forward_backward", use_muon=False):
    if provider is not compiled:
        return
    if not GPU and (shape != SHAPES[0] or use_muon or mode == "forward"):
        pytest.skip("on a CPU torch.compile takes a minute a graph: only fwd + bwd of one shape without Muon")


def make_inputs(shape, dtype=DTYPE):
    """Inputs as a model makes them, and the output's gradient."""
    rows, tokens, width, _ = shape
    new = lambda *sizes: torch.randn(*sizes, device=DEVICE)  # noqa: E731
    weights = [new(rows, width, width) / width**0.5 for _ in range(3)]
    q, k = (F.normalize(F.silu(new(rows, tokens, width)), dim=-1).to(dtype) for _ in range(2))
    v = F.silu(new(rows, tokens, width)).to(dtype)
    rates = [F.softplus(new(rows, tokens, 1) - 6) for _ in range(3)]
    inputs = [*weights, q, k, v, *rates, new(rows, tokens, 1).sigmoid()]
    return [x.requires_grad_() for x in inputs], new(rows, tokens, width).to(dtype)


def step(provider, inputs, d_o, options, mode="forward_backward"):
    if mode == "forward":
        with torch.no_grad():
            return provider(*inputs, **options), ()
    o = provider(*inputs, **options)
    return o.detach(), torch.autograd.grad(o, inputs, d_o)


def check(provider, shape, options):
    """A few rows and tokens of the shape's width in short chunks, where the definition is quick in float64; all of
    it where a further shape would have to be compiled first."""
    if GPU or provider is not compiled:
        shape = (CHECKED_ROWS, CHECKED_TOKENS, shape[2], CHECKED_CHUNK)
    few, d_o = make_inputs(shape)
    options = options | {"chunk_size": shape[3]}
    doubles = [x.detach().double().requires_grad_() for x in few]
    expected = step(eager, doubles, d_o.double(), options)
    actual, plain = (step(f, few, d_o, options) for f in (provider, eager))
    half, muon = torch.bfloat16 == DTYPE, options["use_muon"]
    for name, x, y, z in zip(
        ["o", *(f"gradient {i}" for i in range(len(few)))],
        *([found[0], *found[1]] for found in (actual, expected, plain)),
    ):
        if half and muon and name != "o":
            continue  # Newton-Schulz magnifies a rounding of what it is given
        # autograd over the definition loses digits too, most in Newton-Schulz of a gradient of low rank
        allowed = (5e-2 if muon else 3e-2) if half else 1e-5 + 3 * relative_error(z, y)
        assert_close(x, y, allowed, name)


@pytest.mark.parametrize("provider", [ours, eager, compiled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_time(benchmark, shape, mode, provider):
    require(provider, shape, mode)
    options = {"chunk_size": shape[3], "use_muon": False}
    check(provider, shape, options)
    inputs, d_o = make_inputs(shape)
    benchmark.group = f"lact {mode} {shape}"
    call = functools.partial(step, provider, inputs, d_o, options, mode)
    benchmark.pedantic(seconds, (call,), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("use_muon", [False, True], ids=["plain", "muon"])
@pytest.mark.parametrize("other", [eager, compiled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratio(benchmark, shape, other, use_muon, visit):
    require(other, shape, use_muon=use_muon)
    options = {"chunk_size": shape[3], "use_muon": use_muon}
    for provider in (ours, other) if visit == 1 else ():
        check(provider, shape, options)
    inputs, d_o = make_inputs(shape)

    both = [functools.partial(step, provider, inputs, d_o, options) for provider in (other, ours)]
    ratio = benchmark.pedantic(paired_ratio, both, {"budget": 3}, rounds=1, iterations=1)
    if not GPU and other is eager and visit == 1:
        theirs, mine = (peak_memory(function) for function in both)
        what = f"memory of the reference, {'Muon' if use_muon else 'no Muon'} {shape}"
        add_ratio(what, "chunk_lact, fwd + bwd", theirs / mine)
    goal = "goal: at least 1.5" if GPU and other is compiled else ""
    what = f"{other.__name__} reference, {'Muon' if use_muon else 'no Muon'} {shape}"
    add_ratio(what, "chunk_lact, fwd + bwd", ratio, goal)


@pytest.mark.skipif(not GPU, reason="counts a GPU's memory and matrix rate")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_and_matrix_rate(benchmark, shape):
    """Peak memory above the inputs, and our rate over that of cuBLAS on the op's own products."""
    options = {"chunk_size": shape[3], "use_muon": False}
    inputs, d_o = make_inputs(shape)
    rows, tokens, width, chunk = shape

    theirs, mine = (peak_memory(functools.partial(step, f, inputs, d_o, options)) for f in (eager, ours))
    add_ratio(f"memory of the reference {shape}", "chunk_lact", theirs / mine)

    x = torch.randn(rows, chunk, width, device=DEVICE, dtype=DTYPE)
    w = torch.randn(rows, width, 2 * width, device=DEVICE, dtype=DTYPE)

    def rate_of_cublas() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            x @ w
        torch.cuda.synchronize()
        return 100 * 2 * rows * chunk * width * 2 * width / (time.perf_counter() - start)

    rate_of_cublas()
    call = functools.partial(step, ours, inputs, d_o, options)
    duration = benchmark.pedantic(lambda: min(seconds(call) for _ in range(5)), rounds=1, iterations=1)
    updated = (tokens - 1) // chunk * chunk
    products = 3 * tokens + 6 * updated + 8 * tokens + 15 * updated  # of width x width a token
    rate = 2 * rows * width**2 * products / duration
    add_ratio(f"matrix rate of chunk_lact {shape}", "cuBLAS", rate / rate_of_cublas(), "goal: over 0.6")
