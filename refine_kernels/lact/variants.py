"""What ``python -m refine_kernels.inspect`` compiles: the kernels of each way to call the launchers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from refine_kernels.lact import triton_apply, triton_edges, triton_update
from refine_kernels.lact.layout import Widths
from refine_kernels.launches import Call

# of LaCT-760M with four heads and with two; unequal ones; ones that no vector load divides
WIDTHS = (Widths(384, 384, 384), Widths(768, 768, 768), Widths(192, 96, 160), Widths(60, 100, 60))
CHUNKS = (2048, 5)  # tokens of a chunk: training, decoding
# momentum, Muon, pre-norm
MODES = {
    "plain": (False, False, False),
    "momentum pre-norm": (True, False, True),
    "momentum": (True, False, False),
    "Muon": (True, True, False),
}
MATRIX_KERNELS = ("hidden", "outer", "output", "hidden_backward")


def calls() -> Iterator[Call]:
    """Every kernel for every dtype of tokens at the first widths, for bfloat16 tokens at the others."""
    for widths in WIDTHS:
        for dtype in (
            (torch.bfloat16, torch.float16, torch.float32) if widths == WIDTHS[0] else (torch.bfloat16,)
        ):
            label = f"{'x'.join(map(str, widths))} {str(dtype).removeprefix('torch.')}"
            demands = partial(_demands, dtype)
            for chunk in CHUNKS:
                for mode, what in MODES.items() if chunk == CHUNKS[0] else [("plain", MODES["plain"])]:
                    use = partial(_scan, widths, dtype, chunk, *what)
                    yield Call(f"{label} chunks of {chunk} {mode}", use, demands)
                yield Call(f"{label} chunks of {chunk} read", partial(_apply, widths, dtype, chunk), demands)
            yield Call(f"{label} edges", partial(_edges, widths, dtype), demands)


def _demands(dtype: torch.dtype, kernel: str) -> dict:
    """Without bfloat16 nothing is near a limit, and ptxas may trade a few bytes for fewer registers."""
    return {
        "tensor_core": kernel in MATRIX_KERNELS and dtype != torch.float32,
        "spill_budget": 0 if dtype == torch.bfloat16 else 64,
    }


def _scan(widths: Widths, dtype: torch.dtype, chunk: int, momentum: bool, muon: bool, prenorm: bool) -> None:
    rows, updates = 4, 3
    new = partial(torch.empty, rows, device="meta")
    state, norms = new(widths.size), new(widths.rows)
    k, v = (new(chunk * updates, width, dtype=dtype) for width in (widths.dk, widths.dv))
    rate = new(chunk * updates, 1)
    tokens = (k, v, rate, rate, rate, rate if momentum else None)
    stack, sums, steps, divisors = triton_update.scan_forward(
        state,
        state if prenorm else None,
        state if momentum else None,
        norms,
        *tokens,
        widths,
        chunk,
        updates,
        muon,
    )
    triton_update.scan_backward(
        stack, steps, divisors, norms, *tokens, stack, sums if prenorm else None, steps if momentum else None,
        widths, chunk, muon, prenorm,
    )  # fmt: skip


def _apply(widths: Widths, dtype: torch.dtype, chunk: int) -> None:
    rows, entries = 4, 2
    new = partial(torch.empty, rows, device="meta")
    stack = new(entries, widths.size)
    q, d_o = (new(chunk * entries, width, dtype=dtype) for width in (widths.dk, widths.dv))
    triton_apply.apply_forward(stack, q, widths, chunk, 0)
    triton_apply.apply_backward(stack, q, d_o, widths, chunk, 0)


def _edges(widths: Widths, dtype: torch.dtype) -> None:
    """Turned by angles of 32 pairs a head where they divide it, and gated."""
    batch, tokens, heads = 2, 2048, 4
    new = partial(torch.empty, device="meta")
    q, v = (new(batch, tokens, heads * width, dtype=dtype) for width in (widths.dk, widths.dv))
    scale = new(heads * widths.dk, 2)
    angle = new(batch, tokens, 32) if widths.dk % 64 == 0 else None
    given = (q, q, v, scale, scale, angle, angle, heads, True, True)
    triton_edges.prepare_backward(*triton_edges.prepare_forward(*given), *given)
    o, gate = new(batch, heads, tokens, widths.dv, dtype=dtype), new(batch, tokens, heads)
    weight = new(widths.dv)
    out = triton_edges.finish_forward(o, v, weight, gate, 1e-5)
    triton_edges.finish_backward(out, o, weight, gate, 1e-5)
