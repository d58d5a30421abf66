"""A few tokens of the delta rule for many branches in one launch: the decode path on a GPU.

One program owns a tile ``[K, BV]`` of one head's state of one branch. It finds its parent's state through
``state_indices``, reads the tile once, keeps it in registers while all T tokens go by, and writes the
tile of the branch's own new state once; the parent is never written. Per token the write and the read are
folded, so that the old state is used in one sweep:

    S := a S        [r_q, r_k] = [q, k]^T S        u = beta (v - r_k)        o = scale (r_q + (q . k) u)
    S := S + k u^T

Nothing couples the columns of a state, so V splits over programs freely: 8 branches of 16 heads of 128 x 128
are 1024 programs. Without gradients. Two kernels:

``recurrent_kernel``   takes q, k, v, beta and g as :func:`refine_kernels.recurrent_delta_rule` does.
``decode_kernel``      takes them as the projections of a DeltaNet layer leave them: the short convolutions
                       with their tails, SiLU and the sigmoid of beta happen on the way in.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from refine_kernels.delta_rule.reference import L2_NORM_EPS
from refine_kernels.sizes import ceil_div, power_of_two

# By kernel and whether it is float64. Columns of a tile: at least 64 bytes of every state row; more where every
# tile convolves q and k for itself. Words of a tile that one warp holds, beside q, k and what is on its way.
_COLUMNS_AND_WORDS = {
    ("recurrent", False): (16, 4096),
    ("recurrent", True): (16, 1024),
    ("decode", False): (32, 1024),
    ("decode", True): (16, 512),
}


def forward(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V], HV a multiple of H
    beta: torch.Tensor,  # [B, T, HV]
    g: torch.Tensor | None,  # [B, T, HV]
    initial_state: torch.Tensor | None,  # [N, HV, K, V]
    state_indices: torch.Tensor | None,  # [B]
    scale: float,
    use_qk_l2norm_in_kernel: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(o [B, T, HV, V], final_state [B, HV, K, V] or None)``; row b starts from
    ``initial_state[state_indices[b]]``, or ``initial_state[b]`` without indices.

    Inputs may be views with any strides over B, T and H (as of a fused projection): none is copied unless the
    last dimension is not contiguous.
    """
    (rows, tokens, heads, vd), (key_heads, kd) = v.shape, q.shape[2:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if initial_state is not None and initial_state.stride()[2:] != (vd, 1):
        initial_state = initial_state.contiguous()
    double = q.dtype == torch.float64
    o = q.new_empty(v.shape)
    final_state = None
    if output_final_state:
        dtype = torch.float64 if double else torch.float32
        final_state = q.new_empty((rows, heads, kd, vd), dtype=dtype)
    bk, bv, num_warps = choose_tile("recurrent", kd, vd, double)
    grid = (rows * heads * ceil_div(vd, bv),)
    with torch.cuda.device_of(q):
        recurrent_kernel[grid](
            q, k, v, beta, g, initial_state, state_indices, o, final_state,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(),
            *(beta.stride() if g is None else g.stride()),
            *((0, 0) if initial_state is None else initial_state.stride()[:2]),
            tokens, heads,
            REPEAT=heads // max(key_heads, 1), K=kd, V=vd, BK=bk, BV=bv, SCALE=scale,
            L2NORM=use_qk_l2norm_in_kernel, EPS=L2_NORM_EPS,
            DTYPE=tl.float64 if double else tl.float32, num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    return o, final_state


def decode_forward(
    q: torch.Tensor,  # [B, T, H K]
    k: torch.Tensor,  # [B, T, H K]
    v: torch.Tensor,  # [B, T, HV V], HV a multiple of H
    beta: torch.Tensor,  # [B, T, HV]
    g: torch.Tensor | None,  # [B, T, HV]
    weights: list[torch.Tensor],  # of q, k, v: [D, W]
    tails: list[torch.Tensor],  # of q, k, v: [N, W - 1, D]
    state: torch.Tensor,  # [N, HV, K, V]
    rows: torch.Tensor | None,  # [B]
    scale: float,
    beta_scale: float,
    l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What :func:`~refine_kernels.delta_rule.decode.delta_net_decode` returns; projections may be views with any
    strides over B and T."""
    (_, heads, kd, vd), (b, tokens), width = state.shape, q.shape[:2], weights[0].shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    weights, tails, state = (
        [x.contiguous() for x in weights],
        [x.contiguous() for x in tails],
        state.contiguous(),
    )
    double = q.dtype == torch.float64
    o = q.new_empty(b, tokens, heads, vd)
    new_state = state.new_empty(b, *state.shape[1:])
    new_tails = [q.new_empty(b, *x.shape[1:]) for x in tails]
    bk, bv, num_warps = choose_tile("decode", kd, vd, double)
    grid = (b * heads * ceil_div(vd, bv),)
    with torch.cuda.device_of(q):
        decode_kernel[grid](
            q, k, v, beta, g, *weights, *tails, state, rows, o, *new_tails, new_state,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *beta.stride(),
            *(beta.stride() if g is None else g.stride()),
            tokens, heads,
            REPEAT=heads * kd // max(q.shape[2], 1), K=kd, V=vd, W=width, BK=bk, BV=bv, SCALE=scale,
            BETA_SCALE=beta_scale, L2NORM=l2norm, EPS=L2_NORM_EPS,
            DTYPE=tl.float64 if double else tl.float32, num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    return o, new_state, new_tails


@functools.cache
def choose_tile(kernel: str, kd: int, vd: int, double: bool) -> tuple[int, int, int]:
    """``(BK, BV, num_warps)``: all rows and a few columns of a state, in one warp (no barriers) if they fit."""
    columns, words = _COLUMNS_AND_WORDS[kernel, double]
    bk, bv = max(power_of_two(kd), 16), min(max(power_of_two(vd), 8), columns)
    return bk, bv, max(bk * bv // words, 1)


@triton.jit
def _unit(b_x, EPS: tl.constexpr):
    """``x / sqrt(sum x^2 + eps)`` of one vector."""
    return b_x / tl.sqrt(tl.sum(b_x * b_x, 0) + EPS)


@triton.jit
def _one_token(
    b_s,  # [BK, BV], decayed
    b_q,  # [BK]
    b_k,  # [BK]
    b_v,  # [BV]
    b_beta,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """The state after a token, and what q reads of it [BV]."""
    if L2NORM:
        b_q, b_k = _unit(b_q, EPS), _unit(b_k, EPS)
    b_qk = tl.sum(b_q * b_k, 0)
    b_rq = tl.sum(b_q[:, None] * b_s, 0)
    b_rk = tl.sum(b_k[:, None] * b_s, 0)
    b_u = (b_v - b_rk) * b_beta
    return b_s + b_k[:, None] * b_u[None, :], b_rq + b_qk * b_u


@triton.jit(do_not_specialize=["s_beta_b", "s_beta_t", "s_beta_h", "s_g_b", "s_g_t", "s_g_h", "T", "H"])
def recurrent_kernel(
    q,  # [B, T, H / REPEAT, K]
    k,  # [B, T, H / REPEAT, K]
    v,  # [B, T, H, V]
    beta,  # [B, T, H]
    g,  # [B, T, H] or None
    initial_state,  # [N, H, K, V] or None
    state_indices,  # [B] or None
    o,  # [B, T, H, V], contiguous
    final_state,  # [B, H, K, V], contiguous, or None
    s_q_b, s_q_t, s_q_h,
    s_k_b, s_k_t, s_k_h,
    s_v_b, s_v_t, s_v_h,
    s_beta_b, s_beta_t, s_beta_h,
    s_g_b, s_g_t, s_g_h,
    s_state_n, s_state_h,
    T, H,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile [K, BV] of one head's state of one branch, through T tokens. Reads and writes the tile once,
    and per token q, k [K], v [BV], beta and g; writes o [BV] per token."""
    i_pid = tl.program_id(0).to(tl.int64)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_bh = i_pid % NV, i_pid // NV
    i_b, i_h = i_bh // H, i_bh % H
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]

    p_q = q + i_b * s_q_b + i_h // REPEAT * s_q_h + o_k
    p_k = k + i_b * s_k_b + i_h // REPEAT * s_k_h + o_k
    p_v = v + i_b * s_v_b + i_h * s_v_h + o_v
    p_beta = beta + i_b * s_beta_b + i_h * s_beta_h
    p_o = o + (i_b * T * H + i_h) * V + o_v
    b_q = tl.load(p_q, mask=m_k, other=0.0)
    b_k = tl.load(p_k, mask=m_k, other=0.0)
    b_v = tl.load(p_v, mask=m_v, other=0.0)
    b_beta = tl.load(p_beta)
    if g is not None:
        p_g = g + i_b * s_g_b + i_h * s_g_h
        b_g = tl.load(p_g)

    if initial_state is not None:
        i_n = i_b
        if state_indices is not None:
            i_n = tl.load(state_indices + i_b).to(tl.int64)
        p_s = initial_state + i_n * s_state_n + i_h * s_state_h + o_k[:, None] * V + o_v[None, :]
        b_s = tl.load(p_s, mask=m_s, other=0.0).to(DTYPE)
    else:
        b_s = tl.full((BK, BV), 0.0, DTYPE)

    for i_t in range(0, T):
        b_q1, b_k1, b_v1, b_beta1 = b_q.to(DTYPE), b_k.to(DTYPE), b_v.to(DTYPE), b_beta.to(DTYPE)
        if g is not None:
            b_a = tl.exp(b_g.to(DTYPE))

        more = i_t + 1 < T
        p_q += s_q_t
        p_k += s_k_t
        p_v += s_v_t
        p_beta += s_beta_t
        b_q = tl.load(p_q, mask=tl.where(more, m_k, False), other=0.0)
        b_k = tl.load(p_k, mask=tl.where(more, m_k, False), other=0.0)
        b_v = tl.load(p_v, mask=tl.where(more, m_v, False), other=0.0)
        b_beta = tl.load(p_beta, mask=more, other=0.0)
        if g is not None:
            p_g += s_g_t
            b_g = tl.load(p_g, mask=more, other=0.0)
            b_s *= b_a
        b_s, b_o = _one_token(b_s, b_q1, b_k1, b_v1, b_beta1, L2NORM, EPS)
        b_o *= SCALE
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
        p_o += H * V

    if final_state is not None:
        p_s = final_state + i_bh * K * V + o_k[:, None] * V + o_v[None, :]
        tl.store(p_s, b_s, mask=m_s)


@triton.jit
def _back(p_x, p_tail, i_x, s_x, D, m, W: tl.constexpr, DTYPE: tl.constexpr):
    """A convolution's input at place ``i_x``, to which p_x points: before token 0 it is in the tail."""
    b_x = tl.load(p_x, mask=tl.where(i_x >= 0, m, False), other=0.0).to(DTYPE)
    return b_x + tl.load(p_tail + (i_x + W - 1) * D, mask=tl.where(i_x < 0, m, False), other=0.0).to(DTYPE)


@triton.jit
def _convolve(p_x, p_tail, p_weight, i_t, s_x, D, m, W: tl.constexpr, DTYPE: tl.constexpr):
    """``silu(sum_w weight_w x_{t - (W-1) + w})`` of some channels; p_x points to token t."""
    b_y = _back(p_x, p_tail, i_t, s_x, D, m, W, DTYPE) * tl.load(p_weight + W - 1, mask=m, other=0.0).to(
        DTYPE
    )
    for i_w in tl.static_range(1, W):
        b_x = _back(p_x - i_w * s_x, p_tail, i_t - i_w, s_x, D, m, W, DTYPE)
        b_y += b_x * tl.load(p_weight + W - 1 - i_w, mask=m, other=0.0).to(DTYPE)
    return b_y / (1 + tl.exp(-b_y))


@triton.jit
def _new_tail(p_new, p_x, p_tail, T, s_x, D, m, W: tl.constexpr, DTYPE: tl.constexpr):
    """Keep the last W - 1 inputs; p_x points behind the last token."""
    for i_w in tl.static_range(1, W):
        b_x = _back(p_x - i_w * s_x, p_tail, T - i_w, s_x, D, m, W, DTYPE)
        tl.store(p_new + (W - 1 - i_w) * D, b_x.to(p_new.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["s_beta_b", "s_beta_t", "s_beta_h", "s_g_b", "s_g_t", "s_g_h", "T", "H"])
def decode_kernel(
    q,  # [B, T, H / REPEAT K]
    k,  # [B, T, H / REPEAT K]
    v,  # [B, T, H V]
    beta,  # [B, T, H], before the sigmoid
    g,  # [B, T, H] or None
    w_q, w_k,  # [H / REPEAT K, W]
    w_v,  # [H V, W]
    tail_q, tail_k,  # [N, W - 1, H / REPEAT K]
    tail_v,  # [N, W - 1, H V]
    state,  # [N, H, K, V]
    rows,  # [B] or None
    o,  # [B, T, H, V]
    new_tail_q, new_tail_k,  # [B, W - 1, H / REPEAT K]
    new_tail_v,  # [B, W - 1, H V]
    new_state,  # [B, H, K, V]
    s_q_b, s_q_t,
    s_k_b, s_k_t,
    s_v_b, s_v_t,
    s_beta_b, s_beta_t, s_beta_h,
    s_g_b, s_g_t, s_g_h,
    T, H,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One tile [K, BV] of one head's state of one branch, through T tokens. Reads and writes the tile once;
    per token reads the last W inputs of its head's q and k [K] and of its columns of v [BV], and writes o [BV].
    Writes its columns of v's new tail; a key head's first program writes those of q and k."""
    i_pid = tl.program_id(0).to(tl.int64)
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v, i_bh = i_pid % NV, i_pid // NV
    i_b, i_h = i_bh // H, i_bh % H
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    i_n = i_b
    if rows is not None:
        i_n = tl.load(rows + i_b).to(tl.int64)
    b_s = tl.load(
        state + (i_n * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :], mask=m_s, other=0.0
    ).to(DTYPE)  # fmt: skip

    o_hk, o_hv = i_h // REPEAT * K + o_k, i_h * V + o_v  # channels
    D_k, D_v = H // REPEAT * K, H * V
    p_tail_q, p_tail_k = tail_q + i_n * (W - 1) * D_k + o_hk, tail_k + i_n * (W - 1) * D_k + o_hk
    p_tail_v = tail_v + i_n * (W - 1) * D_v + o_hv
    p_q, p_k, p_v = q + i_b * s_q_b + o_hk, k + i_b * s_k_b + o_hk, v + i_b * s_v_b + o_hv
    p_beta = beta + i_b * s_beta_b + i_h * s_beta_h
    p_o = o + i_b * T * D_v + o_hv
    if g is not None:
        p_g = g + i_b * s_g_b + i_h * s_g_h

    for i_t in range(0, T):
        b_q = _convolve(p_q, p_tail_q, w_q + o_hk * W, i_t, s_q_t, D_k, m_k, W, DTYPE)
        b_k = _convolve(p_k, p_tail_k, w_k + o_hk * W, i_t, s_k_t, D_k, m_k, W, DTYPE)
        b_v = _convolve(p_v, p_tail_v, w_v + o_hv * W, i_t, s_v_t, D_v, m_v, W, DTYPE)
        b_beta = BETA_SCALE / (1 + tl.exp(-tl.load(p_beta).to(DTYPE)))
        if g is not None:
            b_s *= tl.exp(tl.load(p_g).to(DTYPE))
            p_g += s_g_t
        b_s, b_o = _one_token(b_s, b_q, b_k, b_v, b_beta, L2NORM, EPS)
        b_o *= SCALE
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
        p_q += s_q_t
        p_k += s_k_t
        p_v += s_v_t
        p_beta += s_beta_t
        p_o += D_v

    tl.store(new_state + i_bh * K * V + o_k[:, None] * V + o_v[None, :], b_s, mask=m_s)
    p_new_v = new_tail_v + i_b * (W - 1) * D_v + o_hv
    _new_tail(p_new_v, p_v, p_tail_v, T, s_v_t, D_v, m_v, W, DTYPE)
    m_first = tl.where((i_v == 0) & (i_h % REPEAT == 0), m_k, False)
    o_new = i_b * (W - 1) * D_k + o_hk
    _new_tail(new_tail_q + o_new, p_q, p_tail_q, T, s_q_t, D_k, m_first, W, DTYPE)
    _new_tail(new_tail_k + o_new, p_k, p_tail_k, T, s_k_t, D_k, m_first, W, DTYPE)
