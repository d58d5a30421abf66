"""Parts that the chunk kernels of the delta rule share: where tokens and states lie, norms, decays, and how to keep
the compiler from holding in registers what is cheaper worked out again."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Running sums of the log-decays inside the chunk, [BT] each, as a pair of float32 whose sum is exact to
    float64: after a strong decay one float32 no longer resolves the weak ones that follow."""
    b_g = tl.load(g + o_x, mask=m_t, other=0).to(tl.float64)
    b_g = tl.where(b_g < -1e4, -1e4, b_g)
    b_sum = tl.cumsum(b_g, 0)
    b_high = b_sum.to(tl.float32)
    return b_high, (b_sum - b_high.to(tl.float64)).to(tl.float32)


@triton.jit
def decays(decays, ALL, i_x, H, tokens, o_i):
    """What ``inverse_kernel`` wrote of a chunk of ``tokens`` tokens, whose first is at ``i_x``: the pair for each,
    [BT], and for the last one. There is no more decay behind it."""
    o_x = i_x + tl.minimum(o_i, tokens - 1) * H
    last = decays + i_x + (tokens - 1) * H
    return tl.load(decays + o_x), tl.load(decays + ALL + o_x), tl.load(last), tl.load(last + ALL)


@triton.jit
def between(b_high_i, b_low_i, b_high_j, b_low_j, m):
    """``exp(G_i - G_j)`` where ``m`` (i >= j) and 0 elsewhere: masked before exp, which could overflow there."""
    return tl.where(m, tl.exp(tl.where(m, (b_high_i - b_high_j) + (b_low_i - b_low_j), 0.0)), 0.0)


@triton.jit
def between_unmasked(b_high_i, b_low_i, b_high_j, b_low_j):
    """``exp(G_i - G_j)`` where i >= j, something finite elsewhere, where the caller multiplies a zero by it.
    gradient_kernel has no registers for the mask. Growth (g > 0) inside a chunk is cut off at exp(80)."""
    return tl.exp(tl.minimum((b_high_i - b_high_j) + (b_low_i - b_low_j), 80.0))


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
