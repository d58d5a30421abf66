"""The interpreter's bfloat16, as the tests use it, against PyTorch's on a CPU: bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

pytest.importorskip("ml_dtypes")
from tests.refine_kernels.interpreter_bf16 import exact_bf16

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here"),
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]
N = 256


@InterpretedFunction
def arithmetic_kernel(x, y, out, N: tl.constexpr, M: tl.constexpr):
    o = tl.arange(0, N)
    b_x, b_y = tl.load(x + o, mask=o < M, other=0), tl.load(y + o, mask=o < M, other=1.0)
    tl.store(out + o, b_x + b_y)
    tl.store(out + N + o, b_x - b_y)
    tl.store(out + 2 * N + o, b_x * b_y)
    tl.store(out + 3 * N + o, b_x / b_y)
    tl.store(out + 4 * N + o, tl.where(b_x < b_y, -b_x, tl.maximum(b_x, b_y)))
    tl.store(out + 5 * N + o, b_x.to(tl.float32) * 1.2345)
    tl.store(out + 6 * N + o, o)
    tl.store(out + 7 * N + o, b_x, mask=o < M)


@InterpretedFunction
def cast_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(out + o, tl.load(x + o).to(out.dtype.element_ty))


@InterpretedFunction
def dot_kernel(a, b, c, out, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)
    tile = o[:, None] * N + o[None, :]
    b_c = tl.load(c + tile)
    b_out = tl.dot(tl.load(a + tile), tl.trans(tl.load(b + tile)), b_c, input_precision=PRECISION)
    tl.store(out + tile, b_out)


@InterpretedFunction
def sum_kernel(x, out, N: tl.constexpr):
    tl.store(out + tl.arange(0, 1), tl.sum(tl.load(x + tl.arange(0, N)).to(tl.float32), 0))


def test_arithmetic_loads_and_stores():
    x, y = torch.randn(N).bfloat16() * 3, torch.randn(N).bfloat16()
    out = torch.zeros(8, N, dtype=torch.bfloat16)
    with exact_bf16():
        arithmetic_kernel[(1,)](x, y, out, N, N - 7)
    x[-7:], y[-7:] = 0, 1
    expected = [x + y, x - y, x * y, x / y, torch.where(x < y, -x, torch.maximum(x, y)), (x.float() * 1.2345)]
    expected = torch.stack([*(e.bfloat16() for e in expected), torch.arange(N).bfloat16(), x])
    assert torch.equal(out, expected)


def test_casts_round_to_nearest_even():
    halfway = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F80FFFF, 0x80000001, 0x7F7FFFFF, 0x00408000]
    )
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    x = torch.cat([halfway.to(torch.int32).view(torch.float32), special, torch.randn(N - 11) * 1e3])
    for source in (x, x.half(), x.double(), torch.arange(-N, N, 2)):
        out = torch.empty(N, dtype=torch.bfloat16)
        with exact_bf16():
            cast_kernel[(1,)](source, out, N)
        assert torch.equal(out.isnan(), source.to(torch.bfloat16).isnan())
        assert torch.equal(out.nan_to_num(7.0), source.float().bfloat16().nan_to_num(7.0))
    for dtype in (torch.float32, torch.float64, torch.float16):
        out, source = torch.empty(N, dtype=dtype), torch.randn(N).bfloat16()
        with exact_bf16():
            cast_kernel[(1,)](source, out, N)
        assert torch.equal(out, source.to(dtype))


@pytest.mark.parametrize("n", [16, 32])
def test_dots_multiply_in_full_and_add_up_in_float32(n):
    a, b, c = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16(), torch.randn(n, n)
    out = torch.empty(n, n)
    with exact_bf16():
        dot_kernel[(1,)](a, b, c, out, n, "ieee")
    truth = c.double() + a.double() @ b.double().T
    assert (out - truth).abs().max() < 1e-6 * n
    assert (torch.addmm(c.bfloat16(), a, b.T).double() - truth).abs().max() > 1e-3


def test_dots_in_tf32_round_their_operands():
    a, b, c, out = torch.randn(32, 32), torch.randn(32, 32), torch.zeros(32, 32), torch.empty(32, 32)

    def rounded(x):
        return ((x.view(torch.int32).long() + 0x1000) & 0xFFFFE000).to(torch.int32).view(torch.float32)

    with exact_bf16():
        dot_kernel[(1,)](a, b, c, out, 32, "tf32")
        full = torch.empty(32, 32)
        dot_kernel[(1,)](a, b, c, full, 32, "ieee")
    assert (out - rounded(a).double() @ rounded(b).double().T).abs().max() < 1e-5
    assert (full - a.double() @ b.double().T).abs().max() < 1e-5 < (out - full).abs().max()


def test_sums_are_float32():
    x, out = torch.randn(N).bfloat16(), torch.empty(1)
    with exact_bf16():
        sum_kernel[(1,)](x, out, N)
    assert (out - x.double().sum()).abs() < 1e-4


def test_the_interpreter_is_left_as_it_was():
    x, out = torch.ones(16, dtype=torch.float16), torch.empty(16, dtype=torch.float16)
    with pytest.raises(ZeroDivisionError), exact_bf16():
        raise ZeroDivisionError
    cast_kernel[(1,)](x, out, 16)
    assert torch.equal(out, x)
