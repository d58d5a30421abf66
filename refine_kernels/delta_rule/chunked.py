"""The delta rule over chunks of tokens, in PyTorch, with its backward written out: the fast path on a CPU.

One head, one chunk of C tokens, S the state [K, V] before it. With ``G`` the running sum of ``g`` inside the
chunk (0 without decay) and ``D_ij = exp(G_i - G_j)`` for ``i >= j``, the C sequential updates are one
triangular system (the WY form), because each ``u_i`` meets the earlier ones in inner products alone:

    L = strictly_lower(D * K K^T)        P = lower(D * scale Q K^T)         [C, C]
    M = (I + diag(beta) L)^-1            unit lower triangular              [C, C]
    R = V - e^G K S                      what S does not yet say about K    [C, V]
    U = M diag(beta) R                   the writes                         [C, V]
    O = e^G scale Q S + P U              the reads                          [C, V]
    S' = e^G_C S + (e^(G_C - G) K)^T U   the state after                    [K, V]

Only ``R -> U -> S'`` has to run chunk after chunk; what else reads S or dS' does so beside it, while they are in
the cache. The rest runs over the chunks of a segment (64 blocks, so that what is worked on stays in the cache
too) as one batched product.

Backward, given ``dO`` and ``dS'``; M, P, U and S are computed again from the inputs:

    dU = P^T dO + e^(G_C - G) K dS'      dR' = M^T dU                       from the last chunk to the first
    dS = e^G_C dS' + (scale Q)^T e^G dO - K^T e^G beta dR'
    dV = beta dR'        dP = dO U^T        dA = -dR' U^T      of A = diag(beta) L and R' = diag(beta) R
    dbeta = rowsum(dR' * R) + rowsum(dA * L)
    dQ / scale = e^G dO S^T + (D * dP) K
    dK = -e^G beta dR' S^T + e^(G_C - G) U dS'^T + (E + E^T) K + (D * dP)^T scale Q      E = beta D * dA
    dG: every factor e^G, e^(G_C - G), D, e^G_C above contributes <its gradient, its value>

Queries and keys lie stacked, ``X = [scale Q; K]``, and so do the gradients of what they read from S and from
one another: each line above that names both is one product.

Kept from forward to backward: the inputs, and the state before every segment but a sequence's first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from refine_kernels.delta_rule.reference import L2_NORM_EPS
from refine_kernels.precision import accumulation_dtype

CHUNK = 32  # tokens of a chunk; what is left at a sequence's end is a shorter chunk of its own
SEGMENT_BLOCKS = 64  # blocks (chunks * rows * heads) worked on at a time, but never less than two chunks


def forward(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    g: torch.Tensor | None,  # [B, T, HV]
    initial_state: torch.Tensor | None,  # [N, HV, K, V]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
    scale: float,
    l2norm: bool,
    output_final_state: bool,
    state_stride: int,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(o, final_state, states, checkpoints, kept)``, what is not asked for with length 0 (``state_stride`` 0: no
    states).

    Returns:
        o: [B, T, HV, V] in q's dtype.
        final_state: [N, HV, K, V]; states: [N, ceil(longest / state_stride), HV, K, V].
        checkpoints: [checkpoint_count, B, HV, K, V], the states that ``backward`` starts its segments from.
        kept: [kept_count], what else ``backward`` wants to be handed: nothing here.
    """
    (b, _, h, vd), kd = v.shape, q.shape[-1]
    sequences = _sequences(q, cu_seqlens)
    o = q.new_empty(v.shape)
    new_states = q.new_empty(0, dtype=accumulation_dtype(q)).new_zeros
    most = -(-max(end - begin for begin, end, _ in sequences) // state_stride) if state_stride else 0
    states = new_states(b if cu_seqlens is None else len(sequences), most, h, kd, vd)
    checkpoints = new_states(checkpoint_count(v, cu_seqlens) if for_backward else 0, b, h, kd, vd)
    unused = iter(checkpoints)

    finals = []
    for begin, end, owner in sequences:
        state = new_states(b * h, kd, vd)
        if initial_state is not None:
            state.copy_(_state_of(initial_state, owner, q))
        for start, n, c in _segments(begin, end, b * h):
            if for_backward and start > begin:
                next(unused).copy_(state.view(b, h, kd, vd))
            tokens = slice(start, start + n * c)
            seg = _prepare(*(x if x is None else x[:, tokens] for x in (q, k, beta, g)), c, scale, l2norm)
            first, step, at = _boundaries(start - begin, n, state_stride)
            asked = [None] * n
            for j, i in enumerate(range(first, n, step)):
                asked[i] = states[owner, at + j]
            out = _read_and_write(seg, v[:, tokens], state, asked, output_final_state or tokens.stop < end)
            _store(out, o[:, tokens], c)
        finals.append(state)
    if not output_final_state:
        final_state = new_states(0, h, kd, vd)
    else:
        final_state = (finals[0] if len(finals) == 1 else torch.cat(finals)).view(-1, h, kd, vd)
    return o, final_state, states, checkpoints, q.new_empty(0)


def backward(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    g: torch.Tensor | None,  # [B, T, HV]
    initial_state: torch.Tensor | None,  # [N, HV, K, V]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
    checkpoints: torch.Tensor,  # [checkpoint_count, B, HV, K, V]
    kept: torch.Tensor,  # [kept_count]
    d_o: torch.Tensor | None,  # [B, T, HV, V]
    d_final: torch.Tensor | None,  # [N, HV, K, V]
    d_states: torch.Tensor | None,  # [N, ceil(longest / state_stride), HV, K, V]
    scale: float,
    l2norm: bool,
    state_stride: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, beta, g (length 0 without g) and of the initial state [N, HV, K, V]."""
    (b, _, h, vd), kd = v.shape, q.shape[-1]
    dq, dk, dv, dbeta = (x.new_empty(x.shape) for x in (q, k, v, beta))
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    if d_o is None:
        d_o = q.new_zeros(()).expand(v.shape)
    new_zeros = q.new_empty(0, dtype=accumulation_dtype(q)).new_zeros

    used, d_initial = 0, []
    for begin, end, owner in _sequences(q, cu_seqlens):
        initial = new_zeros(b * h, kd, vd) if initial_state is None else _state_of(initial_state, owner, q)
        d_state = None if d_final is None else _state_of(d_final, owner, q)
        segments = list(_segments(begin, end, b * h))
        more = max(len(segments) - 1, 0)
        starts = [initial, *checkpoints[used : used + more].flatten(1, 2)]
        used += more
        for (start, n, c), state in reversed(list(zip(segments, starts))):
            tokens = slice(start, start + n * c)
            seg = _prepare(*(x if x is None else x[:, tokens] for x in (q, k, beta, g)), c, scale, l2norm)
            d_before: list[torch.Tensor | None] = [None] * n  # what arrives at the state before each chunk
            if d_states is not None:
                first, step, at = _boundaries(start - begin, n, state_stride)
                for j, i in enumerate(range(first, n, step)):
                    d_before[i] = _state_of(d_states[:, at + j], owner, q)
            d_x, d_r, d_beta, d_decay, d_state = _gradients(
                seg, v[:, tokens], state, d_o[:, tokens], d_state, d_before
            )
            if l2norm:
                d_x.addcmul_(seg.x, _along(d_x, seg, scale), value=-1)
            _store(d_x[:, :c], dq[:, tokens], c, seg.norms[:, :c] if l2norm else scale)
            _store(d_x[:, c:], dk[:, tokens], c, seg.norms[:, c:] if l2norm else 1)
            _store(d_r, dv[:, tokens], c, seg.beta)
            _store(d_beta, dbeta[:, tokens], c)
            if g is not None:
                _store(d_decay.flip(1).cumsum(1).flip(1), dg[:, tokens], c)
        d_initial.append(torch.zeros_like(initial) if d_state is None else d_state)
    d_initial = d_initial[0] if len(d_initial) == 1 else torch.cat(d_initial)
    return dq, dk, dv, dbeta, dg, d_initial.view(-1, h, kd, vd)


def checkpoint_count(v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:  # [B, T, HV, V], [N + 1]
    """Room for the states that ``forward`` keeps. Exact for whole rows; for packed sequences, each of which
    can add one short segment, a bound that needs no look at the data."""
    tokens, most = v.shape[1], _longest(v.shape[0] * v.shape[2])
    whole, chunks = tokens // CHUNK, -(-tokens // CHUNK)
    if cu_seqlens is None:
        return -(-whole // most) + (chunks - whole) - 1
    return min(whole // most + cu_seqlens.shape[0] - 1, chunks - 1)


def kept_count(q: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None) -> int:
    """Numbers of q's dtype that ``forward`` keeps for the backward beside states."""
    return 0


# ---------------------------------------------------------------------------------------------------------
# What lies where: sequences, segments, chunks


def _sequences(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int, slice]]:
    """``(first token, end, rows of the states)``: all rows at once, or one packed sequence after another."""
    if cu_seqlens is None:
        return [(0, q.shape[1], slice(None))]
    bounds = cu_seqlens.tolist()
    return [(begin, end, slice(n, n + 1)) for n, (begin, end) in enumerate(pairwise(bounds))]


def _longest(blocks: int) -> int:
    """The most chunks of a segment, for ``blocks`` = rows * value heads."""
    return max(2, SEGMENT_BLOCKS // max(1, blocks))


def _segments(begin: int, end: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """``(first token, chunks, tokens of a chunk)`` of each segment; tokens that fill no chunk come last."""
    most = _longest(blocks)
    whole = (end - begin) // CHUNK
    for i in range(0, whole, most):
        yield begin + i * CHUNK, min(most, whole - i), CHUNK
    if begin + whole * CHUNK < end:
        yield begin + whole * CHUNK, 1, end - begin - whole * CHUNK


def _boundaries(token: int, n: int, state_stride: int) -> tuple[int, int, int]:
    """``(first, step, at)``: of the n chunks from ``token`` of a sequence on, number first, first + step, ...
    start from the sequence's states number at, at + 1, ...; ``first >= n`` where none does."""
    if not state_stride:
        return n, 1, 0
    return -token % state_stride // CHUNK, state_stride // CHUNK, -(-token // state_stride)


def _state_of(
    states: torch.Tensor, owner: slice, q: torch.Tensor
) -> torch.Tensor:  # [N, HV, K, V] -> [B * HV, K, V]
    return states[owner].to(accumulation_dtype(q)).reshape(-1, *states.shape[-2:])


def _by_chunk(x: torch.Tensor, c: int) -> torch.Tensor:  # [B, n * C, H, ...] -> [n, B, H, C, ...], a view
    b, t, h, *rest = x.shape
    return x.view(b, t // c, c, h, *rest).permute(1, 0, 3, 2, *range(4, x.dim() + 1))


def _per_key_head(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[n * B * HV, C, ...] -> [n, B, H, G, C, ...], a view, for ``like`` [n, B, H, C, ...]."""
    n, b, h = like.shape[:3]
    return blocks.view(n, b, h, blocks.shape[0] // max(n * b * h, 1), *like.shape[3:])


def _load(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """[B, n * C, H, ...] -> out [n * B * HV, C, ...]; what a key head has goes to all of its value heads."""
    view = _by_chunk(x, out.shape[1])
    _per_key_head(out, view).copy_(view.unsqueeze(3))
    return out


def _store(x: torch.Tensor, out: torch.Tensor, c: int, factor: torch.Tensor | float = 1.0) -> None:
    """``factor`` [n * B * HV, C, 1] times x [n * B * HV, C, ...] -> out [B, n * C, H, ...]; over a key head's value
    heads it is a sum."""
    view = _by_chunk(out, c)
    heads = _per_key_head(x, view)
    if heads.shape[3] != 1 or x.dtype != out.dtype:
        view.copy_(_per_key_head(x * factor, view).sum(3))
    elif isinstance(factor, torch.Tensor):
        torch.mul(heads.squeeze(3), factor.view(*view.shape[:4], 1), out=view)
    elif factor != 1:
        torch.mul(heads.squeeze(3), factor, out=view)
    else:
        view.copy_(heads.squeeze(3))


def _steps(
    x: torch.Tensor | None, n: int
) -> tuple[torch.Tensor | None, ...]:  # [n * r, ...] -> n of [r, ...]
    return (None,) * n if x is None else x.view(n, x.shape[0] // n, *x.shape[1:]).unbind(0)


# ---------------------------------------------------------------------------------------------------------
# The mathematics of one segment: m = chunks * B * HV blocks


@dataclass
class _Segment:
    """What the chunks of a segment are, apart from any state."""

    x: torch.Tensor  # [m, 2C, K]  scale Q over K
    beta: torch.Tensor  # [m, C, 1]
    decay: torch.Tensor  # [m or 1, 2C, C]  lower(D) over strictly_lower(D)
    pairs: torch.Tensor  # [m, 2C, C]  P over L
    inverse: torch.Tensor  # [m, C, C]  M
    norms: torch.Tensor | None  # [m, 2C, 1]  what the rows of x were multiplied by, with l2norm (scale too)
    from_start: torch.Tensor | None  # [m, C, 1]  e^G
    to_end: torch.Tensor | None  # [m, C, 1]  e^(G_C - G)
    through: torch.Tensor | None  # [m, 1, 1]  e^G_C

    @property
    def q(self) -> torch.Tensor:  # [m, C, K]  scale Q
        return self.x[:, : self.beta.shape[1]]

    @property
    def k(self) -> torch.Tensor:  # [m, C, K]
        return self.x[:, self.beta.shape[1] :]

    def reads(self) -> torch.Tensor:  # [m, 2C, K]  e^G scale Q over e^G K
        if self.from_start is None:
            return self.x
        m, rows, kd = self.x.shape
        return (self.x.view(m, 2, rows // 2, kd) * self.from_start.unsqueeze(1)).view(m, rows, kd)

    def writes(self) -> torch.Tensor:  # [m, C, K]  e^(G_C - G) K
        return self.k if self.to_end is None else self.k * self.to_end

    @property
    def p(self) -> torch.Tensor:  # [m, C, C]  P
        return self.pairs[:, : self.beta.shape[1]]

    @property
    def lower(self) -> torch.Tensor:  # [m, C, C]  L
        return self.pairs[:, self.beta.shape[1] :]


def _prepare(
    q: torch.Tensor,  # [B, n * C, H, K]
    k: torch.Tensor,  # [B, n * C, H, K]
    beta: torch.Tensor,  # [B, n * C, HV]
    g: torch.Tensor | None,  # [B, n * C, HV]
    c: int,
    scale: float,
    l2norm: bool,
) -> _Segment:
    b, t, h = beta.shape
    m, kd = b * h * (t // c), q.shape[-1]
    new = q.new_empty(0, dtype=accumulation_dtype(q)).new_empty
    x, norms = new(m, 2 * c, kd), None
    _load(q, x[:, :c])
    _load(k, x[:, c:])
    beta = _load(beta, new(m, c)).unsqueeze(-1)
    if l2norm:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(L2_NORM_EPS).rsqrt_()
        norms[:, :c] *= scale
        x *= norms
    else:
        x[:, :c] *= scale

    from_start = to_end = through = None
    if g is None:
        decay = new(1, 2 * c, c).fill_(1)
        decay[:, :c].tril_()
        decay[:, c:].tril_(-1)
    else:
        # Differences of running sums, in float64: after a strong decay, float32 sums no longer resolve the
        # weak ones that follow. Powers of two: MKL's exp takes 15 times as long where a result leaves float32.
        total = _load(g, new(m, c, dtype=torch.float64)).clamp_(min=-1e4).mul_(math.log2(math.e)).cumsum(1)
        decay = new(m, 2, c, c)
        between = torch.sub(total.unsqueeze(2), total.unsqueeze(1)).to(x.dtype)
        after = new(c, c).fill_(-math.inf).triu_(1)
        torch.exp2(between.add_(after), out=decay[:, 0])
        torch.sub(decay[:, 0], torch.eye(c, dtype=x.dtype, device=x.device), out=decay[:, 1])
        decay = decay.view(m, 2 * c, c)
        from_start = total.exp2().to(x.dtype).unsqueeze(-1)
        to_end = (total[:, -1:] - total).exp2().to(x.dtype).unsqueeze(-1)
        through = from_start[:, -1:]

    pairs = torch.bmm(x, x[:, c:].transpose(1, 2)).mul_(decay)
    eye = torch.eye(c, dtype=x.dtype, device=x.device).expand(m, c, c)
    inverse = torch.linalg.solve_triangular(pairs[:, c:] * beta, eye, upper=False, unitriangular=True)
    return _Segment(x, beta, decay, pairs, inverse, norms, from_start, to_end, through)


def _read_and_write(
    seg: _Segment,
    v: torch.Tensor,  # [B, n * C, HV, V]
    state: torch.Tensor,  # [B * HV, K, V] before the segment; brought to what it is after it, if wanted
    asked: list[torch.Tensor | None],  # n of [B, HV, K, V], to be given the state before each chunk
    want_after: bool,
) -> torch.Tensor:
    """Through the n chunks: the reads O [m, C, V]."""
    n, (m, c, _), vd = len(asked), seg.beta.shape, v.shape[-1]
    z = state.new_empty(m, 2 * c, vd)  # [0; V] - (what x reads from the state), that is [-e^G scale Q S; R]
    z[:, :c] = 0
    _load(v, z[:, c:])
    u = state.new_empty(m, c, vd)
    solve = seg.inverse * seg.beta.transpose(1, 2)
    parts = (z, u, solve, seg.reads(), seg.writes().transpose(1, 2), seg.through)
    for i, (z_i, u_i, solve_i, x_i, k_i, through_i) in enumerate(zip(*(_steps(a, n) for a in parts))):
        if asked[i] is not None:
            asked[i].copy_(state.view(asked[i].shape))
        z_i.baddbmm_(x_i, state, alpha=-1)
        torch.bmm(solve_i, z_i[:, c:], out=u_i)
        if want_after or i < n - 1:
            _advance(state, through_i, k_i, u_i)
    return torch.bmm(seg.p, u).sub_(z[:, :c])


def _scan(
    seg: _Segment,
    v: torch.Tensor,  # [B, n * C, HV, V]
    state: torch.Tensor,  # [B * HV, K, V]
    n: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through the n chunks: R [m, C, V], U [m, C, V] and the states before each [n, B * HV, K, V]."""
    r, u = (state.new_empty(*seg.beta.shape[:2], v.shape[-1]) for _ in range(2))
    _load(v, r)
    before = state.new_empty(n, *state.shape)
    before[0] = state
    k_read = seg.k if seg.from_start is None else seg.k * seg.from_start
    solve = seg.inverse * seg.beta.transpose(1, 2)
    parts = (r, u, solve, k_read, seg.writes().transpose(1, 2), seg.through)
    for i, (r_i, u_i, solve_i, k_read_i, k_write_i, through_i) in enumerate(
        zip(*(_steps(a, n) for a in parts))
    ):
        r_i.baddbmm_(k_read_i, before[i], alpha=-1)
        torch.bmm(solve_i, r_i, out=u_i)
        if i < n - 1:
            if through_i is None:
                torch.baddbmm(before[i], k_write_i, u_i, out=before[i + 1])
            else:
                torch.mul(before[i], through_i, out=before[i + 1]).baddbmm_(k_write_i, u_i)
    return r, u, before


def _advance(
    state: torch.Tensor,  # [B * HV, K, V]
    through: torch.Tensor | None,  # [B * HV, 1, 1]
    a: torch.Tensor,  # [B * HV, K, C]
    b: torch.Tensor,  # [B * HV, C, V]
) -> None:
    """``state = through * state + a b``, in place."""
    if through is not None:
        state *= through
    state.baddbmm_(a, b)


def _gradients(
    seg: _Segment,
    v: torch.Tensor,  # [B, n * C, HV, V]
    state: torch.Tensor,  # [B * HV, K, V] before the segment
    d_o: torch.Tensor,  # [B, n * C, HV, V]
    d_state: torch.Tensor | None,  # [B * HV, K, V] of the state after the segment; None for zero
    d_before: list[torch.Tensor | None],  # n of [B * HV, K, V], to be added before each chunk
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of x [m, 2C, K], R' = diag(beta) R [m, C, V], beta [m, C], G [m, C] and the state before the
    segment."""
    n, (m, c, _) = len(d_before), seg.beta.shape
    r, u, before = _scan(seg, v, state, n)
    d_rows = u.new_empty(m, 2 * c, u.shape[-1])  # dO over dR'
    d_read = torch.empty_like(d_rows)  # of what x reads from the state: e^G dO over -e^G beta dR'
    d_out = _load(d_o, d_rows[:, :c])
    minus = seg.beta.neg()
    if seg.from_start is None:
        d_read[:, :c] = d_out
    else:
        torch.mul(d_out, seg.from_start, out=d_read[:, :c])
        minus *= seg.from_start

    # From the last chunk to the first: dU, dR', dS; and what goes through the state to x.
    d_u = torch.bmm(seg.p.transpose(1, 2), d_out)
    d_r = torch.empty_like(d_u)
    d_x = torch.empty_like(seg.x)
    d_k = torch.empty_like(seg.k)  # of e^(G_C - G) K
    d_through = None if seg.through is None else seg.through.new_zeros(n, m // n)
    d_state = torch.zeros_like(state) if d_state is None else d_state.clone()
    parts = (
        d_u,
        d_r,
        d_read,
        u,
        d_x,
        d_k,
        seg.inverse.transpose(1, 2),
        minus,
        seg.writes(),
        seg.x,
        seg.through,
    )
    chunks = list(zip(*(_steps(a, n) for a in parts)))
    for i in reversed(range(n)):
        d_u_i, d_r_i, d_read_i, u_i, d_x_i, d_k_i, inverse_i, minus_i, k_write_i, x_i, through_i = chunks[i]
        d_u_i.baddbmm_(k_write_i, d_state)
        torch.bmm(u_i, d_state.transpose(1, 2), out=d_k_i)
        if d_through is not None:
            torch.sum(d_state * before[i], (1, 2), out=d_through[i])
        torch.bmm(inverse_i, d_u_i, out=d_r_i)
        torch.mul(d_r_i, minus_i, out=d_read_i[:, c:])
        torch.bmm(d_read_i, before[i].transpose(1, 2), out=d_x_i)
        _advance(d_state, through_i, x_i.transpose(1, 2), d_read_i)
        if d_before[i] is not None:
            d_state += d_before[i]
    d_decay = None
    if d_through is not None:
        d_decay = (d_x * seg.x).sum(-1).view(m, 2, c).sum(1)
        d_k *= seg.to_end
        written = (d_k * seg.k).sum(-1)
        d_decay -= written
        d_decay[:, -1] += written.sum(-1) + d_through.view(m) * seg.through.view(m)

    # Through the pairs, of all chunks at once.
    d_rows[:, c:] = d_r
    # Above the diagonal, where no decay is between, products of what grew (g > 0) may leave float32
    d_p, d_a = torch.bmm(d_rows, u.transpose(1, 2)).split(c, 1)
    d_p, d_a = d_p.tril(), d_a.neg().tril_(-1)
    weighted = d_a * seg.lower
    d_beta = (d_r * r).sum(-1) + weighted.sum(-1)
    if d_decay is not None:
        weighted = weighted.mul_(seg.beta).addcmul_(d_p, seg.p).tril_(-1)
        d_decay += weighted.sum(2) - weighted.sum(1)
    d_pairs = torch.empty_like(seg.pairs)  # of X K^T: D * dP over E
    torch.mul(d_p, seg.decay[:, :c], out=d_pairs[:, :c])
    torch.mul(d_a, seg.decay[:, c:], out=d_pairs[:, c:]).mul_(seg.beta)
    d_x.baddbmm_(d_pairs, seg.k)
    d_x[:, c:] += d_k.baddbmm_(d_pairs.transpose(1, 2), seg.x)
    return d_x, d_r, d_beta, d_decay, d_state


def _along(d_x: torch.Tensor, seg: _Segment, scale: float) -> torch.Tensor:  # [m, 2C, K] -> [m, 2C, 1]
    """How much of ``seg.x`` the gradient of each row loses to its l2 norm: x = norms * raw and
    d_raw = norms * (d_x - along * x), where the norms of query rows contain their scale."""
    along = (d_x * seg.x).sum(-1, keepdim=True)
    along[:, : seg.beta.shape[1]] /= scale**2
    return along
