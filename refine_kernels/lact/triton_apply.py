"""Reading with the fast weights on a GPU: all chunks of all rows at once, forward and backward.

Forward: ``h = silu(q W0^T) * (q W2^T)`` in one launch, ``o = h W1^T`` in a second. Backward: h again and the
gradients at y0 and y2 (`hidden_kernel` with the output's gradient in place of the values), the weights'
gradients (`outer_kernel`), the queries' (`output_kernel`): three launches. With bfloat16 tokens the entries that
are read are first rounded to bfloat16, in one launch. Long inputs go by groups of chunks, so that the hidden
units between the launches stay within a fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refine_kernels.lact import chunked
from refine_kernels.lact.layout import Widths
from refine_kernels.lact.triton_products import (
    arithmetic_of,
    choose_splits,
    hidden,
    outer,
    outer_tile,
    output,
)

HIDDEN_UNITS = (
    1 << 26
)  # rows x tokens x dh that go through memory at a time: 134 MB in bfloat16, thrice backward


def apply_forward(
    stack: torch.Tensor,  # [N, S, P]
    q: torch.Tensor,  # [N, L, dk]
    widths: Widths,
    chunk_size: int,
    offset: int,
) -> torch.Tensor:  # [N, L, dv]
    """Token t is read with entry ``(offset + t) // chunk_size``. float64 has no kernels: the PyTorch path."""
    if q.dtype == torch.float64 or q.numel() == 0:
        return chunked.apply_forward(stack, q, widths, chunk_size, offset)
    arithmetic = arithmetic_of(q.dtype)
    o = q.new_empty(*q.shape[:2], widths.dv)
    with torch.cuda.device_of(q):
        (q,) = arithmetic.hold(q)
        for entries, tokens, inside in _groups(q, widths, chunk_size, offset):
            options = (widths, chunk_size, inside, arithmetic.precision)
            weights = stack[:, entries].to(arithmetic.dtype)
            _, h = hidden(q[:, tokens], None, weights, None, *options)
            output((), (h, weights), None, o[:, tokens], *options)
    return o


def apply_backward(
    stack: torch.Tensor,  # [N, S, P]
    q: torch.Tensor,  # [N, L, dk]
    d_o: torch.Tensor,  # [N, L, dv]
    widths: Widths,
    chunk_size: int,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the stack ``[N, S, P]`` and of q."""
    if q.dtype == torch.float64 or q.numel() == 0:
        return chunked.apply_backward(stack, q, d_o, widths, chunk_size, offset)
    arithmetic = arithmetic_of(q.dtype)
    d_stack, d_q = stack.new_empty(stack.shape), q.new_empty(q.shape)
    d_stack[:, : offset // chunk_size] = 0.0
    d_stack[:, (offset + q.shape[1] - 1) // chunk_size + 1 :] = 0.0
    with torch.cuda.device_of(q):
        q, d_o = arithmetic.hold(q, d_o)
        for entries, tokens, inside in _groups(q, widths, chunk_size, offset):
            options = (widths, chunk_size, inside, arithmetic.precision)
            weights, x, u = stack[:, entries].to(arithmetic.dtype), q[:, tokens], d_o[:, tokens]
            d, h = hidden(x, u, weights, None, *options)
            output((d, weights), (), d_q[:, tokens], None, *options)
            of_a_chunk = min(x.shape[1], chunk_size)
            splits = choose_splits(*weights.shape[:2], of_a_chunk, widths, outer_tile(q.dtype))
            if splits == 1:
                outer(d, x, h, u, d_stack[None, :, entries], *options)
            else:
                parts = stack.new_empty(splits, *weights.shape)
                outer(d, x, h, u, parts, *options)
                torch.sum(parts, 0, out=d_stack[:, entries])
    return d_stack, d_q


def _groups(
    q: torch.Tensor, widths: Widths, chunk_size: int, offset: int
) -> Iterator[tuple[slice, slice, int]]:
    """Entries that are read at a time, their tokens, and how many tokens stand before those in the first entry."""
    rows, tokens = q.shape[:2]
    at_a_time = max(HIDDEN_UNITS // (rows * min(chunk_size, tokens) * widths.dh), 1)
    last = (offset + tokens - 1) // chunk_size + 1
    for first in range(offset // chunk_size, last, at_a_time):
        start = max(first * chunk_size - offset, 0)
        end = min((first + at_a_time) * chunk_size - offset, tokens)
        entries = slice(first, min(first + at_a_time, last))
        yield entries, slice(start, end), max(offset - first * chunk_size, 0)
