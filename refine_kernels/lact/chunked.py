"""The PyTorch path: every chunk is a few large matrix products; the backward is written by hand.

*Scan*: only the update is sequential. It leaves the weights of every chunk, which is all that its backward needs
besides its inputs: products with keys and values are run again. *Apply*: all whole chunks in one batch, forward
and backward. Arithmetic is float32 (float64 for float64 inputs) whatever the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from refine_kernels.lact.layout import Widths
from refine_kernels.lact.newton_schulz import newton_schulz, newton_schulz_backward
from refine_kernels.lact.reference import NORM_EPS


class Tokens(NamedTuple):
    """What an update reads of its chunk."""

    k: torch.Tensor  # [N, C, dk]
    v: torch.Tensor  # [N, C, dv]
    lr0: torch.Tensor  # [N, C, 1]
    lr1: torch.Tensor  # [N, C, 1]
    lr2: torch.Tensor  # [N, C, 1]


# ---- scan --------------------------------------------------------------------------------------------------


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
    """The weights of ``S = updates + 1`` chunks.

    Returns:
        applied ``[N, S, P]``; unnormalised ``[N, S, P]`` (``[0]`` where there is none); steps ``[N, S, P]``, the
        momentum after each update, kept for the backward with Muon too (``[0]`` where neither is used); and the
        row norms that each update divided by, ``[N, S, R]``.
    """
    keep_steps = gate is not None or use_muon
    stack = applied.new_empty(len(applied), updates + 1, widths.size)
    sums = torch.empty_like(stack) if unnormalised is not None else applied.new_empty(0)
    steps = torch.empty_like(stack) if keep_steps else applied.new_empty(0)
    divisors = applied.new_ones(len(applied), updates + 1, widths.rows)
    stack[:, 0] = applied
    if unnormalised is not None:
        sums[:, 0] = unnormalised
    if keep_steps:
        steps[:, 0] = 0.0 if momentum is None else momentum
    for i in range(updates):
        chunk = slice(i * chunk_size, (i + 1) * chunk_size)
        weights = stack[:, i]
        step = _gradient(weights, _tokens(weights, chunk, k, v, lr0, lr1, lr2), widths)
        if gate is not None:
            rate = gate[:, chunk].to(step.dtype).mean((1, 2))[:, None]
            step.addcmul_(steps[:, i], rate)
        if keep_steps:
            steps[:, i + 1] = step
        if use_muon:
            step = _per_matrix(newton_schulz, widths, step)
        total = step.add_(weights if unnormalised is None else sums[:, i])
        if unnormalised is not None:
            sums[:, i + 1] = total
        divisors[:, i + 1] = widths.row_norms(total)
        stack[:, i + 1] = widths.scale_rows(total, norms / (divisors[:, i + 1] + NORM_EPS))
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

    def upstream(gradients: torch.Tensor | None, entry: int) -> torch.Tensor:
        return torch.zeros_like(stack[:, 0]) if gradients is None else gradients[:, entry].to(stack.dtype)

    d_tokens = [torch.zeros(x.shape, dtype=stack.dtype, device=x.device) for x in (k, v, lr0, lr1, lr2)]
    d_gate = None if gate is None else torch.zeros(gate.shape, dtype=stack.dtype, device=gate.device)
    d_norms = torch.zeros_like(norms)
    # what has been collected for the entry at hand: its applied weights, its running sum, its momentum
    d_weights = upstream(d_stack, updates).clone()
    d_sum = upstream(d_sums, updates).clone() if prenorm else None
    d_step = upstream(d_steps, updates).clone() if gate is not None else None
    for i in reversed(range(updates)):
        chunk = slice(i * chunk_size, (i + 1) * chunk_size)
        weights = stack[:, i]
        d_total, d_norm = _norm_backward(stack[:, i + 1], divisors[:, i + 1], norms, d_weights, widths)
        d_norms += d_norm
        if prenorm:
            d_total += d_sum
            d_sum = d_total + upstream(d_sums, i)
        d_gradient = d_total
        if use_muon:
            d_gradient = _per_matrix(newton_schulz_backward, widths, steps[:, i + 1], d_gradient)
        if gate is not None:
            d_gradient = d_gradient + d_step
            rate = gate[:, chunk].to(stack.dtype).mean((1, 2))[:, None]
            d_gate[:, chunk] = ((d_gradient * steps[:, i]).sum(-1) / chunk_size)[:, None, None]
            d_step = upstream(d_steps, i).addcmul(d_gradient, rate)
        *d_chunk, d_weights = _gradient_backward(
            weights, _tokens(weights, chunk, k, v, lr0, lr1, lr2), d_gradient, widths
        )
        for whole, part in zip(d_tokens, d_chunk):
            whole[:, chunk] = part
        d_weights += upstream(d_stack, i)
        if not prenorm:
            d_weights += d_total
    return (
        d_weights,
        d_sum if prenorm else stack.new_empty(0),
        d_step if gate is not None else stack.new_empty(0),
        d_norms,
        *(d.to(x.dtype) for d, x in zip(d_tokens, (k, v, lr0, lr1, lr2))),
        stack.new_empty(0) if gate is None else d_gate.to(gate.dtype),
    )


def _tokens(weights: torch.Tensor, chunk: slice, *tokens: torch.Tensor) -> Tokens:
    return Tokens(*(x[:, chunk].to(weights.dtype) for x in tokens))


def _gradient(weights: torch.Tensor, x: Tokens, widths: Widths) -> torch.Tensor:
    """The gradient of ``sum_t <f(k_t), v_t>`` with every token's rates, packed: ``[N, P]``."""
    w02, w1 = widths.stacked(weights)
    y0, y2 = (x.k @ w02.mT).split(widths.dh, dim=-1)
    g = x.v @ w1
    s = y0.sigmoid()
    a = y0 * s
    d02 = torch.cat([x.lr0 * g * y2 * (s + a * (1 - s)), x.lr2 * g * a], dim=-1)
    g02 = d02.mT @ x.k
    g1 = (x.lr1 * x.v).mT @ (a * y2)
    return torch.cat([g02.flatten(1), g1.flatten(1)], dim=-1)


def _gradient_backward(
    weights: torch.Tensor,  # [N, P]
    x: Tokens,
    d_gradient: torch.Tensor,  # [N, P]
    widths: Widths,
) -> tuple[torch.Tensor, ...]:
    """Gradients of k, v, lr0, lr1, lr2 and, last, of the weights."""
    w02, w1 = widths.stacked(weights)
    c02, c1 = widths.stacked(d_gradient)
    y0, y2 = (x.k @ w02.mT).split(widths.dh, dim=-1)
    g = x.v @ w1
    e0, e2 = (x.k @ c02.mT).split(widths.dh, dim=-1)
    e1 = x.v @ c1
    s = y0.sigmoid()
    a = y0 * s
    slope = s + a * (1 - s)  # silu'
    curvature = s * (1 - s) * (2 + y0 * (1 - 2 * s))  # silu''
    gy2 = g * y2
    d_lr0 = (e0 * gy2 * slope).sum(-1, keepdim=True)
    d_lr1 = (e1 * y2 * a).sum(-1, keepdim=True)
    d_lr2 = (e2 * g * a).sum(-1, keepdim=True)
    e0, e1, e2 = e0 * x.lr0, e1 * x.lr1, e2 * x.lr2
    d_g = e0 * y2 * slope + e2 * a
    d_y = torch.cat(
        [(e2 * g + e1 * y2) * slope + e0 * gy2 * curvature, e0 * g * slope + e1 * a], dim=-1
    )  # of y0 | y2
    d02 = torch.cat([x.lr0 * gy2 * slope, x.lr2 * g * a], dim=-1)
    d_k = d02 @ c02 + d_y @ w02
    d_v = (x.lr1 * y2 * a) @ c1.mT + d_g @ w1.mT
    d_weights = torch.cat([(d_y.mT @ x.k).flatten(1), (x.v.mT @ d_g).flatten(1)], dim=-1)
    return d_k, d_v, d_lr0, d_lr1, d_lr2, d_weights


def _norm_backward(
    applied: torch.Tensor,  # [N, P], the result
    divisor: torch.Tensor,  # [N, R], the norms r of the rows before
    norms: torch.Tensor,  # [N, R], the norms n that they are brought to
    d_applied: torch.Tensor,  # [N, P]
    widths: Widths,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through ``U -> U / (r + e) * n``: the gradients of U and of n.

    U itself is not kept: its direction ``U / (r + e)`` is the result over n. A row whose norm n is 0 stays 0
    and passes no gradient.
    """
    shrunk = divisor + NORM_EPS
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-30), 0.0)
    along = widths.row_dots(d_applied, applied) * inverse  # <dW, U / (r + e)>
    d_total = widths.scale_rows(d_applied, norms / shrunk)
    d_total -= widths.scale_rows(applied, along / divisor.clamp_min(1e-30))
    return d_total, along


def _per_matrix(function, widths: Widths, *flat: torch.Tensor) -> torch.Tensor:
    """``function`` of w0, w1 and w2 of each argument apart, packed again."""
    return widths.pack(*(function(*matrices) for matrices in zip(*(widths.unpack(x) for x in flat))))


# ---- apply -------------------------------------------------------------------------------------------------


def apply_forward(
    stack: torch.Tensor,  # [N, S, P]
    q: torch.Tensor,  # [N, L, dk]
    widths: Widths,
    chunk_size: int,
    offset: int,
) -> torch.Tensor:  # [N, L, dv]
    """Token t is read with entry ``(offset + t) // chunk_size``."""
    o = q.new_empty(*q.shape[:2], widths.dv)
    for weights, start, end in _pieces(stack, q.shape[1], chunk_size, offset):
        w02, w1 = widths.stacked(weights)
        x = _by_chunk(q[:, start:end], weights).to(stack.dtype)
        y0, y2 = (x @ w02.mT).split(widths.dh, dim=-1)
        o[:, start:end] = (torch.nn.functional.silu(y0).mul_(y2) @ w1.mT).flatten(1, 2)
    return o


def apply_backward(
    stack: torch.Tensor,  # [N, S, P]
    q: torch.Tensor,  # [N, L, dk]
    d_o: torch.Tensor,  # [N, L, dv]
    widths: Widths,
    chunk_size: int,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the stack ``[N, S, P]`` and of q."""
    d_stack, d_q = torch.zeros_like(stack), torch.empty_like(q)
    for weights, start, end in _pieces(stack, q.shape[1], chunk_size, offset):
        w02, w1 = widths.stacked(weights)
        x = _by_chunk(q[:, start:end], weights).to(stack.dtype)
        d = _by_chunk(d_o[:, start:end], weights).to(stack.dtype)
        y0, y2 = (x @ w02.mT).split(widths.dh, dim=-1)
        s = y0.sigmoid()
        a = y0 * s
        d_hidden = d @ w1
        d_y = torch.cat([d_hidden * y2 * (s + a * (1 - s)), d_hidden * a], dim=-1)
        d_q[:, start:end] = (d_y @ w02).flatten(1, 2)
        entry = (offset + start) // chunk_size
        into02, into1 = widths.stacked(d_stack[:, entry : entry + weights.shape[1]])
        into02 += d_y.mT @ x
        into1 += d.mT @ (a * y2)
    return d_stack, d_q


def _pieces(
    stack: torch.Tensor, tokens: int, chunk_size: int, offset: int
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Runs of tokens that can be read in one batch: a chunk already begun, all whole chunks, a chunk's start.

    Yields the entries ``[N, s, P]`` and the range of tokens, s chunks of equal length.
    """
    start = 0
    while start < tokens:
        entry, inside = divmod(offset + start, chunk_size)
        whole = (tokens - start) // chunk_size if inside == 0 else 0
        length = whole * chunk_size if whole else min(chunk_size - inside, tokens - start)
        yield stack[:, entry : entry + max(whole, 1)], start, start + length
        start += length


def _by_chunk(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``[N, s c, D] -> [N, s, c, D]`` for entries ``[N, s, P]``."""
    return x.unflatten(1, (weights.shape[1], -1))
