"""Parts that the chunk kernels of the delta rule share: where tokens and states lie, norms, decays, and how to keep
the compiler from holding in registers what is cheaper worked out again."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LARGEST = tl.constexpr(200.0)  # logarithm to base 2 of a decay: 64 of them fit an int32 of GRAINs
# Of such a logarithm. Negative: decays are numbers above 0 then, whose bits are no NaN where they lie in a float32
GRAIN = tl.constexpr(-(2.0**-17))


@triton.jit
def sequence(cu_seqlens, i_n, T):
    """(first token in memory, tokens) of row or packed sequence ``i_n``."""
    if cu_seqlens is None:
        begin = i_n.to(tl.int64) * T
        length = T
    else:
        begin = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - begin).to(tl.int32)
    return begin, length


@triton.jit
def place(cu_seqlens, i_n, begin, T, UNIT: tl.constexpr):
    """The first place of sequence ``i_n`` among what exists once every UNIT tokens."""
    if cu_seqlens is None:
        place = i_n.to(tl.int64) * tl.cdiv(T, UNIT)
    else:
        place = begin // UNIT + i_n
    return place


@triton.jit
def owner(cu_seqlens, owners, i_place, T, UNIT: tl.constexpr):
    """The sequence whose place ``i_place`` is."""
    if cu_seqlens is None:
        i_n = i_place // tl.cdiv(T, UNIT)
    else:
        i_n = tl.load(owners + i_place)
    return i_n


@triton.jit
def norms(norms, i_xk, HK, tokens, o_i):
    """What rows of k are multiplied by, as ``inverse_kernel`` wrote it, of a chunk of ``tokens`` tokens whose first
    is at ``i_xk``; 1 where nothing is normalised. [BT], for use in one layout: another reads it again."""
    if norms is None:
        b_n = tl.full(o_i.shape, 1.0, tl.float32)
    else:
        b_n = tl.load(norms + i_xk + tl.minimum(o_i, tokens - 1) * HK)
    return b_n


@triton.jit
def norms_of_q(q_norms, ALL, REPEAT: tl.constexpr, i_xk, HK, tokens, o_i):
    """Those of q lie behind them."""
    return norms(q_norms, i_xk + ALL // REPEAT, HK, tokens, o_i)


@triton.jit
def sum_decays(g, o_x, m_t):
    """Running sums G of the decays' logarithms to base 2 inside the chunk, [BT] each: in whole GRAINs, int32, and
    the rest in float32. Differences of whole numbers are exact, where after a strong decay one float32 no longer
    resolves the weak ones that follow. What decays by 2^-200 is gone; a NaN stays in the rest."""
    b_g = tl.load(g + o_x, mask=m_t, other=0).to(tl.float64) * LOG2_E
    b_g = tl.where(b_g < -LARGEST, -LARGEST, tl.where(b_g > LARGEST, LARGEST, b_g))
    b_sum = tl.cumsum(b_g, 0)
    b_whole = tl.floor(tl.where(b_sum == b_sum, b_sum, 0.0) / GRAIN + 0.5)
    return b_whole.to(tl.int32), (b_sum - b_whole * GRAIN).to(tl.float32)


@triton.jit
def store_sums(decays, ALL, o_x, b_whole, b_rest, m_t):
    """What :func:`sum_decays` gave, for the kernels to come: the whole numbers' bits, then the rests."""
    tl.store(decays + o_x, b_whole.to(tl.float32, bitcast=True), mask=m_t)
    tl.store(decays + ALL + o_x, b_rest, mask=m_t)


@triton.jit
def _sums(decays, i_x, H, tokens, o_i):
    """Whole GRAINs of G of a chunk of ``tokens`` tokens whose first is at ``i_x``; no more decay behind its end."""
    return tl.load(decays + i_x + tl.minimum(o_i, tokens - 1) * H).to(tl.int32, bitcast=True)


@triton.jit
def _rests(decays, ALL, i_x, H, tokens, o_i):
    """The rest of it, at most 4e-6."""
    return tl.load(decays + ALL + i_x + tl.minimum(o_i, tokens - 1) * H)


@triton.jit
def from_start(decays, ALL, i_x, H, tokens, o_i, PRECISION: tl.constexpr):
    """``e^{G_i}``, [BT]. Rests count where float32 is multiplied in full."""
    b_sum = _sums(decays, i_x, H, tokens, o_i).to(tl.float32) * GRAIN
    if PRECISION == "ieee":
        b_sum += _rests(decays, ALL, i_x, H, tokens, o_i)
    return tl.exp2(b_sum)


@triton.jit
def to_end(decays, ALL, i_x, H, tokens, o_i, PRECISION: tl.constexpr):
    """``e^{G_C - G_i}``, [BT]."""
    b_sum = _sums(decays, i_x, H, tokens, tokens - 1) - _sums(decays, i_x, H, tokens, o_i)
    b_sum = b_sum.to(tl.float32) * GRAIN
    if PRECISION == "ieee":
        b_sum += _rests(decays, ALL, i_x, H, tokens, tokens - 1)
        b_sum -= _rests(decays, ALL, i_x, H, tokens, o_i)
    return tl.exp2(b_sum)


@triton.jit
def through(decays, ALL, i_x, H, tokens):
    """``e^{G_C}``, with its rest: what a state loses in thousands of chunks is a product of them."""
    whole = _sums(decays, i_x, H, tokens, tokens - 1).to(tl.float32)
    return tl.exp2(whole * GRAIN + _rests(decays, ALL, i_x, H, tokens, tokens - 1))


@triton.jit
def _exponents(decays, ALL, i_x, H, tokens, o_i, o_j, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``G_i - G_j``, or ``G_j - G_i``. [BT, BT], rows i."""
    b_whole = _sums(decays, i_x, H, tokens, o_i)[:, None] - _sums(decays, i_x, H, tokens, o_j)[None, :]
    b_sum = b_whole.to(tl.float32) * (-GRAIN if TRANSPOSED else GRAIN)
    if PRECISION == "ieee":
        b_rest = _rests(decays, ALL, i_x, H, tokens, o_i)[:, None]
        b_rest -= _rests(decays, ALL, i_x, H, tokens, o_j)[None, :]
        b_sum += -b_rest if TRANSPOSED else b_rest
    return b_sum


@triton.jit
def between(
    decays, ALL, i_x, H, tokens, o_i, o_j, m, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr = False
):
    """``e^{G_i - G_j}``, TRANSPOSED ``e^{G_j - G_i}``, where ``m`` and 0 elsewhere. [BT, BT], rows i."""
    return _masked_exp2(_exponents(decays, ALL, i_x, H, tokens, o_i, o_j, PRECISION, TRANSPOSED), m)


@triton.jit
def between_sums(b_whole, b_rest, m, dtype: tl.constexpr):
    """The same from what :func:`sum_decays` gave, in ``dtype``."""
    b_sum = (b_whole[:, None] - b_whole[None, :]).to(dtype) * GRAIN
    return _masked_exp2(b_sum + (b_rest.to(dtype)[:, None] - b_rest.to(dtype)[None, :]), m)


@triton.jit
def _masked_exp2(b_x, m):
    """Masked before exp2, which could overflow elsewhere."""
    return tl.exp2(tl.where(m, b_x, -1000.0))


@triton.jit
def anew(o_x, i_c, PHASE: tl.constexpr):
    """The whole numbers ``o_x``: ``i_c >> 24`` is 0, as a sequence has fewer than 2^24 chunks. The compiler does
    not know that. So it works addresses and masks out again in every PHASE, instead of keeping them in registers
    from one to the next and from chunk to chunk, which it would spill."""
    if PHASE < 8:
        return o_x + (i_c >> (30 - PHASE))
    else:
        return o_x + (i_c >> (24 + PHASE % 6)) * PHASE


@triton.jit
def rows(tokens, o_i, i_c, PHASE: tl.constexpr):
    """Rows of a chunk of ``tokens`` tokens (:func:`anew`), those behind its end replaced by the last one, and which
    exist. [BT] each. Tiles are read without a mask: what must be zero behind the end is made so by a factor of its
    row."""
    o_l = anew(o_i, i_c, PHASE)
    return tl.minimum(o_l, tokens - 1), o_l < tokens


@triton.jit
def tile(x, o_l, H, o_d, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``o_d`` of rows ``o_l`` [BT] of x [tokens, H, SIZE], from the place that x points to: [BT, BLOCK],
    zeros past SIZE."""
    p_x = x + ((o_l * H)[:, None] * SIZE + o_d[None, :])
    if SIZE % BLOCK == 0:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_d < SIZE)[None, :], other=0)
    return b_x


@triton.jit
def merge(b_m, b_a, SIZE: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of the diagonal blocks of SIZE to those of twice the size."""
    o_b = tl.arange(0, BT) // SIZE
    m_below = (o_b[:, None] // 2 == o_b[None, :] // 2) & (o_b[:, None] > o_b[None, :])
    b_x = tl.dot(b_m, tl.where(m_below, b_a, 0.0), input_precision=PRECISION, out_dtype=b_m.dtype)
    return b_m - tl.dot(b_x, b_m, input_precision=PRECISION, out_dtype=b_m.dtype)
