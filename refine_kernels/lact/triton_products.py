"""The matrix products of LaCT that reading and updating share, as three kernels over many chunks at once.

The update's gradient is that of ``sum_t <f(k_t), v_t>`` with a rate a token, and the gradient of reading is that
of ``sum_t <f(q_t), do_t>``: one kernel serves both.

- `hidden_kernel`: tokens -> hidden units. ``y0 = W0 x``, ``y2 = W2 x``, ``g = W1^T u``, SiLU, its derivative and
  the rates; writes h and, with u, the gradients at y0 and y2.
- `outer_kernel`: hidden units x tokens -> gradients of weights, in float32; the tokens may be split.
- `output_kernel`: hidden units -> tokens: what is read, or the gradients of x and u.

A fast weight of 384 x 384 does not fit on the chip beside its tokens (three of them are 885 KB in bfloat16), and
neither does the accumulator of a 128-token output, so the hidden units [C, dh] go through memory between them.

Dots take bfloat16 operands for bfloat16 tokens. float32 tokens take full-precision dots, and float16 tokens TF32
dots on float32 copies: gradients of fast weights leave the range of float16. Accumulators are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refine_kernels.lact.layout import Widths
from refine_kernels.sizes import ceil_div

PROGRAMS = 264  # that a large GPU holds at once: two on each of 132 multiprocessors


class Tile(NamedTuple):
    """How a kernel is cut up: ``rows x columns`` of the result a program, ``depth`` of the sum a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class Arithmetic(NamedTuple):
    """How products are computed: the dtype of tokens, hidden units and weights, and Triton's input_precision."""

    dtype: torch.dtype
    precision: str

    def hold(self, *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[N, L, D]`` in ``dtype`` and with a contiguous last dimension; other strides stay."""
        tokens = (x.to(self.dtype) for x in tokens)
        return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tokens)


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """For tokens of ``dtype``."""
    if dtype == torch.bfloat16:
        return Arithmetic(torch.bfloat16, "ieee")
    return Arithmetic(torch.float32, "tf32" if dtype == torch.float16 else "ieee")


def hidden_tile(dtype: torch.dtype, tokens: int) -> Tile:
    """For `hidden_kernel`: two accumulators, or three with u. ``tokens`` are those of a chunk."""
    if tokens <= 16:  # decoding: the weights are what is read
        return Tile(16, 32, 64, 4, 3) if dtype == torch.bfloat16 else Tile(16, 32, 16, 4, 2)
    return Tile(128, 64, 64, 8, 3) if dtype == torch.bfloat16 else Tile(32, 32, 32, 4, 2)


def outer_tile(dtype: torch.dtype) -> Tile:
    """For `outer_kernel`: one accumulator."""
    return Tile(128, 128, 64, 8, 3) if dtype == torch.bfloat16 else Tile(64, 64, 32, 4, 2)


def output_tile(dtype: torch.dtype, tokens: int, widths: Widths) -> Tile:
    """For `output_kernel`: one accumulator, and the pointers of one element each where no vector divides a row."""
    if tokens <= 16:
        return Tile(16, 64, 64, 4, 3) if dtype == torch.bfloat16 else Tile(16, 32, 32, 4, 2)
    if dtype == torch.bfloat16 and all(width % 16 == 0 for width in widths):
        return Tile(128, 128, 64, 8, 3)
    return Tile(64, 64, 32, 8, 1)


def choose_splits(rows: int, entries: int, tokens: int, widths: Widths, tile: Tile) -> int:
    """Parts that the tokens of a chunk are cut into, so that `outer_kernel` fills a GPU.

    A part has at least 256 tokens: each writes a whole gradient in float32.
    """
    programs = rows * entries * sum(_outer_tiles(widths, tile))
    return max(1, min(PROGRAMS // max(programs, 1), tokens // 256, 8))


def _outer_tiles(widths: Widths, tile: Tile) -> tuple[int, int]:
    """Tiles of the gradient of w0 above w2, and of w1."""
    cells = lambda rows, columns: ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)  # noqa: E731
    return cells(2 * widths.dh, widths.dk), cells(widths.dv, widths.dh)


# ---------------------------------------------------------------------------------------------------------
# Launchers. Inputs are as `Arithmetic.hold` leaves them, weights in the same dtype.


def hidden(
    x: torch.Tensor,  # [N, L, dk]
    u: torch.Tensor | None,  # [N, L, dv]
    weights: torch.Tensor,  # [N, S, P]
    rates: torch.Tensor | None,  # [N, L, 3], float32
    widths: Widths,
    chunk_size: int,
    offset: int,
    precision: str,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``(d [N, L, 2 dh] or None without u, h [N, L, dh])``; token t with entry ``(offset + t) // chunk_size``."""
    (rows, tokens), entries = x.shape[:2], weights.shape[1]
    tile = hidden_tile(x.dtype, min(chunk_size, tokens))
    h = torch.empty(rows, tokens, widths.dh, dtype=weights.dtype, device=x.device)
    d = None if u is None else torch.empty(rows, tokens, 2 * widths.dh, dtype=weights.dtype, device=x.device)
    blocks = ceil_div(min(chunk_size, tokens), tile.rows)
    grid = (rows * entries * blocks * ceil_div(widths.dh, tile.columns),)
    hidden_kernel[grid](
        x, u, weights, rates, d, h,
        *x.stride()[:2], *((0, 0) if u is None else u.stride()[:2]), *weights.stride()[:2],
        *((0, 0) if rates is None else rates.stride()[:2]),
        tokens, chunk_size, offset, entries, blocks,
        DK=widths.dk, DH=widths.dh, DV=widths.dv, BT=tile.rows, BH=tile.columns, BK=tile.depth,
        PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return d, h


def outer(
    d: torch.Tensor,  # [N, L, 2 dh]
    x: torch.Tensor,  # [N, L, dk]
    h: torch.Tensor,  # [N, L, dh]
    u: torch.Tensor,  # [N, L, dv]
    out: torch.Tensor,  # [splits, N, S, P], float32; written
    widths: Widths,
    chunk_size: int,
    offset: int,
    precision: str,
) -> None:
    """``out[:, n, s] = [d^T x | u^T h]`` over the tokens of entry s, in parts to be added up."""
    splits, rows, entries, _ = out.shape
    tokens = x.shape[1]
    tile = outer_tile(x.dtype)
    span = ceil_div(ceil_div(min(chunk_size, tokens), splits), tile.depth) * tile.depth
    grid = (splits * rows * entries * sum(_outer_tiles(widths, tile)),)
    outer_kernel[grid](
        d, x, h, u, out,
        *d.stride()[:2], *x.stride()[:2], *h.stride()[:2], *u.stride()[:2], *out.stride()[:3],
        tokens, chunk_size, offset, entries, splits, span,
        DK=widths.dk, DH=widths.dh, DV=widths.dv, BM=tile.rows, BN=tile.columns, BT=tile.depth,
        PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def output(
    keys: tuple[torch.Tensor, ...],  # of one or two pairs [N, L, 2 dh], [N, S, P]; or none
    values: tuple[torch.Tensor, ...],  # of one or two pairs [N, L, dh], [N, S, P]; or none
    out_keys: torch.Tensor | None,  # [N, L, dk]; written
    out_values: torch.Tensor | None,  # [N, L, dv]; written
    widths: Widths,
    chunk_size: int,
    offset: int,
    precision: str,
) -> None:
    """``out_keys = d [w0 above w2]`` and ``out_values = h w1^T``, each added up over its pairs."""
    first = (keys or values)[0]
    (rows, tokens), entries = first.shape[:2], (keys or values)[1].shape[1]
    tile = output_tile(first.dtype, min(chunk_size, tokens), widths)
    blocks = ceil_div(min(chunk_size, tokens), tile.rows)
    columns = [0 if out_keys is None else widths.dk, 0 if out_values is None else widths.dv]
    grid = (rows * entries * blocks * sum(ceil_div(c, tile.columns) for c in columns),)
    second = len(keys or values) == 4
    none = (None, None)
    d1, w1k = keys[:2] if keys else none
    h1, w1v = values[:2] if values else none
    d2, w2k = keys[2:] if keys and second else none
    h2, w2v = values[2:] if values and second else none
    strides = lambda x: (0, 0) if x is None else x.stride()[:2]  # noqa: E731
    output_kernel[grid](
        d1, w1k, d2, w2k, h1, w1v, h2, w2v, out_keys, out_values,
        *(s for x in (d1, w1k, d2, w2k, h1, w1v, h2, w2v, out_keys, out_values) for s in strides(x)),
        tokens, chunk_size, offset, entries, blocks,
        DK=widths.dk, DH=widths.dh, DV=widths.dv, BT=tile.rows, BN=tile.columns, BK=tile.depth,
        PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def tokens_of(i_block, i_entry, L, C, OFFSET, BT: tl.constexpr):
    """``(start, o_t [BT], m_t [BT])``: the first token of a chunk's block among the L at hand, its tokens counted
    from there in 32 bits (64 would take two registers each), and which of them the chunk has."""
    start = tl.maximum(i_entry * C - OFFSET, 0) + i_block * BT
    end = tl.minimum((i_entry + 1) * C - OFFSET, L)
    o_t = tl.arange(0, BT)
    return start, o_t, o_t < end - start


@triton.jit
def times_rows(b_acc, x, o_t, m_t, s_t, w, o_c, W_ROWS, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
               BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc + x[o_t] w[o_c]^T`` for ``w [COLUMNS, WIDTH]``, whose rows stand W_ROWS elements apart."""
    for i_k in range(0, WIDTH, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < WIDTH
        b_x = tl.load(x + (o_t[:, None] * s_t + o_k[None, :]), mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(
            w + o_k[:, None] + o_c[None, :] * W_ROWS, mask=m_k[:, None] & (o_c < COLUMNS)[None, :], other=0.0
        )
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def times_columns(b_acc, x, o_t, m_t, s_t, w, o_c, W_ROWS, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
                  BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc + x[o_t] w[:, o_c]`` for ``w [WIDTH, COLUMNS]``, whose rows stand W_ROWS elements apart."""
    for i_k in range(0, WIDTH, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < WIDTH
        b_x = tl.load(x + (o_t[:, None] * s_t + o_k[None, :]), mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(
            w + o_k[:, None] * W_ROWS + o_c[None, :], mask=m_k[:, None] & (o_c < COLUMNS)[None, :], other=0.0
        )
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit(do_not_specialize=["L", "C", "OFFSET", "S", "BLOCKS"])
def hidden_kernel(
    x,  # [N, L, DK]
    u,  # [N, L, DV] or None
    w,  # [N, S, P]
    rates,  # [N, L, 3] or None: all 1
    d,  # [N, L, 2 DH], contiguous, or None without u
    h,  # [N, L, DH], contiguous
    s_x_n, s_x_t,
    s_u_n, s_u_t,
    s_w_n, s_w_s,
    s_r_n, s_r_t,
    L, C, OFFSET, S, BLOCKS,
    DK: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BH hidden units of BT tokens of one chunk: ``y0 = W0 x``, ``y2 = W2 x`` in one sweep over x, ``g = W1^T u``;
    writes ``h = r1 silu(y0) y2`` and, with u, ``d = [r0 g y2 silu'(y0) | r2 g silu(y0)]``. Reads the tokens'
    rows of x and u, BH rows of W0 and W2 and BH columns of W1, each once; neighbours in the grid share the
    tokens."""
    NH: tl.constexpr = (DH + BH - 1) // BH
    i_pid = tl.program_id(0).to(tl.int64)
    i_h, i_block = i_pid % NH, i_pid // NH
    i_entry, i_block = i_block // BLOCKS, i_block % BLOCKS
    i_n, i_entry = i_entry // S, i_entry % S
    start, o_t, m_t = tokens_of(i_block, i_entry, L, C, OFFSET, BT)
    o_h = i_h.to(tl.int32) * BH + tl.arange(0, BH)
    m_h = o_h < DH
    x += i_n * s_x_n + start * s_x_t
    w += i_n * s_w_n + i_entry * s_w_s

    b_y0 = tl.zeros((BT, BH), tl.float32)
    b_y2 = tl.zeros((BT, BH), tl.float32)
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < DK
        b_x = tl.load(x + (o_t[:, None] * s_x_t + o_k[None, :]), mask=m_t[:, None] & m_k[None, :], other=0.0)
        p_w = w + o_k[:, None] + o_h[None, :] * DK
        m_w = m_k[:, None] & m_h[None, :]
        b_w0 = tl.load(p_w, mask=m_w, other=0.0)
        b_w2 = tl.load(p_w + DH * DK, mask=m_w, other=0.0)
        b_y0 = tl.dot(b_x, b_w0, b_y0, input_precision=PRECISION)
        b_y2 = tl.dot(b_x, b_w2, b_y2, input_precision=PRECISION)
    m_o = m_t[:, None] & m_h[None, :]
    p_h = h + (i_n * L + start) * DH + (o_t[:, None] * DH + o_h[None, :])
    b_s = tl.sigmoid(b_y0)
    b_a = b_y0 * b_s
    b_h = b_a * b_y2
    if rates is not None:
        p_r = rates + i_n * s_r_n + start * s_r_t + o_t * s_r_t
        b_h *= tl.load(p_r + 1, mask=m_t, other=0.0)[:, None]
    tl.store(p_h, b_h.to(h.dtype.element_ty), mask=m_o)
    if u is not None:
        b_d = b_y2 * (b_s + b_a * (1 - b_s))
        b_g = tl.zeros((BT, BH), tl.float32)
        u += i_n * s_u_n + start * s_u_t
        w += 2 * DH * DK
        b_g = times_columns(b_g, u, o_t, m_t, s_u_t, w, o_h, DH, DV, DH, BK, PRECISION)
        b_d *= b_g
        b_a *= b_g
        if rates is not None:
            b_d *= tl.load(p_r, mask=m_t, other=0.0)[:, None]
            b_a *= tl.load(p_r + 2, mask=m_t, other=0.0)[:, None]
        p_d = d + (i_n * L + start) * (2 * DH) + (o_t[:, None] * (2 * DH) + o_h[None, :])
        tl.store(p_d, b_d.to(d.dtype.element_ty), mask=m_o)
        tl.store(p_d + DH, b_a.to(d.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=["L", "C", "OFFSET", "S", "SPLITS", "SPAN"])
def outer_kernel(
    d,  # [N, L, 2 DH]
    x,  # [N, L, DK]
    h,  # [N, L, DH]
    u,  # [N, L, DV]
    out,  # [SPLITS, N, S, P]
    s_d_n, s_d_t,
    s_x_n, s_x_t,
    s_h_n, s_h_t,
    s_u_n, s_u_t,
    s_o_p, s_o_n, s_o_s,
    L, C, OFFSET, S, SPLITS, SPAN,
    DK: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of ``d^T x`` or of ``u^T h`` over SPAN tokens of one chunk: reads BM and BN columns of
    them, writes the tile once in float32. Parts of a chunk's tokens go to planes of their own: the sum has no
    atomics and always the same order."""
    T02: tl.constexpr = ((2 * DH + BM - 1) // BM) * ((DK + BN - 1) // BN)
    T1: tl.constexpr = ((DV + BM - 1) // BM) * ((DH + BN - 1) // BN)
    i_pid = tl.program_id(0).to(tl.int64)
    i_tile, i_entry = i_pid % (T02 + T1), i_pid // (T02 + T1)
    i_split, i_entry = i_entry % SPLITS, i_entry // SPLITS
    i_n, i_entry = i_entry // S, i_entry % S
    start = tl.maximum(i_entry * C - OFFSET, 0)
    end = tl.minimum((i_entry + 1) * C - OFFSET, L)
    start = tl.minimum(start + i_split * SPAN, end)
    end = tl.minimum(start + SPAN, end)
    out += i_split * s_o_p + i_n * s_o_n + i_entry * s_o_s
    if i_tile < T02:
        a, s_a, M = d + i_n * s_d_n, s_d_t, 2 * DH
        b, s_b, N = x + i_n * s_x_n, s_x_t, DK
    else:
        a, s_a, M = u + i_n * s_u_n, s_u_t, DV
        b, s_b, N = h + i_n * s_h_n, s_h_t, DH
        i_tile -= T02
        out += 2 * DH * DK
    NN = tl.cdiv(N, BN)
    o_m = (i_tile // NN) * BM + tl.arange(0, BM)
    o_n = (i_tile % NN) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    o_i = tl.arange(0, BT)
    p_a = a + start * s_a + o_m[:, None] + o_i[None, :] * s_a
    p_b = b + start * s_b + o_i[:, None] * s_b + o_n[None, :]
    b_out = tl.zeros((BM, BN), tl.float32)
    for i_t in range(0, tl.cdiv(end - start, BT)):
        m_t = o_i < end - start - i_t * BT
        b_a = tl.load(p_a, mask=m_m[:, None] & m_t[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(b_a, b_b, b_out, input_precision=PRECISION)
        p_a += BT * s_a
        p_b += BT * s_b
    tl.store(out + o_m[:, None] * N + o_n[None, :], b_out, mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["L", "C", "OFFSET", "S", "BLOCKS"])
def output_kernel(
    d1, w_k1, d2, w_k2,  # [N, L, 2 DH], [N, S, P], and again; None where there are none
    h1, w_v1, h2, w_v2,  # [N, L, DH], [N, S, P], and again; None where there are none
    o_keys,  # [N, L, DK] or None
    o_values,  # [N, L, DV] or None
    s_d1_n, s_d1_t, s_wk1_n, s_wk1_s, s_d2_n, s_d2_t, s_wk2_n, s_wk2_s,
    s_h1_n, s_h1_t, s_wv1_n, s_wv1_s, s_h2_n, s_h2_t, s_wv2_n, s_wv2_s,
    s_ok_n, s_ok_t, s_ov_n, s_ov_t,
    L, C, OFFSET, S, BLOCKS,
    DK: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BN channels of BT tokens of one chunk, either of ``d1 [W0; W2]`` (plus the same of d2) or of ``h1 W1^T``
    (plus the same of h2). Reads the tokens' hidden units and BN columns or rows of the weights, writes the tile
    once; neighbours in the grid share the tokens."""
    NK: tl.constexpr = (DK + BN - 1) // BN if o_keys is not None else 0
    NV: tl.constexpr = (DV + BN - 1) // BN if o_values is not None else 0
    i_pid = tl.program_id(0).to(tl.int64)
    i_c, i_block = i_pid % (NK + NV), i_pid // (NK + NV)
    i_entry, i_block = i_block // BLOCKS, i_block % BLOCKS
    i_n, i_entry = i_entry // S, i_entry % S
    start, o_t, m_t = tokens_of(i_block, i_entry, L, C, OFFSET, BT)
    i_c = i_c.to(tl.int32)
    b_o = tl.zeros((BT, BN), tl.float32)
    if i_c < NK:
        if o_keys is not None:
            o_c = i_c * BN + tl.arange(0, BN)
            p_w = w_k1 + i_n * s_wk1_n + i_entry * s_wk1_s
            p_x = d1 + i_n * s_d1_n + start * s_d1_t
            b_o = times_columns(b_o, p_x, o_t, m_t, s_d1_t, p_w, o_c, DK, 2 * DH, DK, BK, PRECISION)
            if d2 is not None:
                p_w = w_k2 + i_n * s_wk2_n + i_entry * s_wk2_s
                p_x = d2 + i_n * s_d2_n + start * s_d2_t
                b_o = times_columns(b_o, p_x, o_t, m_t, s_d2_t, p_w, o_c, DK, 2 * DH, DK, BK, PRECISION)
            p_o = o_keys + i_n * s_ok_n + start * s_ok_t + (o_t[:, None] * s_ok_t + o_c[None, :])
            tl.store(p_o, b_o.to(o_keys.dtype.element_ty), mask=m_t[:, None] & (o_c < DK)[None, :])
    else:
        if o_values is not None:
            o_c = (i_c - NK) * BN + tl.arange(0, BN)
            p_w = w_v1 + i_n * s_wv1_n + i_entry * s_wv1_s + 2 * DH * DK
            p_x = h1 + i_n * s_h1_n + start * s_h1_t
            b_o = times_rows(b_o, p_x, o_t, m_t, s_h1_t, p_w, o_c, DH, DH, DV, BK, PRECISION)
            if h2 is not None:
                p_w = w_v2 + i_n * s_wv2_n + i_entry * s_wv2_s + 2 * DH * DK
                p_x = h2 + i_n * s_h2_n + start * s_h2_t
                b_o = times_rows(b_o, p_x, o_t, m_t, s_h2_t, p_w, o_c, DH, DH, DV, BK, PRECISION)
            p_o = o_values + i_n * s_ov_n + start * s_ov_t + (o_t[:, None] * s_ov_t + o_c[None, :])
            tl.store(p_o, b_o.to(o_values.dtype.element_ty), mask=m_t[:, None] & (o_c < DV)[None, :])
