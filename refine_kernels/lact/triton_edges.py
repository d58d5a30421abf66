"""The two ends of a LaCT layer on a GPU, one launch each way.

A program holds some tokens of one fast head with all its channels, so a norm is a sum over registers. The partner
of a channel in its rotation is read again (from the cache) instead of being exchanged between threads. Gradients
of parameters, sums over all tokens, go by parts of many tokens to planes of their own, which PyTorch adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from refine_kernels.lact.edges import UNIT_EPS
from refine_kernels.sizes import ceil_div, power_of_two

ELEMENTS = 2048  # of a program at a time
STEPS = 16  # blocks of tokens that one program of a backward goes through
NUM_WARPS = 4


def edge_tile(width: int) -> tuple[int, int]:
    """``(BT, BD)``: tokens at a time, and the channels of a head as a power of two."""
    channels = power_of_two(width)
    return max(1, ELEMENTS // channels), channels


def prepare_forward(
    q: torch.Tensor,  # [B, T, H D]
    k: torch.Tensor,  # [B, T, H D]
    v: torch.Tensor,  # [B, T, H V]
    scale: torch.Tensor,  # [H D, 2]
    offset: torch.Tensor,  # [H D, 2]
    cos: torch.Tensor | None,  # [B, T, R]
    sin: torch.Tensor | None,  # [B, T, R]
    num_heads: int,
    silu: bool,
    v_silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[B, H, T, D]``, ``[B, H, T, D]``, ``[B, H, T, V]``."""
    batch, tokens = q.shape[:2]
    q, k, v = (_dense(x) for x in (q, k, v))
    outs = [x.new_empty(batch, num_heads, tokens, x.shape[2] // num_heads) for x in (q, k, v)]
    angles = _angles(cos, sin)
    width, v_width = outs[0].shape[-1], outs[2].shape[-1]
    bt, bd = edge_tile(max(width, v_width))
    blocks = ceil_div(tokens, bt)
    with torch.cuda.device_of(q):
        prepare_kernel[(3 * batch * num_heads * blocks,)](
            q, k, v, _parameters(scale), _parameters(offset), *angles, *outs,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], tokens, blocks,
            H=num_heads, D=width, V=v_width, R=0 if cos is None else cos.shape[-1], SILU=silu, V_SILU=v_silu,
            EPS=UNIT_EPS, BT=bt, BD=bd, num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return tuple(outs)


def prepare_backward(
    d_q: torch.Tensor,  # [B, H, T, D]
    d_k: torch.Tensor,  # [B, H, T, D]
    d_v: torch.Tensor,  # [B, H, T, V]
    q: torch.Tensor,  # [B, T, H D]
    k: torch.Tensor,  # [B, T, H D]
    v: torch.Tensor,  # [B, T, H V]
    scale: torch.Tensor,  # [H D, 2]
    offset: torch.Tensor,  # [H D, 2]
    cos: torch.Tensor | None,  # [B, T, R]
    sin: torch.Tensor | None,  # [B, T, R]
    num_heads: int,
    silu: bool,
    v_silu: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, scale and offset."""
    batch, tokens = q.shape[:2]
    q, k, v = (_dense(x) for x in (q, k, v))
    upstream = [x.contiguous() for x in (d_q, d_k, d_v)]
    found = [x.new_empty(x.shape) for x in (q, k, v)]
    width, v_width = d_q.shape[-1], d_v.shape[-1]
    bt, bd = edge_tile(max(width, v_width))
    blocks = ceil_div(tokens, bt * STEPS)
    parts = torch.empty(batch * blocks, 2, *scale.shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        prepare_backward_kernel[(3 * batch * num_heads * blocks,)](
            *upstream, q, k, v, _parameters(scale), _parameters(offset), *_angles(cos, sin), *found, parts,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], tokens, blocks,
            H=num_heads, D=width, V=v_width, R=0 if cos is None else cos.shape[-1], SILU=silu, V_SILU=v_silu,
            EPS=UNIT_EPS, BT=bt, BD=bd, STEPS=STEPS, num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
        d_scale, d_offset = parts.sum(0).unbind(0)
    return [*found, d_scale.to(scale.dtype, copy=True), d_offset.to(offset.dtype, copy=True)]


def finish_forward(
    o: torch.Tensor,  # [B, H, T, V]
    attended: torch.Tensor,  # [B, T, H V]
    weight: torch.Tensor,  # [V]
    gate: torch.Tensor | None,  # [B, T, H]
    eps: float,
) -> torch.Tensor:  # [B, T, H V]
    """``attended + RMSNorm(o) * silu(gate)``."""
    batch, heads, tokens, width = o.shape
    o, attended = _dense(o), attended.contiguous()
    out = attended.new_empty(attended.shape)
    bt, bd = edge_tile(width)
    blocks = ceil_div(tokens, bt)
    with torch.cuda.device_of(o):
        finish_kernel[(batch * heads * blocks,)](
            o, attended, _parameters(weight), None if gate is None else _parameters(gate), out,
            *o.stride()[:3], tokens, blocks, H=heads, V=width, EPS=eps, BT=bt, BD=bd,
            num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return out


def finish_backward(
    d_out: torch.Tensor,  # [B, T, H V]
    o: torch.Tensor,  # [B, H, T, V]
    weight: torch.Tensor,  # [V]
    gate: torch.Tensor | None,  # [B, T, H]
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of o, weight and gate (``[0]`` without one)."""
    batch, heads, tokens, width = o.shape
    o, d_out = _dense(o), d_out.contiguous()
    d_o = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    d_gate = None if gate is None else torch.empty(gate.shape, dtype=torch.float32, device=o.device)
    bt, bd = edge_tile(width)
    blocks = ceil_div(tokens, bt * STEPS)
    parts = torch.empty(batch * heads * blocks, width, dtype=torch.float32, device=o.device)
    with torch.cuda.device_of(o):
        finish_backward_kernel[(batch * heads * blocks,)](
            d_out, o, _parameters(weight), None if gate is None else _parameters(gate), d_o, d_gate, parts,
            *o.stride()[:3], tokens, blocks, H=heads, V=width, EPS=eps, BT=bt, BD=bd, STEPS=STEPS,
            num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
        d_weight = parts.sum(0).to(weight.dtype)
    return [d_o, d_weight, weight.new_empty(0) if gate is None else d_gate.to(gate.dtype)]


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _parameters(x: torch.Tensor) -> torch.Tensor:
    return x.float().contiguous()


def _angles(cos: torch.Tensor | None, sin: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.float().contiguous() for x in (cos, sin)]


# ---------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def silu_and_slope(b_z):
    b_s = tl.sigmoid(b_z)
    b_y = b_z * b_s
    return b_y, b_s + b_y * (1 - b_s)


@triton.jit
def transform(x, o_x, m_x, scale, offset, o_p, m_p, SILU: tl.constexpr):
    """``(x, silu(x scale + offset), its slope)`` [BT, BD] of some channels."""
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_y = b_x * tl.load(scale + o_p, mask=m_p, other=0.0) + tl.load(offset + o_p, mask=m_p, other=0.0)
    b_slope = tl.full(b_y.shape, 1.0, tl.float32)
    if SILU:
        b_y, b_slope = silu_and_slope(b_y)
    return b_x, b_y, b_slope


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def prepare_kernel(
    q, k,  # [B, T, H D]
    v,  # [B, T, H V]
    scale, offset,  # [H D, 2]
    cos, sin,  # [B, T, R], contiguous, or None
    o_q, o_k,  # [B, H, T, D], contiguous
    o_v,  # [B, H, T, V], contiguous
    s_q_b, s_q_t, s_k_b, s_k_t, s_v_b, s_v_t,
    T, BLOCKS,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    SILU: tl.constexpr,
    V_SILU: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """BT tokens of one head of q, of k or of v: reads them (twice where they are turned), their angles and the
    head's scales and offsets, writes them once."""
    i_pid = tl.program_id(0).to(tl.int64)
    i_which, i_block = i_pid % 3, i_pid // 3
    i_h, i_block = i_block % H, i_block // H
    i_b, i_block = i_block // BLOCKS, i_block % BLOCKS
    o_t = i_block * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    if i_which == 2:
        m_v = m_t[:, None] & (o_d < V)[None, :]
        p_v = v + i_b * s_v_b + o_t[:, None] * s_v_t + i_h * V + o_d[None, :]
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        if V_SILU:
            b_v *= tl.sigmoid(b_v)
        p_o = o_v + ((i_b * H + i_h) * T + o_t[:, None]) * V + o_d[None, :]
        tl.store(p_o, b_v.to(o_v.dtype.element_ty), mask=m_v)
    else:
        if i_which == 0:
            x, o, s_b, s_t = q, o_q, s_q_b, s_q_t
        else:
            x, o, s_b, s_t = k, o_k, s_k_b, s_k_t
        m_d = o_d < D
        m_x = m_t[:, None] & m_d[None, :]
        x += i_b * s_b + i_h * D
        scale += i_h * D * 2 + i_which
        offset += i_h * D * 2 + i_which
        _, b_y, _ = transform(
            x, o_t[:, None] * s_t + o_d[None, :], m_x, scale, offset, o_d[None, :] * 2, m_d[None, :], SILU
        )
        b_y = tl.where(m_x, b_y, 0.0)
        b_n = 1 / (tl.sqrt(tl.sum(b_y * b_y, 1)) + EPS)
        if cos is not None:
            o_r = o_d % (2 * R)
            o_p = tl.where(o_r < R, o_d + R, o_d - R)  # the partner in the rotation
            _, b_p, _ = transform(
                x, o_t[:, None] * s_t + o_p[None, :], m_x, scale, offset, o_p[None, :] * 2, m_d[None, :], SILU
            )
            o_a = (i_b * T + o_t[:, None]) * R + (o_d % R)[None, :]
            b_cos = tl.load(cos + o_a, mask=m_x, other=0.0)
            b_sin = tl.load(sin + o_a, mask=m_x, other=0.0)
            b_y = b_y * b_cos + b_p * tl.where((o_r < R)[None, :], -b_sin, b_sin)
        b_y *= b_n[:, None]
        p_o = o + ((i_b * H + i_h) * T + o_t[:, None]) * D + o_d[None, :]
        tl.store(p_o, b_y.to(o.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def prepare_backward_kernel(
    d_q, d_k,  # [B, H, T, D], contiguous
    d_v,  # [B, H, T, V], contiguous
    q, k,  # [B, T, H D]
    v,  # [B, T, H V]
    scale, offset,  # [H D, 2]
    cos, sin,  # [B, T, R], contiguous, or None
    g_q, g_k,  # [B, T, H D], contiguous; written
    g_v,  # [B, T, H V], contiguous; written
    parts,  # [B BLOCKS, 2, H D, 2]; written
    s_q_b, s_q_t, s_k_b, s_k_t, s_v_b, s_v_t,
    T, BLOCKS,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    SILU: tl.constexpr,
    V_SILU: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS blocks of BT tokens of one head of q, of k or of v: reads inputs and upstream gradients (the latter
    twice where they were turned), writes the inputs' gradients and, for q and k, the sums over these tokens that
    scale and offset get."""
    i_pid = tl.program_id(0).to(tl.int64)
    i_which, i_block = i_pid % 3, i_pid // 3
    i_h, i_block = i_block % H, i_block // H
    i_b = i_block // BLOCKS
    start = (i_block % BLOCKS) * (BT * STEPS)
    o_d = tl.arange(0, BD)
    if i_which == 2:
        for i_step in range(0, tl.minimum(STEPS, tl.cdiv(T - start, BT))):
            o_t = start + i_step * BT + tl.arange(0, BT)
            m_v = (o_t < T)[:, None] & (o_d < V)[None, :]
            b_v = tl.load(
                v + i_b * s_v_b + o_t[:, None] * s_v_t + i_h * V + o_d[None, :], mask=m_v, other=0.0
            )
            b_g = tl.load(
                d_v + ((i_b * H + i_h) * T + o_t[:, None]) * V + o_d[None, :], mask=m_v, other=0.0
            ).to(tl.float32)
            if V_SILU:
                _, b_slope = silu_and_slope(b_v.to(tl.float32))
                b_g *= b_slope
            p_g = g_v + ((i_b * T + o_t[:, None]) * H + i_h) * V + o_d[None, :]
            tl.store(p_g, b_g.to(g_v.dtype.element_ty), mask=m_v)
    else:
        if i_which == 0:
            x, d, g, s_b, s_t = q, d_q, g_q, s_q_b, s_q_t
        else:
            x, d, g, s_b, s_t = k, d_k, g_k, s_k_b, s_k_t
        m_d = o_d < D
        x += i_b * s_b + i_h * D
        o_p = i_h * D * 2 + i_which + o_d * 2
        b_scale = tl.load(scale + o_p, mask=m_d, other=0.0)
        b_dscale = tl.zeros((BD,), tl.float32)
        b_doffset = tl.zeros((BD,), tl.float32)
        for i_step in range(0, tl.minimum(STEPS, tl.cdiv(T - start, BT))):
            o_t = start + i_step * BT + tl.arange(0, BT)
            m_x = (o_t < T)[:, None] & m_d[None, :]
            b_x, b_y, b_slope = transform(
                x, o_t[:, None] * s_t + o_d[None, :], m_x, scale, offset, o_p[None, :], m_d[None, :], SILU
            )
            b_y = tl.where(m_x, b_y, 0.0)
            p_d = d + ((i_b * H + i_h) * T + o_t[:, None]) * D
            b_d = tl.load(p_d + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
            if cos is not None:
                o_r = o_d % (2 * R)
                o_2 = tl.where(o_r < R, o_d + R, o_d - R)
                b_2 = tl.load(p_d + o_2[None, :], mask=m_x, other=0.0).to(tl.float32)
                o_a = (i_b * T + o_t[:, None]) * R + (o_d % R)[None, :]
                b_cos = tl.load(cos + o_a, mask=m_x, other=0.0)
                b_sin = tl.load(sin + o_a, mask=m_x, other=0.0)
                b_d = b_d * b_cos + b_2 * tl.where((o_r < R)[None, :], b_sin, -b_sin)
            b_r = tl.sqrt(tl.sum(b_y * b_y, 1))
            b_n = 1 / (b_r + EPS)
            b_along = tl.sum(b_d * b_y, 1) * b_n * b_n / tl.maximum(b_r, 1e-30)
            b_z = (b_d * b_n[:, None] - b_y * b_along[:, None]) * b_slope
            p_g = g + ((i_b * T + o_t[:, None]) * H + i_h) * D + o_d[None, :]
            tl.store(p_g, (b_z * b_scale[None, :]).to(g.dtype.element_ty), mask=m_x)
            b_dscale += tl.sum(b_z * b_x, 0)
            b_doffset += tl.sum(b_z, 0)
        p_part = parts + (i_b * BLOCKS + i_block % BLOCKS) * (4 * H * D) + o_p
        tl.store(p_part, b_dscale, mask=m_d)
        tl.store(p_part + 2 * H * D, b_doffset, mask=m_d)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def finish_kernel(
    o,  # [B, H, T, V]
    attended,  # [B, T, H V], contiguous
    weight,  # [V]
    gate,  # [B, T, H], contiguous, or None
    out,  # [B, T, H V], contiguous; written
    s_o_b, s_o_h, s_o_t,
    T, BLOCKS,
    H: tl.constexpr,
    V: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """BT tokens of one head: reads o and the attention's output, writes their sum, each once."""
    i_pid = tl.program_id(0).to(tl.int64)
    i_h, i_block = i_pid % H, i_pid // H
    i_b, i_block = i_block // BLOCKS, i_block % BLOCKS
    o_t = i_block * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < V
    m_o = m_t[:, None] & m_d[None, :]
    p_o = o + i_b * s_o_b + i_h * s_o_h + o_t[:, None] * s_o_t + o_d[None, :]
    b_o = tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
    b_f = 1 / tl.sqrt(tl.sum(b_o * b_o, 1) / V + EPS)
    i_row = (i_b * T + o_t) * H + i_h
    if gate is not None:
        b_gate = tl.load(gate + i_row, mask=m_t, other=0.0)
        b_f *= b_gate * tl.sigmoid(b_gate)
    b_y = b_o * b_f[:, None] * tl.load(weight + o_d, mask=m_d, other=0.0)[None, :]
    o_out = i_row[:, None] * V + o_d[None, :]
    b_y += tl.load(attended + o_out, mask=m_o, other=0.0).to(tl.float32)
    tl.store(out + o_out, b_y.to(out.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def finish_backward_kernel(
    d_out,  # [B, T, H V], contiguous
    o,  # [B, H, T, V]
    weight,  # [V]
    gate,  # [B, T, H], contiguous, or None
    d_o,  # [B, H, T, V], contiguous; written
    d_gate,  # [B, T, H], contiguous, or None; written
    parts,  # [B BLOCKS H, V]; written
    s_o_b, s_o_h, s_o_t,
    T, BLOCKS,
    H: tl.constexpr,
    V: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS blocks of BT tokens of one head: reads o and the upstream gradient, writes the gradients of o and of
    the gate, and the sum over these tokens that the weight gets."""
    i_pid = tl.program_id(0).to(tl.int64)
    i_h, i_block = i_pid % H, i_pid // H
    i_b = i_block // BLOCKS
    start = (i_block % BLOCKS) * (BT * STEPS)
    o_d = tl.arange(0, BD)
    m_d = o_d < V
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0)
    b_dw = tl.zeros((BD,), tl.float32)
    for i_step in range(0, tl.minimum(STEPS, tl.cdiv(T - start, BT))):
        o_t = start + i_step * BT + tl.arange(0, BT)
        m_t = o_t < T
        m_o = m_t[:, None] & m_d[None, :]
        i_row = (i_b * T + o_t) * H + i_h
        b_d = tl.load(d_out + i_row[:, None] * V + o_d[None, :], mask=m_o, other=0.0).to(tl.float32)
        p_o = o + i_b * s_o_b + i_h * s_o_h + o_t[:, None] * s_o_t + o_d[None, :]
        b_o = tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
        b_r = 1 / tl.sqrt(tl.sum(b_o * b_o, 1) / V + EPS)
        b_o *= b_r[:, None]  # normalised
        if gate is not None:
            b_gate = tl.load(gate + i_row, mask=m_t, other=0.0)
            b_open, b_slope = silu_and_slope(b_gate)
            tl.store(d_gate + i_row, tl.sum(b_d * b_o * b_w[None, :], 1) * b_slope, mask=m_t)
            b_d *= b_open[:, None]
        b_dw += tl.sum(b_d * b_o, 0)
        b_d *= b_w[None, :]
        b_d = (b_d - b_o * (tl.sum(b_d * b_o, 1) / V)[:, None]) * b_r[:, None]
        p_d = d_o + ((i_b * H + i_h) * T + o_t[:, None]) * V + o_d[None, :]
        tl.store(p_d, b_d.to(d_o.dtype.element_ty), mask=m_o)
    tl.store(parts + i_pid * V + o_d, b_dw, mask=m_d)
