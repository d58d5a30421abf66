"""The delta rule over chunks of tokens, in Triton: backend ``"triton"`` of ``chunk_delta_rule``.

The mathematics and its letters are those of ``chunked.py``; README.md counts what each kernel moves. Forward,
two launches: ``inverse_kernel`` (all chunks at once) writes the unit lower triangular M and the running sums of
the decays, ``scan_kernel`` (chunk after chunk, one program per head and block of V) keeps S on the chip and emits
O and, for the backward, U. Backward: ``reverse_kernel`` (from the last chunk to the first) writes dR' and the dS'
that arrives at each chunk, ``gradient_kernel`` (all groups of chunks at once, by columns of K) writes dq, dk, dv
and shares of dbeta and dg, summed at the end. It starts from the state that the forward kept for every group of
eight chunks and carries it on the chip; head sizes too large for that read each chunk's state from memory, where
a second ``scan_kernel``, parallel over the groups, has put it.

Keys and queries are never normalised in memory nor on the chip: ``use_qk_l2norm_in_kernel`` multiplies rows of
float32 results by ``1 / sqrt(sum x^2 + eps)``, so products read what was loaded. The same holds for beta and the
decays. No product takes a transposed result of another product, only transposed loads (Triton before 3.7.1 is
known to get the former wrong on Hopper): ``gradient_kernel`` therefore works on S^T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from refine_kernels.delta_rule.reference import L2_NORM_EPS

GROUP_TOKENS = 512  # from one kept state to the next
FEW = 64  # rows x heads that do not occupy a GPU


# ---------------------------------------------------------------------------------------------------------
# Launching


def forward(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
    initial_state: torch.Tensor | None,  # [N, H, K, V]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
    scale: float,
    l2norm: bool,
    output_final_state: bool,
    state_stride: int,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(o, final_state, states, checkpoints, kept)``, what is not asked for with length 0; as
    ``chunked.forward``. ``kept`` holds the running sums of g, U and M."""
    q, k, v, beta, g, initial_state, cu_seqlens = _contiguous(q, k, v, beta, g, initial_state, cu_seqlens)
    plan = _plan(q, v, g is not None, cu_seqlens)
    (b, _, h, kd), vd = q.shape, v.shape[-1]
    most = 0
    if state_stride:
        longest = q.shape[1] if cu_seqlens is None else int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        most = -(-longest // state_stride)
    o = torch.empty_like(v)
    new_states = torch.empty if cu_seqlens is None else torch.zeros  # some places are nobody's
    states = new_states(plan.rows, most, h, kd, vd, dtype=torch.float32, device=q.device)
    final_state = states.new_empty(plan.rows if output_final_state else 0, h, kd, vd)
    groups = checkpoint_count(q, cu_seqlens) if for_backward else 0
    checkpoints = new_states(groups, b, h, kd, vd, dtype=torch.float32, device=q.device)
    kept = q.new_empty(kept_count(q, v, g) if for_backward else 0)
    if b * h == 0:
        return o, final_state, states, checkpoints, kept
    if for_backward:
        decays, u, inverse = _kept(kept, v, plan, g is not None)
    else:
        decays = None if g is None else g.new_empty(2, *g.shape, dtype=torch.float32)
        u, inverse = None, q.new_empty(*q.shape[:3], plan.chunk)
    inverse_kernel[(plan.chunks * h,)](
        k, beta, g, inverse, decays, cu_seqlens, plan.chunk_owners, q.shape[1], h, beta.numel(),
        **{n: x for n, x in plan.sizes(plan.tiles.inverse, l2norm).items() if n not in ("V", "BV")},
    )  # fmt: skip
    tile = plan.tiles.scan
    blocks = triton.cdiv(vd, tile.bv)
    scan_kernel[(plan.rows * h * blocks,)](
        q, k, v, beta, decays, inverse, initial_state, o, u,
        final_state if output_final_state else None,
        states if most else None,
        checkpoints if for_backward else None,
        None, cu_seqlens, None,
        scale, q.shape[1], h, beta.numel(), most, max(state_stride // plan.chunk, 1),
        RESCAN=False, GROUP=GROUP_TOKENS // plan.chunk, **plan.sizes(tile, l2norm),
    )  # fmt: skip
    return o, final_state, states, checkpoints, kept


def backward(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
    initial_state: torch.Tensor | None,  # [N, H, K, V]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
    checkpoints: torch.Tensor,  # [checkpoint_count, B, H, K, V]
    kept: torch.Tensor,  # [kept_count]
    o: torch.Tensor | None,  # [B, T, H, V], with l2norm
    d_o: torch.Tensor | None,  # [B, T, H, V]
    d_final: torch.Tensor | None,  # [N, H, K, V]
    d_states: torch.Tensor | None,  # [N, ceil(longest / state_stride), H, K, V]
    scale: float,
    l2norm: bool,
    state_stride: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, beta, g (length 0 without g) and of the initial state [N, H, K, V]."""
    if d_o is None:
        d_o = torch.zeros_like(v)
    q, k, v, beta, g, cu_seqlens, o, d_o, d_final, d_states = _contiguous(
        q, k, v, beta, g, cu_seqlens, o, d_o, d_final, d_states
    )
    plan = _plan(q, v, g is not None, cu_seqlens)
    (b, tokens, h, kd), vd = q.shape, v.shape[-1]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    d_initial = q.new_empty(plan.rows, h, kd, vd, dtype=torch.float32)
    if b * h == 0:
        dg = q.new_empty(0) if g is None else torch.empty_like(g)
        return dq, dk, dv, torch.empty_like(beta), dg, d_initial
    decays, u, inverse = _kept(kept, v, plan, g is not None)

    chunk_states = None
    if not plan.tiles.carry:
        tile = plan.tiles.scan
        chunk_states = q.new_empty(plan.chunks, h, kd, vd)
        scan_kernel[(plan.groups * h * triton.cdiv(vd, tile.bv),)](
            None, k, v, beta, decays, inverse, checkpoints, None, None, None, None, None,
            chunk_states, cu_seqlens, plan.group_owners,
            scale, tokens, h, beta.numel(), 0, 1,
            RESCAN=True, GROUP=GROUP_TOKENS // plan.chunk, **plan.sizes(tile, l2norm),
        )  # fmt: skip

    tile = plan.tiles.reverse
    d_r, d_chunk_states = torch.empty_like(v), q.new_empty(plan.chunks, h, kd, vd)
    reverse_kernel[(plan.rows * h * triton.cdiv(vd, tile.bv),)](
        q, k, beta, decays, inverse, d_o, d_final, d_states, d_r, d_chunk_states, d_initial, cu_seqlens,
        scale, tokens, h, beta.numel(), 0 if d_states is None else d_states.shape[1],
        max(state_stride // plan.chunk, 1),
        **plan.sizes(tile, l2norm),
    )  # fmt: skip

    carry = plan.tiles.carry
    tile = plan.tiles.gradient
    blocks = triton.cdiv(kd, tile.bk)
    sums = q.new_empty(blocks, 1 if g is None else 2, *beta.shape, dtype=torch.float32)
    gradient_kernel[((plan.groups if carry else plan.chunks) * h * blocks,)](
        q, k, v, o if l2norm else None, u, beta, decays, checkpoints if carry else chunk_states, d_o, d_r,
        d_chunk_states, dq, dk, dv, sums,
        cu_seqlens, plan.group_owners if carry else plan.chunk_owners, scale, tokens, h,
        beta.numel(), sums.stride(0),
        GROUP=GROUP_TOKENS // plan.chunk if carry else 1, BR=tile.br,
        **plan.sizes(tile, l2norm) | {"BK": tile.bk},
    )  # fmt: skip
    dbeta = sums[:, 0].sum(0).to(beta.dtype)
    dg = q.new_empty(0) if g is None else sums[:, 1].sum(0).to(g.dtype)
    return dq, dk, dv, dbeta, dg, d_initial


def checkpoint_count(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:  # [B, T, H, K], [N + 1]
    """Room for the states that ``forward`` keeps, for whatever head size of the values. A bound for packed
    sequences that needs no look at the data."""
    if cu_seqlens is None:
        return -(-q.shape[1] // GROUP_TOKENS)
    return q.shape[1] // GROUP_TOKENS + cu_seqlens.shape[0] - 1


def kept_count(q: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None) -> int:
    """Numbers of q's dtype that ``forward`` keeps for the backward beside states: with g its running sums, two
    float32 a token and head; U [B, T, H, V] and M [B, T, H, C]."""
    tensor_memory = _has_tensor_memory(q.device)
    tiles = choose_tiles(
        q.shape[-1], v.shape[-1], q.element_size(), g is not None, tensor_memory=tensor_memory
    )
    sums = 0 if g is None else _sums_count(v)
    return sums + q.shape[0] * q.shape[1] * q.shape[2] * (v.shape[-1] + tiles.chunk)


def _sums_count(v: torch.Tensor) -> int:
    """Places of v's dtype for two float32 a token and head, to a multiple of 16 bytes: U starts behind them, and
    kernels are compiled for tensors that start at one."""
    return -(-v.shape[:3].numel() // 2) * (16 // v.element_size())


def _kept(kept: torch.Tensor, v: torch.Tensor, plan: _Plan, gated: bool) -> tuple[torch.Tensor | None, ...]:
    """Running sums of g, U and M, as views."""
    tokens = v.shape[:3]
    sums = _sums_count(v) if gated else 0
    decays = kept[:sums].view(torch.float32)[: 2 * tokens.numel()].view(2, *tokens) if gated else None
    return decays, kept[sums:][: v.numel()].view(v.shape), kept[sums + v.numel() :].view(*tokens, plan.chunk)


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(x if x is None else x.contiguous() for x in tensors)


# ---------------------------------------------------------------------------------------------------------
# Sizes


class Tile(NamedTuple):
    """How a kernel is cut: columns of V a program holds at a time, warps, and loads in flight."""

    bv: int
    num_warps: int
    num_stages: int


class GradientTile(NamedTuple):
    """How ``gradient_kernel`` is cut: columns of K a program owns; columns of V at a time in products with the
    state, and in all others; warps and loads in flight."""

    bk: int
    bv: int
    br: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of all kernels for one pair of head sizes."""

    chunk: int  # tokens
    carry: bool  # whether gradient_kernel carries the state from chunk to chunk of a group
    inverse: Tile
    scan: Tile
    reverse: Tile
    gradient: GradientTile


def choose_tiles(
    kd: int, vd: int, itemsize: int, gated: bool, *, few: bool = False, tensor_memory: bool = False
) -> Tiles:
    """The tiles for head sizes ``kd`` and ``vd``, ``itemsize`` bytes a number, with or without decay, ``few`` rows
    x heads (too few to occupy a GPU by themselves). Decays cost registers, so at K = 128 their kernels hold less
    of the state. Chips with ``tensor_memory`` (Blackwell) hold products of 64 rows there, and it has no room for
    all of gradient_kernel's: Triton then compiles a trap."""
    bk, whole = block(kd), block(vd)
    if tensor_memory or max(bk, whole) > 128 or (itemsize > 2 and max(bk, whole) > 64):
        bv = min(whole, 16 if bk > 128 else 32)
        tile = Tile(bv, 4, 1)
        return Tiles(32, False, tile, tile, tile, GradientTile(min(bk, 64), bv, bv, 4, 1))
    large = bk == 128
    scan = Tile(min(whole, (16 if gated else 32) if large else 32 if few else 64), 4, 2)
    gradient = GradientTile(
        min(bk, 32 if gated else 64), whole, min(whole, 16 if gated and large else 64), 8, 1
    )
    return Tiles(64, True, Tile(scan.bv, 4, 1), scan, scan, gradient)


def block(size: int) -> int:
    """The power of two that holds a head size; a tensor-core product takes no less than 16."""
    return max(triton.next_power_of_2(size), 16)


class _Plan(NamedTuple):
    rows: int  # N
    chunks: int  # places for what exists once a chunk
    groups: int  # places for what exists once a group of chunks
    chunk_owners: torch.Tensor | None  # [chunks]  whose place it is, for packed sequences
    group_owners: torch.Tensor | None  # [groups]
    tiles: Tiles
    chunk: int
    kd: int
    vd: int
    precision: str

    def sizes(self, tile: Tile, l2norm: bool) -> dict:
        return {
            "K": self.kd,
            "V": self.vd,
            "BK": block(self.kd),
            "BV": tile.bv,
            "BT": self.chunk,
            "L2NORM": l2norm,
            "EPS": L2_NORM_EPS,
            "PRECISION": self.precision,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def _plan(q: torch.Tensor, v: torch.Tensor, gated: bool, cu_seqlens: torch.Tensor | None) -> _Plan:
    (b, tokens, h, kd), vd = q.shape, v.shape[-1]
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensor_memory = _has_tensor_memory(q.device)
    tiles = choose_tiles(kd, vd, q.element_size(), gated, few=rows * h < FEW, tensor_memory=tensor_memory)
    chunks, chunk_owners = _places(tokens, b, tiles.chunk, cu_seqlens)
    groups, group_owners = _places(tokens, b, GROUP_TOKENS, cu_seqlens)
    return _Plan(
        rows, chunks, groups, chunk_owners, group_owners, tiles, tiles.chunk, kd, vd, precision_of(q.dtype)
    )


def _has_tensor_memory(device: torch.device) -> bool:
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device)[0] == 10


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in full for float32 inputs; M is worked out in TF32 for shorter ones."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _places(tokens: int, b: int, unit: int, cu_seqlens: torch.Tensor | None):
    """Sequence n that starts at token t has the places from ``t // unit + n`` on, one for every ``unit`` tokens:
    no two sequences share one, and nobody needs to look at the lengths."""
    if cu_seqlens is None:
        return b * triton.cdiv(tokens, unit), None
    n = cu_seqlens.shape[0] - 1
    places = tokens // unit + n
    order = torch.arange(max(n, places), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    first = cu_seqlens[:-1] // unit + order[:n]
    return places, torch.searchsorted(first, order[:places], right=True, out_int32=True) - 1


# ---------------------------------------------------------------------------------------------------------
# Parts of kernels


@triton.jit
def _sequence(cu_seqlens, i_n, T):
    """(first token in memory, tokens) of row or packed sequence ``i_n``."""
    if cu_seqlens is None:
        begin = i_n.to(tl.int64) * T
        length = T
    else:
        begin = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - begin).to(tl.int32)
    return begin, length


@triton.jit
def _place(cu_seqlens, i_n, begin, T, UNIT: tl.constexpr):
    """The first place of sequence ``i_n`` among what exists once every UNIT tokens."""
    if cu_seqlens is None:
        place = i_n.to(tl.int64) * tl.cdiv(T, UNIT)
    else:
        place = begin // UNIT + i_n
    return place


@triton.jit
def _owner(cu_seqlens, owners, i_place, T, UNIT: tl.constexpr):
    """The sequence whose place ``i_place`` is."""
    if cu_seqlens is None:
        i_n = i_place // tl.cdiv(T, UNIT)
    else:
        i_n = tl.load(owners + i_place)
    return i_n


@triton.jit
def _norms(b_x, L2NORM: tl.constexpr, EPS: tl.constexpr):  # [BT, BK] -> [BT]
    """What the rows are multiplied by."""
    b_f = b_x.to(tl.float32)
    if L2NORM:
        b_n = tl.rsqrt(tl.sum(b_f * b_f, 1) + EPS)
    else:
        b_n = tl.full((b_x.shape[0],), 1.0, tl.float32)
    return b_n


@triton.jit
def _row_norms(p_x, o_x, m_t, K: tl.constexpr, BK: tl.constexpr, L2NORM: tl.constexpr, EPS: tl.constexpr):
    """``_norms`` of rows [BT] in memory, read BK columns at a time."""
    b_n = tl.full(o_x.shape, 1.0, tl.float32)
    if L2NORM:
        b_n = tl.zeros(o_x.shape, tl.float32)
        for i_k in range((K + BK - 1) // BK):
            o_k = i_k * BK + tl.arange(0, BK)
            m = m_t[:, None] & (o_k < K)[None, :]
            b_x = tl.load(p_x + (o_x[:, None] * K + o_k[None, :]), mask=m, other=0).to(tl.float32)
            b_n += tl.sum(b_x * b_x, 1)
        b_n = tl.rsqrt(b_n + EPS)
    return b_n


@triton.jit
def _sum_decays(g, o_x, m_t):
    """Running sums of the log-decays inside the chunk, [BT] each, as a pair of float32 whose sum is exact to
    float64: after a strong decay one float32 no longer resolves the weak ones that follow."""
    b_g = tl.load(g + o_x, mask=m_t, other=0).to(tl.float64)
    b_g = tl.where(b_g < -1e4, -1e4, b_g)
    b_sum = tl.cumsum(b_g, 0)
    b_high = b_sum.to(tl.float32)
    return b_high, (b_sum - b_high.to(tl.float64)).to(tl.float32)


@triton.jit
def _decays(decays, ALL, i_x, H, tokens, o_i):
    """What ``inverse_kernel`` wrote of a chunk of ``tokens`` tokens, whose first is at ``i_x``: the pair for each,
    [BT], and for the last one. There is no more decay behind it."""
    o_x = i_x + tl.minimum(o_i, tokens - 1) * H
    last = decays + i_x + (tokens - 1) * H
    return tl.load(decays + o_x), tl.load(decays + ALL + o_x), tl.load(last), tl.load(last + ALL)


@triton.jit
def _between(b_high_i, b_low_i, b_high_j, b_low_j, m):
    """``exp(G_i - G_j)`` where ``m`` (i >= j) and 0 elsewhere: masked before exp, which could overflow there."""
    return tl.where(m, tl.exp(tl.where(m, (b_high_i - b_high_j) + (b_low_i - b_low_j), 0.0)), 0.0)


@triton.jit
def _between_at_most_1(b_high_i, b_low_i, b_high_j, b_low_j):
    """``exp(G_i - G_j)`` where i >= j, something of at most 1 elsewhere: bounded before exp, and the caller masks.
    gradient_kernel has no registers for the mask."""
    return tl.exp(tl.minimum((b_high_i - b_high_j) + (b_low_i - b_low_j), 0.0))


@triton.jit
def _anew(o_x, i_c, PHASE: tl.constexpr):
    """The whole numbers ``o_x``: ``i_c >> 24`` is 0, as a sequence has fewer than 2^24 chunks. The compiler does
    not know that. So it works addresses and masks out again in every PHASE, instead of keeping them in registers
    from one to the next and from chunk to chunk, which it would spill."""
    return o_x + (i_c >> (30 - PHASE))


@triton.jit
def _again(b_x, i_c, PHASE: tl.constexpr):  # [BT] -> [BT]
    """``b_x`` of float32, likewise: it is laid out anew along rows and columns of a product in every PHASE, where
    it would take 16 registers in between."""
    return b_x * ((i_c >> (30 - PHASE)) + 1.0)


@triton.jit
def _tokens(length, i_c, H, BT: tl.constexpr, PHASE: tl.constexpr):
    """The tokens of chunk ``i_c`` (:func:`_anew`): number in it, whether it exists, row in memory. [BT] each."""
    o_i = _anew(tl.arange(0, BT), i_c, PHASE)
    return o_i, i_c * BT + o_i < length, o_i * H


@triton.jit
def _merge(b_m, b_a, SIZE: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of the diagonal blocks of SIZE to those of twice the size."""
    o_b = tl.arange(0, BT) // SIZE
    m_below = (o_b[:, None] // 2 == o_b[None, :] // 2) & (o_b[:, None] > o_b[None, :])
    b_x = tl.dot(b_m, tl.where(m_below, b_a, 0.0), input_precision=PRECISION)
    return b_m - tl.dot(b_x, b_m, input_precision=PRECISION)


# ---------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=["T"])
def inverse_kernel(
    k,  # [B, T, H, K]
    beta,  # [B, T, H]
    g,  # [B, T, H] or None
    inverse,  # [B, T, H, BT]
    decays,  # [2, B, T, H] float32, or None without g
    cu_seqlens,  # [N + 1] or None
    owners,  # [places] or None
    T,
    H,
    ALL,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: M = (I + A)^-1, A = diag(beta) strictly_lower(D * K K^T), of one chunk and head.

    Reads k, beta and g once, writes M and the running sums of g once. The 16 x 16 blocks on the diagonal by
    substitution, row after row in all of them at once; then blocks of 32 and 64 by ``M <- M - M A_below M``.
    Substitution keeps its accuracy for parallel keys, where powers of A (Neumann doubling) reach 10^8.
    """
    pid = tl.program_id(0)
    i_h = pid % H
    i_place = pid // H
    i_n = _owner(cu_seqlens, owners, i_place, T, BT)
    begin, length = _sequence(cu_seqlens, i_n, T)
    i_c = (i_place - _place(cu_seqlens, i_n, begin, T, BT)).to(tl.int32)
    if i_c * BT >= length:
        return

    o_i = tl.arange(0, BT)
    o_t = i_c * BT + o_i
    m_t = o_t < length
    i_x = (begin + i_c * BT) * H + i_h  # of the chunk's first token, then of every token from there
    o_x = o_i * H
    o_k = tl.arange(0, BK)
    b_k = tl.load(
        k + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_t[:, None] & (o_k < K)[None, :], other=0
    )
    b_beta = tl.load(beta + i_x + o_x, mask=m_t, other=0).to(tl.float32)
    b_nk = _norms(b_k, L2NORM, EPS)
    m_below = o_i[:, None] > o_i[None, :]
    b_a = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
    b_a = b_a * (b_beta * b_nk)[:, None] * b_nk[None, :]
    if g is not None:
        b_high, b_low = _sum_decays(g + i_x, o_x, m_t)
        tl.store(decays + i_x + o_x, b_high, mask=m_t)
        tl.store(decays + ALL + i_x + o_x, b_low, mask=m_t)
        b_a *= _between(b_high[:, None], b_low[:, None], b_high[None, :], b_low[None, :], m_below)
    b_a = tl.where(m_below, b_a, 0.0)

    NB: tl.constexpr = BT // 16
    o_b = tl.arange(0, NB)
    o_16 = tl.arange(0, 16)
    # the blocks on the diagonal, [NB, 16, 16]
    m_own = o_b[:, None, None, None] == o_b[None, None, :, None]
    b_d = tl.sum(tl.where(m_own, tl.reshape(b_a, (NB, 16, NB, 16)), 0.0), 2)
    b_m = tl.where(o_16[None, :, None] == o_16[None, None, :], 1.0, 0.0) + tl.zeros((NB, 16, 16), tl.float32)
    for i in range(1, 16):
        m_row = (o_16 == i)[None, :, None]
        b_row = tl.sum(tl.where(m_row, b_d, 0.0), 1)  # [NB, 16]
        b_new = tl.sum(b_row[:, :, None] * b_m, 1)  # [NB, 16]
        b_m = tl.where(m_row, b_m - b_new[:, None, :], b_m)
    b_m = tl.where(m_own, tl.reshape(b_m, (NB, 16, 1, 16)), 0.0)
    b_m = tl.reshape(b_m, (BT, BT))

    b_m = _merge(b_m, b_a, 16, BT, PRECISION)
    if BT > 32:
        b_m = _merge(b_m, b_a, 32, BT, PRECISION)
    b_m = b_m.to(inverse.dtype.element_ty)
    tl.store(inverse + i_x * BT + (o_x[:, None] * BT + o_i[None, :]), b_m, mask=m_t[:, None])


@triton.jit(do_not_specialize=["T", "N_STATES", "STRIDE"])
def scan_kernel(
    q,  # [B, T, H, K]; None for RESCAN
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    beta,  # [B, T, H]
    decays,  # [2, B, T, H] float32 or None
    inverse,  # [B, T, H, BT]
    initial,  # [N, H, K, V] float32 or None; with RESCAN the kept states, [places of groups, H, K, V]
    o,  # [B, T, H, V]; None for RESCAN
    u,  # [B, T, H, V] or None
    final_state,  # [N, H, K, V] float32 or None
    states,  # [N, N_STATES, H, K, V] float32 or None
    checkpoints,  # [places of groups, H, K, V] float32 or None
    chunk_states,  # [places of chunks, H, K, V] or None
    cu_seqlens,  # [N + 1] or None
    owners,  # [places of groups] or None
    scale,
    T,
    H,
    ALL,
    N_STATES,
    STRIDE,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    RESCAN: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BV columns of one head's state, through all chunks of a sequence (RESCAN: of one group).

    Reads q, k, v, beta, g and M once (q, k and M once for every block of V), writes o once; the state stays on
    the chip. States at strides, the final state, a float32 state every GROUP chunks and a rounded one every
    chunk are written where there is a tensor for them. STRIDE counts chunks.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_row = pid // NV // H
    if RESCAN:
        i_n = _owner(cu_seqlens, owners, i_row, T, GROUP * BT)
    else:
        i_n = i_row
    begin, length = _sequence(cu_seqlens, i_n, T)
    chunks = tl.cdiv(length, BT)
    first = 0
    if RESCAN:
        first = (i_row - _place(cu_seqlens, i_n, begin, T, GROUP * BT)).to(tl.int32) * GROUP
        chunks = tl.minimum(chunks, first + GROUP)
    i_group = _place(cu_seqlens, i_n, begin, T, GROUP * BT)
    i_place = _place(cu_seqlens, i_n, begin, T, BT)

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
    else:
        b_s = tl.load(initial + (i_row.to(tl.int64) * H + i_h) * (K * V) + o_s, mask=m_s, other=0).to(
            tl.float32
        )

    for i_c in range(first, chunks):
        if states is not None:  # noqa: SIM102
            if i_c % STRIDE == 0:
                i_state = (i_n.to(tl.int64) * N_STATES + i_c // STRIDE) * H + i_h
                o_z = _anew(o_k, i_c, 3)[:, None] * V + o_v[None, :]
                tl.store(states + i_state * (K * V) + o_z, b_s, mask=m_s)
        if checkpoints is not None:  # noqa: SIM102
            if i_c % GROUP == 0:
                i_state = (i_group + i_c // GROUP) * H + i_h
                o_z = _anew(o_k, i_c, 4)[:, None] * V + o_v[None, :]
                tl.store(checkpoints + i_state * (K * V) + o_z, b_s, mask=m_s)
        b_h = b_s.to(dtype)
        if chunk_states is not None:
            tl.store(chunk_states + ((i_place + i_c) * H + i_h) * (K * V) + o_s, b_h, mask=m_s)

        o_t = i_c * BT + o_i
        m_t = o_t < length
        o_x = (begin + o_t) * H + i_h
        i_x = (begin + i_c * BT) * H + i_h  # the chunk's first
        tokens = tl.minimum(length - i_c * BT, BT)
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_k = tl.load(k + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_m = tl.load(inverse + (o_x[:, None] * BT + o_i[None, :]), mask=m_t[:, None], other=0)
        b_beta = tl.load(beta + o_x, mask=m_t, other=0).to(tl.float32)
        b_nk = _norms(b_k, L2NORM, EPS)
        b_read = b_nk  # factors of K where it reads the state, of K where it writes
        b_write = b_nk
        if decays is not None:
            b_high, b_low, high, low = _decays(decays, ALL, i_x, H, tokens, o_i)
            b_read = b_nk * tl.exp(b_high)

        b_v = tl.load(v + (o_x[:, None] * V + o_v[None, :]), mask=m_tv, other=0).to(tl.float32)
        b_r = b_v - b_read[:, None] * tl.dot(b_k, b_h, input_precision=PRECISION)
        b_u = tl.dot(b_m, (b_beta[:, None] * b_r).to(dtype), input_precision=PRECISION)
        if u is not None:
            tl.store(u + (o_x[:, None] * V + o_v[None, :]), b_u.to(dtype), mask=m_tv)
        if o is not None:
            b_q = tl.load(q + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
            b_nq = _norms(b_q, L2NORM, EPS) * scale
            o_j = _anew(o_i, i_c, 0)
            m_p = o_j[:, None] >= o_j[None, :]
            b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_nq[:, None] * b_nk[None, :]
            if decays is not None:
                p_high, p_low, _, _ = _decays(decays, ALL, i_x, H, tokens, o_j)
                b_p *= _between(p_high[:, None], p_low[:, None], p_high[None, :], p_low[None, :], m_p)
                b_nq *= tl.exp(p_high)
            b_p = tl.where(m_p, b_p, 0.0)
            b_o = tl.dot(b_q, b_h, input_precision=PRECISION) * b_nq[:, None]
            b_o = tl.dot(b_p.to(dtype), b_u.to(dtype), b_o, input_precision=PRECISION)
            tl.store(o + (o_x[:, None] * V + o_v[None, :]), b_o.to(dtype), mask=m_tv)
        if decays is not None:
            b_high, b_low, high, low = _decays(decays, ALL, i_x, H, tokens, _anew(o_i, i_c, 1))
            b_write = b_nk * tl.exp((high - b_high) + (low - b_low))
            b_s *= tl.exp(high)
        b_s = tl.dot(tl.trans(b_k), (b_write[:, None] * b_u).to(dtype), b_s, input_precision=PRECISION)

    if final_state is not None:
        o_z = _anew(o_k, chunks, 4)[:, None] * V + o_v[None, :]
        i_z = (_anew(pid // NV // H, chunks, 3).to(tl.int64) * H + i_h) * (K * V)
        tl.store(final_state + i_z + o_z, b_s, mask=m_s)


@triton.jit(do_not_specialize=["T", "N_STATES", "STRIDE"])
def reverse_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    beta,  # [B, T, H]
    decays,  # [2, B, T, H] float32 or None
    inverse,  # [B, T, H, BT]
    d_o,  # [B, T, H, V]
    d_final,  # [N, H, K, V] float32 or None
    d_states,  # [N, N_STATES, H, K, V] float32 or None
    d_r,  # [B, T, H, V]
    d_chunk_states,  # [places of chunks, H, K, V]
    d_initial,  # [N, H, K, V] float32
    cu_seqlens,  # [N + 1] or None
    scale,
    T,
    H,
    ALL,
    N_STATES,
    STRIDE,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BV columns of dS of one head, from the last chunk of a sequence to the first.

    Reads q, k, beta, g, M and dO once (q, k and M once for every block of V), writes dR' and the dS' that
    arrives behind every chunk once, both rounded to the dtype of k.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_n = pid // NV // H
    begin, length = _sequence(cu_seqlens, i_n, T)
    i_place = _place(cu_seqlens, i_n, begin, T, BT)
    chunks = tl.cdiv(length, BT)

    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    dtype = k.dtype.element_ty
    i_state = (i_n.to(tl.int64) * H + i_h) * (K * V)
    if d_final is None:
        b_ds = tl.zeros((BK, BV), tl.float32)
    else:
        b_ds = tl.load(d_final + i_state + o_s, mask=m_s, other=0).to(tl.float32)

    for i_back in range(0, chunks):
        i_c = chunks - 1 - i_back
        b_dh = b_ds.to(dtype)
        o_z = _anew(o_k, i_c, 3)[:, None] * V + o_v[None, :]
        tl.store(d_chunk_states + ((i_place + i_c) * H + i_h) * (K * V) + o_z, b_dh, mask=m_s)

        o_t = i_c * BT + o_i
        m_t = o_t < length
        o_x = (begin + o_t) * H + i_h
        i_x = (begin + i_c * BT) * H + i_h  # the chunk's first
        tokens = tl.minimum(length - i_c * BT, BT)
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_q = tl.load(q + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_k = tl.load(k + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_do = tl.load(d_o + (o_x[:, None] * V + o_v[None, :]), mask=m_tv, other=0)
        b_m = tl.load(inverse + (o_x[:, None] * BT + o_i[None, :]), mask=m_t[:, None], other=0)
        b_beta = tl.load(beta + o_x, mask=m_t, other=0).to(tl.float32)
        b_nq = _norms(b_q, L2NORM, EPS) * scale
        b_nk = _norms(b_k, L2NORM, EPS)
        o_j = _anew(o_i, i_c, 0)
        m_p = o_j[:, None] <= o_j[None, :]
        b_p = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_nk[:, None] * b_nq[None, :]  # P^T
        b_write = b_nk
        b_read = b_nk
        if decays is not None:
            b_high, b_low, high, low = _decays(decays, ALL, i_x, H, tokens, o_i)
            p_high, p_low, _, _ = _decays(decays, ALL, i_x, H, tokens, o_j)
            b_p *= _between(p_high[None, :], p_low[None, :], p_high[:, None], p_low[:, None], m_p)
            b_write = b_nk * tl.exp((high - b_high) + (low - b_low))
            b_read = b_nk * tl.exp(b_high)
            b_nq *= tl.exp(b_high)
        b_p = tl.where(m_p, b_p, 0.0)

        b_du = tl.dot(b_k, b_dh, input_precision=PRECISION) * b_write[:, None]
        b_du = tl.dot(b_p.to(dtype), b_do, b_du, input_precision=PRECISION)
        b_dr = tl.dot(tl.trans(b_m), b_du.to(dtype), input_precision=PRECISION)
        tl.store(d_r + (o_x[:, None] * V + o_v[None, :]), b_dr.to(dtype), mask=m_tv)
        if decays is not None:
            b_ds *= tl.exp(high)
        b_x = (b_nq[:, None] * b_do.to(tl.float32)).to(dtype)
        b_ds = tl.dot(tl.trans(b_q), b_x, b_ds, input_precision=PRECISION)
        b_x = (-(b_read * b_beta)[:, None] * b_dr).to(dtype)
        b_ds = tl.dot(tl.trans(b_k), b_x, b_ds, input_precision=PRECISION)
        if d_states is not None:  # noqa: SIM102
            if i_c % STRIDE == 0:
                i_given = (i_n.to(tl.int64) * N_STATES + i_c // STRIDE) * H + i_h
                o_z = _anew(o_k, i_c, 4)[:, None] * V + o_v[None, :]
                b_ds += tl.load(d_states + i_given * (K * V) + o_z, mask=m_s, other=0).to(tl.float32)

    o_z = _anew(o_k, chunks, 4)[:, None] * V + o_v[None, :]
    i_z = (_anew(pid // NV // H, chunks, 3).to(tl.int64) * H + i_h) * (K * V)
    tl.store(d_initial + i_z + o_z, b_ds, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    o,  # [B, T, H, V] or None without L2NORM
    u,  # [B, T, H, V]
    beta,  # [B, T, H]
    decays,  # [2, B, T, H] float32 or None
    kept,  # [places of groups, H, K, V]  the state before every group
    d_o,  # [B, T, H, V]
    d_r,  # [B, T, H, V]
    d_chunk_states,  # [places of chunks, H, K, V]
    dq,  # [B, T, H, K]
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
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
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
    i_n = _owner(cu_seqlens, owners, i_group, T, GROUP * BT)
    begin, length = _sequence(cu_seqlens, i_n, T)
    i_place = _place(cu_seqlens, i_n, begin, T, BT)
    first = (i_group - _place(cu_seqlens, i_n, begin, T, GROUP * BT)).to(tl.int32) * GROUP
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
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 0)
        i_x = (begin + i_c * BT) * H + i_h
        p_ds = d_chunk_states + ((i_place + i_c) * H + i_h) * (K * V)
        b_beta = tl.load(beta + i_x + o_x, mask=m_t, other=0).to(tl.float32)
        b_nk = _row_norms(k + i_x * K, o_x, m_t, K, BK, L2NORM, EPS)
        b_nq = _row_norms(q + i_x * K, o_x, m_t, K, BK, L2NORM, EPS)
        b_from = tl.full((BT,), 1.0, tl.float32)
        b_to = b_from
        if decays is not None:
            b_high, b_low, high, low = _decays(decays, ALL, i_x, H, tl.minimum(length - i_c * BT, BT), o_i)
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
            tl.store(dv + i_x * V + o_xr, (b_beta[:, None] * b_r).to(dtype), mask=m_r & (i_k == 0))
            if L2NORM:
                b_v = tl.load(u + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
                b_kk += 2 * tl.sum(b_r * b_v, 1) - b_beta * b_rv
                b_v = tl.load(o + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
                b_r = tl.load(d_o + i_x * V + o_xr, mask=m_r, other=0).to(tl.float32)
                b_qq += tl.sum(b_r * b_v, 1)
        b_dbeta = tl.where(i_k == 0, b_dbeta, 0.0)

        # dq = e^G dO S^T + dP K
        a_nk = _again(b_nk, i_c, 1)
        a_nq = _again(b_nq, i_c, 1)
        a_from = _again(b_from, i_c, 1)
        a_qq = _again(b_qq, i_c, 1)
        if decays is not None:
            a_high = _again(b_high, i_c, 1)
            a_low = _again(b_low, i_c, 1)
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 1)
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
        b_k = tl.load(k + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_p = tl.where(m_p, b_p * a_nk[None, :], 0.0)
        if decays is not None:
            b_p *= _between_at_most_1(a_high[:, None], a_low[:, None], a_high[None, :], a_low[None, :])
            b_q = tl.load(q + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
            b_f = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_p
            b_f = tl.where(o_i[:, None] > o_i[None, :], b_f * (a_nq * scale)[:, None], 0.0)
            b_dg = tl.sum(b_f, 1) - tl.sum(b_f, 0)
        b_w = b_p.to(dtype)
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 6)
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
        b_q = tl.load(q + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        if decays is not None:
            b_dx *= a_from[:, None]
            b_dg += tl.sum(b_dx * b_q.to(tl.float32), 1) * a_nq * scale
        b_dx = tl.dot(b_w, b_k, b_dx, input_precision=PRECISION) * scale
        if L2NORM:
            b_dx = (b_dx - b_q.to(tl.float32) * (a_qq * a_nq)[:, None]) * a_nq[:, None]
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 7)
        m_tk = m_t[:, None] & m_k[None, :]
        tl.store(dq + i_x * K + (o_x[:, None] * K + o_k[None, :]), b_dx.to(dtype), mask=m_tk)

        # dk where it reads: -beta e^G dR' S^T + E K, E = beta dA
        a_nk = _again(b_nk, i_c, 2)
        a_beta = _again(b_beta, i_c, 2)
        a_from = _again(b_from, i_c, 2)
        if decays is not None:
            a_high = _again(b_high, i_c, 2)
            a_low = _again(b_low, i_c, 2)
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 2)
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
        b_k = tl.load(k + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_p = tl.where(m_p, -b_p * a_nk[None, :], 0.0)
        if decays is not None:
            b_p *= _between_at_most_1(a_high[:, None], a_low[:, None], a_high[None, :], a_low[None, :])
        b_f = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_p * a_nk[:, None]
        b_dbeta += tl.sum(b_f, 1)
        if decays is not None:
            b_f *= a_beta[:, None]
            b_dg += tl.sum(b_f, 1) - tl.sum(b_f, 0)
        b_w = b_p.to(dtype)
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 10)
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
        a_nk = _again(b_nk, i_c, 3)
        a_beta = _again(b_beta, i_c, 3)
        a_to = _again(b_to, i_c, 3)
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 3)
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
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 4)
        a_nq = _again(b_nq, i_c, 4)
        if decays is not None:
            a_high = _again(b_high, i_c, 4)
            a_low = _again(b_low, i_c, 4)
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
            b_p *= _between_at_most_1(a_high[None, :], a_low[None, :], a_high[:, None], a_low[:, None])
        b_q = tl.load(q + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_dx = tl.dot(b_p.to(dtype), b_q, b_dx, input_precision=PRECISION)
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 5)
        a_nk = _again(b_nk, i_c, 5)
        a_beta = _again(b_beta, i_c, 5)
        a_kk = _again(b_kk, i_c, 5)
        if decays is not None:
            a_high = _again(b_high, i_c, 5)
            a_low = _again(b_low, i_c, 5)
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
            b_p *= _between_at_most_1(a_high[None, :], a_low[None, :], a_high[:, None], a_low[:, None])
        b_k = tl.load(k + i_x * K + (o_x[:, None] * K + o_k[None, :]), mask=m_tk, other=0)
        b_dx = tl.dot(b_p.to(dtype), b_k, b_dx, input_precision=PRECISION)
        if L2NORM:
            b_dx = (b_dx - b_k.to(tl.float32) * (a_kk * a_nk)[:, None]) * a_nk[:, None]
        o_i, m_t, o_x = _tokens(length, i_c, H, BT, 8)
        m_tk = m_t[:, None] & m_k[None, :]
        tl.store(dk + i_x * K + (o_x[:, None] * K + o_k[None, :]), b_dx.to(dtype), mask=m_tk)

        if GROUP > 1:
            if decays is not None:
                b_s *= tl.exp(high)
            o_i, m_t, o_x = _tokens(length, i_c, H, BT, 6)
            b_u = tl.load(
                u + i_x * V + o_x[:, None] * V + o_v[None, :], mask=m_t[:, None] & (o_v < V)[None, :], other=0
            )
            b_kw = (b_k.to(tl.float32) * (b_nk * b_to)[:, None]).to(dtype)
            b_s = tl.dot(tl.trans(b_u), b_kw, b_s, input_precision=PRECISION)
