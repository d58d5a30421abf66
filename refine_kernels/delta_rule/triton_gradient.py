"""The backward's kernels that are parallel over chunks or groups of them: the states before every chunk, worked out
again from those kept and U, and the gradients of q, k, v, beta and g from U, dR' and the states.

Launched by ``triton_chunk.py``; the letters are those of ``chunked.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refine_kernels.delta_rule import triton_parts as parts


@triton.jit(do_not_specialize=["T", "ALL"])
def states_kernel(
    k,  # [B, T, H / REPEAT, K]
    u,  # [B, T, H, V]
    decays,  # [2, B, T, H] float32 or None
    norms,  # [2, B, T, H / REPEAT] float32 or None
    checkpoints,  # [places of groups, H, K, V] float32, the state before every group of GROUP chunks
    chunk_states,  # [places of chunks, H, K, V]
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of groups] or None
    T,
    H,
    ALL,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BV columns of one head's state through one group: ``S <- e^{G_C} S + K^T e^{G_C - G} U``.

    Reads the kept state, u and, for every block of V, k once; writes the state before every chunk, rounded.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_group = pid // NV // H
    i_n = parts.owner(cu_seqlens, owners, i_group, T, GROUP * BT)
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    i_place = parts.place(cu_seqlens, i_n, begin, T, BT)
    first = (i_group - parts.place(cu_seqlens, i_n, begin, T, GROUP * BT)).to(tl.int32) * GROUP
    chunks = tl.minimum(tl.cdiv(length, BT), first + GROUP)

    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    dtype = k.dtype.element_ty
    b_s = tl.load(checkpoints + (i_group.to(tl.int64) * H + i_h) * (K * V) + o_s, mask=m_s, other=0).to(
        tl.float32
    )
    for i_c in range(first, chunks):
        tl.store(chunk_states + ((i_place + i_c) * H + i_h) * (K * V) + o_s, b_s.to(dtype), mask=m_s)
        i_x = (begin + i_c * BT) * H + i_h  # the chunk's first
        i_xk = i_x // REPEAT  # of the key head
        tokens = tl.minimum(length - i_c * BT, BT)
        m_t = o_i < tokens
        b_k = tl.load(
            k + i_xk * K + ((o_i * (H // REPEAT))[:, None] * K + o_k[None, :]),
            mask=m_t[:, None] & (o_k < K)[None, :], other=0,
        )  # fmt: skip
        b_u = tl.load(
            u + i_x * V + ((o_i * H)[:, None] * V + o_v[None, :]),
            mask=m_t[:, None] & (o_v < V)[None, :],
            other=0,
        )
        b_w = parts.norms(norms, i_xk, H // REPEAT, tokens, o_i)
        if decays is not None:
            b_high, b_low, high, low = parts.decays(decays, ALL, i_x, H, tokens, o_i)
            b_w *= tl.exp((high - b_high) + (low - b_low))
            b_s *= tl.exp(high)
        if (norms is not None) or (decays is not None):
            b_u = (b_u.to(tl.float32) * b_w[:, None]).to(dtype)
        b_s = tl.dot(tl.trans(b_k), b_u, b_s, input_precision=PRECISION)


@triton.jit
def _of_block(i_v, o_i, m_t, o_k, m_k, H, V: tl.constexpr, BV: tl.constexpr):
    """Where block ``i_v`` of columns of V lies, and what of it exists: in tensors of tokens, [BT, BV] each, and in
    those of states, [BK, BV] each."""
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < V
    o_xv = (o_i * H)[:, None] * V + o_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    return o_xv, m_t[:, None] & m_v[None, :], o_s, m_k[:, None] & m_v[None, :]


@triton.jit(do_not_specialize=["T", "ALL", "SHARE"])
def gradient_kernel(
    q,  # [B, T, H / REPEAT, K]
    k,  # [B, T, H / REPEAT, K]
    v,  # [B, T, H, V]
    o,  # [B, T, H, V] or None without norms
    u,  # [B, T, H, V]
    beta,  # [B, T, H]
    decays,  # [2, B, T, H] float32 or None
    norms,  # [2, B, T, H / REPEAT] float32 or None
    chunk_states,  # [places of chunks, H, K, V]  the state before every chunk
    d_o,  # [B, T, H, V]
    d_r,  # [B, T, H, V]
    d_chunk_states,  # [places of chunks, H, K, V]
    dq,  # [B, T, H, K], shares of the value heads where several read one q and k
    dk,  # [B, T, H, K]
    dv,  # [B, T, H, V]
    sums,  # [blocks of K, 1 or, with g, 2, B, T, H] float32, shares of dbeta and dg
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of chunks] or None
    scale,
    T,
    H,
    ALL,
    SHARE,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BK columns of dq and dk of one chunk and head, by blocks of BV columns of V.

    With U and the states given, nothing goes along the sequence. All that is summed over V is summed in one loop:
    ``dO U^T``, ``dR' U^T`` and both transposed (a product's result is never transposed), ``dO S^T``, ``dR' S^T``
    and ``U dS'^T``. Reads v, o, U, dO, dR' and its rows of S and dS' once, its columns of q and k once; writes its
    columns of dq and dk, its share of dbeta and dg, and the first program of a chunk dv.

    Rows of dq and dk are made orthogonal to q and k without the other columns: ``<dq_i, q_i> = <dO_i, o_i>``, as
    o is linear in q, and ``<dk_i, k_i> = <dR'_i, 2 u_i - beta_i v_i>``, as scaling what k_i writes scales u_i and
    scaling what it reads scales ``u_i - beta_i v_i``.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    i_place = pid // NK // H
    i_n = parts.owner(cu_seqlens, owners, i_place, T, BT)
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    i_c = (i_place - parts.place(cu_seqlens, i_n, begin, T, BT)).to(tl.int32)
    if i_c * BT >= length:
        return

    tokens = tl.minimum(length - i_c * BT, BT)
    i_x = (begin + i_c * BT) * H + i_h  # the chunk's first
    HK = H // REPEAT
    i_xk = i_x // REPEAT  # of the key head
    o_i = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_t = o_i < tokens
    m_k = o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    dtype = k.dtype.element_ty
    i_s = (i_place.to(tl.int64) * H + i_h) * (K * V)

    o_x = (o_i * HK)[:, None] * K + o_k[None, :]
    o_y = (o_i * H)[:, None] * K + o_k[None, :]

    # dq = e^G dO S^T + dP K
    b_p = tl.zeros((BT, BT), tl.float32)
    b_dx = tl.zeros((BT, BK), tl.float32)
    b_qq = tl.zeros((BT,), tl.float32)
    for i_v in range(NV):
        o_xv, m_tv, o_s, m_s = _of_block(i_v, o_i, m_t, o_k, m_k, H, V, BV)
        b_do = tl.load(d_o + i_x * V + o_xv, mask=m_tv, other=0)
        b_u = tl.load(u + i_x * V + o_xv, mask=m_tv, other=0)
        b_s = tl.load(chunk_states + i_s + o_s, mask=m_s, other=0)
        b_p = tl.dot(b_do, tl.trans(b_u), b_p, input_precision=PRECISION)
        b_dx = tl.dot(b_do, tl.trans(b_s), b_dx, input_precision=PRECISION)
        if norms is not None:
            b_o = tl.load(o + i_x * V + o_xv, mask=m_tv, other=0).to(tl.float32)
            b_qq += tl.sum(b_do.to(tl.float32) * b_o, 1)
    b_k = tl.load(k + i_xk * K + o_x, mask=m_tk, other=0)
    b_q = tl.load(q + i_xk * K + o_x, mask=m_tk, other=0)
    o_j, o_r = parts.anew(o_i, i_c, 1), parts.anew(o_i, i_c, 5)
    m_p = o_r[:, None] >= o_j[None, :]
    b_nq = parts.norms_of_q(norms, ALL, REPEAT, i_xk, HK, tokens, o_r)
    b_p = tl.where(m_p, b_p * parts.norms(norms, i_xk, HK, tokens, o_j)[None, :], 0.0)
    if decays is not None:
        b_high, b_low, _, _ = parts.decays(decays, ALL, i_x, H, tokens, o_r)
        c_high, c_low, _, _ = parts.decays(decays, ALL, i_x, H, tokens, o_j)
        b_p *= parts.between_unmasked(b_high[:, None], b_low[:, None], c_high[None, :], c_low[None, :])
        b_f = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_p
        b_f = tl.where(o_r[:, None] > o_j[None, :], b_f * (b_nq * scale)[:, None], 0.0)
        b_dg = tl.sum(b_f, 1) - tl.sum(b_f, 0)
        b_dx *= tl.exp(b_high)[:, None]
        b_dg += tl.sum(b_dx * b_q.to(tl.float32), 1) * b_nq * scale
    b_dx = tl.dot(b_p.to(dtype), b_k, b_dx, input_precision=PRECISION) * scale
    if norms is not None:
        b_dx = (b_dx - b_q.to(tl.float32) * (b_qq * b_nq)[:, None]) * b_nq[:, None]
    tl.store(dq + i_x * K + o_y, b_dx.to(dq.dtype.element_ty), mask=m_tk)

    # dk where it writes: e^{G_C - G} U dS'^T + dP^T Q + E^T K, E = beta dA; rows are those of U
    b_p = tl.zeros((BT, BT), tl.float32)
    b_e = tl.zeros((BT, BT), tl.float32)
    b_dx = tl.zeros((BT, BK), tl.float32)
    b_through = tl.zeros((BK,), tl.float32)  # <dS', S>
    for i_v in range(NV):
        o_xv, m_tv, o_s, m_s = _of_block(i_v, o_i, m_t, o_k, m_k, H, V, BV)
        b_u = tl.load(u + i_x * V + o_xv, mask=m_tv, other=0)
        b_do = tl.load(d_o + i_x * V + o_xv, mask=m_tv, other=0)
        b_dr = tl.load(d_r + i_x * V + o_xv, mask=m_tv, other=0)
        b_ds = tl.load(d_chunk_states + i_s + o_s, mask=m_s, other=0)
        b_p = tl.dot(b_u, tl.trans(b_do), b_p, input_precision=PRECISION)
        b_e = tl.dot(b_u, tl.trans(b_dr), b_e, input_precision=PRECISION)
        b_dx = tl.dot(b_u, tl.trans(b_ds), b_dx, input_precision=PRECISION)
        if decays is not None:
            b_s = tl.load(chunk_states + i_s + o_s, mask=m_s, other=0)
            b_through += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
    o_j, o_r = parts.anew(o_i, i_c, 2), parts.anew(o_i, i_c, 6)
    m_p = o_r[:, None] <= o_j[None, :]
    if decays is not None:
        b_high, b_low, high, low = parts.decays(decays, ALL, i_x, H, tokens, o_r)
        b_dx *= tl.exp((high - b_high) + (low - b_low))[:, None]
        b_written = tl.sum(b_dx * b_k.to(tl.float32), 1) * parts.norms(norms, i_xk, HK, tokens, o_r)
    c_nq = parts.norms_of_q(norms, ALL, REPEAT, i_xk, HK, tokens, o_j) * scale
    b_p = tl.where(m_p, b_p * c_nq[None, :], 0.0)
    if decays is not None:
        c_high, c_low, _, _ = parts.decays(decays, ALL, i_x, H, tokens, o_j)
        b_p *= parts.between_unmasked(c_high[None, :], c_low[None, :], b_high[:, None], b_low[:, None])
    b_dx = tl.dot(b_p.to(dtype), b_q, b_dx, input_precision=PRECISION)
    o_j = parts.anew(o_i, i_c, 3)
    m_p = o_r[:, None] < o_j[None, :]
    c_beta = tl.load(beta + i_x + o_j * H, mask=o_j < tokens, other=0).to(tl.float32)
    b_e = tl.where(m_p, -b_e * (parts.norms(norms, i_xk, HK, tokens, o_j) * c_beta)[None, :], 0.0)
    if decays is not None:
        c_high, c_low, _, _ = parts.decays(decays, ALL, i_x, H, tokens, o_j)
        b_e *= parts.between_unmasked(c_high[None, :], c_low[None, :], b_high[:, None], b_low[:, None])
    b_dk = tl.dot(b_e.to(dtype), b_k, b_dx, input_precision=PRECISION)

    # dk where it reads: -beta e^G dR' S^T + E K; and what needs no product
    b_e = tl.zeros((BT, BT), tl.float32)
    b_dx = tl.zeros((BT, BK), tl.float32)
    b_rv = tl.zeros((BT,), tl.float32)
    b_kk = tl.zeros((BT,), tl.float32)
    for i_v in range(NV):
        o_xv, m_tv, o_s, m_s = _of_block(i_v, o_i, m_t, o_k, m_k, H, V, BV)
        b_dr = tl.load(d_r + i_x * V + o_xv, mask=m_tv, other=0)
        b_u = tl.load(u + i_x * V + o_xv, mask=m_tv, other=0)
        b_s = tl.load(chunk_states + i_s + o_s, mask=m_s, other=0)
        b_e = tl.dot(b_dr, tl.trans(b_u), b_e, input_precision=PRECISION)
        b_dx = tl.dot(b_dr, tl.trans(b_s), b_dx, input_precision=PRECISION)
        b_r = b_dr.to(tl.float32)
        b_v = tl.load(v + i_x * V + o_xv, mask=m_tv, other=0).to(tl.float32)
        b_rv += tl.sum(b_r * b_v, 1)
        if norms is not None:
            b_kk += 2 * tl.sum(b_r * b_u.to(tl.float32), 1)
        b_v = tl.load(beta + i_x + o_i * H, mask=m_t, other=0).to(tl.float32)[:, None] * b_r
        tl.store(dv + i_x * V + o_xv, b_v.to(dtype), mask=tl.where(i_k == 0, m_tv, False))
    o_j, o_r = parts.anew(o_i, i_c, 4), parts.anew(o_i, i_c, 7)
    m_p = o_r[:, None] > o_j[None, :]
    b_nk = parts.norms(norms, i_xk, HK, tokens, o_r)
    b_beta = tl.load(beta + i_x + o_r * H, mask=o_r < tokens, other=0).to(tl.float32)
    b_e = tl.where(m_p, -b_e * parts.norms(norms, i_xk, HK, tokens, o_j)[None, :], 0.0)
    if decays is not None:
        b_high, b_low, high, _ = parts.decays(decays, ALL, i_x, H, tokens, o_r)
        b_dx *= tl.exp(b_high)[:, None]
        c_high, c_low, _, _ = parts.decays(decays, ALL, i_x, H, tokens, o_j)
        b_e *= parts.between_unmasked(b_high[:, None], b_low[:, None], c_high[None, :], c_low[None, :])
    b_row = -tl.sum(b_dx * b_k.to(tl.float32), 1) * b_nk
    b_dk += tl.dot(b_e.to(dtype), b_k, -b_dx, input_precision=PRECISION) * b_beta[:, None]
    if norms is not None:
        b_dk = (b_dk - b_k.to(tl.float32) * ((b_kk - b_beta * b_rv) * b_nk)[:, None]) * b_nk[:, None]
    tl.store(dk + i_x * K + o_y, b_dk.to(dk.dtype.element_ty), mask=m_tk)

    b_f = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_e * b_nk[:, None]
    b_dbeta = tl.where(i_k == 0, b_rv, 0.0) + tl.sum(b_f, 1) + b_row
    tl.store(sums + i_k.to(tl.int64) * SHARE + i_x + o_i * H, b_dbeta, mask=m_t)
    if decays is not None:
        b_f *= b_beta[:, None]
        b_dg += tl.sum(b_f, 1) - tl.sum(b_f, 0) + b_row * b_beta
        # written by a token: the decays of all later ones of the chunk keep it
        b_dg = tl.cumsum(b_dg, 0, reverse=True) + (tl.cumsum(b_written, 0) - b_written)
        b_dg += tl.sum(b_through, 0) * tl.exp(high)
        tl.store(sums + i_k.to(tl.int64) * SHARE + ALL + i_x + o_i * H, b_dg, mask=m_t)
