"""The delta rule over chunks of tokens, in PyTorch, with its backward written out: the fast path on a CPU.

One head, one chunk of C tokens, S the state [K, V] before it. With ``G`` the running sum of ``g`` inside the
chunk (0 without decay) and ``D_ij = exp(G_i - G_j)`` for ``i >= j``, the C sequential updates are one
triangular system (the WY form), because every ``u_i`` depends on earlier ones through inner products alone:

    L = strictly_lower(D * K K^T)          P = lower(D * scale Q K^T)       [C, C]
    M = (I + diag(beta) L)^-1              unit lower triangular            [C, C]
    R = V - e^G K S                        what S does not say about K      [C, V]
    U = M diag(beta) R                     the writes                       [C, V]
    O = e^G scale Q S + P U                                                 [C, V]
    S' = e^G_C S + (e^(G_C - G) K)^T U                                      [K, V]

Only ``R -> U -> S'`` is sequential over chunks. Everything else runs over all chunks of a segment (some tens
of [C, C] blocks, so that the working set stays in the cache) as one batched product.

Backward, with ``dO`` and ``dS'`` given; the chunk's M, P, U, S are computed again from the inputs:

    dU = P^T dO + e^(G_C - G) K dS'        dR = M^T dU                      sequential, from the last chunk
    dS = e^G_C dS' + (e^G scale Q)^T dO - (e^G K)^T (beta dR)
    dV = beta dR      dP = dO U^T      dA = -dR U^T   (A = diag(beta) L)
    dbeta = rowsum(dR * R) + rowsum(dA * L)
    dQ/scale = e^G dO S^T + (D * dP) K
    dK = -e^G beta dR S^T + e^(G_C - G) U dS'^T + (E + E^T) K + (D * dP)^T scale Q,   E = beta D * dA
    dG from the same products: every factor e^G, e^(G_C - G), D and e^G_C returns <gradient, value>

Kept between forward and backward: the inputs, and one state for every segment but the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refine_kernels.delta_rule.reference import L2_NORM_EPS

CHUNK = 32  # tokens of a chunk; a sequence's last chunk is as long as what is left
SEGMENT_BLOCKS = 64  # [C, C] blocks worked on at a time: chunks * batch * heads


def checkpoint_count(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:  # [B, T, H, K], [N + 1]
    """Room for the states that ``forward`` keeps for ``backward``: one for every segment but a sequence's first.
    For packed sequences a bound that needs no look at the data: each can add one short segment."""
    if cu_seqlens is None:
        return len(_segments(q)) - 1
    return min((q.shape[1] - 1) // (CHUNK * _chunks_per_segment(q)) + cu_seqlens.shape[0] - 1, q.shape[1] // CHUNK)


def _chunks_per_segment(q: torch.Tensor) -> int:  # q [B, T, H, K]
    return max(1, SEGMENT_BLOCKS // max(1, q.shape[0] * q.shape[2]))


def _segments(q: torch.Tensor) -> list[tuple[int, int, int]]:  # q [B, T, H, K]
    """``(first token, chunks, tokens of a chunk)`` of every segment, in order; the rest of a chunk stands alone."""
    tokens, most = q.shape[1], _chunks_per_segment(q)
    whole = tokens // CHUNK
    segments = [(i * CHUNK, min(most, whole - i), CHUNK) for i in range(0, whole, most)]
    if tokens % CHUNK:
        segments.append((whole * CHUNK, 1, tokens % CHUNK))
    return segments


def _sequences(cu_seqlens: torch.Tensor | None) -> list[tuple[slice, slice, slice]]:
    """``(rows of the batch, tokens, rows of the states)``: one entry for a whole batch, or one a packed sequence."""
    if cu_seqlens is None:
        return [(slice(None), slice(None), slice(None))]
    bounds = cu_seqlens.tolist()
    return [(slice(0, 1), slice(a, b), slice(n, n + 1)) for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:]))]


# ---------------------------------------------------------------------------------------------------------
# Between [B, T, H, ...] and chunks: blocks of [C, ...], ordered (chunk, row of the batch, head)


def _chunk_view(x: torch.Tensor, c: int) -> torch.Tensor:  # [B, n * C, H, ...] -> [n, B, H, C, ...], a view
    x = x.unflatten(1, (-1, c)).movedim(1, 0)
    return x.transpose(2, 3)


def _load(x: torch.Tensor, c: int, out: torch.Tensor) -> torch.Tensor:  # [B, n*C, H, ...] -> out [n*B*H, C, ...]
    view = _chunk_view(x, c)
    out.view(view.shape).copy_(view) if out.is_contiguous() else out.unflatten(0, view.shape[:3]).copy_(view)
    return out


@dataclass
class _Segment:
    """What a segment's chunks are, apart from any state. ``m = chunks * batch * heads`` blocks."""

    x: torch.Tensor  # [m, 2C, K]   scale * q over k
    v: torch.Tensor  # [m, C, V]
    beta: torch.Tensor  # [m, C, 1]
    mask: torch.Tensor  # [m or 1, 2C, C]   D over strictly_lower(D); 0 and 1 without decay
    pl: torch.Tensor  # [m, 2C, C]   P over L
    inverse: torch.Tensor  # [m, C, C]   M
    from_start: torch.Tensor | None  # [m, C, 1]   e^G
    to_end: torch.Tensor | None  # [m, C, 1]   e^(G_C - G)
    whole: torch.Tensor | None  # [m, 1, 1]   e^G_C
    norms: torch.Tensor | None  # [m, 2C, 1]   1 / |row of x| before normalising
    k_read: torch.Tensor  # [m, C, K]   e^G K
    k_write: torch.Tensor  # [m, C, K]   e^(G_C - G) K

    @property
    def q(self) -> torch.Tensor:  # [m, C, K]
        return self.x[:, : self.v.shape[1]]

    @property
    def k(self) -> torch.Tensor:  # [m, C, K]
        return self.x[:, self.v.shape[1] :]


def _prepare(q, k, v, beta, g, scale, l2norm, c, dtype) -> _Segment:
    (b, t, h, d), m = q.shape, q.shape[0] * q.shape[2] * (q.shape[1] // c)
    new = lambda *shape: torch.empty(shape, dtype=dtype, device=q.device)  # noqa: E731
    x = new(m, 2 * c, d)
    _load(q, c, x[:, :c])
    _load(k, c, x[:, c:])
    v = _load(v, c, new(m, c, v.shape[-1]))
    beta = _load(beta, c, new(m, c)).unsqueeze(-1)
    norms = None
    if l2norm:
        norms = x.square().sum(-1, keepdim=True).add_(L2_NORM_EPS).rsqrt_()
        x *= norms
    x[:, :c] *= scale
    pl = torch.bmm(x, x[:, c:].transpose(1, 2))
    from_start = to_end = whole = None
    k_read = k_write = x[:, c:]
    if g is None:
        mask = torch.ones(1, 2 * c, c, dtype=dtype, device=q.device)
        mask[:, :c].tril_()
        mask[:, c:].tril_(-1)
    else:
        total = _load(g, c, new(m, c).double()).cumsum(1)
        difference = (total[:, :, None] - total[:, None, :]).to(dtype)
        above = torch.full((c, c), float("-inf"), dtype=dtype, device=q.device).triu_(1)
        mask = new(m, 2 * c, c)
        torch.exp(difference + above, out=mask[:, :c])
        torch.tril(mask[:, :c], -1, out=mask[:, c:])
        from_start = total.to(dtype).exp().unsqueeze(-1)
        to_end = (total[:, -1:] - total).to(dtype).exp().unsqueeze(-1)
        whole = from_start[:, -1:]
        k_read = x[:, c:] * from_start
        k_write = x[:, c:] * to_end
    pl *= mask
    eye = torch.eye(c, dtype=dtype, device=q.device).expand(m, c, c)
    inverse = torch.linalg.solve_triangular(pl[:, c:] * beta, eye, upper=False, unitriangular=True)
    return _Segment(x, v, beta, mask, pl, inverse, from_start, to_end, whole, norms, k_read, k_write)


def _scan(seg: _Segment, state: torch.Tensor, n: int):
    """Through the segment's chunks: R [m, C, V], U [m, C, V], the states before each [m, K, V], the state after."""
    r = state.shape[0]
    before = state if n == 1 else state.new_empty(n * r, *state.shape[1:])
    if n > 1:
        before[:r] = state
    rest, writes = seg.v, torch.empty_like(seg.v)  # R takes the place of V
    solve = seg.inverse * seg.beta.transpose(1, 2)
    for i in range(n):
        block = slice(i * r, (i + 1) * r)
        rest[block].baddbmm_(seg.k_read[block], state, alpha=-1)
        torch.bmm(solve[block], rest[block], out=writes[block])
        if seg.whole is not None:
            state = state * seg.whole[block]
        last = i + 1 == n
        out = {} if last else {"out": before[(i + 1) * r : (i + 2) * r]}
        state = torch.baddbmm(state, seg.k_write[block].transpose(1, 2), writes[block], **out)
    return rest, writes, before, state


def forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, state_stride, l2norm, keep):
    """``(o, final_state, states, checkpoints)``; the last two are empty unless asked for."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (b, t, h, kd), vd = q.shape, v.shape[-1]
    spans = _sequences(cu_seqlens)
    n_seq = b if cu_seqlens is None else len(spans)
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    final = torch.empty(n_seq, h, kd, vd, dtype=dtype, device=q.device)
    most = 0
    if state_stride:
        longest = t if cu_seqlens is None else max(s.stop - s.start for _, s, _ in spans)
        most = -(-longest // state_stride)
    states = final.new_zeros(n_seq, most, h, kd, vd)
    checkpoints = final.new_zeros(checkpoint_count(q, cu_seqlens) if keep else 0, b, h, kd, vd)
    kept = 0
    for rows, tokens, owner in spans:
        qs, ks, vs, bs, gs = (None if x is None else x[:, tokens] for x in (q, k, v, beta, g))
        rb = qs.shape[0]
        if initial_state is None:
            state = final.new_zeros(rb * h, kd, vd)
        else:
            state = initial_state[owner].to(dtype).reshape(rb * h, kd, vd)
        for start, n, c in _segments(qs):
            part = slice(start, start + n * c)
            if start and keep:
                checkpoints[kept] = state.view(rb, h, kd, vd)
                kept += 1
            seg = _prepare(
                qs[:, part], ks[:, part], vs[:, part], bs[:, part], None if gs is None else gs[:, part],
                scale, l2norm, c, dtype,
            )  # fmt: skip
            _, writes, before, state = _scan(seg, state, n)
            out = torch.bmm(seg.pl[:, :c], writes)
            if seg.from_start is not None:
                seg.q.mul_(seg.from_start)
            out.baddbmm_(seg.q, before)
            _chunk_view(o[rows, tokens][:, part], c).copy_(out.view(n, rb, h, c, vd))
            if state_stride:
                first = -start % state_stride // CHUNK
                step = state_stride // CHUNK
                if first < n:
                    at = before.view(n, rb, h, kd, vd)[first::step]
                    j = (start + first * CHUNK) // state_stride
                    states[owner, j : j + at.shape[0]] = at.transpose(0, 1)
        final[owner] = state.view(rb, h, kd, vd)
    return o, final, states, checkpoints


def backward(q, k, v, beta, g, scale, initial_state, cu_seqlens, state_stride, l2norm, checkpoints, do, dfinal, dstates):
    """Gradients of q, k, v, beta, g (empty without g) and the initial state."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (b, t, h, kd), vd = q.shape, v.shape[-1]
    spans = _sequences(cu_seqlens)
    n_seq = b if cu_seqlens is None else len(spans)
    dq, dk, dv, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, beta))
    dg = torch.empty(g.shape if g is not None else (0,), dtype=g.dtype if g is not None else dtype, device=q.device)
    dinitial = torch.empty(n_seq, h, kd, vd, dtype=dtype, device=q.device)
    if do is None:
        do = q.new_zeros(()).expand(v.shape)
    kept = 0
    for rows, tokens, owner in spans:
        qs, ks, vs, bs, gs, dos = (None if x is None else x[:, tokens] for x in (q, k, v, beta, g, do))
        rb = qs.shape[0]
        if initial_state is None:
            initial = dinitial.new_zeros(rb * h, kd, vd)
        else:
            initial = initial_state[owner].to(dtype).reshape(rb * h, kd, vd)
        if dfinal is None:
            dstate = dinitial.new_zeros(rb * h, kd, vd)
        else:
            dstate = dfinal[owner].to(dtype).reshape(rb * h, kd, vd)
        segments = _segments(qs)
        first_kept = kept
        kept += max(len(segments) - 1, 0)
        for i_seg, (start, n, c) in reversed(list(enumerate(segments))):
            part = slice(start, start + n * c)
            state = checkpoints[first_kept + i_seg - 1].view(rb * h, kd, vd) if i_seg else initial
            seg = _prepare(
                qs[:, part], ks[:, part], vs[:, part], bs[:, part], None if gs is None else gs[:, part],
                scale, l2norm, c, dtype,
            )  # fmt: skip
            r, m = rb * h, n * rb * h
            rest, u, before, after = _scan(seg, state, n)
            # [w dO; -w dR]
            both = before.new_empty(m, 2 * c, vd)
            d_out = _load(dos[:, part], c, both[:, :c])
            if g is not None:
                d_out = d_out.clone()
                both[:, :c] *= seg.from_start
            du = torch.bmm(seg.pl[:, :c].transpose(1, 2), d_out)
            dr = torch.empty_like(du)
            d_after = before.new_empty(n + 1, r, kd, vd)
            d_after[n] = dstate
            back = seg.inverse.transpose(1, 2)
            weight = seg.beta if g is None else seg.beta * seg.from_start
            minus = -weight
            for i in reversed(range(n)):
                block = slice(i * r, (i + 1) * r)
                du[block].baddbmm_(seg.k_write[block], d_after[i + 1])
                torch.bmm(back[block], du[block], out=dr[block])
                torch.mul(dr[block], minus[block], out=both[block, c:])
                if g is None:
                    base = d_after[i + 1]
                else:
                    base = d_after[i + 1] * seg.whole[block]
                torch.baddbmm(base, seg.x[block].transpose(1, 2), both[block], out=d_after[i])
                token = start + i * c
                if state_stride and dstates is not None and token % state_stride == 0:
                    d_after[i].view(rb, h, kd, vd).add_(dstates[owner, token // state_stride])
            dstate = d_after[0]
            d_end = d_after[1:].view(m, kd, vd)

            dx = torch.bmm(both, before.transpose(1, 2))
            dG = None
            if g is not None:
                rows_dot = (dx * seg.x).sum(-1)
                dG = rows_dot[:, :c] + rows_dot[:, c:]
            pairs = before.new_empty(m, 2 * c, c)
            d_p = torch.bmm(d_out, u.transpose(1, 2))
            d_a = torch.bmm(dr, u.transpose(1, 2)).neg_()
            lower = d_a * seg.pl[:, c:]
            d_beta = (dr * rest).sum(-1) + lower.sum(-1)
            if g is not None:
                lower *= seg.beta
                lower += (d_p * seg.pl[:, :c]).tril_(-1)
                dG += lower.sum(-1)
                dG -= lower.sum(-2)
            torch.mul(d_p, seg.mask[:, :c], out=pairs[:, :c])
            torch.mul(d_a, seg.mask[:, c:], out=pairs[:, c:])
            pairs[:, c:] *= seg.beta
            dx.baddbmm_(pairs, seg.k)
            dkey = torch.bmm(u, d_end.transpose(1, 2))
            if g is not None:
                dkey *= seg.to_end
                dot = (dkey * seg.k).sum(-1)
                dG -= dot
                dG[:, -1] += dot.sum(-1)
                dG[:, -1] += (d_end * before).sum((-1, -2)) * seg.whole.view(m)
                dgs = dG.flip(-1).cumsum(-1).flip(-1)
                _chunk_view(dg[rows, tokens][:, part], c).copy_(dgs.view(n, rb, h, c))
            dkey.baddbmm_(pairs.transpose(1, 2), seg.x)
            dx[:, c:] += dkey
            if l2norm:
                xn = seg.x
                xn[:, :c] *= 1 / scale
                dx -= xn * (dx * xn).sum(-1, keepdim=True)
                dx *= seg.norms
            torch.mul(dx.view(n, rb, h, 2 * c, kd)[..., :c, :], scale, out=_chunk_view(dq[rows, tokens][:, part], c))
            _chunk_view(dk[rows, tokens][:, part], c).copy_(dx.view(n, rb, h, 2 * c, kd)[..., c:, :])
            torch.mul(dr.view(n, rb, h, c, vd), seg.beta.view(n, rb, h, c, 1), out=_chunk_view(dv[rows, tokens][:, part], c))
            _chunk_view(dbeta[rows, tokens][:, part], c).copy_(d_beta.view(n, rb, h, c))
        dinitial[owner] = dstate.view(rb, h, kd, vd)
    return dq, dk, dv, dbeta, dg, dinitial
