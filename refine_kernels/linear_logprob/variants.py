"""What ``python -m refine_kernels.inspect`` compiles: the kernels of each way to call the launchers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from refine_kernels.launches import Call
from refine_kernels.linear_logprob import triton_forward, triton_rows
from refine_kernels.linear_logprob.chunked import Head

HEADS = ((2048, 32000), (4096, 131072), (60, 997))  # D, V; no vector load divides the last
ROWS = (8, 64, 16384)  # decoding, a small batch of it, training
SPILLS = 64  # bytes, once a tile of logits: a few registers of masks (D = 60), of draws, of float32
# what is asked of the forward: a target, log-prob, entropy, a token, noise
ASKED = {
    "logprob": (True, True, False, False, False),
    "logprob entropy": (True, True, True, False, False),
    "draw logprob entropy": (False, True, True, True, True),
    "greedy": (False, False, False, True, False),
}


def calls() -> Iterator[Call]:
    """All dtypes at the first head, bfloat16 at the others."""
    for D, V in HEADS:
        for dtype in (
            (torch.bfloat16, torch.float16, torch.float32) if HEADS[0] == (D, V) else (torch.bfloat16,)
        ):
            label = f"D{D} V{V} {str(dtype).removeprefix('torch.')}"
            for asked, what in ASKED.items():
                for N in ROWS:
                    use = partial(_forward, N, D, V, dtype, *what)
                    yield Call(f"{label} {asked} {N} rows", use, partial(_demands, dtype))
            for name in ("dense", "general", "slice"):
                yield Call(f"{label} {name}", partial(_gradient, V, dtype, name), partial(_demands, dtype))
    use = partial(_forward, ROWS[0], *HEADS[0], torch.bfloat16, *ASKED["draw logprob entropy"], capped=True)
    yield Call("draw of a capped head", use, partial(_demands, torch.bfloat16))


def _demands(dtype: torch.dtype, kernel: str) -> dict:
    return {"tensor_core": kernel == "forward" and dtype != torch.float32, "spill_budget": SPILLS}


def _head(D: int, V: int, dtype: torch.dtype, capped: bool) -> Head:
    """With a bias if it is capped as well."""
    weight, bias = (torch.empty(*shape, dtype=kind, device="meta") for shape, kind in
                    (((V, D), dtype), ((V,), torch.float32)))  # fmt: skip
    return Head(weight, bias if capped else None, 30.0 if capped else None, 1.0)


def _forward(
    N: int, D: int, V: int, dtype: torch.dtype, targets: bool, logprob: bool, entropy: bool, sample: bool,
    noise: bool, *, capped: bool = False,
) -> None:  # fmt: skip
    whole = torch.empty(N, dtype=torch.int64, device="meta")
    triton_forward.outputs(
        torch.empty(N, D, dtype=dtype, device="meta"), _head(D, V, dtype, capped), whole if targets else None,
        whole if noise else None, ignore_index=-100, need_logprob=logprob, need_entropy=entropy, need_lse=False,
        sample=sample,
    )  # fmt: skip


def _gradient(V: int, dtype: torch.dtype, name: str, R: int = 512) -> None:
    number = torch.empty(R, device="meta")
    optional = {
        "dense": ("logprob", "entropy"),
        "general": ("g_entropy", "g_lse"),
        "slice": ("g_entropy", "g_lse", "lse", "row_entropy"),
    }[name]
    q = torch.empty(R, V, device="meta")
    triton_rows.gradient(
        q, q.to(dtype), _head(1, V, dtype, name != "dense"), first=0, target=number.long(), g_logprob=number,
        rows=None if name == "dense" else number.long(), **dict.fromkeys(optional, number),
    )  # fmt: skip
