"""Other tiles than those the ops choose, timed: what the tables of tiles are to be corrected by.

Every candidate cuts the kernels of the delta rule in another way at once, as each kernel's time is read apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.gpu.inputs import delta_inputs, lact_inputs
from benchmarks.gpu.measuring import CUDA, DEVICE, HALF, Row, launches, milliseconds, row
from benchmarks.gpu.pool import Task
from refine_kernels import chunk_delta_rule, chunk_lact, linear_logprob
from refine_kernels.delta_rule import triton_chunk
from refine_kernels.delta_rule.tiles import GradientTile, Tile
from refine_kernels.lact import triton_products, triton_update
from refine_kernels.linear_logprob import triton_forward

HERE = "benchmarks.gpu.tiles:"
# columns of V, warps, stages
SCANS = (
    (32, 4, 2), (32, 4, 1), (32, 4, 3), (16, 4, 2), (16, 4, 3), (64, 4, 2), (64, 4, 1), (64, 8, 2), (128, 8, 1),
    (32, 2, 2), (64, 4, 3), (32, 8, 2),
)  # fmt: skip
STATES = ((64, 4, 2), (64, 4, 1), (128, 8, 1), (128, 8, 2), (32, 4, 2), (128, 4, 1))
INVERSES = (4, 2, 8, 1)  # warps
# columns of K, at least half of them, of V, warps, stages
GRADIENTS = (
    (64, 64, 4, 1), (64, 32, 4, 1), (64, 64, 4, 2), (64, 128, 4, 1), (64, 32, 4, 2), (64, 16, 4, 1),
    (128, 64, 4, 1), (128, 32, 4, 1), (128, 64, 4, 2), (128, 32, 4, 2), (64, 16, 4, 2), (64, 128, 4, 2),
)  # fmt: skip
HEADS = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (64, 256, 64, 4, 3),
    (128, 256, 128, 8, 2), (256, 128, 64, 8, 3),
)  # fmt: skip
_PRODUCTS = (
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4),
    (128, 128, 64, 8, 4),
)  # fmt: skip
LACTS = {
    "hidden_tile": (
        (128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 8, 4), (128, 128, 64, 8, 2),
        (64, 128, 64, 4, 3),
    ),
    "outer_tile": _PRODUCTS,
    "output_tile": _PRODUCTS,
    "hidden_backward_tile": (
        (128, 32, 64, 8, 2), (64, 32, 64, 4, 2), (128, 64, 64, 8, 2), (64, 64, 64, 4, 2), (64, 32, 64, 4, 3),
        (128, 32, 64, 4, 2),
    ),
}  # fmt: skip


def compiling() -> list[Task]:
    """Each candidate compiles its kernels in a process of its own."""
    if not CUDA:
        return []
    tasks = []
    for gated, i in itertools.product((False, True), range(len(GRADIENTS))):
        tasks.append(
            Task(
                "compiling",
                f"delta tiles {gated} {i}",
                HERE + "delta",
                {"gated": gated, "only": [i], "shapes": ((1, 4096), (8, 1024))},
                True,
            )
        )
    for i in range(len(HEADS)):
        tasks.append(Task("compiling", f"head tiles {i}", HERE + "head", {"only": [i]}, True))
    for i in range(len(LACTS["outer_tile"])):
        tasks.append(Task("compiling", f"LaCT tiles {i}", HERE + "lact", {"only": [i]}, True))
    return tasks


def delta(gated: bool, only: list[int] | None = None, shapes=((1, 16384), (8, 8192))) -> Iterator[Row]:
    """Microseconds of every kernel under every candidate, one long sequence (split) and eight."""
    heads, size = (16, 128) if CUDA else (2, 16)
    choose = triton_chunk.choose_tiles
    for (b, t), i in itertools.product(shapes if CUDA else [(1, 256)], only or range(len(GRADIENTS))):
        inputs = delta_inputs(b, t, heads, size, size, HALF, gated=gated)
        leaves = [inputs[n] for n in ("q", "k", "v", "beta", "g") if inputs[n] is not None]
        d_o = torch.randn_like(inputs["v"])
        scan, states, inverse = (x[i % len(x)] for x in (SCANS, STATES, INVERSES))
        tiles = {
            "scan": Tile(*scan), "reverse": Tile(*scan), "states": Tile(*states), "inverse": Tile(32, inverse, 1),
            "gradient": GradientTile(*GRADIENTS[i]),
        }  # fmt: skip

        def chosen(*arguments, tiles=tiles, **options):
            found = choose(*arguments, **options)
            return found._replace(**tiles) if CUDA else found

        def both(leaves=leaves, inputs=inputs, d_o=d_o):
            o = chunk_delta_rule(*leaves[:4], g=inputs["g"], use_qk_l2norm_in_kernel=True)[0]
            return torch.autograd.grad(o, leaves, d_o)

        cut = ", ".join(f"{name} {tuple(tile)}" for name, tile in tiles.items())
        what = f"{'gated ' * gated}{b} x {t}: {cut}"
        with mock.patch.object(triton_chunk, "choose_tiles", chosen):
            try:
                kernels = launches(both)
            except Exception as error:
                yield row(what, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                continue
        ours = {n.removesuffix("_kernel"): us for n, (_, us) in kernels.items() if n.endswith("_kernel")}
        yield row(what, ", ".join(f"{n} {us:.0f} us" for n, us in ours.items()), kernels=ours)


def spans(gated: bool) -> Iterator[Row]:
    """One sequence split into spans of several lengths: forward and backward."""
    heads, size, t = (16, 128, 16384) if CUDA else (2, 16, 2048)
    for b in (1, 2):
        inputs = delta_inputs(b, t, heads, size, size, HALF, gated=gated)
        leaves = [inputs[n] for n in ("q", "k", "v", "beta", "g") if inputs[n] is not None]
        d_o = torch.randn_like(inputs["v"])
        forward = lambda: chunk_delta_rule(*leaves[:4], g=inputs["g"], use_qk_l2norm_in_kernel=True)[0]  # noqa: E731, B023
        for span in (0, 8192, 4096, 2048, 1024, 512):
            if span >= t:
                continue
            with mock.patch.object(triton_chunk, "span_tokens", lambda *_: span):  # noqa: B023
                with torch.no_grad():
                    alone = milliseconds(forward)
                whole = milliseconds(lambda: torch.autograd.grad(forward(), leaves, d_o))  # noqa: B023
            yield row(
                f"{'gated ' * gated}{b} x {t}, spans of {span or 'all'} tokens", f"{alone:.3f} / {whole:.3f} ms",
                forward_ms=alone, both_ms=whole,
            )  # fmt: skip


def head(only: list[int] | None = None) -> Iterator[Row]:
    """The forward with entropy."""
    n, d, v = (16384, 2048, 32000) if CUDA else (64, 16, 97)
    x, w = (
        torch.randn(n, d, device=DEVICE, dtype=HALF),
        torch.randn(v, d, device=DEVICE, dtype=HALF) * d**-0.5,
    )
    y = torch.randint(v, (n,), device=DEVICE)
    for i in only or range(len(HEADS)):
        tile = triton_forward.Tile(*HEADS[i])
        with mock.patch.object(triton_forward, "choose_tile", lambda *_: tile), torch.no_grad():  # noqa: B023
            try:
                ms = milliseconds(lambda: linear_logprob(x, w, y, return_entropy=True))
            except Exception as error:
                yield row(f"head tile {HEADS[i]}", f"{type(error).__name__}: {str(error).splitlines()[0]}")
                continue
        yield row(f"head tile {HEADS[i]}", f"{ms:.2f} ms", ms=ms)


def lact(only: list[int] | None = None) -> Iterator[Row]:
    """Every kernel of LaCT under every candidate, 760M's shape."""
    n, length, size, chunk = (4, 8192, 384, 2048) if CUDA else (2, 256, 16, 64)
    tensors, momentum = lact_inputs(n, length, size, HALF)
    leaves = [*tensors, momentum]

    def both():
        o = chunk_lact(*tensors, momentum=momentum, chunk_size=chunk)
        return torch.autograd.grad(o, leaves, torch.ones_like(o))

    for i in only or range(len(LACTS["outer_tile"])):
        tiles = {name: triton_products.Tile(*candidates[i]) for name, candidates in LACTS.items()}
        with mock.patch.multiple(
            triton_products, **{n: lambda *_, n=n: tiles[n] for n in ("hidden_tile", "output_tile")}  # noqa: B023
        ), mock.patch.object(
            triton_products, "outer_tile", lambda *_: tiles["outer_tile"]  # noqa: B023
        ), mock.patch.object(
            triton_update, "outer_tile", lambda *_: tiles["outer_tile"]  # noqa: B023
        ), mock.patch.object(
            triton_update, "hidden_backward_tile", lambda *_: tiles["hidden_backward_tile"]  # noqa: B023
        ):  # fmt: skip
            if not CUDA:
                return
            try:
                kernels = launches(both)
            except Exception as error:
                yield row(f"LaCT tiles {i}", f"{type(error).__name__}: {str(error).splitlines()[0]}")
                continue
        ours = {n.removesuffix("_kernel"): us for n, (_, us) in kernels.items() if n.endswith("_kernel")}
        yield row(
            f"LaCT tiles {i}: {', '.join(f'{n[:-5]} {tuple(t)}' for n, t in tiles.items())}",
            ", ".join(f"{n} {us:.0f} us" for n, us in ours.items()), kernels=kernels,
        )  # fmt: skip
