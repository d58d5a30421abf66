"""A chunk of materialised logits, turned into its own gradient while log-prob and entropy are read off.

`gradient_kernel`. One program owns a row q [V] of a chunk. It reads the row twice (the chunk is small enough to
stay in L2): once for max, sum and mean by the recurrence of `triton_forward.py`, once to write

    dz = p (g_lse - g_lp - g_H (log p + H)) + g_lp 1_y        times (1 - tanh^2) / temperature

in the dtype that the next products take. For float32 it may write over q itself: element by element the same
thread reads, then writes. Where lse is given (a row of which other ranks hold the rest), the first reading is
left out, and so it is where no gradient is wanted the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from refine_kernels.linear_logprob.chunked import Head
from refine_kernels.linear_logprob.triton_forward import soft_capped
from refine_kernels.sizes import power_of_two

_COLUMNS = 4096  # that a program holds at once: 16 a thread
WARPS = 8


def columns_of(V: int) -> int:
    """How many columns of a row of V a program of `gradient_kernel` holds at once."""
    return min(max(power_of_two(V), 128), _COLUMNS)


def gradient(
    q: torch.Tensor,  # [R, V] float32: x W^T
    dz: torch.Tensor | None,  # [R, V] out, float32 (may be q itself) or a half precision
    head: Head,
    *,
    target: torch.Tensor,  # [R], columns of this slice; none of its own where there is no target here
    g_logprob: torch.Tensor,  # [R]
    g_entropy: torch.Tensor | None = None,  # [R]
    g_lse: torch.Tensor | None = None,  # [R]
    lse: torch.Tensor | None = None,  # [R] of the whole vocabulary; None: of this slice, computed here
    row_entropy: torch.Tensor | None = None,  # [R] beside lse
    logprob: torch.Tensor | None = None,  # [R] out
    entropy: torch.Tensor | None = None,  # [R] out
) -> None:
    """dz of a chunk of R rows, and what was asked for of their statistics."""
    R, V = q.shape
    with torch.cuda.device_of(q):
        gradient_kernel[(R,)](
            q, dz, head.bias, target, g_logprob, g_entropy, g_lse, lse, row_entropy, logprob, entropy,
            V, 1.0 / head.temperature, head.softcap or 1.0,
            HAS_SOFTCAP=head.softcap is not None, BV=columns_of(V), num_warps=WARPS, num_stages=1,
        )  # fmt: skip


@triton.jit
def _scaled_logits(p_q, o_v, bias, V, inv_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """A block of q [BV], -1e30 beyond V."""
    b_q = tl.load(p_q + o_v, mask=o_v < V, other=0.0)
    if bias is not None:
        b_q += tl.load(bias + o_v, mask=o_v < V, other=0.0)
    if HAS_SOFTCAP:
        b_q = soft_capped(b_q, softcap)
    return tl.where(o_v < V, b_q * inv_temperature, -1e30)


@triton.jit
def gradient_kernel(
    q,  # [R, V]
    dz,  # [R, V] out, or None
    bias,  # [V] or None
    target,  # [R]
    g_logprob,  # [R]
    g_entropy,  # [R] or None
    g_lse,  # [R] or None
    lse,  # [R] or None
    row_entropy,  # [R] or None
    logprob,  # [R] out, or None
    entropy,  # [R] out, or None
    V,
    inv_temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BV: tl.constexpr,
):
    i_r = tl.program_id(0)
    p_q = q + i_r.to(tl.int64) * V
    o_c = tl.arange(0, BV)
    i_y = tl.load(target + i_r)

    if lse is not None:
        # d is taken from lse itself: log p = q - lse
        b_m = tl.load(lse + i_r)
        b_log_s = b_m * 0
        b_h = b_log_s
        if row_entropy is not None:
            b_h = tl.load(row_entropy + i_r)
    else:
        b_m = tl.full([1], -1e30, tl.float32)
        b_s = tl.zeros([1], tl.float32)
        b_t = tl.zeros([1], tl.float32)
        b_qy = tl.zeros([1], tl.float32)
        for i_v in range(0, V, BV):
            b_q = _scaled_logits(p_q, i_v + o_c, bias, V, inv_temperature, softcap, HAS_SOFTCAP)
            b_mn = tl.maximum(b_m, tl.max(b_q, 0))
            b_d = b_q - b_mn
            b_e = tl.exp(b_d)
            b_step = b_m - b_mn
            b_a = tl.exp(b_step)
            b_t = b_a * (b_t + b_step * b_s) + tl.sum(b_e * b_d, 0)
            b_s = b_a * b_s + tl.sum(b_e, 0)
            b_qy += tl.sum(tl.where(i_v + o_c == i_y, b_q, 0.0), 0)
            b_m = b_mn
        b_log_s = tl.log(b_s)
        b_h = b_log_s - b_t / b_s
        if logprob is not None:
            tl.store(logprob + i_r + tl.arange(0, 1), b_qy - b_m - b_log_s)
        if entropy is not None:
            tl.store(entropy + i_r + tl.arange(0, 1), b_h)

    if dz is not None:
        p_dz = dz + i_r.to(tl.int64) * V
        b_glp = tl.load(g_logprob + i_r)
        b_g = -b_glp
        if g_lse is not None:
            b_g += tl.load(g_lse + i_r)
        for i_v in range(0, V, BV):
            o_v = i_v + o_c
            b_q = _scaled_logits(p_q, o_v, bias, V, inv_temperature, softcap, HAS_SOFTCAP)
            b_log_p = (b_q - b_m) - b_log_s
            b_factor = b_g
            if g_entropy is not None:
                b_factor = b_g - tl.load(g_entropy + i_r) * (b_log_p + b_h)
            b_dz = tl.exp(b_log_p) * b_factor + tl.where(o_v == i_y, b_glp, 0.0)
            if HAS_SOFTCAP:
                b_tanh = b_q / (inv_temperature * softcap)
                b_dz *= 1.0 - b_tanh * b_tanh
            tl.store(p_dz + o_v, (b_dz * inv_temperature).to(dz.dtype.element_ty), mask=o_v < V)
