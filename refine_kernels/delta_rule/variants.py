"""What ``python -m refine_kernels.inspect`` compiles: every kernel at every configuration of some head sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refine_kernels.delta_rule import triton_chunk
from refine_kernels.delta_rule.reference import L2_NORM_EPS
from refine_kernels.delta_rule.tiles import GROUP_TOKENS, JOIN_ROWS, Tiles, block, choose_tiles, precision_of
from refine_kernels.delta_rule.triton_recurrent import recurrent_variants
from refine_kernels.kernel_variant import KernelVariant

# (K, V): of the published models; unequal; the largest; ones that no vector load divides
HEAD_SIZES = ((128, 128), (64, 64), (128, 256), (256, 256), (60, 100))
DTYPES = {(128, 128): (torch.bfloat16, torch.float16, torch.float32)}  # bfloat16 alone elsewhere
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Bytes that may spill on any NVIDIA chip, about what it is today; none on sm_90 at K = V = 128 in bfloat16 and
# float16 (README.md).
SPILL_BUDGET = {"inverse": 0, "scan": 3072, "reverse": 2048, "join": 0, "gradient": 1024}
FLOAT32_SPILL_BUDGET = 65_536  # products of float32 in full are sums over registers

# What a kernel does without, by purpose. "again" is the backward's second scan over groups; "spans", what a split
# sequence adds: one span from a joined state, and (maps) what a span does to a state.
_SPLIT = ("owners", "SPAN", "maps")
_FOR_MAPS = ("d_r", "d_initial")
_OUTPUTS = ("u", "final_state", "states", "checkpoints", "chunk_states")
OPTIONAL = {
    "inverse": {"plain": ("g", "decays"), "gated": ()},
    "scan": {
        "plain": ("decays", "initial", *_OUTPUTS, *_SPLIT),
        "gated": ("initial", *_OUTPUTS, *_SPLIT),
        "gated training": ("chunk_states", *_SPLIT),
        "plain training": ("decays", "chunk_states", *_SPLIT),
        "plain training spans": ("decays", "chunk_states", "maps"),
        "gated training spans": ("chunk_states", "maps"),
        "plain maps": ("q", "o", "decays", *_OUTPUTS),
        "gated maps": ("q", "o", *_OUTPUTS),
        "plain again": ("q", "o", "decays", *(x for x in _OUTPUTS if x != "chunk_states"), "maps"),
        "gated again": ("q", "o", *(x for x in _OUTPUTS if x != "chunk_states"), "maps"),
    },
    "reverse": {
        "plain": ("decays", "d_final", "d_states", *_SPLIT),
        "gated": ("d_final", "d_states", *_SPLIT),
        "gated states": _SPLIT,
        "plain states": ("decays", *_SPLIT),
        "plain states spans": ("decays", "maps"),
        "gated states spans": ("maps",),
        "plain states maps": ("decays", *_FOR_MAPS),
        "gated states maps": _FOR_MAPS,
    },
    "join": {"plain": (), "plain reverse": ()},
    "gradient": {"plain": ("decays",), "gated": ()},
}
FLOAT32 = ("beta", "g", "decays", "sums", "initial", "final_state", "states", "checkpoints", "d_final", "d_states",
           "d_initial", "maps", "given", "starts")  # fmt: skip


def kernel_variants() -> Iterator[KernelVariant]:
    """The chunk kernels for all dtypes at K = V = 128, for bfloat16 at the other head sizes; the decode kernels."""
    for kd, vd in HEAD_SIZES:
        for dtype in DTYPES.get((kd, vd), (torch.bfloat16,)):
            for kernel, purposes in OPTIONAL.items():
                for purpose, without in purposes.items():
                    for tiles, archs in _choices(kernel, kd, vd, dtype, purpose.startswith("gated")):
                        if "again" not in purpose or not tiles.carry:
                            yield _variant(kernel, purpose, kd, vd, dtype, tiles, without, archs)
    yield from recurrent_variants()


def _choices(
    kernel: str, kd: int, vd: int, dtype: torch.dtype, gated: bool
) -> list[tuple[Tiles, frozenset[str]]]:
    """The tiles that this kernel can get, each with its chips (none: all)."""

    def choose(few: bool, tensor_memory: bool) -> Tiles:
        return choose_tiles(kd, vd, dtype.itemsize, gated, few=few, tensor_memory=tensor_memory)

    many, few, blackwell = choose(False, False), choose(True, False), choose(False, True)
    elsewhere = frozenset() if blackwell == many else frozenset({"sm_80", "sm_90", "gfx942"})
    choices = [(many, elsewhere)]
    if getattr(few, kernel) != getattr(many, kernel):
        choices.append((few, elsewhere))
    if blackwell != many:
        choices.append((blackwell, frozenset({"sm_100"})))
    return choices


def _variant(
    kernel: str,
    purpose: str,
    kd: int,
    vd: int,
    dtype: torch.dtype,
    tiles: Tiles,
    without: tuple[str, ...],
    archs: frozenset[str],
) -> KernelVariant:
    """With packed sequences, whose address arithmetic is the longer one."""
    function, tile = getattr(triton_chunk, f"{kernel}_kernel"), getattr(tiles, kernel)
    group = GROUP_TOKENS // tiles.chunk
    if kernel == "gradient" and not tiles.carry:
        group = 1
    constants = {
        "REPEAT": 1, "K": kd, "V": vd, "BK": getattr(tile, "bk", block(kd)), "BV": tile.bv,
        "BR": getattr(tile, "br", None), "BT": tiles.chunk, "GROUP": group,
        "BJ": JOIN_ROWS, "REVERSE": "reverse" in purpose, "L2NORM": True, "EPS": L2_NORM_EPS,
        "PRECISION": precision_of(dtype),
    }  # fmt: skip
    names = function.arg_names
    constants = {n: x for n, x in constants.items() if n in names} | dict.fromkeys(
        n for n in without if n in names
    )
    pointers = dict.fromkeys(names[: names.index("T")], POINTERS[dtype])
    if kernel == "gradient" and tiles.carry:
        pointers["kept"] = "*fp32"
    pointers |= dict.fromkeys(FLOAT32, "*fp32") | {"cu_seqlens": "*i64", "owners": "*i32", "scale": "fp32"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    return KernelVariant(
        name=f"delta_rule.{kernel} {purpose} K{kd} V{vd} {str(dtype).removeprefix('torch.')} "
        f"{tiles.chunk} tokens x {tile.bv}",
        kernel=function,
        signature=signature,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=frozenset(n for n, kind in signature.items() if kind.startswith("*")),
        spill_budget=FLOAT32_SPILL_BUDGET if dtype == torch.float32 else SPILL_BUDGET[kernel],
        tensor_core=dtype != torch.float32,
        spill_free=frozenset({"sm_90"}) if (kd, vd) == (128, 128) and dtype.itemsize == 2 else frozenset(),
        archs=archs,
    )
