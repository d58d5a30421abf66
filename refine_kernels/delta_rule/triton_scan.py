"""The kernels that go along a sequence chunk by chunk, and the one before them that inverts every chunk's system.

What they compute is told in ``triton_chunk.py``, which launches them; the letters are those of ``chunked.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refine_kernels.delta_rule import triton_parts as parts


@triton.jit(do_not_specialize=["T", "ALL"])
def inverse_kernel(
    q,  # [B, T, H / REPEAT, K]
    k,  # [B, T, H / REPEAT, K]
    beta,  # [B, T, H]
    g,  # [B, T, H] or None
    inverse,  # [B, T, H, BT]
    decays,  # [2, B, T, H] float32 (parts.store_sums), or None without g
    norms,  # [2, B, T, H / REPEAT] float32, of k and of q, or None: not normalised
    cu_seqlens,  # [N + 1] or None
    owners,  # [places] or None
    T,
    H,
    ALL,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: M = (I + A)^-1, A = diag(beta) strictly_lower(D * K K^T), of one chunk and head.

    Float32 inputs have A and M worked out in float64: rounding of A comes back multiplied by M, whose rows sum to
    19 for parallel keys and beta = 1.9, and would be most of what such states lose.

    Reads k, beta, g and, for its norms, q once, writes M, the running sums of g and the factors
    ``1 / sqrt(sum x^2 + eps)`` once. The 8 x 8 blocks on the diagonal by substitution, row after row in all of them
    at once; then blocks of 16, 32 and 64 by ``M <- M - M A_below M``.
    Substitution keeps its accuracy for parallel keys, where powers of A (Neumann doubling) reach 10^8.
    """
    pid = tl.program_id(0)
    i_h = pid % H
    i_place = pid // H
    i_n = parts.owner(cu_seqlens, owners, i_place, T, BT)
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    i_c = (i_place - parts.place(cu_seqlens, i_n, begin, T, BT)).to(tl.int32)
    if i_c * BT >= length:
        return

    o_i = tl.arange(0, BT)
    o_t = i_c * BT + o_i
    m_t = o_t < length
    i_x = (begin + i_c * BT) * H + i_h  # of the chunk's first token, then of every token from there
    o_x = o_i * H
    o_xk = o_i * (H // REPEAT)
    o_k = tl.arange(0, BK)
    b_k = tl.load(
        k + i_x // REPEAT * K + (o_xk[:, None] * K + o_k[None, :]),
        mask=m_t[:, None] & (o_k < K)[None, :],
        other=0,
    )
    b_beta = tl.load(beta + i_x + o_x, mask=m_t, other=0).to(tl.float32)
    b_nk = tl.full((BT,), 1.0, tl.float32)
    if norms is not None:
        p_n = norms + i_x // REPEAT + o_xk
        b_q = tl.load(
            q + i_x // REPEAT * K + (o_xk[:, None] * K + o_k[None, :]),
            mask=m_t[:, None] & (o_k < K)[None, :], other=0,
        )  # fmt: skip
        b_nk = _factors(b_k, EPS)
        m_n = tl.where(i_h % REPEAT == 0, m_t, False)
        tl.store(p_n, b_nk, mask=m_n)
        tl.store(p_n + ALL // REPEAT, _factors(b_q, EPS), mask=m_n)
    m_below = o_i[:, None] > o_i[None, :]
    dtype: tl.constexpr = tl.float64 if PRECISION == "ieee" else tl.float32
    if PRECISION == "ieee":
        b_k = b_k.to(dtype)
    b_nk = b_nk.to(dtype)
    b_a = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION, out_dtype=dtype)
    b_a = b_a * (b_beta.to(dtype) * b_nk)[:, None] * b_nk[None, :]
    if g is not None:
        b_whole, b_rest = parts.sum_decays(g + i_x, o_x, m_t)
        parts.store_sums(decays, ALL, i_x + o_x, b_whole, b_rest, m_t)
        b_a *= parts.between_sums(b_whole, b_rest, m_below, dtype)
    b_a = tl.where(m_below, b_a, 0.0)

    # blocks of OWN tokens on the diagonal, [NB, OWN, OWN]
    OWN: tl.constexpr = 8
    NB: tl.constexpr = BT // OWN
    o_b = tl.arange(0, NB)
    o_own = tl.arange(0, OWN)
    m_own = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_d = tl.sum(tl.where(m_own, tl.reshape(b_a, (NB, OWN, NB, OWN)), 0.0), 2)
    b_m = tl.where(o_own[None, :, None] == o_own[None, None, :], 1.0, 0.0) + tl.zeros((NB, OWN, OWN), dtype)
    for i in range(1, OWN):
        m_row = (o_own == i)[None, :, None]
        b_row = tl.sum(tl.where(m_row, b_d, 0.0), 1)  # [NB, OWN]
        b_new = tl.sum(b_row[:, :, None] * b_m, 1)  # [NB, OWN]
        b_m = tl.where(m_row, b_m - b_new[:, None, :], b_m)
    b_m = tl.where(m_own, tl.reshape(b_m, (NB, OWN, 1, OWN)), 0.0)
    b_m = tl.reshape(b_m, (BT, BT))

    b_m = parts.merge(b_m, b_a, 8, BT, PRECISION)
    b_m = parts.merge(b_m, b_a, 16, BT, PRECISION)
    if BT > 32:
        b_m = parts.merge(b_m, b_a, 32, BT, PRECISION)
    b_m = b_m.to(inverse.dtype.element_ty)
    tl.store(inverse + i_x * BT + (o_x[:, None] * BT + o_i[None, :]), b_m, mask=m_t[:, None])


@triton.jit
def _factors(b_x, EPS: tl.constexpr):  # [BT, BK] -> [BT]
    b_f = b_x.to(tl.float32)
    return tl.rsqrt(tl.sum(b_f * b_f, 1) + EPS)


@triton.jit(do_not_specialize=["T", "ALL", "N_STATES", "STRIDE", "SPAN"])
def scan_kernel(
    q,  # [B, T, H / REPEAT, K]; None without o
    k,  # [B, T, H / REPEAT, K]
    v,  # [B, T, H, V]
    beta,  # [B, T, H]
    decays,  # [2, B, T, H] float32 or None
    norms,  # [2, B, T, H / REPEAT] float32 or None
    inverse,  # [B, T, H, BT]
    initial,  # [N, H, K, V] float32 or None; with SPAN and without maps, [places of spans, H, K, V]
    o,  # [B, T, H, V] or None
    u,  # [B, T, H, V] or None
    final_state,  # [N, H, K, V] float32 or None
    states,  # [N, N_STATES, H, K, V] float32 or None
    checkpoints,  # [places of groups, H, K, V] float32 or None
    maps,  # [places of spans, H, K, V + K] float32 or None
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of spans] or None
    scale,
    T,
    H,
    ALL,
    N_STATES,
    STRIDE,
    SPAN,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BV columns of one head's state, through all chunks of a sequence or, with SPAN, through SPAN of
    them from the state that ``initial`` has for this span.

    Reads q, k, v, beta, g, norms and M once (q, k and M once for every block of V), writes o once; the
    state stays on the chip. States at strides, the final state, a float32 state every GROUP chunks are
    written where there is a tensor for them. STRIDE counts chunks.

    ``maps`` asks for what a span does to the state that enters it, ``S -> P S + L``, as [L P]: L is scanned from
    zeros, the columns of P from those of the identity with v = 0, as columns of a state do not see one another.
    The first span starts from ``initial``, so its L is what leaves it and P is left out; the last one is skipped.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NB: tl.constexpr = NV if maps is None else NV + (K + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NB
    i_h = (pid // NB) % H
    i_row = pid // NB // H
    if SPAN is None:
        i_n = i_row
    else:
        i_n = parts.owner(cu_seqlens, owners, i_row, T, SPAN * BT)
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    whole = tl.cdiv(length, BT)
    chunks = whole
    first = tl.minimum(
        T, 0
    )  # 0, which the compiler does not know: it would keep addresses of all phases in registers
    if SPAN is not None:
        first = (i_row - parts.place(cu_seqlens, i_n, begin, T, SPAN * BT)).to(tl.int32) * SPAN
        chunks = tl.minimum(whole, first + SPAN)
    if maps is not None:  # noqa: SIM102
        if (first + SPAN >= whole) | ((first == 0) & (i_v >= NV)):
            return
    i_group = parts.place(cu_seqlens, i_n, begin, T, GROUP * BT)

    HK = H // REPEAT
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    dtype = k.dtype.element_ty
    if initial is None:
        b_s = tl.zeros((BK, BV), tl.float32)
    elif maps is None:
        i_z = (i_row.to(tl.int64) * H + i_h) * (K * V)
        b_s = tl.load(initial + i_z + o_s, mask=m_s, other=0).to(tl.float32)
    else:
        i_z = (i_n.to(tl.int64) * H + i_h) * (K * V)
        b_s = tl.load(initial + i_z + o_s, mask=tl.where(first == 0, m_s, False), other=0).to(tl.float32)
    if maps is not None:
        b_s = tl.where(o_k[:, None] == (o_v - NV * BV)[None, :], 1.0, b_s)

    for i_c in range(first, chunks):
        if states is not None:  # noqa: SIM102
            if i_c % STRIDE == 0:
                i_state = (i_n.to(tl.int64) * N_STATES + i_c // STRIDE) * H + i_h
                o_z = parts.anew(o_k, i_c, 3)[:, None] * V + o_v[None, :]
                tl.store(states + i_state * (K * V) + o_z, b_s, mask=m_s)
        if checkpoints is not None:  # noqa: SIM102
            if i_c % GROUP == 0:
                i_state = (i_group + i_c // GROUP) * H + i_h
                o_z = parts.anew(o_k, i_c, 4)[:, None] * V + o_v[None, :]
                tl.store(checkpoints + i_state * (K * V) + o_z, b_s, mask=m_s)
        b_h = b_s.to(dtype)

        i_x = (begin + i_c * BT) * H + i_h  # the chunk's first
        i_xk = i_x // REPEAT  # of the key head
        tokens = tl.minimum(length - i_c * BT, BT)
        o_l, m_t = parts.rows(tokens, o_i, i_c, 5)
        b_k = parts.tile(k + i_xk * K, o_l, HK, o_k, K, BK)
        b_m = parts.tile(inverse + i_x * BT, o_l, H, o_i, BT, BT)
        b_beta = tl.load(beta + i_x + o_l * H).to(tl.float32)
        b_beta = tl.where(m_t, b_beta, 0.0)
        b_read = parts.norms(norms, i_xk, HK, tokens, o_i)  # factors of K where it reads the state
        if decays is not None:
            b_read *= parts.from_start(decays, ALL, i_x, H, tokens, o_i, PRECISION)

        b_v = parts.tile(v + i_x * V, o_l, H, o_v, V, BV).to(tl.float32)
        if maps is not None:
            b_v = tl.where((o_v < V)[None, :], b_v, 0.0)
        b_r = b_v - b_read[:, None] * tl.dot(b_k, b_h, input_precision=PRECISION)
        b_u = tl.dot(b_m, (b_beta[:, None] * b_r).to(dtype), input_precision=PRECISION)
        if u is not None:
            o_j = parts.anew(o_i, i_c, 2)
            o_w = (o_j * H)[:, None] * V + o_v[None, :]
            tl.store(u + i_x * V + o_w, b_u.to(dtype), mask=(o_j < tokens)[:, None] & m_v[None, :])
        # what K writes: nothing behind the end. Its norms go to U instead of the columns of P.
        o_j = parts.anew(o_i, i_c, 1)
        b_w = b_u * tl.where(o_j < tokens, parts.norms(norms, i_xk, HK, tokens, o_j), 0.0)[:, None]
        if o is not None:
            o_l, m_t = parts.rows(tokens, o_i, i_c, 7)
            b_q = parts.tile(q + i_xk * K, o_l, HK, o_k, K, BK)
            o_j = parts.anew(o_i, i_c, 0)
            b_nq = parts.norms_of_q(norms, ALL, REPEAT, i_xk, HK, tokens, o_j) * scale
            m_p = o_j[:, None] >= o_j[None, :]
            b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_nq[:, None]
            if decays is not None:
                b_p *= parts.between(decays, ALL, i_x, H, tokens, o_j, o_j, m_p, PRECISION)
                b_nq *= parts.from_start(decays, ALL, i_x, H, tokens, o_j, PRECISION)
            else:
                b_p = tl.where(m_p, b_p, 0.0)
            b_o = tl.dot(b_q, b_h, input_precision=PRECISION) * b_nq[:, None]
            b_o = tl.dot(b_p.to(dtype), b_w.to(dtype), b_o, input_precision=PRECISION)
            o_j = parts.anew(o_i, i_c, 6)
            o_w = (o_j * H)[:, None] * V + o_v[None, :]
            tl.store(o + i_x * V + o_w, b_o.to(dtype), mask=(o_j < tokens)[:, None] & m_v[None, :])
        if decays is not None:
            b_w *= parts.to_end(decays, ALL, i_x, H, tokens, parts.anew(o_i, i_c, 1), PRECISION)[:, None]
            b_s *= parts.through(decays, ALL, i_x, H, tokens)
        b_s = tl.dot(tl.trans(b_k), b_w.to(dtype), b_s, input_precision=PRECISION)

    if maps is not None:
        o_z, m_z = _map_places(parts.anew(o_k, chunks, 4), parts.anew(i_v, chunks, 3), K, V, BV)
        i_z = (parts.anew(pid // NB // H, chunks, 3).to(tl.int64) * H + i_h) * (K * (V + K))
        tl.store(maps + i_z + o_z, b_s, mask=m_z)
    if final_state is not None:
        o_z = parts.anew(o_k, chunks, 4)[:, None] * V + o_v[None, :]
        if SPAN is None:
            i_z = (parts.anew(pid // NB // H, chunks, 3).to(tl.int64) * H + i_h) * (K * V)
            tl.store(final_state + i_z + o_z, b_s, mask=m_s)
        else:
            i_z = (i_n.to(tl.int64) * H + i_h) * (K * V)
            last = ((first == 0) | (first < whole)) & (first + SPAN >= whole)
            tl.store(final_state + i_z + o_z, b_s, mask=tl.where(last, m_s, False))


@triton.jit(do_not_specialize=["T", "ALL", "N_STATES", "STRIDE", "SPAN"])
def reverse_kernel(
    q,  # [B, T, H / REPEAT, K]
    k,  # [B, T, H / REPEAT, K]
    beta,  # [B, T, H]
    decays,  # [2, B, T, H] float32 or None
    norms,  # [2, B, T, H / REPEAT] float32 or None
    inverse,  # [B, T, H, BT]
    d_o,  # [B, T, H, V]
    d_final,  # [N, H, K, V] float32 or None; with SPAN and without maps, [places of spans, H, K, V]
    d_states,  # [N, N_STATES, H, K, V] float32 or None
    d_r,  # [B, T, H, V]; None with maps
    d_chunk_states,  # [places of chunks, H, K, V]; not written with maps
    d_initial,  # [N, H, K, V] float32; None with maps
    maps,  # [places of spans, H, K, V + K] float32 or None
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of spans] or None
    scale,
    T,
    H,
    ALL,
    N_STATES,
    STRIDE,
    SPAN,
    REPEAT: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BV columns of dS of one head, from the last chunk of a sequence or of a span to the first.

    Reads q, k, beta, g, norms, M and dO once (q, k and M once for every block of V), writes dR' and the dS' that
    arrives behind every chunk once, both rounded to the dtype of k.

    SPAN and ``maps`` as in ``scan_kernel``, mirrored: what a span does to the dS that arrives behind it. Here the
    last span starts from ``d_final`` and the first one is skipped.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NB: tl.constexpr = NV if maps is None else NV + (K + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NB
    i_h = (pid // NB) % H
    i_row = pid // NB // H
    if SPAN is None:
        i_n = i_row
    else:
        i_n = parts.owner(cu_seqlens, owners, i_row, T, SPAN * BT)
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    i_place = parts.place(cu_seqlens, i_n, begin, T, BT)
    whole = tl.cdiv(length, BT)
    chunks = whole
    first = tl.minimum(
        T, 0
    )  # 0, which the compiler does not know: it would keep addresses of all phases in registers
    if SPAN is not None:
        first = (i_row - parts.place(cu_seqlens, i_n, begin, T, SPAN * BT)).to(tl.int32) * SPAN
        chunks = tl.minimum(whole, first + SPAN)
    if maps is not None:  # noqa: SIM102
        if (first == 0) | (first >= whole) | ((first + SPAN >= whole) & (i_v >= NV)):
            return

    HK = H // REPEAT
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    dtype = k.dtype.element_ty
    if d_final is None:
        b_ds = tl.zeros((BK, BV), tl.float32)
    elif maps is None:
        i_z = (i_row.to(tl.int64) * H + i_h) * (K * V)
        b_ds = tl.load(d_final + i_z + o_s, mask=m_s, other=0).to(tl.float32)
    else:
        i_z = (i_n.to(tl.int64) * H + i_h) * (K * V)
        b_ds = tl.load(d_final + i_z + o_s, mask=tl.where(first + SPAN >= whole, m_s, False), other=0).to(
            tl.float32
        )
    if maps is not None:
        b_ds = tl.where(o_k[:, None] == (o_v - NV * BV)[None, :], 1.0, b_ds)

    for i_back in range(0, chunks - first):
        i_c = chunks - 1 - i_back
        b_dh = b_ds.to(dtype)
        o_z = parts.anew(o_k, i_c, 3)[:, None] * V + o_v[None, :]
        # maps have no use for it, but without a store here (it never happens: STRIDE is positive) 84 bytes spill
        m_z = m_s if maps is None else tl.where(STRIDE < 0, m_s, False)
        tl.store(d_chunk_states + ((i_place + i_c) * H + i_h) * (K * V) + o_z, b_dh, mask=m_z)

        i_x = (begin + i_c * BT) * H + i_h  # the chunk's first
        i_xk = i_x // REPEAT  # of the key head
        tokens = tl.minimum(length - i_c * BT, BT)
        o_l, _ = parts.rows(tokens, o_i, i_c, 5)
        b_q = parts.tile(q + i_xk * K, o_l, HK, o_k, K, BK)
        b_k = parts.tile(k + i_xk * K, o_l, HK, o_k, K, BK)
        b_do = parts.tile(d_o + i_x * V, o_l, H, o_v, V, BV)
        b_m = parts.tile(inverse + i_x * BT, o_l, H, o_i, BT, BT)
        if maps is not None:
            b_do = tl.where((o_v < V)[None, :], b_do, 0.0)
        # factors of rows, nothing behind the end; the norms of Q go to dO instead of the columns of P^T
        o_j = parts.anew(o_i, i_c, 1)
        m_j = o_j < tokens
        b_nk = tl.where(m_j, parts.norms(norms, i_xk, HK, tokens, o_j), 0.0)
        b_nq = tl.where(m_j, parts.norms_of_q(norms, ALL, REPEAT, i_xk, HK, tokens, o_j) * scale, 0.0)
        b_beta = tl.load(beta + i_x + tl.minimum(o_j, tokens - 1) * H).to(tl.float32)
        b_x = b_do.to(tl.float32) * b_nq[:, None]
        o_p = parts.anew(o_i, i_c, 0)
        m_p = o_p[:, None] <= o_p[None, :]
        b_p = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # P^T, but for its norms
        b_p *= tl.where(o_p < tokens, parts.norms(norms, i_xk, HK, tokens, o_p), 0.0)[:, None]
        b_du = tl.dot(b_k, b_dh, input_precision=PRECISION)
        b_read, b_write = -b_nk * b_beta, b_nk
        if decays is not None:
            b_p *= parts.between(decays, ALL, i_x, H, tokens, o_p, o_p, m_p, PRECISION, TRANSPOSED=True)
            b_write *= parts.to_end(decays, ALL, i_x, H, tokens, o_j, PRECISION)
            b_start = parts.from_start(decays, ALL, i_x, H, tokens, o_j, PRECISION)
            b_read *= b_start
        else:
            b_p = tl.where(m_p, b_p, 0.0)

        b_du *= b_write[:, None]
        b_du = tl.dot(b_p.to(dtype), b_x.to(dtype), b_du, input_precision=PRECISION)
        b_dr = tl.dot(tl.trans(b_m), b_du.to(dtype), input_precision=PRECISION)
        if d_r is not None:
            o_j = parts.anew(o_i, i_c, 2)
            o_w = (o_j * H)[:, None] * V + o_v[None, :]
            tl.store(d_r + i_x * V + o_w, b_dr.to(dtype), mask=(o_j < tokens)[:, None] & m_v[None, :])
        if decays is not None:
            b_ds *= parts.through(decays, ALL, i_x, H, tokens)
            b_x *= b_start[:, None]
        b_ds = tl.dot(tl.trans(b_q), b_x.to(dtype), b_ds, input_precision=PRECISION)
        b_ds = tl.dot(tl.trans(b_k), (b_read[:, None] * b_dr).to(dtype), b_ds, input_precision=PRECISION)
        if d_states is not None:  # noqa: SIM102
            if i_c % STRIDE == 0:
                i_given = (i_n.to(tl.int64) * N_STATES + i_c // STRIDE) * H + i_h
                o_z = parts.anew(o_k, i_c, 4)[:, None] * V + o_v[None, :]
                b_ds += tl.load(d_states + i_given * (K * V) + o_z, mask=m_s, other=0).to(tl.float32)

    if maps is not None:
        o_z, m_z = _map_places(parts.anew(o_k, chunks, 4), parts.anew(i_v, chunks, 3), K, V, BV)
        i_z = (parts.anew(pid // NB // H, chunks, 3).to(tl.int64) * H + i_h) * (K * (V + K))
        tl.store(maps + i_z + o_z, b_ds, mask=m_z)
    if d_initial is not None:
        o_z = parts.anew(o_k, chunks, 4)[:, None] * V + o_v[None, :]
        if SPAN is None:
            i_z = (parts.anew(pid // NB // H, chunks, 3).to(tl.int64) * H + i_h) * (K * V)
            tl.store(d_initial + i_z + o_z, b_ds, mask=m_s)
        else:
            i_z = (i_n.to(tl.int64) * H + i_h) * (K * V)
            tl.store(d_initial + i_z + o_z, b_ds, mask=tl.where(first == 0, m_s, False))


@triton.jit
def _map_places(o_k, i_v, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Where block ``i_v`` of a span's [L P] lies, and what of it exists. [BK, BV] each."""
    NV: tl.constexpr = (V + BV - 1) // BV
    o_v = i_v * BV + tl.arange(0, BV)
    o_p = o_v - NV * BV
    o_m = tl.where(o_p < 0, o_v, V + o_p)
    m_m = tl.where(o_p < 0, o_v < V, o_p < K)
    return o_k[:, None] * (V + K) + o_m[None, :], (o_k < K)[:, None] & m_m[None, :]


@triton.jit(do_not_specialize=["T", "SPAN"])
def join_kernel(
    maps,  # [places of spans, H, K, V + K] float32
    given,  # [N, H, K, V] float32 or None
    starts,  # [places of spans, H, K, V] float32
    cu_seqlens,  # [N + 1] or None
    T,
    H,
    SPAN,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BJ: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BV columns of one head's states, from span to span of a sequence; REVERSE: of dS, backwards.

    Writes the state that enters every span, ``S <- P S + L``, reads each [L P] once for every block of V. The span
    that comes first has begun from ``given``, so its L is what leaves it. S lies in memory where it is multiplied:
    a product takes BJ of its rows at a time.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_h = (pid // NV) % H
    i_n = pid // NV // H
    begin, length = parts.sequence(cu_seqlens, i_n, T)
    i_place = parts.place(cu_seqlens, i_n, begin, T, SPAN * BT)
    spans = tl.maximum(tl.cdiv(length, SPAN * BT), 1)

    o_k = tl.arange(0, BK)
    o_j = tl.arange(0, BJ)
    o_v = (pid % NV) * BV + tl.arange(0, BV)
    m_v = o_v < V
    m_s = (o_k < K)[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    if given is None:
        b_s = tl.zeros((BK, BV), tl.float32)
    else:
        b_s = tl.load(given + (i_n.to(tl.int64) * H + i_h) * (K * V) + o_s, mask=m_s, other=0).to(tl.float32)

    for i in range(0, spans):
        i_span = i
        if REVERSE:
            i_span = spans - 1 - i
        i_x = (i_place + i_span) * H + i_h
        p_map = maps + i_x * (K * (V + K))
        p_start = starts + i_x * (K * V)
        tl.store(p_start + o_s, b_s, mask=m_s)
        tl.debug_barrier()  # what other threads of this program have stored is read below
        more = i + 1 < spans
        b_s = tl.load(p_map + o_k[:, None] * (V + K) + o_v[None, :], mask=tl.where(more, m_s, False), other=0)
        for i_j in range(0, K, BJ):
            m_j = tl.where(more & (i > 0), i_j + o_j < K, False)
            b_p = tl.load(
                p_map + o_k[:, None] * (V + K) + (V + i_j + o_j)[None, :],
                mask=(o_k < K)[:, None] & m_j[None, :], other=0,
            )  # fmt: skip
            b_x = tl.load(
                p_start + (i_j + o_j)[:, None] * V + o_v[None, :], mask=m_j[:, None] & m_v[None, :], other=0
            )
            b_s = tl.dot(b_p, b_x, b_s, input_precision=PRECISION)
