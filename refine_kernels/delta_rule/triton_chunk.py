"""The delta rule over chunks of tokens, in Triton: backend ``"triton"`` of ``chunk_delta_rule``.

Value heads may be a multiple of key heads: programs go by value heads, ``REPEAT`` neighbours of which read the rows
of one q and k where they lie. In shapes here HV counts value heads and H key heads; in the kernels H counts value
heads. Only the gradients of q and k are written by value heads first, in float32, and summed over each group.

The mathematics and its letters are those of ``chunked.py``; README.md counts what each kernel moves. Forward,
two launches: ``inverse_kernel`` (all chunks at once) writes the unit lower triangular M and the running sums of
the decays, ``scan_kernel`` (chunk after chunk, one program per head and block of V) keeps S on the chip and emits
O and, for the backward, U. It keeps the state before every group of chunks. Backward: ``states_kernel`` (all groups
at once) works out the state before every chunk again, ``reverse_kernel`` (from the last chunk to the first) writes
dR' and the dS' that arrives at each chunk, ``gradient_kernel`` (all chunks at once) the gradients.

Where rows x heads leave a chip mostly empty, sequences are split into spans (``tiles.span_tokens``), two launches
more each way: one maps what every span does to a state (``maps``), ``join_kernel`` goes from span to span, and then
all spans are scanned at once from their own states.

Keys and queries are never normalised in memory nor on the chip: ``use_qk_l2norm_in_kernel`` multiplies rows of
float32 results by ``1 / sqrt(sum x^2 + eps)``, so products read what was loaded. The same holds for beta and the
decays. No product takes a transposed result of another product, only transposed loads (Triton before 3.7.1 is
known to get the former wrong on Hopper): ``gradient_kernel`` multiplies U and dO, U and dR' in both orders.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from refine_kernels.delta_rule.reference import L2_NORM_EPS
from refine_kernels.delta_rule.tiles import (
    FEW,
    GROUP_TOKENS,
    JOIN_ROWS,
    GradientTile,
    Tile,
    Tiles,
    block,
    choose_tiles,
    has_tensor_memory,
    precision_of,
    program_slots,
    span_tokens,
)
from refine_kernels.delta_rule.triton_gradient import gradient_kernel, states_kernel
from refine_kernels.delta_rule.triton_scan import inverse_kernel, join_kernel, reverse_kernel, scan_kernel
from refine_kernels.sizes import ceil_div

# ---------------------------------------------------------------------------------------------------------
# Launching


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
    """``(o, final_state, states, checkpoints, kept)``, what is not asked for with length 0; as
    ``chunked.forward``. ``kept`` holds the running sums of g, norms, U and M."""
    q, k, v, beta, g, initial_state, cu_seqlens = _contiguous(q, k, v, beta, g, initial_state, cu_seqlens)
    plan = _plan(q, v, l2norm, cu_seqlens)
    b, _, h, vd = v.shape
    kd = q.shape[-1]
    most = 0
    if state_stride:
        longest = q.shape[1] if cu_seqlens is None else int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        most = -(-longest // state_stride)
    o = torch.empty_like(v)
    new_states = q.new_empty if cu_seqlens is None else q.new_zeros  # some places belong to no sequence
    states = new_states((plan.rows, most, h, kd, vd), dtype=torch.float32)
    final_state = states.new_empty(plan.rows if output_final_state else 0, h, kd, vd)
    groups = checkpoint_count(v, cu_seqlens) if for_backward else 0
    checkpoints = new_states((groups, b, h, kd, vd), dtype=torch.float32)
    kept = q.new_empty(kept_count(q, v, g) if for_backward else 0)
    if b * h == 0:
        return o, final_state, states, checkpoints, kept
    if for_backward:
        decays, norms, u, inverse = _kept(kept, q, v, plan, g is not None)
    else:
        decays = None if g is None else g.new_empty(2, *g.shape, dtype=torch.float32)
        norms = q.new_empty(2, *q.shape[:3], dtype=torch.float32) if l2norm else None
        u, inverse = None, q.new_empty(*v.shape[:3], plan.chunk)
    given = {"k": k, "beta": beta, "inverse": inverse, "decays": decays, "norms": norms}
    plan.launch(
        inverse_kernel, plan.chunks * h, plan.tiles.inverse, q=q, g=g, owners=plan.chunk_owners, **given
    )
    given |= {"v": v, "scale": scale}
    tile, starts = plan.tiles.scan, initial_state
    if plan.span:
        maps = states.new_empty(plan.spans, h, kd, vd + kd)
        programs = plan.spans * h * plan.blocks(tile, mapped=True)
        span = {"owners": plan.span_owners, "SPAN": plan.span}
        plan.launch(scan_kernel, programs, tile, initial=initial_state, maps=maps, **given, **span)
        starts = _join(plan, maps, initial_state, reverse=False)
        given |= span
    plan.launch(
        scan_kernel, (plan.spans or plan.rows) * h * plan.blocks(tile), tile, q=q, initial=starts, o=o, u=u,
        final_state=final_state if output_final_state else None, states=states if most else None,
        checkpoints=checkpoints if for_backward else None,
        N_STATES=most, STRIDE=max(state_stride // plan.chunk, 1), **given,
    )  # fmt: skip
    return o, final_state, states, checkpoints, kept


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
    if d_o is None:
        d_o = torch.zeros_like(v)
    q, k, v, beta, g, cu_seqlens, d_o, d_final, d_states = _contiguous(
        q, k, v, beta, g, cu_seqlens, d_o, d_final, d_states
    )
    plan = _plan(q, v, l2norm, cu_seqlens)
    b, _, h, vd = v.shape
    kd = q.shape[-1]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    d_initial = q.new_empty(plan.rows, h, kd, vd, dtype=torch.float32)
    if b * h == 0:
        dg = q.new_empty(0) if g is None else torch.empty_like(g)
        return dq, dk, dv, torch.empty_like(beta), dg, d_initial
    decays, norms, u, inverse = _kept(kept, q, v, plan, g is not None)

    given = {"k": k, "beta": beta, "inverse": inverse, "decays": decays, "norms": norms, "scale": scale}
    tile, chunk_states = plan.tiles.states, q.new_empty(plan.chunks, h, kd, vd)
    plan.launch(
        states_kernel, plan.groups * h * plan.blocks(tile), tile, k=k, u=u, decays=decays, norms=norms,
        checkpoints=checkpoints, chunk_states=chunk_states, owners=plan.group_owners,
    )  # fmt: skip

    tile = plan.tiles.reverse
    d_r, d_chunk_states = torch.empty_like(v), q.new_empty(plan.chunks, h, kd, vd)
    back = given | {
        "q": q, "d_o": d_o, "d_states": d_states, "d_chunk_states": d_chunk_states,
        "N_STATES": 0 if d_states is None else d_states.shape[1], "STRIDE": max(state_stride // plan.chunk, 1),
    }  # fmt: skip
    if plan.span:
        maps = d_initial.new_empty(plan.spans, h, kd, vd + kd)
        back |= {"owners": plan.span_owners, "SPAN": plan.span}
        programs = plan.spans * h * plan.blocks(tile, mapped=True)
        plan.launch(reverse_kernel, programs, tile, d_final=d_final, maps=maps, **back)
        d_final = _join(plan, maps, d_final, reverse=True)
    plan.launch(
        reverse_kernel, (plan.spans or plan.rows) * h * plan.blocks(tile), tile, d_final=d_final, d_r=d_r,
        d_initial=d_initial, **back,
    )  # fmt: skip

    tile = plan.tiles.gradient
    sums = q.new_empty(1 if g is None else 2, *beta.shape, dtype=torch.float32)
    by_value_heads = [dq, dk]
    if plan.repeat > 1:
        by_value_heads = [q.new_empty(*v.shape[:3], kd, dtype=torch.float32) for _ in by_value_heads]
    plan.launch(
        gradient_kernel, plan.chunks * h, tile, q=q, k=k, v=v, u=u, beta=beta,
        decays=decays, norms=norms, d_o=d_o, d_r=d_r, chunk_states=chunk_states, d_chunk_states=d_chunk_states,
        dq=by_value_heads[0], dk=by_value_heads[1], dv=dv, sums=sums, owners=plan.chunk_owners, scale=scale,
    )  # fmt: skip
    if plan.repeat > 1:
        dq, dk = (x.unflatten(2, (-1, plan.repeat)).sum(3).to(q.dtype) for x in by_value_heads)
    dbeta = sums[0].to(beta.dtype, copy=True)  # results of an operator share no memory
    dg = q.new_empty(0) if g is None else sums[1].to(g.dtype, copy=True)
    return dq, dk, dv, dbeta, dg, d_initial


def _join(plan: _Plan, maps: torch.Tensor, given: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """The states [places of spans, H, K, V] that enter the spans; with ``reverse``, the dS that arrive behind."""
    tile, starts = plan.tiles.join, maps.new_empty(*maps.shape[:3], plan.vd)
    programs = plan.rows * plan.heads * plan.blocks(tile)
    plan.launch(
        join_kernel, programs, tile, maps=maps, given=given, starts=starts, SPAN=plan.span, REVERSE=reverse
    )
    return starts


def checkpoint_count(v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:  # [B, T, HV, V], [N + 1]
    """Room for the states that ``forward`` keeps, for whatever head size of the values. A bound for packed
    sequences that needs no look at the data."""
    if cu_seqlens is None:
        return -(-v.shape[1] // GROUP_TOKENS)
    return v.shape[1] // GROUP_TOKENS + cu_seqlens.shape[0] - 1


def kept_count(q: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None) -> int:
    """Numbers of q's dtype that ``forward`` keeps for the backward beside states: with g its running sums, two
    float32 a token and value head; norms, two float32 a token and key head; U [B, T, HV, V] and M [B, T, HV, C]."""
    tensor_memory = has_tensor_memory(q.device)
    kd, vd = int(q.shape[-1]), int(v.shape[-1])
    tiles = choose_tiles(kd, vd, q.element_size(), tensor_memory=tensor_memory)
    sums = 0 if g is None else _pairs_count(v)
    rest = v.shape[0] * v.shape[1] * v.shape[2] * (v.shape[-1] + tiles.chunk)
    return sums + _pairs_count(q) + rest + rest % 2  # all of it can be viewed as float32


def _pairs_count(x: torch.Tensor) -> int:
    """Places of x's dtype for two float32 a token and head, to a multiple of 16 bytes: other tensors start behind
    them, and kernels are compiled for tensors that start at one."""
    return -(-x.shape[:3].numel() // 2) * (16 // x.element_size())


def _kept(
    kept: torch.Tensor, q: torch.Tensor, v: torch.Tensor, plan: _Plan, gated: bool
) -> tuple[torch.Tensor | None, ...]:
    """Running sums of g, norms, U and M, as views."""
    (b, t, h, vd), key_heads = v.shape, q.shape[2]
    start = _pairs_count(v) if gated else 0  # of the norms
    end = start + _pairs_count(q)
    decays = norms = None
    if gated or plan.l2norm:
        pairs = kept.view(torch.float32)
        decays = _part(pairs, 0, 2, b, t, h) if gated else None
        start = start * kept.element_size() // pairs.element_size()
        norms = _part(pairs, start, 2, b, t, key_heads) if plan.l2norm else None
    u, inverse = _part(kept, end, b, t, h, vd), _part(kept, end + v.numel(), b, t, h, plan.chunk)
    return decays, norms, u, inverse


def _part(kept: torch.Tensor, start: int, a: int, b: int, c: int, d: int) -> torch.Tensor:
    """``[a, b, c, d]`` from place ``start`` on, in one operation: slices and views take as long as a launch."""
    return kept.as_strided((a, b, c, d), (b * c * d, c * d, d, 1), kept.storage_offset() + start)


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(x if x is None else x.contiguous() for x in tensors)


# ---------------------------------------------------------------------------------------------------------
# Sizes


class _Plan(NamedTuple):
    """What the launches of one call share."""

    rows: int  # N
    tokens: int  # T
    heads: int  # of values
    repeat: int  # value heads that share a key head
    kd: int
    vd: int
    tiles: Tiles
    chunk: int  # tokens
    chunks: int  # places for what exists once a chunk
    chunk_owners: torch.Tensor | None  # [chunks]  whose place it is, for packed sequences
    groups: int  # places for what exists once a group of chunks
    group_owners: torch.Tensor | None  # [groups]
    span: int  # chunks of a span; 0: sequences are not split
    spans: int  # places for what exists once a span
    span_owners: torch.Tensor | None  # [spans]
    l2norm: bool
    sizes: dict[str, Any]  # by the names that kernels have for them

    def blocks(self, tile: Tile, mapped: bool = False) -> int:
        """Programs a head: blocks of columns of V, and of K where spans are mapped."""
        return ceil_div(self.vd, tile.bv) + (ceil_div(self.kd, tile.bv) if mapped else 0)

    def launch(self, kernel, programs: int, tile: Tile | GradientTile, **given) -> None:
        """Start a kernel: tensors and numbers by name, what is not given is None, sizes are the tile's and ours."""
        values = self.sizes | _blocks(tile) | given
        with torch.cuda.device_of(given["maps"] if given.get("k") is None else given["k"]):
            kernel[(programs,)](
                *map(values.get, kernel.arg_names), num_warps=tile.num_warps, num_stages=tile.num_stages
            )


@functools.cache
def _blocks(tile: Tile | GradientTile) -> dict[str, int]:
    """A tile's blocks as kernels call them."""
    return {name.upper(): size for name, size in tile._asdict().items() if name[0] == "b"}


def _plan(q: torch.Tensor, v: torch.Tensor, l2norm: bool, cu_seqlens: torch.Tensor | None) -> _Plan:
    (b, tokens, h, vd), kd = v.shape, q.shape[-1]
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensor_memory = has_tensor_memory(q.device)
    tiles = choose_tiles(kd, vd, q.element_size(), few=rows * h < FEW, tensor_memory=tensor_memory)
    repeat = h // max(q.shape[2], 1)
    chunks, chunk_owners = _places(tokens, b, tiles.chunk, cu_seqlens)
    groups, group_owners = _places(tokens, b, GROUP_TOKENS, cu_seqlens)
    programs = rows * h * ceil_div(vd, tiles.scan.bv)
    span = span_tokens(tokens, programs, program_slots(q.device), tiles.chunk)
    spans, span_owners = _places(tokens, b, span, cu_seqlens) if span else (0, None)
    sizes = {
        "cu_seqlens": cu_seqlens, "T": tokens, "H": h, "ALL": b * tokens * h, "N_STATES": 0, "STRIDE": 1,
        "REPEAT": repeat, "K": kd, "V": vd, "BK": block(kd), "BT": tiles.chunk, "BJ": JOIN_ROWS,
        "GROUP": GROUP_TOKENS // tiles.chunk, "EPS": L2_NORM_EPS, "PRECISION": precision_of(q.dtype),
    }  # fmt: skip
    return _Plan(
        rows, tokens, h, repeat, kd, vd, tiles, tiles.chunk, chunks, chunk_owners, groups, group_owners,
        span // tiles.chunk, spans, span_owners, l2norm, sizes,
    )  # fmt: skip


def _places(tokens: int, b: int, unit: int, cu_seqlens: torch.Tensor | None):
    """Sequence n that starts at token t has the places from ``t // unit + n`` on, one for every ``unit`` tokens:
    no two sequences share one, and nobody needs to look at the lengths."""
    if cu_seqlens is None:
        return b * ceil_div(tokens, unit), None
    n = cu_seqlens.shape[0] - 1
    places = tokens // unit + n
    order = torch.arange(places, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    first = cu_seqlens[1:-1] // unit + order[1:n]  # of all sequences but the first, which has place 0
    return places, torch.searchsorted(first, order, right=True, out_int32=True)
