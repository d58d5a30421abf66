"""What ``python -m refine_kernels.inspect`` compiles: every kernel at every tile that its launcher can choose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from refine_kernels.kernel_variant import KernelVariant
from refine_kernels.linear_logprob import triton_forward, triton_rows

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
HEADS = ((2048, 32000), (4096, 131072), (60, 997))  # D, V; no vector load divides the last
ROWS = (8, 64, 16384)  # decoding, a small batch of it, training
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes: a few registers beside the accumulator's way out of tensor memory, once a tile of 128 x 256 logits.
SPILLS = {"sm_100": 64}
# name -> the arguments of `forward_kernel` that are None
ASKED = {
    "logprob": ("seed", "t", "best", "token"),
    "logprob entropy": ("seed", "best", "token"),
    "draw logprob entropy": ("target",),
    "greedy": ("target", "seed", "t", "q_y"),
}


def kernel_variants() -> Iterator[KernelVariant]:
    """Every tile of `forward_kernel` for the chip that takes it; the other kernels for all chips."""
    for dtype in POINTERS:
        for D, V in HEADS if dtype == torch.bfloat16 else HEADS[:1]:
            for chip, (asked, absent) in itertools.product(CHIPS, ASKED.items()):
                tiles = {triton_forward.choose_tile(N, dtype, "seed" not in absent, chip) for N in ROWS}
                for tile in sorted(tiles):
                    yield _forward(chip, dtype, D, asked, absent, tile)
            yield from _gradient(dtype, V)
    for splits in (1, 132):
        yield _combine(splits)
    for chip in CHIPS:
        few = triton_forward.choose_tile(ROWS[0], torch.bfloat16, True, chip)
        yield _forward(chip, torch.bfloat16, 2048, "draw of a capped head", (), few, softcap=True)


def _forward(
    chip: str,
    dtype: torch.dtype,
    D: int,
    asked: str,
    absent: tuple[str, ...],
    tile: triton_forward.Tile,
    softcap: bool = False,
) -> KernelVariant:
    """Without a bias unless the head is capped as well."""
    half = POINTERS[dtype]
    pointers = {"x": half, "w": half, "bias": "*fp32", "target": "*i64", "seed": "*i64", "m": "*fp32"}
    pointers |= {"s": "*fp32", "t": "*fp32", "q_y": "*fp32", "best": "*fp32", "token": "*i64"}
    scalars = dict.fromkeys(("N", "V", "first_column", "row_tiles", "tiles_per_split"), "i32")
    scalars |= {"inv_temperature": "fp32", "softcap": "fp32"}
    return _variant(
        f"forward {asked} D{D} {dtype} {tile.rows}x{tile.columns}x{tile.depth} for {chip}",
        triton_forward.forward_kernel,
        pointers,
        scalars,
        absent if softcap else (*absent, "bias"),
        {"D": D, "HAS_SOFTCAP": softcap, **tile.constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tensor_core=dtype != torch.float32,
        spill_budget=SPILLS.get(chip, 0),
        archs=frozenset([chip]),
    )


def _gradient(dtype: torch.dtype, V: int) -> Iterator[KernelVariant]:
    statistics = ("g_logprob", "g_entropy", "g_lse", "lse", "row_entropy", "logprob", "entropy")
    pointers = {"q": "*fp32", "dz": POINTERS[dtype], "bias": "*fp32", "target": "*i64"}
    pointers |= dict.fromkeys(statistics, "*fp32")
    absences = {
        "dense": ("bias", "g_entropy", "g_lse", "lse", "row_entropy"),
        "general": ("lse", "row_entropy", "logprob", "entropy"),
        "slice": ("logprob", "entropy"),
    }
    for name, absent in absences.items():
        yield _variant(
            f"gradient {name} V{V} {dtype}",
            triton_rows.gradient_kernel,
            pointers,
            {"V": "i32", "inv_temperature": "fp32", "softcap": "fp32"},
            absent,
            {"HAS_SOFTCAP": name != "dense", "BV": triton_rows.columns_of(V)},
            num_warps=triton_rows.WARPS,
            num_stages=1,
        )


def _combine(splits: int) -> KernelVariant:
    fields = ("m", "s", "t", "q_y", "best", "token")
    pointers = dict.fromkeys(
        (*fields, "m_out", "log_s_out", "e_out", "q_y_out", "best_out", "token_out"), "*fp32"
    )
    pointers |= {"token": "*i64", "token_out": "*i64"}
    BS, BR = triton_forward.combine_tile(splits)
    return _variant(
        f"combine of {splits}",
        triton_forward.combine_kernel,
        pointers,
        {"N": "i32", "S": "i32"},
        (),
        {"DRAWN": True, "BS": BS, "BR": BR},
        num_warps=4,
        num_stages=1,
    )


def _variant(name, kernel, pointers, scalars, absent, constants, **options) -> KernelVariant:
    """Pointers of new tensors are multiples of 16 bytes; an argument that is None is a constant."""
    there = {key: kind for key, kind in pointers.items() if key not in absent}
    constants = {**dict.fromkeys(absent), **constants}
    return KernelVariant(
        name=f"linear_logprob.{name.replace('torch.', '')}",
        kernel=kernel,
        signature={**there, **scalars, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        divisible_by_16=frozenset(there),
        **options,
    )
