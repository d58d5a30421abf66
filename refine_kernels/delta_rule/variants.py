"""What ``python -m refine_kernels.inspect`` compiles: the kernels of each way to call the launchers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from refine_kernels.delta_rule import triton_chunk, triton_recurrent
from refine_kernels.launches import Call

# (K, V): of the published models; unequal; the largest; ones that no vector load divides
HEAD_SIZES = ((128, 128), (64, 64), (128, 256), (256, 256), (60, 100))
# Bytes that may spill on an NVIDIA chip, in every release of Triton from 3.6 to 3.9 (README.md); and on sm_90 at
# K = V = 64 and 128 in bfloat16 and float16, where releases place registers differently near the limit of 255.
SPILLS = {"scan": 3072, "reverse": 2048, "gradient": 1024, "recurrent": 64, "decode": 64}
HOPPER_SPILLS = {"gradient": 40, "decode": 8}
FLOAT32_SPILLS = 65_536  # products of float32 in full are sums over registers


def calls() -> Iterator[Call]:
    """All dtypes at K = V = 128, bfloat16 at the other head sizes."""
    for size in HEAD_SIZES:
        dtypes = (torch.bfloat16, torch.float16, torch.float32) if size == (128, 128) else (torch.bfloat16,)
        for dtype, gated, many in itertools.product(dtypes, (False, True), (True, False)):
            # many heads fill a GPU; few have their sequences split, and other tiles
            rows, heads, tokens = (8, 16, 4096) if many else (1, 8, 16384)
            use = partial(_chunks, *size, dtype, gated, rows, heads, tokens)
            kind = f"{'gated' if gated else 'plain'} {'many' if many else 'few'}"
            yield _call(*size, dtype, f"{kind} forward", partial(use, training=False))
            yield _call(*size, dtype, f"{kind} training", partial(use, training=True))
        for dtype, gated in itertools.product((*dtypes, torch.float64), (False, True)):
            kind = "gated" if gated else "plain"
            yield _call(*size, dtype, kind, partial(_recurrent, *size, dtype, gated))
    for gated in (False, True):
        use = partial(_chunks, 128, 128, torch.bfloat16, gated, 8, 8, 4096, repeat=2, training=True)
        yield _call(128, 128, torch.bfloat16, f"{'gated' if gated else 'plain'} value heads", use)


def _call(kd: int, vd: int, dtype: torch.dtype, label: str, run) -> Call:
    def demands(kernel: str) -> dict[str, Any]:
        chunks = kernel not in ("recurrent", "decode")
        held = (kd, vd) in ((128, 128), (64, 64)) and dtype.itemsize == 2
        budget = FLOAT32_SPILLS if chunks and dtype == torch.float32 else SPILLS.get(kernel, 0)
        return {
            "tensor_core": chunks and dtype != torch.float32,
            "spill_budget": budget,
            "chip_budgets": {"sm_90": HOPPER_SPILLS.get(kernel, 0)} if held else {},
        }

    return Call(f"K{kd} V{vd} {str(dtype).removeprefix('torch.')} {label}", run, demands)


def _chunks(
    kd: int, vd: int, dtype: torch.dtype, gated: bool, rows: int, heads: int, tokens: int, *, training: bool,
    repeat: int = 1,
) -> None:  # fmt: skip
    """Packed sequences, whose address arithmetic is the longer one; with ``training`` everything there is."""
    total, all_heads = rows * tokens, heads * repeat
    new = partial(torch.empty, device="meta")
    q = new(1, total, heads, kd, dtype=dtype)
    v = new(1, total, all_heads, vd, dtype=dtype)
    beta, g = new(1, total, all_heads, dtype=dtype), new(1, total, all_heads) if gated else None
    cu_seqlens = torch.arange(rows + 1) * tokens
    state = new(rows, all_heads, kd, vd) if training else None
    stride = 512 if training else 0
    given = (q, q, v, beta, g, state, cu_seqlens)
    o, final, states, *kept = triton_chunk.forward(*given, 1.0, True, training, stride, training)
    if training:
        triton_chunk.backward(*given, *kept, o, final, states, 1.0, True, stride)


def _recurrent(kd: int, vd: int, dtype: torch.dtype, gated: bool) -> None:
    rows, heads, width = 8, 16, 4
    new = partial(torch.empty, device="meta")
    q, v = new(rows, 1, heads, kd, dtype=dtype), new(rows, 1, heads, vd, dtype=dtype)
    beta, g = new(rows, 1, heads, dtype=dtype), new(rows, 1, heads) if gated else None
    state = new(rows, heads, kd, vd, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    indices = new(rows, dtype=torch.int64)
    triton_recurrent.forward(q, q, v, beta, g, state, indices, 1.0, True, True)
    q, v = q.flatten(2), v.flatten(2)
    weights = [new(x.shape[2], width, dtype=dtype) for x in (q, q, v)]
    tails = [new(rows, width - 1, x.shape[2], dtype=dtype) for x in (q, q, v)]
    triton_recurrent.decode_forward(q, q, v, beta, g, weights, tails, state, indices, 1.0, 1.0, True)


def turns(kernel: str, given: dict[str, Any]) -> tuple[list, bool, float]:
    """For the counted clock: turns of a kernel's outermost loops, whether it goes along a sequence, and the share
    of its programs that have work. ``given``: the launch's arguments; sequences of one length."""
    span, chunks = given.get("SPAN"), -(-given["T"] // given["BT"])
    if kernel == "inverse":
        return [7], False, 1.0
    if kernel == "gradient":
        blocks = -(-given["K"] // given["BK"])
        loops = 3 + (3 if given.get("decays") is None else 4) * blocks
        return [-(-given["V"] // given["BV"])] * loops, False, 1.0
    if kernel == "states":
        return [min(given["GROUP"], chunks)], False, 1.0
    if kernel == "join":
        return [(-(-chunks // span), given["K"] // given["BJ"])], True, 1.0
    if span is None:
        return [chunks], True, 1.0
    spans, share = -(-chunks // span), 1.0
    if given.get("maps") is not None:  # one span is not mapped, of another only L is
        of_v, of_k = (-(-given[size] // given["BV"]) for size in "VK")
        share = ((spans - 1) * (of_v + of_k) - of_k) / (spans * (of_v + of_k))
    return [span], True, share


def clock_call(
    rows: int, tokens: int, heads: int, value_heads: int, kd: int, vd: int, dtype: torch.dtype, gated: bool
):
    """For the counted clock: ``(forward, forward for training, backward)`` of plain rows with the l2 norm."""
    new = partial(torch.empty, device="meta")
    q = new(rows, tokens, heads, kd, dtype=dtype)
    v = new(rows, tokens, value_heads, vd, dtype=dtype)
    beta = new(rows, tokens, value_heads, dtype=dtype)
    g = new(rows, tokens, value_heads) if gated else None
    given = (q, q.clone(), v, beta, g, None, None)

    def forward(training: bool):
        return triton_chunk.forward(*given, kd**-0.5, True, False, 0, training)

    def backward() -> None:
        kept = triton_chunk.checkpoint_count(v, None), triton_chunk.kept_count(q, v, g)
        checkpoints = new(kept[0], rows, value_heads, kd, vd)
        d_o = new(v.shape, dtype=dtype)
        triton_chunk.backward(*given, checkpoints, q.new_empty(kept[1]), d_o, None, None, kd**-0.5, True, 0)

    return partial(forward, False), partial(forward, True), backward
