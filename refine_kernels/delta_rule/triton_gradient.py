"""The backward's kernel for all chunks at once: gradients of q, k, v, beta and g from U, dR' and the states.

Launched by ``triton_chunk.py``; the letters are those of ``chunked.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refine_kernels.delta_rule import triton_parts as parts


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
    kept,  # [places of groups, H, K, V]  the state before every group
    d_o,  # [B, T, H, V]
    d_r,  # [B, T, H, V]
    d_chunk_states,  # [places of chunks, H, K, V]
    dq,  # [B, T, H, K], shares of the value heads where several read one q and k
    dk,  # [B, T, H, K]
    dv,  # [B, T, H, V]
    sums,  # [blocks of K, 1 or, with g, 2, B, T, H] float32, shares of dbeta and dg
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of groups] or None
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
    BR: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BK columns of dq and dk over one group of GROUP chunks and one head.

    With U given, rows of the state do not meet: a program carries its BK rows of S (as S^T) through the group on
    the chip (GROUP > 1, BV >= V) or reads those of every chunk (GROUP = 1, block of V after block). Reads its
    columns of q and k and of every chunk's dS', and v, o, U, dO, dR', beta and g; writes its columns of dq and
    dk, its share of dbeta and dg, and the first program of a head dv.

    Rows of dq and dk are made orthogonal to q and k without the other columns: ``<dq_i, q_i> = <dO_i, o_i>``, as
    o is linear in q, and ``<dk_i, k_i> = <dR'_i, 2 u_i - beta_i v_i>``, as scaling what k_i writes scales u_i and
    scaling what it reads scales ``u_i - beta_i v_i``.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    NR: tl.constexpr = (V + BR - 1) // BR
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    i_group = pid // NK // H
    i_n = parts.owner(cu_seqlens, owners, i_group, T, GROUP * BT)
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    i_place = parts.place(cu_seqlens, i_n, begin, T, BT)
    first = (i_group - parts.place(cu_seqlens, i_n, begin, T, GROUP * BT)).to(tl.int32) * GROUP
    chunks = tl.minimum(tl.cdiv(length, BT), first + GROUP)

    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    o_v = tl.arange(0, BV)
    dtype = k.dtype.element_ty
    p_kept = kept + (i_group.to(tl.int64) * H + i_h) * (K * V)
    o_st = o_v[:, None] + o_k[None, :] * V  # of S^T
    if GROUP > 1:
        b_s = tl.load(p_kept + o_st, mask=(o_v < V)[:, None] & m_k[None, :], other=0).to(tl.float32)

    for i_c in range(first, chunks):
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 0)
        i_x = (begin + i_c * BT) * H + i_h
        i_xk = i_x // REPEAT  # of the key head
        p_ds = d_chunk_states + ((i_place + i_c) * H + i_h) * (K * V)
        b_beta = tl.load(beta + i_x + o_x, mask=m_t, other=0).to(tl.float32)
        size = tl.minimum(length - i_c * BT, BT)
        b_nk = parts.norms(norms, i_xk, H // REPEAT, size, o_i)
        b_nq = parts.norms_of_q(norms, ALL, REPEAT, i_xk, H // REPEAT, size, o_i)
        b_from = tl.full((BT,), 1.0, tl.float32)
        b_to = b_from
        if decays is not None:
            b_high, b_low, high, low = parts.decays(decays, ALL, i_x, H, size, o_i)
            b_from = tl.exp(b_high)
            b_to = tl.exp((high - b_high) + (low - b_low))

        # What needs no matrix: dv, dbeta's first part, and the inner products of rows.
        b_dbeta = tl.zeros((BT,), tl.float32)
        b_qq = tl.zeros((BT,), tl.float32)
        b_kk = tl.zeros((BT,), tl.float32)
        for i_r in range(NR):
            o_r = i_r * BR + tl.arange(0, BR)
            m_r = m_t[:, None] & (o_r < V)[None, :]
            o_xr = o_x[:, None] * V + o_r[None, :]
            b_r = tl.load(d_r + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
            b_v = tl.load(v + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
            b_rv = tl.sum(b_r * b_v, 1)
            b_dbeta += b_rv
            tl.store(
                dv + i_x * V + o_xr, (b_beta[:, None] * b_r).to(dtype), mask=tl.where(i_k == 0, m_r, False)
            )
            if norms is not None:
                b_v = tl.load(u + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
                b_kk += 2 * tl.sum(b_r * b_v, 1) - b_beta * b_rv
                b_v = tl.load(o + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
                b_r = tl.load(d_o + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
                b_qq += tl.sum(b_r * b_v, 1)
        b_dbeta = tl.where(i_k == 0, b_dbeta, 0.0)

        # dq = e^G dO S^T + dP K
        a_nk = parts.again(b_nk, i_c, 1)
        a_nq = parts.again(b_nq, i_c, 1)
        a_from = parts.again(b_from, i_c, 1)
        a_qq = parts.again(b_qq, i_c, 1)
        if decays is not None:
            a_high = parts.again(b_high, i_c, 1)
            a_low = parts.again(b_low, i_c, 1)
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 1)
        m_tk = m_t[:, None] & m_k[None, :]
        m_p = o_i[:, None] >= o_i[None, :]
        b_p = tl.zeros((BT, BT), tl.float32)
        for i_r in range(NR):
            o_r = i_r * BR + tl.arange(0, BR)
            m_r = m_t[:, None] & (o_r < V)[None, :]
            o_xr = o_x[:, None] * V + o_r[None, :]
            b_y = tl.load(d_o + i_x * V + o_xr, mask=m_r, other=0)
            b_u = tl.load(u + i_x * V + o_xr, mask=m_r, other=0)
            b_p = tl.dot(b_y, tl.trans(b_u), b_p, input_precision=PRECISION)
        b_k = tl.load(k + i_xk * K + (o_xk[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_p = tl.where(m_p, b_p * a_nk[None, :], 0.0)
        if decays is not None:
            b_p *= parts.between_unmasked(a_high[:, None], a_low[:, None], a_high[None, :], a_low[None, :])
            b_q = tl.load(q + i_xk * K + (o_xk[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
            b_f = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_p
            b_f = tl.where(o_i[:, None] > o_i[None, :], b_f * (a_nq * scale)[:, None], 0.0)
            b_dg = tl.sum(b_f, 1) - tl.sum(b_f, 0)
        b_w = b_p.to(dtype)
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 6)
        m_tk = m_t[:, None] & m_k[None, :]
        b_dx = tl.zeros((BT, BK), tl.float32)
        for i_v in range(NV + (i_c >> 30)):
            m_v = i_v * BV + o_v < V
            o_xv = o_x[:, None] * V + (i_v * BV + o_v)[None, :]
            b_y = tl.load(d_o + i_x * V + o_xv, mask=m_t[:, None] & m_v[None, :], other=0)
            if GROUP == 1:
                b_h = tl.load(p_kept + o_st + i_v * BV, mask=m_v[:, None] & m_k[None, :], other=0)
            else:
                b_h = b_s.to(dtype)
            b_dx = tl.dot(b_y, b_h, b_dx, input_precision=PRECISION)
        b_q = tl.load(q + i_xk * K + (o_xk[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        if decays is not None:
            b_dx *= a_from[:, None]
            b_dg += tl.sum(b_dx * b_q.to(tl.float32), 1) * a_nq * scale
        b_dx = tl.dot(b_w, b_k, b_dx, input_precision=PRECISION) * scale
        if norms is not None:
            b_dx = (b_dx - b_q.to(tl.float32) * (a_qq * a_nq)[:, None]) * a_nq[:, None]
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 7)
        m_tk = m_t[:, None] & m_k[None, :]
        tl.store(dq + i_x * K + (o_x[:, None] * K + o_k[None, :]), b_dx.to(dq.dtype.element_ty), mask=m_tk)

        # dk where it reads: -beta e^G dR' S^T + E K, E = beta dA
        a_nk = parts.again(b_nk, i_c, 2)
        a_beta = parts.again(b_beta, i_c, 2)
        a_from = parts.again(b_from, i_c, 2)
        if decays is not None:
            a_high = parts.again(b_high, i_c, 2)
            a_low = parts.again(b_low, i_c, 2)
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 2)
        m_tk = m_t[:, None] & m_k[None, :]
        m_p = o_i[:, None] > o_i[None, :]
        b_p = tl.zeros((BT, BT), tl.float32)
        for i_r in range(NR):
            o_r = i_r * BR + tl.arange(0, BR)
            m_r = m_t[:, None] & (o_r < V)[None, :]
            o_xr = o_x[:, None] * V + o_r[None, :]
            b_y = tl.load(d_r + i_x * V + o_xr, mask=m_r, other=0)
            b_u = tl.load(u + i_x * V + o_xr, mask=m_r, other=0)
            b_p = tl.dot(b_y, tl.trans(b_u), b_p, input_precision=PRECISION)
        b_k = tl.load(k + i_xk * K + (o_xk[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_p = tl.where(m_p, -b_p * a_nk[None, :], 0.0)
        if decays is not None:
            b_p *= parts.between_unmasked(a_high[:, None], a_low[:, None], a_high[None, :], a_low[None, :])
        b_f = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_p * a_nk[:, None]
        b_dbeta += tl.sum(b_f, 1)
        if decays is not None:
            b_f *= a_beta[:, None]
            b_dg += tl.sum(b_f, 1) - tl.sum(b_f, 0)
        b_w = b_p.to(dtype)
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 10)
        m_tk = m_t[:, None] & m_k[None, :]
        b_dx = tl.zeros((BT, BK), tl.float32)
        for i_v in range(NV + (i_c >> 30)):
            m_v = i_v * BV + o_v < V
            o_xv = o_x[:, None] * V + (i_v * BV + o_v)[None, :]
            b_y = tl.load(d_r + i_x * V + o_xv, mask=m_t[:, None] & m_v[None, :], other=0)
            if GROUP == 1:
                b_h = tl.load(p_kept + o_st + i_v * BV, mask=m_v[:, None] & m_k[None, :], other=0)
            else:
                b_h = b_s.to(dtype)
            b_dx = tl.dot(b_y, b_h, b_dx, input_precision=PRECISION)
        b_dx *= -a_from[:, None]
        b_row = tl.sum(b_dx * b_k.to(tl.float32), 1) * a_nk
        b_dbeta += b_row
        tl.store(sums + i_k.to(tl.int64) * SHARE + i_x + o_x, b_dbeta, mask=m_t)
        b_dx = tl.dot(b_w, b_k, b_dx, input_precision=PRECISION) * a_beta[:, None]

        # dk where it writes: + e^{G_C - G} U dS'^T + E^T K + dP^T Q
        a_nk = parts.again(b_nk, i_c, 3)
        a_beta = parts.again(b_beta, i_c, 3)
        a_to = parts.again(b_to, i_c, 3)
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 3)
        m_tk = m_t[:, None] & m_k[None, :]
        b_e = tl.zeros((BT, BK), tl.float32)
        through = tl.zeros((1,), tl.float32)
        for i_v in range(NV + (i_c >> 30)):
            m_v = i_v * BV + o_v < V
            o_xv = o_x[:, None] * V + (i_v * BV + o_v)[None, :]
            b_u = tl.load(u + i_x * V + o_xv, mask=m_t[:, None] & m_v[None, :], other=0)
            b_ds = tl.load(p_ds + o_st + i_v * BV, mask=m_v[:, None] & m_k[None, :], other=0)
            b_e = tl.dot(b_u, b_ds, b_e, input_precision=PRECISION)
            if decays is not None:
                if GROUP == 1:
                    b_h = tl.load(p_kept + o_st + i_v * BV, mask=m_v[:, None] & m_k[None, :], other=0)
                    b_sh = b_h.to(tl.float32)
                else:
                    b_sh = b_s
                through += tl.sum(tl.sum(b_ds.to(tl.float32) * b_sh, 1, keep_dims=True), 0)
        if decays is not None:
            b_e *= a_to[:, None]
            b_written = tl.sum(b_e * b_k.to(tl.float32), 1) * a_nk
            b_dg += b_row * a_beta
            # written by a token: the decays of all later ones of the chunk keep it
            b_dg = tl.cumsum(b_dg, 0, reverse=True) + (tl.cumsum(b_written, 0) - b_written)
            b_dg += through * tl.exp(high)
            tl.store(sums + i_k.to(tl.int64) * SHARE + ALL + i_x + o_x, b_dg, mask=m_t)
        b_dx += b_e
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 4)
        a_nq = parts.again(b_nq, i_c, 4)
        if decays is not None:
            a_high = parts.again(b_high, i_c, 4)
            a_low = parts.again(b_low, i_c, 4)
        m_tk = m_t[:, None] & m_k[None, :]
        m_p = o_i[:, None] <= o_i[None, :]
        b_p = tl.zeros((BT, BT), tl.float32)  # [j, i]
        for i_r in range(NR):
            o_r = i_r * BR + tl.arange(0, BR)
            m_r = m_t[:, None] & (o_r < V)[None, :]
            o_xr = o_x[:, None] * V + o_r[None, :]
            b_y = tl.load(d_o + i_x * V + o_xr, mask=m_r, other=0)
            b_u = tl.load(u + i_x * V + o_xr, mask=m_r, other=0)
            b_p = tl.dot(b_u, tl.trans(b_y), b_p, input_precision=PRECISION)
        b_p = tl.where(m_p, b_p * (a_nq * scale)[None, :], 0.0)
        if decays is not None:
            b_p *= parts.between_unmasked(a_high[None, :], a_low[None, :], a_high[:, None], a_low[:, None])
        b_q = tl.load(q + i_xk * K + (o_xk[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_dx = tl.dot(b_p.to(dtype), b_q, b_dx, input_precision=PRECISION)
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 5)
        a_nk = parts.again(b_nk, i_c, 5)
        a_beta = parts.again(b_beta, i_c, 5)
        a_kk = parts.again(b_kk, i_c, 5)
        if decays is not None:
            a_high = parts.again(b_high, i_c, 5)
            a_low = parts.again(b_low, i_c, 5)
        m_tk = m_t[:, None] & m_k[None, :]
        m_p = o_i[:, None] < o_i[None, :]
        b_p = tl.zeros((BT, BT), tl.float32)
        for i_r in range(NR):
            o_r = i_r * BR + tl.arange(0, BR)
            m_r = m_t[:, None] & (o_r < V)[None, :]
            o_xr = o_x[:, None] * V + o_r[None, :]
            b_y = tl.load(d_r + i_x * V + o_xr, mask=m_r, other=0)
            b_u = tl.load(u + i_x * V + o_xr, mask=m_r, other=0)
            b_p = tl.dot(b_u, tl.trans(b_y), b_p, input_precision=PRECISION)
        b_p = tl.where(m_p, -b_p * (a_nk * a_beta)[None, :], 0.0)
        if decays is not None:
            b_p *= parts.between_unmasked(a_high[None, :], a_low[None, :], a_high[:, None], a_low[:, None])
        b_k = tl.load(k + i_xk * K + (o_xk[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_dx = tl.dot(b_p.to(dtype), b_k, b_dx, input_precision=PRECISION)
        if norms is not None:
            b_dx = (b_dx - b_k.to(tl.float32) * (a_kk * a_nk)[:, None]) * a_nk[:, None]
        o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 8)
        m_tk = m_t[:, None] & m_k[None, :]
        tl.store(dk + i_x * K + (o_x[:, None] * K + o_k[None, :]), b_dx.to(dk.dtype.element_ty), mask=m_tk)

        if GROUP > 1:
            if decays is not None:
                b_s *= tl.exp(high)
            o_i, m_t, o_x, o_xk = parts.tokens(length, i_c, H, REPEAT, BT, 6)
            b_u = tl.load(
                u + i_x * V + o_x[:, None] * V + o_v[None, :], mask=m_t[:, None] & (o_v < V)[None, :], other=0
            )
            b_kw = (b_k.to(tl.float32) * (b_nk * b_to)[:, None]).to(dtype)
            b_s = tl.dot(tl.trans(b_u), b_kw, b_s, input_precision=PRECISION)
