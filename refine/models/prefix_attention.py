"""Attention of tokens that continue a prefix: to the prefix's keys, read in place, and to one another.

A prefix is keys and values in blocks, shared by every row that continues it; each row sees its first tokens and
nothing else of it. Rows of one prefix share one pass over its keys. Scores exist for one tile of queries and keys
at a time, in the forward and again in the backward, so that memory is linear in the number of keys.

Both parts, prefix and own tokens, stand under one softmax: each is a running softmax over tiles, and the
log-sum-exps join them. The backward needs the joint log-sum-exp alone (the identity that FlashAttention, Dao et
al., arXiv 2205.14135, recomputes tiles with holds for any subset of the keys).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refine.models.window_attention import into_groups, out_of_groups, place_in_groups

_QUERIES = 512  # rows of a tile of scores, at most
_TILE_ENTRIES = 1 << 19  # entries of a tile of scores, all heads together: 2 MB in float32


def prefix_attention(
    q: torch.Tensor,  # [N, H, T, d]
    keys: tuple[torch.Tensor, ...],  # blocks of the prefixes, [P, G, L_i, d] each; H is a multiple of G
    values: tuple[torch.Tensor, ...],  # [P, G, L_i, d] each
    rows: torch.Tensor | None,  # [N] each row's prefix; None: N = P, in order
    read: torch.Tensor | None,  # [N] tokens of its prefix that a row sees; None: all
    own_k: torch.Tensor,  # [N, G, S + T, d], tokens behind the prefix; the last T are the queries'
    own_v: torch.Tensor,  # [N, G, S + T, d]
) -> torch.Tensor:  # [N, H, T, d]
    """Softmax attention at scale ``d ** -0.5``; query t sees its prefix and the own tokens up to itself."""
    place, width = place_in_groups(rows, len(keys[0]), len(q))
    return _PrefixAttention.apply(q, own_k, own_v, place, width, read, len(keys), *keys, *values)


@dataclass
class _Visible:
    """Which keys the rows of a score matrix see: those before ``limit``, which may differ from row to row."""

    limit: torch.Tensor  # [X or 1, M] int64
    first: int  # no limit is smaller; with ``step``, row i has the limit ``first + i // step``
    step: int | None  # None: the limits follow no order
    length: int  # keys that there are

    @classmethod
    def causal(cls, before: int, tokens: int, repeat: int, device: torch.device) -> _Visible:
        """Rows are (token, head of a group): token t sees ``before + t + 1`` keys."""
        limit = before + 1 + torch.arange(tokens, device=device).repeat_interleave(repeat)
        return cls(limit[None], before + 1, repeat, before + tokens)

    def end(self, rows: slice) -> int:
        """No row of these sees a key from here on."""
        if self.step is None:
            return self.length
        return min(self.length, self.first + (rows.stop - 1) // self.step)

    def mask(self, rows: slice, start: int, end: int) -> torch.Tensor | None:
        """[X, 1, rows, end - start], True for keys that are not seen; None where all are."""
        smallest = self.first if self.step is None else self.first + rows.start // self.step
        if end <= smallest:
            return None
        return (
            torch.arange(start, end, device=self.limit.device) >= self.limit[:, rows, None]
        )[:, None]  # fmt: skip


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, own_k, own_v, place, width, read, count, *blocks):
        keys, values = blocks[:count], blocks[count:]
        folded, seen = _fold_prefix(q, keys, place, width, read)
        out, lse = _attend(folded, keys, values, seen)
        out, lse = (_unfold_prefix(x, q, place, width) for x in (out, lse))
        own_q, own_seen = _fold_own(q, own_k)
        own_out, own_lse = (_unfold_own(x, q) for x in _attend(own_q, (own_k,), (own_v,), own_seen))
        joint = torch.logaddexp(lse, own_lse)  # [N, H, T]
        out = out.mul_((lse - joint).exp_()[..., None]) + own_out.mul_((own_lse - joint).exp_()[..., None])
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own_k, own_v, place, read, out, joint, *blocks)
        ctx.width, ctx.count = width, count
        return out

    @staticmethod
    def backward(ctx, grad):
        q, own_k, own_v, place, read, out, lse, *blocks = ctx.saved_tensors
        keys, values = blocks[: ctx.count], blocks[ctx.count :]
        delta = (grad * out).sum(-1, dtype=lse.dtype)  # [N, H, T]
        folded, seen = _fold_prefix(q, keys, place, ctx.width, read)
        grouped = (_fold(into_groups(x, place, len(keys[0]), ctx.width), keys[0]) for x in (grad, lse, delta))
        d_q, d_keys, d_values = _attend_backward(folded, keys, values, seen, *grouped)
        d_q = _unfold_prefix(d_q, q, place, ctx.width)
        own_q, seen = _fold_own(q, own_k)
        grouped = (_fold(x[:, None], own_k) for x in (grad, lse, delta))
        own_d_q, own_d_k, own_d_v = _attend_backward(own_q, (own_k,), (own_v,), seen, *grouped)
        d_q = (d_q + _unfold_own(own_d_q, q)).to(q.dtype)
        return d_q, own_d_k[0], own_d_v[0], None, None, None, None, *d_keys, *d_values


# ---- queries as rows of a score matrix: [X, G, M, d], M = (row of a group, token, head of a group of heads)


def _fold(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[X, m, H, T, ...] -> [X, G, m T H/G, ...]."""
    x = x.unflatten(2, (keys.shape[1], -1))  # [X, m, G, r, T, ...]
    order = (0, 2, 1, 4, 3, *range(5, x.ndim))
    return x.permute(order).flatten(2, 4)


def _unfold(x: torch.Tensor, width: int, tokens: int) -> torch.Tensor:
    """[X, G, m T r, ...] -> [X, m, H, T, ...]."""
    x = x.unflatten(2, (width, tokens, -1))
    order = (0, 2, 1, 4, 3, *range(5, x.ndim))
    return x.permute(order).flatten(2, 3)


def _fold_prefix(q, keys, place, width, read) -> tuple[torch.Tensor, _Visible | None]:
    groups, repeat = len(keys[0]), q.shape[1] // keys[0].shape[1]
    folded = _fold(into_groups(q, place, groups, width), keys[0])
    if read is None:
        return folded, None
    limit = into_groups(read, place, groups, width).repeat_interleave(q.shape[2] * repeat, dim=1)
    return folded, _Visible(limit, 0, None, sum(k.shape[2] for k in keys))


def _unfold_prefix(x: torch.Tensor, q: torch.Tensor, place, width: int) -> torch.Tensor:
    return out_of_groups(_unfold(x, width, q.shape[2]), place)


def _fold_own(q: torch.Tensor, own_k: torch.Tensor) -> tuple[torch.Tensor, _Visible]:
    tokens, repeat = q.shape[2], q.shape[1] // own_k.shape[1]
    return _fold(q[:, None], own_k), _Visible.causal(own_k.shape[2] - tokens, tokens, repeat, q.device)


def _unfold_own(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return _unfold(x, 1, q.shape[2])[:, 0]


# ---- tiles


def _row_blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _QUERIES):
        yield slice(start, min(count, start + _QUERIES))


def _tiles(blocks, rows: slice, q: torch.Tensor, seen: _Visible | None) -> Iterator[tuple]:
    """(block, its columns, what is masked of them) for every tile that these rows see something of."""
    size = max(64, _TILE_ENTRIES // (q.shape[0] * q.shape[1] * max(1, rows.stop - rows.start)))
    start = 0
    for i, block in enumerate(blocks):
        end = start + block.shape[2]
        stop = end if seen is None else min(end, seen.end(rows))
        for at in range(start, stop, size):
            until = min(at + size, stop)
            mask = None if seen is None else seen.mask(rows, at, until)
            yield i, slice(at - start, until - start), mask
        start = end


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[X, G, rows, columns] in float32 at least, -inf where not seen."""
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    scores.mul_(q.shape[-1] ** -0.5)
    return scores if mask is None else scores.masked_fill_(mask, float("-inf"))


def _attend(q, keys, values, seen) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [X, G, M, d] queries to blocks: the output and the log-sum-exp [X, G, M] of the scores."""
    exact = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:-1], values[0].shape[-1], dtype=exact)
    lse = q.new_full(q.shape[:-1], float("-inf"), dtype=exact)
    for rows in _row_blocks(q.shape[2]):
        block_q = q[:, :, rows]
        largest, total = lse[:, :, rows], torch.zeros_like(lse[:, :, rows])
        summed = out[:, :, rows]
        for i, columns, mask in _tiles(keys, rows, q, seen):
            scores = _scores(block_q, keys[i][:, :, columns], mask)
            before, largest = largest, torch.maximum(largest, scores.amax(-1))
            shift = largest.masked_fill(largest == float("-inf"), 0.0)  # nothing seen yet
            weights = scores.sub_(shift[..., None]).exp_()
            shrink = (before - shift).exp_()
            total = total * shrink + weights.sum(-1)
            product = weights.to(q.dtype) @ values[i][:, :, columns]
            summed = summed * shrink[..., None] + product
        empty = total == 0
        out[:, :, rows] = summed / total.masked_fill(empty, 1.0)[..., None]
        lse[:, :, rows] = largest + total.log()  # -inf where nothing is seen
    return out, lse


def _attend_backward(q, keys, values, seen, grad, lse, delta):
    """Gradients of the queries, and lists of those of the blocks' keys and values."""
    scale = q.shape[-1] ** -0.5
    d_q = torch.zeros_like(q, dtype=lse.dtype)
    d_keys = [torch.zeros_like(k, dtype=lse.dtype) for k in keys]
    d_values = [torch.zeros_like(v, dtype=lse.dtype) for v in values]
    for rows in _row_blocks(q.shape[2]):
        block_q, block_grad = q[:, :, rows], grad[:, :, rows]
        for i, columns, mask in _tiles(keys, rows, q, seen):
            k, v = keys[i][:, :, columns], values[i][:, :, columns]
            weights = _scores(block_q, k, mask).sub_(lse[:, :, rows, None]).exp_()
            d_values[i][:, :, columns] += weights.to(q.dtype).transpose(-1, -2) @ block_grad
            d_scores = (block_grad @ v.transpose(-1, -2)).to(lse.dtype)
            d_scores = d_scores.sub_(delta[:, :, rows, None]).mul_(weights).mul_(scale).to(q.dtype)
            d_q[:, :, rows] += d_scores @ k
            d_keys[i][:, :, columns] += d_scores.transpose(-1, -2) @ block_q
    d_keys = [d.to(k.dtype) for d, k in zip(d_keys, keys)]
    return d_q, d_keys, [d.to(v.dtype) for d, v in zip(d_values, values)]
