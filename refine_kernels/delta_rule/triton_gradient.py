"""The backward's kernels that are parallel over chunks or groups of them: the states before every chunk, worked out
again from those kept and U, and the gradients of q, k, v, beta and g from U, dR' and the states.

Launched by ``triton_chunk.py``; the letters are those of ``chunked.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refine_kernels.delta_rule import triton_parts as parts

SMALL = tl.constexpr(2**-6)  # of beta: below it dbeta is not worked out by dividing by beta


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
        o_l, m_t = parts.rows(tokens, o_i, i_c, 5)
        b_k = parts.tile(k + i_xk * K, o_l, H // REPEAT, o_k, K, BK)
        b_u = parts.tile(u + i_x * V, o_l, H, o_v, V, BV)
        b_w = tl.where(m_t, parts.norms(norms, i_xk, H // REPEAT, tokens, o_i), 0.0)
        if decays is not None:
            b_w *= parts.to_end(decays, ALL, i_x, H, tokens, o_i, PRECISION)
            b_s *= parts.through(decays, ALL, i_x, H, tokens)
        b_u = (b_u.to(tl.float32) * b_w[:, None]).to(dtype)
        b_s = tl.dot(tl.trans(b_k), b_u, b_s, input_precision=PRECISION)


@triton.jit
def _of_tokens(i_v, o_i, m_t, H, V: tl.constexpr, BV: tl.constexpr):
    """Where block ``i_v`` of columns of V lies in a tensor of tokens, and what of it exists. [BT, BV] each."""
    o_v = i_v * BV + tl.arange(0, BV)
    return (o_i * H)[:, None] * V + o_v[None, :], m_t[:, None] & (o_v < V)[None, :]


@triton.jit
def _of_state(i_v, o_k, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """The same of rows ``o_k`` of a state. [BK, BV] each."""
    o_v = i_v * BV + tl.arange(0, BV)
    return o_k[:, None] * V + o_v[None, :], (o_k < K)[:, None] & (o_v < V)[None, :]


@triton.jit
def _columns(x, i_x, o_i, m_t, o_k, H, K: tl.constexpr):
    """Columns ``o_k`` of a chunk's rows of q or k, [BT, BK]."""
    m_x = m_t[:, None] & (o_k < K)[None, :]
    return tl.load(x + i_x * K + ((o_i * H)[:, None] * K + o_k[None, :]), mask=m_x, other=0)


@triton.jit
def _through_state(
    d, states, i_x, i_s, o_i, m_t, o_k, H, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``d S^T`` for the rows ``o_k`` of a chunk's S, [BT, BK]."""
    b_x = tl.zeros((o_i.shape[0], o_k.shape[0]), tl.float32)
    for i_v in range((V + BV - 1) // BV):
        o_xv, m_tv = _of_tokens(i_v, o_i, m_t, H, V, BV)
        o_s, m_s = _of_state(i_v, o_k, K, V, BV)
        b_d = tl.load(d + i_x * V + o_xv, mask=m_tv, other=0)
        b_s = tl.load(states + i_s + o_s, mask=m_s, other=0)
        b_x = tl.dot(b_d, tl.trans(b_s), b_x, input_precision=PRECISION)
    return b_x


@triton.jit
def _sum_of_products(a, b, i_s, o_k, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """``<a, b>`` over the rows ``o_k`` of two states."""
    sum = 0.0
    for i_v in range((V + BV - 1) // BV):
        o_s, m_s = _of_state(i_v, o_k, K, V, BV)
        b_a = tl.load(a + i_s + o_s, mask=m_s, other=0).to(tl.float32)
        b_b = tl.load(b + i_s + o_s, mask=m_s, other=0).to(tl.float32)
        sum += tl.sum(tl.sum(b_a * b_b, 1), 0)
    return sum


@triton.jit
def _of_dq(
    q, k, d_o, chunk_states, decays, b_p, i_x, i_xk, i_s, tokens, o_i, o_k, scale, ALL, H, HK, K: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns ``o_k`` of dq [BT, BK], and sums of their rows [BT]: of what came through the state times q, and of
    all of it times q."""
    m_t = o_i < tokens
    b_x = _through_state(d_o, chunk_states, i_x, i_s, o_i, m_t, o_k, H, K, V, BV, PRECISION)
    b_q = _columns(q, i_xk, o_i, m_t, o_k, HK, K).to(tl.float32)
    b_k = _columns(k, i_xk, o_i, m_t, o_k, HK, K)
    b_read = tl.zeros(o_i.shape, tl.float32)
    if decays is not None:
        b_x *= parts.from_start(decays, ALL, i_x, H, tokens, o_i, PRECISION)[:, None]
        b_read = tl.sum(b_x * b_q, 1)
    b_x = tl.dot(b_p, b_k, b_x, input_precision=PRECISION) * scale
    return b_x, b_read, tl.sum(b_x * b_q, 1)


@triton.jit
def _of_dk_written(
    q, k, u, d_chunk_states, decays, b_p, b_e, i_x, i_xk, i_s, tokens, o_i, o_k, ALL, H, HK, K: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns ``o_k`` of dk where it writes [BT, BK], and sums of their rows [BT]: of what came through the state
    times k."""
    m_t = o_i < tokens
    b_x = _through_state(u, d_chunk_states, i_x, i_s, o_i, m_t, o_k, H, K, V, BV, PRECISION)
    b_k = _columns(k, i_xk, o_i, m_t, o_k, HK, K)
    b_q = _columns(q, i_xk, o_i, m_t, o_k, HK, K)
    b_written = tl.zeros(o_i.shape, tl.float32)
    if decays is not None:
        b_x *= parts.to_end(decays, ALL, i_x, H, tokens, o_i, PRECISION)[:, None]
        b_written = tl.sum(b_x * b_k.to(tl.float32), 1)
    b_x = tl.dot(b_p, b_q, b_x, input_precision=PRECISION)
    b_x = tl.dot(b_e, b_k, b_x, input_precision=PRECISION)
    return b_x, b_written


@triton.jit
def _with_dk_read(
    b_x, k, d_r, chunk_states, decays, b_e, b_beta, i_x, i_xk, i_s, tokens, o_i, o_k, ALL, H, HK, K: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``b_x`` with what dk gets where it reads, and sums of rows [BT]: of what came through the state times k, and
    of all of it times k."""
    m_t = o_i < tokens
    b_y = _through_state(d_r, chunk_states, i_x, i_s, o_i, m_t, o_k, H, K, V, BV, PRECISION)
    b_k = _columns(k, i_xk, o_i, m_t, o_k, HK, K)
    if decays is not None:
        b_y *= parts.from_start(decays, ALL, i_x, H, tokens, o_i, PRECISION)[:, None]
    b_read = tl.sum(b_y * b_k.to(tl.float32), 1)
    b_x -= b_y * b_beta[:, None]
    b_x = tl.dot(b_e, b_k, b_x, input_precision=PRECISION)
    return b_x, b_read, tl.sum(b_x * b_k.to(tl.float32), 1)


@triton.jit
def _store_columns(d_x, x, norms, b_x, b_along, b_n, i_x, i_xk, tokens, o_i, o_k, H, HK, K: tl.constexpr):
    """Columns ``o_k`` of the gradient of rows of x, orthogonal to x where x is normalised; ``b_along``: what all
    columns of a row have in x's direction, ``<b_x, x>``."""
    m_t = o_i < tokens
    if norms is not None:
        b_x -= _columns(x, i_xk, o_i, m_t, o_k, HK, K).to(tl.float32) * (b_along * b_n * b_n)[:, None]
        b_x *= b_n[:, None]
    m_x = m_t[:, None] & (o_k < K)[None, :]
    tl.store(d_x + i_x * K + ((o_i * H)[:, None] * K + o_k[None, :]), b_x.to(d_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["T", "ALL"])
def gradient_kernel(
    q,  # [B, T, H / REPEAT, K]
    k,  # [B, T, H / REPEAT, K]
    v,  # [B, T, H, V]
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
    sums,  # [1 or, with g, 2, B, T, H] float32, dbeta and dg
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of chunks] or None
    scale,
    T,
    H,
    ALL,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one chunk of one head, its K columns in one or TWO blocks of BK, V in blocks of BV.

    With U and the states given, nothing goes along the sequence. ``dO U^T``, ``dR' U^T`` and both transposed (a
    product's result is never transposed) are worked out first and wait as [BT, BT] in the inputs' dtype; then block
    by block of K what comes through the states, ``dO S^T``, ``U dS'^T`` and ``dR' S^T``. Reads everything once from
    memory (U, dO, dR' and S up to four times from the cache) and of v the rows with a small beta alone.

    Where q and k are normalised, all columns of a row of dq and dk are here before any is stored, so that what they
    have along q and k can be taken out. ``dbeta_i = <dR'_i, R_i> + <dA_i, L_i>`` is ``<dR'_i, u_i> / beta_i``, as
    scaling beta_i scales u_i: used where beta_i does not come near 0.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    TWO: tl.constexpr = K > BK
    pid = tl.program_id(0)
    i_h = pid % H
    i_place = pid // H
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
    o_k = tl.arange(0, BK)
    m_t = o_i < tokens
    dtype = k.dtype.element_ty
    i_s = (i_place.to(tl.int64) * H + i_h) * (K * V)

    if decays is not None:
        kept = _sum_of_products(chunk_states, d_chunk_states, i_s, o_k, K, V, BV)
        if TWO:
            kept += _sum_of_products(chunk_states, d_chunk_states, i_s, BK + o_k, K, V, BV)

    # dq = e^G dO S^T + dP K
    b_p = tl.zeros((BT, BT), tl.float32)
    for i_v in range(NV):
        o_xv, m_tv = _of_tokens(i_v, o_i, m_t, H, V, BV)
        b_do = tl.load(d_o + i_x * V + o_xv, mask=m_tv, other=0)
        b_u = tl.load(u + i_x * V + o_xv, mask=m_tv, other=0)
        b_p = tl.dot(b_do, tl.trans(b_u), b_p, input_precision=PRECISION)
    o_j, o_r = parts.anew(o_i, i_c, 19), parts.anew(o_i, i_c, 23)
    b_nq = parts.norms_of_q(norms, ALL, REPEAT, i_xk, HK, tokens, o_r)
    m_p = o_r[:, None] >= o_j[None, :]
    b_p = tl.where(m_p, b_p * parts.norms(norms, i_xk, HK, tokens, o_j)[None, :], 0.0)
    if decays is not None:
        b_p *= parts.between(decays, ALL, i_x, H, tokens, o_r, o_j, m_p, PRECISION)
        b_q = _columns(q, i_xk, o_r, o_r < tokens, o_k, HK, K)
        b_k = _columns(k, i_xk, o_r, o_r < tokens, o_k, HK, K)
        b_f = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if TWO:
            b_q = _columns(q, i_xk, o_r, o_r < tokens, BK + o_k, HK, K)
            b_k = _columns(k, i_xk, o_r, o_r < tokens, BK + o_k, HK, K)
            b_f = tl.dot(b_q, tl.trans(b_k), b_f, input_precision=PRECISION)
        b_f = tl.where(o_r[:, None] > o_j[None, :], b_f * b_p * (b_nq * scale)[:, None], 0.0)
        b_dg = tl.sum(b_f, 1) - tl.sum(b_f, 0)
    b_h = b_p.to(dtype)
    b_x0, b_read, b_along = _of_dq(
        q, k, d_o, chunk_states, decays, b_h, i_x, i_xk, i_s, tokens, parts.anew(o_i, i_c, 24), o_k,
        scale, ALL, H, HK, K, V, BV, PRECISION,
    )  # fmt: skip
    if TWO:
        b_x1, c_read, c_along = _of_dq(
            q, k, d_o, chunk_states, decays, b_h, i_x, i_xk, i_s, tokens, parts.anew(o_i, i_c, 25), BK + o_k,
            scale, ALL, H, HK, K, V, BV, PRECISION,
        )  # fmt: skip
        b_read += c_read
        b_along += c_along
        o_r = parts.anew(o_i, i_c, 8)
        _store_columns(dq, q, norms, b_x1, b_along, b_nq, i_x, i_xk, tokens, o_r, BK + o_k, H, HK, K)
    _store_columns(
        dq, q, norms, b_x0, b_along, b_nq, i_x, i_xk, tokens, parts.anew(o_i, i_c, 9), o_k, H, HK, K
    )
    if decays is not None:
        b_dg += b_read * b_nq * scale

    # dk where it writes: e^{G_C - G} U dS'^T + dP^T Q + E^T K, E = beta dA; rows are those of U
    b_p = tl.zeros((BT, BT), tl.float32)
    b_e = tl.zeros((BT, BT), tl.float32)
    o_r = parts.anew(o_i, i_c, 20)
    for i_v in range(NV):
        o_xv, m_tv = _of_tokens(i_v, o_r, o_r < tokens, H, V, BV)
        b_u = tl.load(u + i_x * V + o_xv, mask=m_tv, other=0)
        b_do = tl.load(d_o + i_x * V + o_xv, mask=m_tv, other=0)
        b_dr = tl.load(d_r + i_x * V + o_xv, mask=m_tv, other=0)
        b_p = tl.dot(b_u, tl.trans(b_do), b_p, input_precision=PRECISION)
        b_e = tl.dot(b_u, tl.trans(b_dr), b_e, input_precision=PRECISION)
    o_j, o_r = parts.anew(o_i, i_c, 21), parts.anew(o_i, i_c, 22)
    c_nq = parts.norms_of_q(norms, ALL, REPEAT, i_xk, HK, tokens, o_j) * scale
    c_nk = parts.norms(norms, i_xk, HK, tokens, o_j)
    c_beta = tl.load(beta + i_x + o_j * H, mask=o_j < tokens, other=0).to(tl.float32)
    m_p = o_r[:, None] <= o_j[None, :]
    b_p = tl.where(m_p, b_p * c_nq[None, :], 0.0)
    b_e = tl.where(o_r[:, None] < o_j[None, :], -b_e * (c_nk * c_beta)[None, :], 0.0)
    if decays is not None:
        b_d = parts.between(decays, ALL, i_x, H, tokens, o_r, o_j, m_p, PRECISION, TRANSPOSED=True)
        b_p *= b_d
        b_e *= b_d
    b_h, b_e = b_p.to(dtype), b_e.to(dtype)
    b_x0, b_written = _of_dk_written(
        q, k, u, d_chunk_states, decays, b_h, b_e, i_x, i_xk, i_s, tokens, parts.anew(o_i, i_c, 10), o_k,
        ALL, H, HK, K, V, BV, PRECISION,
    )  # fmt: skip
    if TWO:
        b_x1, c_written = _of_dk_written(
            q, k, u, d_chunk_states, decays, b_h, b_e, i_x, i_xk, i_s, tokens, parts.anew(o_i, i_c, 11), BK + o_k,
            ALL, H, HK, K, V, BV, PRECISION,
        )  # fmt: skip
        b_written += c_written

    # dk where it reads: -beta e^G dR' S^T + E K; and what needs no product
    b_e = tl.zeros((BT, BT), tl.float32)
    b_dbeta = tl.zeros((BT,), tl.float32)
    o_r = parts.anew(o_i, i_c, 12)
    b_beta = tl.load(beta + i_x + o_r * H, mask=o_r < tokens, other=0).to(tl.float32)
    b_small = tl.abs(b_beta) < SMALL
    b_by = tl.where(b_small, 0.0, 1 / tl.where(b_small, 1.0, b_beta))
    for i_v in range(NV):
        o_xv, m_tv = _of_tokens(i_v, o_r, o_r < tokens, H, V, BV)
        b_u = tl.load(u + i_x * V + o_xv, mask=m_tv, other=0)
        b_dr = tl.load(d_r + i_x * V + o_xv, mask=m_tv, other=0)
        b_e = tl.dot(b_dr, tl.trans(b_u), b_e, input_precision=PRECISION)
        b_r = b_dr.to(tl.float32)
        b_v = tl.load(v + i_x * V + o_xv, mask=m_tv & b_small[:, None], other=0).to(tl.float32)
        b_v += b_u.to(tl.float32) * b_by[:, None]
        b_dbeta += tl.sum(b_r * b_v, 1)
        tl.store(dv + i_x * V + o_xv, (b_r * b_beta[:, None]).to(dtype), mask=m_tv)
    o_j, o_r = parts.anew(o_i, i_c, 13), parts.anew(o_i, i_c, 14)
    b_nk = parts.norms(norms, i_xk, HK, tokens, o_r)
    c_nk = parts.norms(norms, i_xk, HK, tokens, o_j)
    b_beta = tl.load(beta + i_x + o_r * H, mask=o_r < tokens, other=0).to(tl.float32)
    m_p = o_r[:, None] > o_j[None, :]
    b_e = tl.where(m_p, -b_e * c_nk[None, :], 0.0)
    if decays is not None:
        b_e *= parts.between(decays, ALL, i_x, H, tokens, o_r, o_j, m_p, PRECISION)
    b_h = (b_e * b_beta[:, None]).to(dtype)
    b_k = _columns(k, i_xk, o_r, o_r < tokens, o_k, HK, K)
    b_f = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    if TWO:
        b_k = _columns(k, i_xk, o_r, o_r < tokens, BK + o_k, HK, K)
        b_f = tl.dot(b_k, tl.trans(b_k), b_f, input_precision=PRECISION)
    b_f *= b_e * b_nk[:, None]
    b_fl = tl.sum(b_f, 1)
    if decays is not None:
        b_f *= b_beta[:, None]
        b_dg += tl.sum(b_f, 1) - tl.sum(b_f, 0)
    b_x0, b_read, b_along = _with_dk_read(
        b_x0, k, d_r, chunk_states, decays, b_h, b_beta, i_x, i_xk, i_s, tokens, parts.anew(o_i, i_c, 15), o_k,
        ALL, H, HK, K, V, BV, PRECISION,
    )  # fmt: skip
    if TWO:
        b_x1, c_read, c_along = _with_dk_read(
            b_x1, k, d_r, chunk_states, decays, b_h, b_beta, i_x, i_xk, i_s, tokens, parts.anew(o_i, i_c, 16),
            BK + o_k, ALL, H, HK, K, V, BV, PRECISION,
        )  # fmt: skip
        b_read += c_read
        b_along += c_along
        o_r = parts.anew(o_i, i_c, 17)
        _store_columns(dk, k, norms, b_x1, b_along, b_nk, i_x, i_xk, tokens, o_r, BK + o_k, H, HK, K)
    _store_columns(
        dk, k, norms, b_x0, b_along, b_nk, i_x, i_xk, tokens, parts.anew(o_i, i_c, 18), o_k, H, HK, K
    )

    b_read *= -b_nk
    b_dbeta += tl.where(tl.abs(b_beta) < SMALL, b_fl + b_read, 0.0)
    tl.store(sums + i_x + o_i * H, b_dbeta, mask=m_t)
    if decays is not None:
        b_written *= b_nk
        b_dg += b_read * b_beta
        # written by a token: the decays of all later ones of the chunk keep it
        b_dg = tl.cumsum(b_dg, 0, reverse=True) + (tl.cumsum(b_written, 0) - b_written)
        b_dg += kept * parts.through(decays, ALL, i_x, H, tokens)
        tl.store(sums + ALL + i_x + o_i * H, b_dg, mask=m_t)
