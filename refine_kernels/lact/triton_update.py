"""The update of the fast weights on a GPU: the sequential part, forward and backward.

A chunk forward, three launches: `hidden_kernel` over its keys and values (three products, SiLU derivative,
rates), `outer_kernel` (the gradient, its tokens in parts), and `step_kernel`, which goes over the one flat state
once: adds the parts, adds the momentum, adds the weights, brings every row back to its norm and leaves a rounded
copy for the next chunk's products. With Muon the last is two launches with Newton-Schulz between them.

A chunk backward, four: `step_backward_kernel` over the flat state, `hidden_backward_kernel` (six products and the
second derivative of SiLU), `outer_kernel` for the weights, `output_kernel` for keys and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from refine_kernels.lact import chunked
from refine_kernels.lact.layout import Widths
from refine_kernels.lact.newton_schulz import newton_schulz, newton_schulz_backward
from refine_kernels.lact.reference import NORM_EPS
from refine_kernels.lact.triton_products import (
    Arithmetic,
    Tile,
    arithmetic_of,
    choose_splits,
    hidden,
    outer,
    outer_tile,
    output,
    tokens_of,
)
from refine_kernels.sizes import ceil_div, power_of_two


def scan_forward(
    applied: torch.Tensor,  # [N, P]
    unnormalised: torch.Tensor | None,  # [N, P]
    momentum: torch.Tensor | None,  # [N, P]
    norms: torch.Tensor,  # [N, R]
    k: torch.Tensor,  # [N, L, dk]
    v: torch.Tensor,  # [N, L, dv]
    lr0: torch.Tensor,  # [N, L, 1]
    lr1: torch.Tensor,  # [N, L, 1]
    lr2: torch.Tensor,  # [N, L, 1]
    gate: torch.Tensor | None,  # [N, L, 1], the momentum's rates
    widths: Widths,
    chunk_size: int,
    updates: int,
    use_muon: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`refine_kernels.lact.chunked.scan_forward`. float64 has no kernels: the PyTorch path."""
    if k.dtype == torch.float64 or k.numel() == 0:
        return chunked.scan_forward(
            applied, unnormalised, momentum, norms, k, v, lr0, lr1, lr2, gate, widths, chunk_size, updates, use_muon
        )  # fmt: skip
    arithmetic = arithmetic_of(k.dtype)
    keep_steps = gate is not None or use_muon
    rows = len(applied)
    stack = applied.new_empty(rows, updates + 1, widths.size)
    sums = torch.empty_like(stack) if unnormalised is not None else applied.new_empty(0)
    steps = torch.empty_like(stack) if keep_steps else applied.new_empty(0)
    divisors = applied.new_empty(rows, updates + 1, widths.rows)
    stack[:, 0], divisors[:, 0] = applied, 1.0
    if unnormalised is not None:
        sums[:, 0] = unnormalised
    if keep_steps:
        steps[:, 0] = 0.0 if momentum is None else momentum
    if updates == 0:
        return stack, sums, steps, divisors

    with torch.cuda.device_of(k):
        norms = norms.contiguous()
        (k, v), rates = arithmetic.hold(k, v), _rates(lr0, lr1, lr2)
        means = None if gate is None else _chunk_means(gate, updates, chunk_size)
        splits = choose_splits(rows, 1, chunk_size, widths, outer_tile(arithmetic.dtype))
        parts = stack.new_empty(splits, rows, 1, widths.size)
        rounded = applied.to(arithmetic.dtype, copy=True, memory_format=torch.contiguous_format)
        for i in range(updates):
            chunk = slice(i * chunk_size, (i + 1) * chunk_size)
            options = (widths, chunk_size, 0, arithmetic.precision)
            d, h = hidden(k[:, chunk], v[:, chunk], rounded[:, None], rates[:, chunk], *options)
            outer(d, k[:, chunk], h, v[:, chunk], parts, *options)
            before = stack if unnormalised is None else sums
            total = None if unnormalised is None else sums[:, i + 1]
            momentum_of = {} if gate is None else {"before": steps[:, i], "rate": means[:, i]}
            normalised = {
                "base": before[:, i], "norms": norms, "total": total, "divisor": divisors[:, i + 1],
                "applied": stack[:, i + 1], "rounded": rounded,
            }  # fmt: skip
            if use_muon:
                _step(parts, widths, step=steps[:, i + 1], **momentum_of)
                orthogonal = _orthogonalise(steps[:, i + 1], widths, arithmetic)
                _step(orthogonal[None], widths, **normalised)
            else:
                step = steps[:, i + 1] if keep_steps else None
                _step(parts[:, :, 0], widths, step=step, **momentum_of, **normalised)
    return stack, sums, steps, divisors


def scan_backward(
    stack: torch.Tensor,  # [N, S, P]
    steps: torch.Tensor,  # [N, S, P] or [0]
    divisors: torch.Tensor,  # [N, S, R]
    norms: torch.Tensor,  # [N, R]
    k: torch.Tensor,  # [N, L, dk]
    v: torch.Tensor,  # [N, L, dv]
    lr0: torch.Tensor,  # [N, L, 1]
    lr1: torch.Tensor,  # [N, L, 1]
    lr2: torch.Tensor,  # [N, L, 1]
    gate: torch.Tensor | None,  # [N, L, 1]
    d_stack: torch.Tensor | None,  # [N, S, P]
    d_sums: torch.Tensor | None,  # [N, S, P]
    d_steps: torch.Tensor | None,  # [N, S, P]
    widths: Widths,
    chunk_size: int,
    use_muon: bool,
    prenorm: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of applied, unnormalised, momentum ``[N, P]``, norms ``[N, R]``, k, v, lr0, lr1, lr2 and gate."""
    updates = stack.shape[1] - 1
    if k.dtype == torch.float64 or k.numel() == 0 or updates == 0:
        return chunked.scan_backward(
            stack, steps, divisors, norms, k, v, lr0, lr1, lr2, gate, d_stack, d_sums, d_steps, widths, chunk_size,
            use_muon, prenorm,
        )  # fmt: skip
    arithmetic = arithmetic_of(k.dtype)
    rows, read = len(stack), updates * chunk_size
    flat = lambda: stack.new_empty(rows, widths.size)  # noqa: E731
    entry = lambda x, i: None if x is None else x[:, i]  # noqa: E731
    with torch.cuda.device_of(k):
        d_stack, d_sums, d_steps = (None if x is None else x.contiguous() for x in (d_stack, d_sums, d_steps))
        norms = norms.contiguous()
        d_k, d_v = k.new_empty(k.shape), v.new_empty(v.shape)
        d_k[:, read:], d_v[:, read:] = 0.0, 0.0
        (k, v), rates = arithmetic.hold(k, v), _rates(lr0, lr1, lr2)
        means = None if gate is None else _chunk_means(gate, updates, chunk_size)
        tile = hidden_backward_tile(arithmetic.dtype)
        d_rates = stack.new_zeros(ceil_div(widths.dh, tile.columns), rows, k.shape[1], 3)
        d_norms = torch.zeros_like(norms)
        d_means = None if gate is None else stack.new_empty(rows, updates, widths.rows)
        splits = choose_splits(rows, 1, chunk_size, widths, outer_tile(arithmetic.dtype))
        parts = stack.new_empty(splits, rows, 1, widths.size)
        rounded = stack[:, :-1].to(arithmetic.dtype)
        d_gradient = flat().to(arithmetic.dtype)
        d_total = flat() if use_muon or not prenorm else None
        # gradients of the running sum and of the momentum of the entry at hand
        d_sum = None if not prenorm else flat().copy_(d_sums[:, -1]) if d_sums is not None else flat().zero_()
        d_step = None
        if gate is not None:
            d_step = flat().copy_(d_steps[:, -1]) if d_steps is not None else flat().zero_()
        for i in reversed(range(updates)):
            chunk = slice(i * chunk_size, (i + 1) * chunk_size)
            first = i == updates - 1
            norm_of = {
                "parts": None if first else parts[:, :, 0], "d_applied": entry(d_stack, i + 1),
                "carry": None if first or prenorm else d_total, "applied": stack[:, i + 1],
                "divisor": divisors[:, i + 1], "norms": norms, "d_norms": d_norms, "d_sum": d_sum,
                "d_sums": entry(d_sums, i) if prenorm else None, "d_total": d_total,
            }  # fmt: skip
            step_of = {"d_gradient": d_gradient}
            if gate is not None:
                step_of |= {
                    "d_step": d_step, "before": steps[:, i], "rate": means[:, i], "d_steps": entry(d_steps, i),
                    "d_mean": d_means[:, i],
                }  # fmt: skip
            if use_muon:
                _step_backward(widths, **norm_of)
                orthogonal = _orthogonalise_backward(steps[:, i + 1], d_total, widths, arithmetic)
                _step_backward(widths, d_direction=orthogonal, **step_of)
            else:
                _step_backward(widths, **norm_of, **step_of)
            tokens = (k[:, chunk], v[:, chunk], rates[:, chunk])
            d, d_y, h, d_g = _hidden_backward(
                *tokens, rounded[:, i], d_gradient, d_rates[:, :, chunk], widths, arithmetic, tile
            )
            options = (widths, chunk_size, 0, arithmetic.precision)
            outer(d_y, k[:, chunk], d_g, v[:, chunk], parts, *options)
            weights, gradient = rounded[:, i : i + 1], d_gradient[:, None]
            output(
                (d, gradient, d_y, weights),
                (h, gradient, d_g, weights),
                d_k[:, chunk],
                d_v[:, chunk],
                *options,
            )
        d_weights = parts[:, :, 0].sum(0)
        for x in (entry(d_stack, 0), None if prenorm else d_total):
            if x is not None:
                d_weights += x
        d_gate = None
        if gate is not None:
            d_gate = gate.new_zeros(gate.shape)
            mean = d_means.sum(-1) / chunk_size
            d_gate[:, :read] = mean.repeat_interleave(chunk_size, 1)[..., None].to(gate.dtype)
        d_rates = d_rates.sum(0)
    none = lambda: stack.new_empty(0)  # noqa: E731
    d_rates = (d.to(x.dtype, copy=True) for d, x in zip(d_rates.split(1, -1), (lr0, lr1, lr2)))
    d_state = (d_weights, *(none() if x is None else x for x in (d_sum, d_step)))
    return *d_state, d_norms, d_k, d_v, *d_rates, none() if d_gate is None else d_gate


def _rates(*rates: torch.Tensor) -> torch.Tensor:
    """``[N, L, 3]`` in float32."""
    return torch.cat([x.float() for x in rates], dim=-1)


def _chunk_means(gate: torch.Tensor, updates: int, chunk_size: int) -> torch.Tensor:
    """``[N, L, 1] -> [N, updates]``: the momentum's rate of every updated chunk."""
    return (
        gate[:, : updates * chunk_size, 0].unflatten(1, (updates, chunk_size)).mean(-1, dtype=torch.float32)
    )


def _newton_schulz_dtype(arithmetic: Arithmetic) -> torch.dtype:
    """float16 in the place of bfloat16: as fast, and all matrices of Newton-Schulz have norms near 1, so that the
    range is enough. Its five steps magnify what their products round: 8 bits of mantissa lose 2 to 10 % of the
    weights and up to half of the momentum's gradient, 11 bits a quarter of that or less."""
    return torch.float16 if arithmetic.dtype == torch.bfloat16 else arithmetic.dtype


def _orthogonalise(step: torch.Tensor, widths: Widths, arithmetic: Arithmetic) -> torch.Tensor:
    """Newton-Schulz of every matrix of ``[N, P]``."""
    dtype = _newton_schulz_dtype(arithmetic)
    return widths.from_batches([newton_schulz(x, dtype) for x in widths.batches(step)])


def _orthogonalise_backward(
    step: torch.Tensor, d_total: torch.Tensor, widths: Widths, arithmetic: Arithmetic
) -> torch.Tensor:
    """The gradient at ``step [N, P]`` from that at its orthogonalised matrices."""
    pairs = zip(widths.batches(step), widths.batches(d_total))
    dtype = _newton_schulz_dtype(arithmetic)
    return widths.from_batches([newton_schulz_backward(*pair, dtype) for pair in pairs])


# ---------------------------------------------------------------------------------------------------------
# The flat state: momentum, sum, norms


def state_tile(widths: Widths) -> Tile:
    """Rows of a fast weight a program, and the columns of its longest row; about 1024 elements."""
    columns = power_of_two(max(widths.dk, widths.dh))
    return Tile(max(1, 1024 // columns), columns, 1, 4, 1)


def _step(
    parts: torch.Tensor,  # [parts, N, P]: their sum is the gradient, or what Newton-Schulz made of the step
    widths: Widths,
    *,
    before: torch.Tensor | None = None,  # [N, P], the momentum before
    rate: torch.Tensor | None = None,  # [N]
    step: torch.Tensor | None = None,  # [N, P]; written
    base: torch.Tensor | None = None,  # [N, P], what the step is added to; None: it is only formed
    norms: torch.Tensor | None = None,  # [N, R]
    total: torch.Tensor | None = None,  # [N, P]; written
    divisor: torch.Tensor | None = None,  # [N, R]; written
    applied: torch.Tensor | None = None,  # [N, P]; written
    rounded: torch.Tensor | None = None,  # [N, P]; written
) -> None:
    tile = state_tile(widths)
    rows = parts.shape[1]
    stride = lambda x: 0 if x is None else x.stride(0)  # noqa: E731
    step_kernel[(rows * ceil_div(widths.rows, tile.rows),)](
        parts, before, rate, step, base, norms, total, divisor, applied, rounded,
        len(parts), parts.stride(0), parts.stride(1), stride(before), stride(rate), stride(step), stride(base),
        stride(norms), stride(total), stride(divisor), stride(applied), stride(rounded),
        DK=widths.dk, DH=widths.dh, DV=widths.dv, BR=tile.rows, BC=tile.columns, EPS=NORM_EPS,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit
def state_rows(DK: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """``(i_n, o_r [BR], m_r, o_p [BR, BC], m_p)``: a program's row of the batch, its rows of the three matrices,
    their elements in the flat state, and which of them exist."""
    NR: tl.constexpr = (2 * DH + DV + BR - 1) // BR
    i_pid = tl.program_id(0).to(tl.int64)
    i_n = i_pid // NR
    o_r = (i_pid % NR) * BR + tl.arange(0, BR)
    m_r = o_r < 2 * DH + DV
    o_c = tl.arange(0, BC)
    in_w02 = o_r < 2 * DH
    start = tl.where(in_w02, o_r * DK, 2 * DH * DK + (o_r - 2 * DH) * DH)
    width = tl.where(in_w02, DK, DH)
    return i_n, o_r, m_r, start[:, None] + o_c[None, :], m_r[:, None] & (o_c[None, :] < width[:, None])


@triton.jit
def sum_of_parts(parts, PARTS, s_part, o_p, m_p, BR: tl.constexpr, BC: tl.constexpr):
    """The planes of ``parts`` added up, always in the same order."""
    b_x = tl.zeros((BR, BC), tl.float32)
    for _ in range(0, PARTS):
        b_x += tl.load(parts + o_p, mask=m_p, other=0.0).to(tl.float32)
        parts += s_part
    return b_x


@triton.jit(do_not_specialize=["PARTS", "s_rate"])
def step_kernel(
    parts,  # [PARTS, N, P]
    before,  # [N, P] or None: no momentum
    rate,  # [N] or None
    step,  # [N, P] or None; written
    base,  # [N, P] or None: the step is only formed
    norms,  # [N, R] or None
    total,  # [N, P] or None; written
    divisor,  # [N, R] or None; written
    applied,  # [N, P] or None; written
    rounded,  # [N, P] or None; written
    PARTS, s_part, s_part_n, s_before, s_rate, s_step, s_base, s_norms, s_total, s_divisor, s_applied, s_rounded,
    DK: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """BR rows of the three matrices of one row of the batch: ``M = sum of parts + rate M``, ``U = base + M``,
    ``r = |U|``, ``W = U n / (r + e)``. Reads every part, M and the base once, writes M, U (with pre-norm), r, W
    and W rounded for the next products, once each."""
    i_n, o_r, m_r, o_p, m_p = state_rows(DK, DH, DV, BR, BC)
    b_x = sum_of_parts(parts + i_n * s_part_n, PARTS, s_part, o_p, m_p, BR, BC)
    if before is not None:
        b_rate = tl.load(rate + i_n * s_rate)
        b_x += b_rate * tl.load(before + i_n * s_before + o_p, mask=m_p, other=0.0)
    if step is not None:
        tl.store(step + i_n * s_step + o_p, b_x, mask=m_p)
    if base is not None:
        b_x += tl.load(base + i_n * s_base + o_p, mask=m_p, other=0.0)
        if total is not None:
            tl.store(total + i_n * s_total + o_p, b_x, mask=m_p)
        b_r = tl.sqrt(tl.sum(b_x * b_x, 1))
        tl.store(divisor + i_n * s_divisor + o_r, b_r, mask=m_r)
        b_n = tl.load(norms + i_n * s_norms + o_r, mask=m_r, other=0.0)
        b_x *= (b_n / (b_r + EPS))[:, None]
        tl.store(applied + i_n * s_applied + o_p, b_x, mask=m_p)
        tl.store(rounded + i_n * s_rounded + o_p, b_x.to(rounded.dtype.element_ty), mask=m_p)


def _step_backward(
    widths: Widths,
    *,
    parts: torch.Tensor
    | None = None,  # [parts, N, P]: gradients of the applied weights by their chunk's update
    d_applied: torch.Tensor | None = None,  # [N, P]: and from outside
    carry: torch.Tensor | None = None,  # [N, P]: and by the next sum, without pre-norm
    applied: torch.Tensor | None = None,  # [N, P]; None: the norms are not gone through
    divisor: torch.Tensor | None = None,  # [N, R]
    norms: torch.Tensor | None = None,  # [N, R]
    d_norms: torch.Tensor | None = None,  # [N, R]; added to
    d_sum: torch.Tensor | None = None,  # [N, P], with pre-norm; read and written
    d_sums: torch.Tensor | None = None,  # [N, P]: from outside at the sum before
    d_total: torch.Tensor | None = None,  # [N, P]; written
    d_direction: torch.Tensor | None = None,  # [N, P]: after Newton-Schulz, in place of what the norms give
    d_gradient: torch.Tensor | None = None,  # [N, P]; written; None: the step is not gone through
    d_step: torch.Tensor | None = None,  # [N, P], with momentum; read and written
    before: torch.Tensor | None = None,  # [N, P], the momentum before
    rate: torch.Tensor | None = None,  # [N]
    d_steps: torch.Tensor | None = None,  # [N, P]: from outside at the momentum before
    d_mean: torch.Tensor | None = None,  # [N, R]; written: to be added up over rows
) -> None:
    tile = state_tile(widths)
    rows = len(applied if d_direction is None else d_direction)
    stride = lambda x: 0 if x is None else x.stride(0)  # noqa: E731
    step_backward_kernel[(rows * ceil_div(widths.rows, tile.rows),)](
        parts, d_applied, carry, applied, divisor, norms, d_norms, d_sum, d_sums, d_total, d_direction,
        d_gradient, d_step, before, rate, d_steps, d_mean,
        0 if parts is None else len(parts), stride(parts), 0 if parts is None else parts.stride(1),
        *(stride(x) for x in (
            d_applied, carry, applied, divisor, norms, d_norms, d_sum, d_sums, d_total, d_direction, d_gradient,
            d_step, before, rate, d_steps, d_mean,
        )),
        DK=widths.dk, DH=widths.dh, DV=widths.dv, BR=tile.rows, BC=tile.columns, EPS=NORM_EPS,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["PARTS", "s_rate"])
def step_backward_kernel(
    parts,  # [PARTS, N, P] or None
    d_applied,  # [N, P] or None
    carry,  # [N, P] or None
    applied,  # [N, P] or None: the norms are not gone through
    divisor, norms,  # [N, R] or None
    d_norms,  # [N, R] or None; added to
    d_sum,  # [N, P] or None; read and written
    d_sums,  # [N, P] or None
    d_total,  # [N, P] or None; written
    d_direction,  # [N, P] or None
    d_gradient,  # [N, P] or None; written
    d_step,  # [N, P] or None; read and written
    before,  # [N, P] or None
    rate,  # [N] or None
    d_steps,  # [N, P] or None
    d_mean,  # [N, R] or None; written
    PARTS, s_part, s_part_n,
    s_d_applied, s_carry, s_applied, s_divisor, s_norms, s_d_norms, s_d_sum, s_d_sums, s_d_total, s_d_direction,
    s_d_gradient, s_d_step, s_before, s_rate, s_d_steps, s_d_mean,
    DK: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """BR rows of the three matrices of one row of the batch, the step's way back. With ``dW`` the sum of what
    reached the applied weights: ``along = <dW, W> / n``, added to dn; ``dU = dW n / (r + e) - W along / r`` (plus
    the gradient of later sums); ``dM = dU`` (plus that of later momenta) is the gradient of the gradient, written
    as the products want it; ``dM' = rate dM`` and ``<dM, M'>`` by rows go on. Each tensor is read or written
    once; ``carry`` may be ``d_total``."""
    i_n, o_r, m_r, o_p, m_p = state_rows(DK, DH, DV, BR, BC)
    if applied is not None:
        b_d = tl.zeros((BR, BC), tl.float32)
        if parts is not None:
            b_d = sum_of_parts(parts + i_n * s_part_n, PARTS, s_part, o_p, m_p, BR, BC)
        if d_applied is not None:
            b_d += tl.load(d_applied + i_n * s_d_applied + o_p, mask=m_p, other=0.0)
        if carry is not None:
            b_d += tl.load(carry + i_n * s_carry + o_p, mask=m_p, other=0.0)
        b_w = tl.load(applied + i_n * s_applied + o_p, mask=m_p, other=0.0)
        b_r = tl.load(divisor + i_n * s_divisor + o_r, mask=m_r, other=1.0)
        b_n = tl.load(norms + i_n * s_norms + o_r, mask=m_r, other=0.0)
        b_along = tl.where(b_n > 0, tl.sum(b_d * b_w, 1) / tl.maximum(b_n, 1e-30), 0.0)
        p_dn = d_norms + i_n * s_d_norms + o_r
        tl.store(p_dn, tl.load(p_dn, mask=m_r, other=0.0) + b_along, mask=m_r)
        b_d = b_d * (b_n / (b_r + EPS))[:, None] - b_w * (b_along / tl.maximum(b_r, 1e-30))[:, None]
        if d_sum is not None:
            p_ds = d_sum + i_n * s_d_sum + o_p
            b_d += tl.load(p_ds, mask=m_p, other=0.0)
            b_ds = b_d
            if d_sums is not None:
                b_ds += tl.load(d_sums + i_n * s_d_sums + o_p, mask=m_p, other=0.0)
            tl.store(p_ds, b_ds, mask=m_p)
        if d_total is not None:
            tl.store(d_total + i_n * s_d_total + o_p, b_d, mask=m_p)
    else:
        b_d = tl.load(d_direction + i_n * s_d_direction + o_p, mask=m_p, other=0.0).to(tl.float32)
    if d_gradient is not None:
        if d_step is not None:
            p_dm = d_step + i_n * s_d_step + o_p
            b_d += tl.load(p_dm, mask=m_p, other=0.0)
            b_m = tl.load(before + i_n * s_before + o_p, mask=m_p, other=0.0)
            tl.store(d_mean + i_n * s_d_mean + o_r, tl.sum(b_d * b_m, 1), mask=m_r)
            b_dm = b_d * tl.load(rate + i_n * s_rate)
            if d_steps is not None:
                b_dm += tl.load(d_steps + i_n * s_d_steps + o_p, mask=m_p, other=0.0)
            tl.store(p_dm, b_dm, mask=m_p)
        tl.store(d_gradient + i_n * s_d_gradient + o_p, b_d.to(d_gradient.dtype.element_ty), mask=m_p)


# ---------------------------------------------------------------------------------------------------------
# The tokens of a chunk, the gradient's own gradient


def hidden_backward_tile(dtype: torch.dtype) -> Tile:
    """For `hidden_backward_kernel`: six accumulators."""
    return Tile(128, 32, 64, 8, 2) if dtype == torch.bfloat16 else Tile(32, 32, 32, 4, 2)


def _hidden_backward(
    k: torch.Tensor,  # [N, C, dk]
    v: torch.Tensor,  # [N, C, dv]
    rates: torch.Tensor,  # [N, C, 3]
    weights: torch.Tensor,  # [N, P]
    d_gradient: torch.Tensor,  # [N, P]
    d_rates: torch.Tensor,  # [hidden tiles, N, C, 3]; written
    widths: Widths,
    arithmetic: Arithmetic,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``d, d_y [N, C, 2 dh]`` and ``h, d_g [N, C, dh]``, what products of the backward are made of."""
    rows, tokens = k.shape[:2]
    new = lambda width: torch.empty(rows, tokens, width, dtype=arithmetic.dtype, device=k.device)  # noqa: E731
    d, d_y, h, d_g = new(2 * widths.dh), new(2 * widths.dh), new(widths.dh), new(widths.dh)
    blocks = ceil_div(tokens, tile.rows)
    hidden_backward_kernel[(rows * blocks * ceil_div(widths.dh, tile.columns),)](
        k, v, weights, d_gradient, rates, d, d_y, h, d_g, d_rates,
        *k.stride()[:2], *v.stride()[:2], weights.stride(0), d_gradient.stride(0), *rates.stride()[:2],
        *d_rates.stride()[:3], tokens, blocks,
        DK=widths.dk, DH=widths.dh, DV=widths.dv, BT=tile.rows, BH=tile.columns, BK=tile.depth,
        PRECISION=arithmetic.precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return d, d_y, h, d_g


@triton.jit(do_not_specialize=["C", "BLOCKS"])
def hidden_backward_kernel(
    k,  # [N, C, DK]
    v,  # [N, C, DV]
    w,  # [N, P]
    c,  # [N, P], the gradient of the update's gradient
    rates,  # [N, C, 3]
    d,  # [N, C, 2 DH], contiguous; written
    d_y,  # [N, C, 2 DH], contiguous; written
    h,  # [N, C, DH], contiguous; written
    d_g,  # [N, C, DH], contiguous; written
    d_rates,  # [NH, N, C, 3]; written
    s_k_n, s_k_t, s_v_n, s_v_t, s_w_n, s_c_n, s_r_n, s_r_t, s_dr_h, s_dr_n, s_dr_t,
    C, BLOCKS,
    DK: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BH hidden units of BT tokens. In one sweep over k: ``y0, y2 = W k`` and ``e0, e2 = C k``; in one over v:
    ``g = W1^T v`` and ``e1 = C1^T v``. Writes what the forward made of them (h with its rate; d), the gradients
    at y0 | y2 and at g, and this tile's part of the gradients of the three rates. Reads the tokens' rows of k and
    v, BH rows of W0, W2, C0, C2 and BH columns of W1, C1, each once."""
    NH: tl.constexpr = (DH + BH - 1) // BH
    i_pid = tl.program_id(0).to(tl.int64)
    i_h, i_block = i_pid % NH, i_pid // NH
    i_n, i_block = i_block // BLOCKS, i_block % BLOCKS
    start, o_t, m_t = tokens_of(i_block, 0, C, C, 0, BT)
    o_h = i_h.to(tl.int32) * BH + tl.arange(0, BH)
    m_h = o_h < DH
    k += i_n * s_k_n + start * s_k_t
    v += i_n * s_v_n + start * s_v_t
    w += i_n * s_w_n
    c += i_n * s_c_n

    b_y0 = tl.zeros((BT, BH), tl.float32)
    b_y2 = tl.zeros((BT, BH), tl.float32)
    b_e0 = tl.zeros((BT, BH), tl.float32)
    b_e2 = tl.zeros((BT, BH), tl.float32)
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < DK
        b_k = tl.load(k + (o_t[:, None] * s_k_t + o_k[None, :]), mask=m_t[:, None] & m_k[None, :], other=0.0)
        o_w = o_k[:, None] + o_h[None, :] * DK
        m_w = m_k[:, None] & m_h[None, :]
        b_y0 = tl.dot(b_k, tl.load(w + o_w, mask=m_w, other=0.0), b_y0, input_precision=PRECISION)
        b_e0 = tl.dot(b_k, tl.load(c + o_w, mask=m_w, other=0.0), b_e0, input_precision=PRECISION)
        o_w += DH * DK
        b_y2 = tl.dot(b_k, tl.load(w + o_w, mask=m_w, other=0.0), b_y2, input_precision=PRECISION)
        b_e2 = tl.dot(b_k, tl.load(c + o_w, mask=m_w, other=0.0), b_e2, input_precision=PRECISION)
    b_g = tl.zeros((BT, BH), tl.float32)
    b_e1 = tl.zeros((BT, BH), tl.float32)
    for i_v in range(0, DV, BK):
        o_v = i_v + tl.arange(0, BK)
        m_v = o_v < DV
        b_v = tl.load(v + (o_t[:, None] * s_v_t + o_v[None, :]), mask=m_t[:, None] & m_v[None, :], other=0.0)
        o_w = 2 * DH * DK + o_v[:, None] * DH + o_h[None, :]
        m_w = m_v[:, None] & m_h[None, :]
        b_g = tl.dot(b_v, tl.load(w + o_w, mask=m_w, other=0.0), b_g, input_precision=PRECISION)
        b_e1 = tl.dot(b_v, tl.load(c + o_w, mask=m_w, other=0.0), b_e1, input_precision=PRECISION)

    p_r = rates + i_n * s_r_n + start * s_r_t + o_t * s_r_t
    b_r0 = tl.load(p_r, mask=m_t, other=0.0)[:, None]
    b_r1 = tl.load(p_r + 1, mask=m_t, other=0.0)[:, None]
    b_r2 = tl.load(p_r + 2, mask=m_t, other=0.0)[:, None]
    b_s = tl.sigmoid(b_y0)
    b_a = b_y0 * b_s
    b_slope = b_s + b_a * (1 - b_s)  # silu'
    b_curve = b_s * (1 - b_s) * (2 + b_y0 * (1 - 2 * b_s))  # silu''
    p_dr = d_rates + i_h * s_dr_h + i_n * s_dr_n + start * s_dr_t + o_t * s_dr_t
    tl.store(p_dr, tl.sum(b_e0 * b_g * b_y2 * b_slope, 1), mask=m_t)
    tl.store(p_dr + 1, tl.sum(b_e1 * b_y2 * b_a, 1), mask=m_t)
    tl.store(p_dr + 2, tl.sum(b_e2 * b_g * b_a, 1), mask=m_t)

    m_o = m_t[:, None] & m_h[None, :]
    h += (i_n * C + start) * DH
    d_g += (i_n * C + start) * DH
    d += (i_n * C + start) * (2 * DH)
    d_y += (i_n * C + start) * (2 * DH)
    o_1 = o_t[:, None] * DH + o_h[None, :]
    o_2 = o_t[:, None] * (2 * DH) + o_h[None, :]
    tl.store(h + o_1, (b_r1 * b_y2 * b_a).to(h.dtype.element_ty), mask=m_o)
    tl.store(d + o_2, (b_r0 * b_g * b_y2 * b_slope).to(h.dtype.element_ty), mask=m_o)
    tl.store(d + o_2 + DH, (b_r2 * b_g * b_a).to(h.dtype.element_ty), mask=m_o)
    b_e0 *= b_r0
    b_e1 *= b_r1
    b_e2 *= b_r2
    tl.store(d_g + o_1, (b_e0 * b_y2 * b_slope + b_e2 * b_a).to(h.dtype.element_ty), mask=m_o)
    b_d0 = (b_e2 * b_g + b_e1 * b_y2) * b_slope + b_e0 * b_g * b_y2 * b_curve
    tl.store(d_y + o_2, b_d0.to(h.dtype.element_ty), mask=m_o)
    tl.store(d_y + o_2 + DH, (b_e0 * b_g * b_slope + b_e1 * b_a).to(h.dtype.element_ty), mask=m_o)
