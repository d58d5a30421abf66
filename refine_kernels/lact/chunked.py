"""The PyTorch path: large matrix products with the elementwise work between them, and a backward by hand.

*Scan*: only the update is sequential. It leaves the weights of every chunk, which is all that its backward needs
besides its inputs: products with keys and values are run again. *Apply*: all whole chunks in one batch, forward
and backward. Arithmetic is float32 (float64 for float64 inputs) whatever the inputs' dtype.

Both go block by block, so few tokens (or rows, where chunks are small) at a time that a dozen arrays of a
block's hidden units stay in a core's cache between one elementwise operation and the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from refine_kernels.lact.layout import Widths
from refine_kernels.lact.newton_schulz import newton_schulz, newton_schulz_backward
from refine_kernels.lact.reference import NORM_EPS

BLOCK = 1 << 16  # hidden units, tokens x dh, that are worked on at a time


class Tokens(NamedTuple):
    """What an update reads of its chunk."""

    k: torch.Tensor  # [N, C, dk]
    v: torch.Tensor  # [N, C, dv]
    lr0: torch.Tensor  # [N, C, 1]
    lr1: torch.Tensor  # [N, C, 1]
    lr2: torch.Tensor  # [N, C, 1]

    def block(self, rows: slice, tokens: slice, dtype: torch.dtype) -> Tokens:
        """Some tokens of some rows, as arithmetic wants them."""
        return Tokens(*(x[rows, tokens].to(dtype) for x in self))


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
        step = _gradient(weights, Tokens(*(x[:, chunk] for x in (k, v, lr0, lr1, lr2))), widths)
        if gate is not None:
            rate = gate[:, chunk].to(step.dtype).mean((1, 2))[:, None]
            step.addcmul_(steps[:, i], rate)
        if keep_steps:
            steps[:, i + 1] = step
        if use_muon:
            step = _per_matrix(newton_schulz, widths, step)
        total = torch.add(step, weights if unnormalised is None else sums[:, i], out=stack[:, i + 1])
        if unnormalised is not None:
            sums[:, i + 1] = total
        divisors[:, i + 1] = widths.row_norms(total)
        widths.scale_rows_(total, norms / (divisors[:, i + 1] + NORM_EPS))
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

    d_tokens = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, lr0, lr1, lr2)]
    for d in d_tokens:
        d[:, updates * chunk_size :] = 0.0
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
        tokens = Tokens(*(x[:, chunk] for x in (k, v, lr0, lr1, lr2)))
        d_weights = _gradient_backward(
            weights, tokens, d_gradient, Tokens(*(d[:, chunk] for d in d_tokens)), widths
        )
        d_weights += upstream(d_stack, i)
        if not prenorm:
            d_weights += d_total
    return (
        d_weights,
        d_sum if prenorm else stack.new_empty(0),
        d_step if gate is not None else stack.new_empty(0),
        d_norms,
        *d_tokens,
        stack.new_empty(0) if gate is None else d_gate.to(gate.dtype),
    )


def _blocks(rows: int, tokens: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of rows and of tokens that cover all, some rows whole or a part of one."""
    fitting = max(BLOCK // width, 64)
    some_rows, some_tokens = max(fitting // tokens, 1), min(fitting, tokens)
    for n in range(0, rows, some_rows):
        for t in range(0, tokens, some_tokens):
            yield slice(n, min(n + some_rows, rows)), slice(t, min(t + some_tokens, tokens))


def _gradient(weights: torch.Tensor, x: Tokens, widths: Widths) -> torch.Tensor:
    """The gradient of ``sum_t <f(k_t), v_t>`` with every token's rates, packed: ``[N, P]``."""
    found = weights.new_empty(weights.shape)
    (w02, w1), (g02, g1) = widths.stacked(weights), widths.stacked(found)
    for n, t in _blocks(*x.k.shape[:2], widths.dh):
        b = x.block(n, t, weights.dtype)
        d, h = _hidden(b.k, b.v, w02[n], w1[n], widths.dh)
        d0, d2 = d.split(widths.dh, dim=-1)
        d0.mul_(b.lr0)
        d2.mul_(b.lr2)
        h.mul_(b.lr1)
        _accumulate(g02[n], d, b.k, t)
        _accumulate(g1[n], b.v, h, t)
    return found


def _hidden(
    x: torch.Tensor,  # [n, t, dk]
    u: torch.Tensor,  # [n, t, dv]
    w02: torch.Tensor,  # [n, 2 dh, dk]
    w1: torch.Tensor,  # [n, dv, dh]
    dh: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``<f(x), u>`` at y0 | y2 ``[n, t, 2 dh]``, and the hidden units ``[n, t, dh]``."""
    y = x @ w02.mT
    y0, y2 = y.split(dh, dim=-1)
    g = u @ w1
    s = y0.sigmoid()
    a = y0 * s
    h = a * y2
    slope = s.addcmul_(s, a, value=-1).add_(a)  # silu' = s + a (1 - s)
    torch.mul(y2, slope, out=y0).mul_(g)
    torch.mul(a, g, out=y2)
    return y, h


def _store(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *second: torch.Tensor) -> None:
    """``into = a b``, or the sum of two such products, without a copy where dtypes agree."""
    found = torch.bmm(a, b, out=into if into.dtype == a.dtype else None)
    if second:
        found.baddbmm_(*second)
    if found is not into:
        into.copy_(found)


def _accumulate(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, tokens: slice) -> None:
    """``into += a^T b``, or the first block's product in place of what was there."""
    into.baddbmm_(a.mT, b, beta=0 if tokens.start == 0 else 1)


def _gradient_backward(
    weights: torch.Tensor,  # [N, P]
    x: Tokens,
    d_gradient: torch.Tensor,  # [N, P]
    d_x: Tokens,  # written
    widths: Widths,
) -> torch.Tensor:
    """Gradients of the tokens, written into ``d_x``, and of the weights ``[N, P]``."""
    d_weights = weights.new_empty(weights.shape)
    (w02, w1), (c02, c1) = widths.stacked(weights), widths.stacked(d_gradient)
    into02, into1 = widths.stacked(d_weights)
    for n, t in _blocks(*x.k.shape[:2], widths.dh):
        b = x.block(n, t, weights.dtype)
        y, e = b.k @ w02[n].mT, b.k @ c02[n].mT
        (y0, y2), (e0, e2) = y.split(widths.dh, dim=-1), e.split(widths.dh, dim=-1)
        g, e1 = b.v @ w1[n], b.v @ c1[n]
        s = y0.sigmoid()
        a = y0 * s
        # silu'' = s (1 - s) (2 + y0 - 2 a), silu' = s + a (1 - s)
        curvature = torch.sub(y0, a, alpha=2).add_(2).mul_(s.addcmul(s, s, value=-1))
        slope = s.addcmul_(s, a, value=-1).add_(a)
        # what the forward made of the tokens, before its rates
        h, d2 = y2 * a, g * a
        d0 = torch.mul(g, slope, out=y0).mul_(y2)
        for d_rate, gradient, value in ((d_x.lr0, e0, d0), (d_x.lr1, e1, h), (d_x.lr2, e2, d2)):
            d_rate[n, t] = (gradient * value).sum(-1, keepdim=True)
        e0.mul_(b.lr0)
        e1.mul_(b.lr1)
        e2.mul_(b.lr2)
        through = e0 * slope
        d_g = (e2 * a).addcmul_(through, y2)
        d_y0 = (e2 * g).addcmul_(e1, y2).mul_(slope).addcmul_(e0.mul_(g).mul_(y2), curvature)
        torch.mul(through, g, out=e2).addcmul_(e1, a)
        e0.copy_(d_y0)  # e is now the gradient at y0 | y2
        d0.mul_(b.lr0)
        torch.mul(d2, b.lr2, out=y2)  # y is now what the forward multiplied k with
        h.mul_(b.lr1)
        _store(d_x.k[n, t], y, c02[n], e, w02[n])
        _store(d_x.v[n, t], h, c1[n].mT, d_g, w1[n].mT)
        _accumulate(into02[n], e, b.k, t)
        _accumulate(into1[n], b.v, d_g, t)
    return d_weights


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
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(1e-30), 0.0)
    along = widths.row_dots(d_applied, applied) * inverse  # <dW, U / (r + e)>
    d_total = widths.scale_rows_(d_applied.clone(), norms / (divisor + NORM_EPS))
    d_total -= widths.scale_rows_(applied.clone(), along / divisor.clamp_min(1e-30))
    return d_total, along


def _per_matrix(function, widths: Widths, *flat: torch.Tensor) -> torch.Tensor:
    """``function`` of the matrices of each argument, packed again."""
    return widths.from_batches([function(*batch) for batch in zip(*(widths.batches(x) for x in flat))])


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
    for weights, (x, into) in _pieces(stack, (q, o), chunk_size, offset):
        w02, w1 = widths.stacked(weights)
        for n, t in _blocks(*x.shape[:2], widths.dh):
            y0, y2 = (x[n, t].to(stack.dtype) @ w02[n].mT).split(widths.dh, dim=-1)
            _store(into[n, t], torch.nn.functional.silu(y0).mul_(y2), w1[n].mT)
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
    d_stack, d_q = stack.new_empty(stack.shape), q.new_empty(q.shape)
    d_stack[:, : offset // chunk_size] = 0.0
    d_stack[:, (offset + q.shape[1] - 1) // chunk_size + 1 :] = 0.0
    pieces = _pieces(stack, (q, d_o, d_q), chunk_size, offset)
    gradients = _pieces(d_stack, (), chunk_size, offset, tokens=q.shape[1])
    for (weights, (x, d, into)), (d_weights, _) in zip(pieces, gradients):
        (w02, w1), (into02, into1) = widths.stacked(weights), widths.stacked(d_weights)
        for n, t in _blocks(*x.shape[:2], widths.dh):
            b_x, b_d = x[n, t].to(stack.dtype), d[n, t].to(stack.dtype)
            d_y, h = _hidden(b_x, b_d, w02[n], w1[n], widths.dh)
            _store(into[n, t], d_y, w02[n])
            _accumulate(into02[n], d_y, b_x, t)
            _accumulate(into1[n], b_d, h, t)
    return d_stack, d_q


def _pieces(
    stack: torch.Tensor,  # [N, S, P]
    over_tokens: tuple[torch.Tensor, ...],  # each [N, L, D]
    chunk_size: int,
    offset: int,
    tokens: int | None = None,
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """What can be read in one batch: a chunk already begun of all rows, all whole chunks of a row, a chunk's start.

    Yields views: entries ``[n, P]`` and of each tensor over tokens ``[n, c, D]``.
    """
    start, tokens = 0, over_tokens[0].shape[1] if tokens is None else tokens
    while start < tokens:
        entry, inside = divmod(offset + start, chunk_size)
        whole = (tokens - start) // chunk_size if inside == 0 else 0
        if whole > 1:
            end = start + whole * chunk_size
            for n in range(len(stack)):
                parts = [x[n, start:end].unflatten(0, (whole, chunk_size)) for x in over_tokens]
                yield stack[n, entry : entry + whole], parts
        else:
            end = min(start + chunk_size - inside, tokens)
            yield stack[:, entry], [x[:, start:end] for x in over_tokens]
        start = end
