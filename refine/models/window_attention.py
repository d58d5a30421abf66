"""Sliding-window attention: over whole sequences in time and memory linear in T, and for branches in place.

Query i sees key j iff ``i - (window - 1) <= j <= i``, at scale ``head_dim ** -0.5``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def window_attention(
    q: torch.Tensor,  # [B, T, heads, d]
    k: torch.Tensor,  # [B, L, heads, d], L >= T: the last T keys are the queries' own
    v: torch.Tensor,  # [B, L, heads, d]
    window: int,
) -> torch.Tensor:  # [B, T, heads, d]
    """Attention of the last T of L positions, through flash-attn where it is installed, else PyTorch's own."""
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            pass
        else:
            return flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _by_blocks(q, k, v, window).transpose(1, 2)


def _by_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """[B, heads, T, d]: queries in blocks, each with the keys it can see, one call for all whole blocks.

    The keys of the blocks overlap, so they are taken as a view with overlapping strides; nothing is copied.
    """
    tokens, length = q.shape[2], k.shape[2]
    past = length - tokens
    if length <= window:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_visible(tokens, length, window, q.device))
    outputs = []
    # the first queries see fewer than `window` keys
    head = max(0, window - 1 - past)
    if head:
        mask = _visible(head, past + head, window, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, :head], k[:, :, : past + head], v[:, :, : past + head], mask
            )
        )
    block = min(tokens - head, max(64, window // 2))
    whole = (tokens - head) // block
    first = past + head - (window - 1)  # the first key that the first block sees
    if whole:
        size = window - 1 + block
        end = first + size + (whole - 1) * block
        mask = _visible(block, size, window, q.device)
        parts = q[:, :, head : head + whole * block].unflatten(2, (whole, block)).transpose(1, 2)
        keys, values = (
            x[:, :, first:end].unfold(2, size, block).permute(0, 2, 1, 4, 3) for x in (k, v)
        )  # [B, whole, heads, size, d]
        out = F.scaled_dot_product_attention(
            *(x.flatten(0, 1) for x in (parts, keys, values)), attn_mask=mask
        )
        outputs.append(out.unflatten(0, (-1, whole)).transpose(1, 2).flatten(2, 3))
    if rest := tokens - head - whole * block:
        mask = _visible(rest, window - 1 + rest, window, q.device)
        seen = slice(length - rest - (window - 1), length)
        outputs.append(F.scaled_dot_product_attention(q[:, :, -rest:], k[:, :, seen], v[:, :, seen], mask))
    return torch.cat(outputs, dim=2)


def _visible(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """[queries, keys] bool, where the last key is the last query's own."""
    ahead = (
        torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)
    )
    return (ahead <= 0) & (ahead > -window)


def branch_attention(
    q: torch.Tensor,  # [N, T, heads, d]
    parent_k: torch.Tensor,  # [P, L, heads, d]
    parent_v: torch.Tensor,  # [P, L, heads, d]
    parent_origin: torch.Tensor,  # [P] position of each parent's first key
    rows: torch.Tensor | None,  # [N] each branch's parent; None: N = P, in order
    branched_at: torch.Tensor,  # [N] tokens of the parent that the branch has read
    own_k: torch.Tensor,  # [N, S + T, heads, d], the branch's own tokens; the last T are the queries'
    own_v: torch.Tensor,  # [N, S + T, heads, d]
    window: int,
) -> torch.Tensor:  # [N, T, heads, d]
    """Attention of short branches to their parents' keys, read in place, and to their own.

    Branches of one parent share one pass over its keys. Nothing of the size of the scores is kept for the
    backward. The scores of all N T queries against L keys exist for the time of a call.
    """
    slot, width = place_in_groups(rows, len(parent_k), len(q))
    return _BranchAttention.apply(
        q, parent_k, parent_v, own_k, own_v, parent_origin, branched_at, slot, width, window
    )


def place_in_groups(rows: torch.Tensor | None, groups: int, count: int) -> tuple[torch.Tensor | None, int]:
    """Where each of ``count`` rows stands in a table of ``groups x width`` places, its group given by ``rows``.

    Returns:
        (place [count] int64, or None when the table is the rows themselves; width).
    """
    if rows is None:
        return None, 1
    order = torch.argsort(rows, stable=True)
    sizes = torch.bincount(rows, minlength=groups)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(rows)
    rank[order] = torch.arange(count, device=rows.device) - starts[rows[order]]
    width = int(sizes.max())
    return rows * width + rank, width


def into_groups(x: torch.Tensor, place: torch.Tensor | None, groups: int, width: int) -> torch.Tensor:
    """[N, ...] -> [groups, width, ...], zeros where there is no row."""
    if place is None:
        return x[:, None]
    table = x.new_zeros(groups * width, *x.shape[1:])
    return table.index_copy(0, place, x).unflatten(0, (groups, width))


def out_of_groups(table: torch.Tensor, place: torch.Tensor | None) -> torch.Tensor:
    """[groups, width, ...] -> [N, ...]."""
    return table.flatten(0, 1) if place is None else table.flatten(0, 1).index_select(0, place)


class _BranchAttention(torch.autograd.Function):
    """Two score matrices under one softmax; the backward computes them again from the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, parent_k, parent_v, own_k, own_v, origin, branched_at, place, width, window):
        ctx.width, ctx.window = width, window
        groups = len(parent_k)
        to_parent, to_own, _ = _BranchAttention._scores(
            q, parent_k, own_k, origin, branched_at, place, width, window
        )
        parent_lse = out_of_groups(to_parent.logsumexp(-1), place)  # [N, T, h]
        lse = torch.logaddexp(parent_lse, to_own.logsumexp(-1))
        grouped_lse = into_groups(lse, place, groups, width)
        weights = (to_parent - grouped_lse[..., None]).exp_().to(q.dtype)
        out = out_of_groups(torch.einsum("gmthl,glhd->gmthd", weights, parent_v), place)
        own = (to_own - lse[..., None]).exp_().to(q.dtype)
        out = out + torch.einsum("nthl,nlhd->nthd", own, own_v)
        ctx.save_for_backward(q, parent_k, parent_v, own_k, own_v, origin, branched_at, place, lse, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, parent_k, parent_v, own_k, own_v, origin, branched_at, place, lse, out = ctx.saved_tensors
        groups, width, scale = len(parent_k), ctx.width, q.shape[-1] ** -0.5
        to_parent, to_own, grouped_q = _BranchAttention._scores(
            q, parent_k, own_k, origin, branched_at, place, width, ctx.window
        )
        delta = (grad * out).sum(-1, dtype=lse.dtype)  # [N, T, h]
        grouped_lse, grouped_delta, grouped_grad = (
            into_groups(x, place, groups, width) for x in (lse, delta, grad)
        )
        weights = (to_parent - grouped_lse[..., None]).exp_()
        d_parent_v = torch.einsum("gmthl,gmthd->glhd", weights.to(q.dtype), grouped_grad)
        d_scores = torch.einsum("gmthd,glhd->gmthl", grouped_grad, parent_v).to(lse.dtype)
        d_scores = ((d_scores - grouped_delta[..., None]) * weights * scale).to(q.dtype)
        d_q = out_of_groups(torch.einsum("gmthl,glhd->gmthd", d_scores, parent_k), place)
        d_parent_k = torch.einsum("gmthl,gmthd->glhd", d_scores, grouped_q)
        own = (to_own - lse[..., None]).exp_()
        d_own_v = torch.einsum("nthl,nthd->nlhd", own.to(q.dtype), grad)
        d_scores = torch.einsum("nthd,nlhd->nthl", grad, own_v).to(lse.dtype)
        d_scores = ((d_scores - delta[..., None]) * own * scale).to(q.dtype)
        d_q = d_q + torch.einsum("nthl,nlhd->nthd", d_scores, own_k)
        d_own_k = torch.einsum("nthl,nthd->nlhd", d_scores, q)
        return d_q, d_parent_k, d_parent_v, d_own_k, d_own_v, None, None, None, None, None

    @staticmethod
    def _scores(q, parent_k, own_k, origin, branched_at, place, width, window):
        """[P, m, T, h, L] and [N, T, h, S+T] in float32 at least, -inf where not visible; and q by group."""
        exact = torch.promote_types(q.dtype, torch.float32)
        groups, tokens, own_length, scale = len(parent_k), q.shape[1], own_k.shape[1], q.shape[-1] ** -0.5
        position = branched_at[:, None] + torch.arange(own_length, device=q.device)  # [N, S+T] of own tokens
        query = position[:, -tokens:]  # [N, T]
        grouped_q = into_groups(q, place, groups, width)
        oldest = into_groups(query - window, place, groups, width)[
            ..., None
        ]  # [P, m, T, 1], not seen any more
        end = into_groups(branched_at, place, groups, width)[..., None, None]  # [P, m, 1, 1]
        key = (origin[:, None] + torch.arange(parent_k.shape[1], device=q.device))[
            :, None, None
        ]  # [P, 1, 1, L]
        seen = (key > oldest) & (key < end) & (key >= 0)
        to_parent = torch.einsum("gmthd,glhd->gmthl", grouped_q, parent_k).to(exact).mul_(scale)
        to_parent.masked_fill_(~seen[:, :, :, None], float("-inf"))
        key = position[:, None]  # [N, 1, S+T]
        seen = (key > query[..., None] - window) & (key <= query[..., None])
        to_own = torch.einsum("nthd,nlhd->nthl", q, own_k).to(exact).mul_(scale)
        to_own.masked_fill_(~seen[:, :, None], float("-inf"))
        return to_parent, to_own, grouped_q
