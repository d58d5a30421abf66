"""The linear head on row chunks, in PyTorch: at most one chunk of logits is alive, never ``[N, V]``.

Both paths walk over the rows in chunks: one matrix product gives a chunk of logits ``[R, V]``, the row
arithmetic runs over blocks of it that stay in the cache, and everything else is small.

*General* (`forward`, `backward`): any of log-prob, entropy, lse, a drawn token; the backward recomputes the
logits of those rows whose upstream gradient is not zero. 4 products in all.
*Dense* (`loss_and_gradients`): the weighted sum of the rows' losses with the entropies off the same pass and
the gradients taken at once, logits turned into their own gradient in place. 3 products in all.

The row arithmetic. With ``m = max q``, ``d = q - m`` and ``p = exp(d)`` (as a power of two, which takes a third of
the time of MKL's exp), nothing needs another exponential or logarithm of a whole row:

    c      = sum p                p / c is normalised to an ulp
    log_s  = log c                log sum exp(d) >= 0, since the largest element of p is 1
    lse    = m + log_s
    log p  = d - log_s
    H      = log_s - sum(p d) / c         both terms >= 0, and neither knows m: shifts cost no accuracy

    dL/dq  = g_lp (1_y - p) - g_H p (log p + H) + g_lse p

Where the vocabulary is cut over a process group, ``m``, ``log_s`` and the mean of ``d`` are those of this rank's
slice until `partials.py` joins them, and the backward takes ``log p = q - lse`` from the joined lse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from refine_kernels.linear_logprob.partials import Partials, VocabGroup, combine, finish
from refine_kernels.linear_logprob.philox import gumbel
from refine_kernels.precision import accumulation_dtype

# Rows of a product: 16 MiB of logits, or 256 rows where that is more (with 128 the products are 8% slower).
CHUNK_BYTES = 16 << 20
MIN_CHUNK_ROWS = 256
# Rows of a block of row arithmetic: 1, 2 and 8 MiB differ by a hundredth; larger ones start fewer parallel loops.
BLOCK_BYTES = 2 << 20
# Elements whose noise is drawn at once. ATen keeps loops of up to 32768 elements on one thread, and the
# generator is a hundred short loops: on two idle cores two threads would be 1.8 times as fast, but on busy
# ones they wait for each other at the end of every loop (90 times as slow at a load of 7).
NOISE_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class Head:
    """``q = softcap(x W^T + b) / temperature`` and the arithmetic it is computed in."""

    weight: torch.Tensor  # [V, D] in the dtype that products take
    bias: torch.Tensor | None  # [V] in the dtype that they add up in
    softcap: float | None
    temperature: float

    def scaled_logits_(
        self,
        q: torch.Tensor,  # [R, V] out
        x: torch.Tensor,  # [R, D]
    ) -> None:
        torch.mm(x, self.weight.t(), out=q)
        if self.bias is not None:
            q.add_(self.bias)
        if self.softcap is not None:
            q.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1:
            q.div_(self.temperature)


class Rows(NamedTuple):
    """What a block of rows is known by after its softmax. All ``[B, 1]``."""

    m: torch.Tensor  # max q
    log_s: torch.Tensor  # log sum exp(q - m)
    c: torch.Tensor  # sum of p

    def within(
        self,
        lse: torch.Tensor,  # [B, 1]
    ) -> Rows:
        """The same row as a part of one with this lse; a part that weighs nothing has an infinite c."""
        log_s = lse - self.m
        return Rows(self.m, log_s, self.c * (log_s - self.log_s).exp())


class Upstream(NamedTuple):
    """What arrives for each row: dL/d(logprob), dL/d(entropy), dL/d(lse). All ``[N]``."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor | None
    row_entropy: torch.Tensor | None  # the entropies themselves, where dL/d(entropy) is there

    def at(
        self,
        rows: torch.Tensor,  # [B]
    ) -> Upstream:  # [B] each
        return Upstream(*(None if g is None else g[rows] for g in self))

    def live(self) -> torch.Tensor:  # [N]
        """Which rows have a gradient at all."""
        live = self.logprob != 0
        for g in (self.entropy, self.lse):
            live = live if g is None else live | (g != 0)
        return live


class Gradients:
    """dx, dW and db, each only where needed, accumulated over chunks in ``dtype``; a row of dx is final at once and
    may be kept in another, ``x_dtype``."""

    def __init__(
        self,
        x: torch.Tensor,  # [N, D]
        head: Head,
        needs: tuple[bool, bool, bool],
        dtype: torch.dtype,
        x_dtype: torch.dtype | None = None,
    ) -> None:
        w = head.weight
        self.head = head
        self.needs_x, self.needs_weight, self.needs_bias = needs
        self.x = w.new_zeros(x.shape if self.needs_x else 0, dtype=x_dtype or dtype)  # [N, D]
        self.weight = w.new_zeros(w.shape if self.needs_weight else 0, dtype=dtype)  # [V, D]
        self.bias = w.new_zeros(w.shape[0] if self.needs_bias else 0, dtype=dtype)  # [V]
        self.first = True

    def add(
        self,
        dz: torch.Tensor,  # [R, V]
        x: torch.Tensor,  # [R, D]
        rows: torch.Tensor,  # [R]
    ) -> None:
        if self.needs_x:
            self.x[rows] = dz @ self.head.weight
        if self.needs_weight:
            self.weight.addmm_(dz.t(), x, beta=0 if self.first else 1)
            self.first = False
        if self.needs_bias:
            self.bias += dz.sum(0)


def head_of(
    x: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    softcap: float | None,
    temperature: float = 1.0,
) -> Head:
    """The head in the dtype of the arithmetic; a half-precision weight is converted once per call."""
    dtype = accumulation_dtype(x, weight)
    bias = None if bias is None else bias.to(dtype)
    return Head(weight.to(dtype).contiguous(), bias, softcap, temperature)


def forward(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor | None,  # [N]; None: the drawn token
    seed: torch.Tensor | None,  # [N]
    *,
    ignore_index: int,
    need_logprob: bool,
    need_entropy: bool,
    need_lse: bool,
    sample: bool,
    greedy: bool,
    group: VocabGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy, lse and token of every row, each ``[N]``, or ``[0]`` where not needed."""
    N, V = x.shape[0], head.weight.shape[0]
    start = 0 if group is None else group.start
    columns = torch.arange(start, start + V, device=x.device)

    def new(need: bool, **dtype: torch.dtype) -> torch.Tensor | None:
        return head.weight.new_empty(N, **dtype) if need else None

    part = Partials(
        new(True),
        new(True),
        new(need_entropy),
        new(need_logprob),
        new(sample),
        new(sample, dtype=torch.int64),
    )
    for rows, _, q, d in _chunks(x, head, torch.arange(N, device=x.device)):
        for rows_b, q_b, d_b in _blocks(rows, q, d):
            if sample:
                part.best[rows_b], drawn = q_b.max(1) if greedy else _draw(q_b, seed[rows_b], columns)
                part.token[rows_b] = drawn + start
            if need_logprob:
                y = drawn if target is None else target[rows_b] - start
                held = (y >= 0) & (y < V)
                q_y = q_b.gather(1, torch.where(held, y, 0)[:, None])[:, 0]
                part.q_y[rows_b] = torch.where(held, q_y, -torch.inf)
            row = _softmax_(q_b, d_b)
            part.m[rows_b], part.log_s[rows_b] = row.m[:, 0], row.log_s[:, 0]
            if need_entropy:
                part.e[rows_b] = _mean(q_b, d_b, row)[:, 0]
    if group is not None:
        part = combine(group.gather(part), drawn=target is None)
    return finish(part, target, ignore_index, need_lse)


def backward(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor | None,  # [N]
    upstream: Upstream,
    *,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
    lse: torch.Tensor | None = None,  # [N], beside group
    group: VocabGroup | None = None,
) -> Gradients:
    """Gradients of the general path. Rows whose upstream gradients are all zero cost nothing."""
    target, upstream = without_ignored(target, upstream, ignore_index)
    if group is not None:
        target = target - group.start
    gradients = Gradients(x, head, needs, head.weight.dtype)
    for rows, x_c, q, d in _chunks(x, head, upstream.live().nonzero()[:, 0]):
        for rows_b, q_b, d_b in _blocks(rows, q, d):
            row = _softmax_(q_b, d_b)
            if group is not None:
                row = row.within(lse[rows_b, None])
            _gradient_(q_b, d_b, row, target[rows_b], upstream.at(rows_b), head)
        gradients.add(q, x_c, rows)
    if group is not None and gradients.needs_x:
        group.sum_(gradients.x)
    return gradients


def loss_and_gradients(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor,  # [N]
    row_scale: torch.Tensor,  # [N]
    *,
    ignore_index: int,
    need_entropy: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """``sum_r row_scale[r] * -log p_r[target[r]]``, the entropies ``[N]``, and the loss's gradients.

    Rows that are ignored or have scale zero cost one product instead of three where entropies are asked
    for, and nothing where they are not.
    """
    target, upstream = without_ignored(target, Upstream(-row_scale, None, None, None), ignore_index)
    live = upstream.live()
    logprob = torch.zeros_like(upstream.logprob)  # [N]
    entropy = torch.empty_like(logprob) if need_entropy else logprob.new_empty(0)
    gradients = Gradients(x, head, needs, head.weight.dtype)

    for rows, x_c, q, d in _chunks(x, head, live.nonzero()[:, 0]):
        for rows_b, q_b, d_b in _blocks(rows, q, d):
            y = target[rows_b]
            q_y = q_b.gather(1, y[:, None])  # [B, 1]
            row = _softmax_(q_b, d_b)
            logprob[rows_b] = (q_y - row.m - row.log_s)[:, 0]
            if need_entropy:
                # without a softcap nobody needs d after this
                entropy[rows_b] = (row.log_s - _mean(q_b, d_b, row, into_d=head.softcap is None))[:, 0]
            if any(needs):
                _gradient_(q_b, d_b, row, y, upstream.at(rows_b), head)
        gradients.add(q, x_c, rows)

    if need_entropy:
        for rows, _, q, d in _chunks(x, head, (~live).nonzero()[:, 0]):
            for rows_b, q_b, d_b in _blocks(rows, q, d):
                row = _softmax_(q_b, d_b)
                entropy[rows_b] = (row.log_s - _mean(q_b, d_b, row))[:, 0]
    return (upstream.logprob * logprob).sum(), entropy, gradients


def _chunks(
    x: torch.Tensor,  # [N, D]
    head: Head,
    rows: torch.Tensor,  # [n] which of the N
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each chunk its rows [R], their x [R, D], scaled logits [R, V], and scratch for one block [B, V]."""
    V = head.weight.shape[0]
    row_bytes = V * head.weight.itemsize
    R = min(max(MIN_CHUNK_ROWS, CHUNK_BYTES // row_bytes), len(rows))
    B = min(max(1, BLOCK_BYTES // row_bytes), R)
    q, d = head.weight.new_empty(R, V), head.weight.new_empty(B, V)
    for start in range(0, len(rows), max(R, 1)):
        chunk = rows[start : start + R]
        x_c = x[chunk].to(head.weight.dtype)
        q_c = q[: len(chunk)]
        head.scaled_logits_(q_c, x_c)
        yield chunk, x_c, q_c, d


def _blocks(
    rows: torch.Tensor,  # [R]
    q: torch.Tensor,  # [R, V]
    d: torch.Tensor,  # [B, V]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same chunk in blocks of at most B rows: rows, logits, scratch."""
    B = max(len(d), 1)
    for start in range(0, len(rows), B):
        q_b = q[start : start + B]
        yield rows[start : start + B], q_b, d[: len(q_b)]


def _softmax_(
    q: torch.Tensor,  # [B, V] logits -> exp(q - m): probabilities times c
    d: torch.Tensor,  # [B, V] out: q - m
) -> Rows:
    m = q.amax(1, keepdim=True)
    torch.sub(q, m, out=d)
    torch.mul(d, math.log2(math.e), out=q).exp2_()
    c = q.sum(1, keepdim=True)
    return Rows(m, c.log(), c)


def _mean(
    p: torch.Tensor,  # [B, V] exp(q - m): probabilities times c
    d: torch.Tensor,  # [B, V]
    row: Rows,
    into_d: bool = False,
) -> torch.Tensor:  # [B, 1]
    """The mean of d under p: the entropy is log_s less it. ``into_d``: d is used up."""
    return torch.mul(p, d, out=d if into_d else None).sum(1, keepdim=True) / row.c


def _gradient_(
    p: torch.Tensor,  # [B, V] exp(q - m): probabilities times c -> dL/d(x W^T + b)
    d: torch.Tensor,  # [B, V] used up
    row: Rows,
    y: torch.Tensor,  # [B]; outside [0, V) where another rank holds it
    g: Upstream,  # [B] each
    head: Head,
) -> None:
    g = Upstream(*(None if value is None else value[:, None] for value in g))
    # dL/dq = p (g_lse - g_lp - g_H (log p + H)) + g_lp 1_y, with log p = d - log_s
    factor = -g.logprob
    if g.lse is not None:
        factor = factor + g.lse
    if g.entropy is not None:
        factor = torch.addcmul(factor + g.entropy * (row.log_s - g.row_entropy), g.entropy, d, value=-1)
    p.mul_(factor.div_(row.c))
    held = ((y >= 0) & (y < p.shape[1]))[:, None]
    p.scatter_add_(1, torch.where(held, y[:, None], 0), torch.where(held, g.logprob, 0.0))
    if head.softcap is not None:
        # q T / cap = tanh(.), and its derivative is 1 - tanh^2; the cap itself cancels
        d.add_(row.m).mul_(head.temperature / head.softcap)
        p.addcmul_(p, d.square_(), value=-1)
    if head.temperature != 1:
        p.div_(head.temperature)


def without_ignored(
    target: torch.Tensor | None,  # [N]
    upstream: Upstream,
    ignore_index: int,
) -> tuple[torch.Tensor, Upstream]:
    """Ignored rows get target 0 and a log-prob gradient of zero."""
    if target is None:
        return torch.zeros_like(upstream.logprob, dtype=torch.int64), upstream
    valid = target != ignore_index
    g = torch.where(valid, upstream.logprob, 0.0)
    return torch.where(valid, target, 0), upstream._replace(logprob=g)


def _draw(
    q: torch.Tensor,  # [B, V]
    seed: torch.Tensor,  # [B]
    columns: torch.Tensor,  # [V], of the whole vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:  # [B] each
    """The largest sum of logit and noise, and where it is."""
    rows = max(1, NOISE_ELEMENTS // q.shape[1])
    parts = zip(q.split(rows), seed[:, None].split(rows))
    best = [(q_part + gumbel(seed_part, columns)).max(1) for q_part, seed_part in parts]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
