"""A chunk of materialised logits, turned into its own gradient while log-prob and entropy are read off.

`gradient_kernel`. One program owns a row q [V] of a chunk. It reads the row twice: once for
max, sum and mean by the recurrence of `triton_forward.py`, once to write

    dz = p (g_lse - g_lp - g_H (log p + H)) + g_lp 1_y        times (1 - tanh^2) / temperature

in the dtype that the next products take. For float32 it may write over q itself: element by element the same
thread reads, then writes. Where lse is given (a row of which other ranks hold the rest), the first reading is
left out, and so it is where no gradient is wanted the second.

What is known of a row is read and written at its place among the N, so nothing is gathered before or after. A row
whose upstream gradients are all zero has dz 0 and log-prob 0, whatever its logits are; a target that is no column
makes the row's log-prob and dz nan.
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
    first: int,  # the chunk is rows first to first + R of the N, or of `rows`
    rows: torch.Tensor | None,  # [n] which of the N; None: all
    target: torch.Tensor,  # [N], columns of this slice; none of its own where there is no target here
    g_logprob: torch.Tensor,  # [N]
    g_entropy: torch.Tensor | None = None,  # [N]
    g_lse: torch.Tensor | None = None,  # [N]
    lse: torch.Tensor | None = None,  # [N] of the whole vocabulary; None: of this slice, computed here
    row_entropy: torch.Tensor | None = None,  # [N] beside lse
    logprob: torch.Tensor | None = None,  # [N] out, at the chunk's rows
    entropy: torch.Tensor | None = None,  # [N] out, at the chunk's rows
) -> None:
    """dz of a chunk of R rows, and what was asked for of their statistics. All ``[N]`` are contiguous."""
    R, V = q.shape
    with torch.cuda.device_of(q):
        gradient_kernel[(R,)](
            q, dz, head.bias, rows, target, g_logprob, g_entropy, g_lse, lse, row_entropy, logprob, entropy,
            first, V, 1.0 / head.temperature, head.softcap or 1.0,
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


@triton.jit(do_not_specialize=["first"])
def gradient_kernel(
    q,  # [R, V]
    dz,  # [R, V] out, or None
    bias,  # [V] or None
    rows,  # [n] or None
    target,  # [N]
    g_logprob,  # [N]
    g_entropy,  # [N] or None
    g_lse,  # [N] or None
    lse,  # [N] or None
    row_entropy,  # [N] or None
    logprob,  # [N] out, or None
    entropy,  # [N] out, or None
    first,
    V,
    inv_temperature,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BV: tl.constexpr,
):
    i_r = tl.program_id(0)
    p_q = q + i_r.to(tl.int64) * V
    o_c = tl.arange(0, BV)
    i_n = (first + i_r).to(tl.int64)
    if rows is not None:
        i_n = tl.load(rows + i_n)
    i_y = tl.load(target + i_n)
    b_glp = tl.load(g_logprob + i_n)
    live = b_glp != 0
    if g_entropy is not None:
        live = live | (tl.load(g_entropy + i_n) != 0)
    if g_lse is not None:
        live = live | (tl.load(g_lse + i_n) != 0)
    if lse is None:  # this is the whole vocabulary: no other rank has the target
        held = (i_y >= 0) & (i_y < V)
        b_glp = tl.where(held, b_glp, float("nan"))

    if lse is not None:
        # d is taken from lse itself: log p = q - lse
        b_m = tl.load(lse + i_n)
        b_log_s = b_m * 0
        b_h = b_log_s
        if row_entropy is not None:
            b_h = tl.load(row_entropy + i_n)
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
            b_logprob = tl.where(held, b_qy - b_m - b_log_s, float("nan"))
            tl.store(logprob + i_n + tl.arange(0, 1), tl.where(live, b_logprob, 0.0))
        if entropy is not None:
            tl.store(entropy + i_n + tl.arange(0, 1), b_h)

    if dz is not None:
        p_dz = dz + i_r.to(tl.int64) * V
        b_g = -b_glp
        if g_lse is not None:
            b_g += tl.load(g_lse + i_n)
        for i_v in range(0, V, BV):
            o_v = i_v + o_c
            b_q = _scaled_logits(p_q, o_v, bias, V, inv_temperature, softcap, HAS_SOFTCAP)
            b_log_p = (b_q - b_m) - b_log_s
            b_factor = b_g
            if g_entropy is not None:
                b_factor = b_g - tl.load(g_entropy + i_n) * (b_log_p + b_h)
            b_dz = tl.exp(b_log_p) * b_factor + tl.where(o_v == i_y, b_glp, 0.0)
            if HAS_SOFTCAP:
                b_tanh = b_q / (inv_temperature * softcap)
                b_dz *= 1.0 - b_tanh * b_tanh
            b_dz = tl.where(live, b_dz * inv_temperature, 0.0)
            tl.store(p_dz + o_v, b_dz.to(dz.dtype.element_ty), mask=o_v < V)
