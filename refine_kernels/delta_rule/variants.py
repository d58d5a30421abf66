"""What ``python -m refine_kernels.inspect`` compiles: every kernel at every configuration of some head sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refine_kernels.delta_rule import triton_chunk
from refine_kernels.delta_rule.reference import L2_NORM_EPS
from refine_kernels.delta_rule.triton_recurrent import recurrent_variants
from refine_kernels.kernel_variant import KernelVariant

# (K, V): of the published models; unequal; the largest; ones that no vector load divides
HEAD_SIZES = ((128, 128), (64, 64), (128, 256), (256, 256), (60, 100))
DTYPES = {(128, 128): (torch.bfloat16, torch.float16, torch.float32)}  # bfloat16 alone elsewhere
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Bytes that may spill on any NVIDIA chip, about what it is today; none at K = V = 128 in bfloat16 without decay on
# sm_90 but for the gradient kernel (README.md).
SPILL_BUDGET = {"inverse": 0, "scan": 3072, "rescan": 3072, "reverse": 2048, "gradient": 8192}
FLOAT32_SPILL_BUDGET = 65_536  # products of float32 in full are sums over registers

OPTIONAL = {  # what a kernel does without, by purpose
    "inverse": {"plain": ("g", "decays"), "gated": ()},
    "scan": {
        "plain": ("decays", "u", "initial", "final_state", "states", "checkpoints", "chunk_states"),
        "gated": ("u", "initial", "final_state", "states", "checkpoints", "chunk_states"),
        "gated training": ("chunk_states",),
        "plain training": ("decays", "chunk_states"),
    },
    "rescan": {
        "plain": ("q", "o", "u", "decays", "final_state", "states", "checkpoints"),
        "gated": ("q", "o", "u", "final_state", "states", "checkpoints"),
    },
    "reverse": {
        "plain": ("decays", "d_final", "d_states"),
        "gated": ("d_final", "d_states"),
        "gated states": (),
        "plain states": ("decays",),
    },
    "gradient": {"plain": ("decays",), "gated": ()},
}
FLOAT32 = ("beta", "g", "decays", "sums", "initial", "final_state", "states", "checkpoints", "d_final", "d_states",
           "d_initial")  # fmt: skip


def kernel_variants() -> Iterator[KernelVariant]:
    """The chunk kernels for all dtypes at K = V = 128, for bfloat16 at the other head sizes; the decode kernels."""
    for kd, vd in HEAD_SIZES:
        for dtype in DTYPES.get((kd, vd), (torch.bfloat16,)):
            for few in (False, True):
                tiles = triton_chunk.choose_tiles(kd, vd, dtype.itemsize, few)
                for kernel, purposes in OPTIONAL.items():
                    if kernel == "rescan" and tiles.carry:
                        continue
                    same = tiles if not few else triton_chunk.choose_tiles(kd, vd, dtype.itemsize, False)
                    name = kernel.removeprefix("re") if kernel == "rescan" else kernel
                    if few and getattr(same, name) == getattr(tiles, name):
                        continue
                    for purpose, without in purposes.items():
                        yield _variant(kernel, purpose, kd, vd, dtype, tiles, without)
            tiles = triton_chunk.choose_tiles(kd, vd, dtype.itemsize, False, tensor_memory=True)
            if tiles != triton_chunk.choose_tiles(kd, vd, dtype.itemsize, False):
                for kernel, purposes in OPTIONAL.items():
                    for purpose, without in purposes.items():
                        yield _variant(kernel, f"{purpose}, Blackwell", kd, vd, dtype, tiles, without)
    yield from recurrent_variants()


def _archs(kd: int, vd: int, dtype: torch.dtype, tiles: triton_chunk.Tiles) -> frozenset[str]:
    """Where these tiles are chosen: all chips unless Blackwell takes others."""
    blackwell = triton_chunk.choose_tiles(kd, vd, dtype.itemsize, False, tensor_memory=True)
    if blackwell == triton_chunk.choose_tiles(kd, vd, dtype.itemsize, False):
        return frozenset()
    return frozenset({"sm_100"} if tiles == blackwell else {"sm_80", "sm_90", "gfx942"})


def _variant(
    kernel: str,
    purpose: str,
    kd: int,
    vd: int,
    dtype: torch.dtype,
    tiles: triton_chunk.Tiles,
    without: tuple[str, ...],
) -> KernelVariant:
    """With packed sequences, whose address arithmetic is the longer one."""
    name = "scan" if kernel == "rescan" else kernel
    function, tile = getattr(triton_chunk, f"{name}_kernel"), getattr(tiles, name)
    if kernel == "gradient" and purpose.startswith("gated"):
        tile = tiles.gated_gradient
    group = triton_chunk.GROUP_TOKENS // tiles.chunk
    if kernel == "gradient" and not tiles.carry:
        group = 1
    constants = {
        "K": kd, "V": vd, "BK": getattr(tile, "bk", triton_chunk.block(kd)), "BV": tile.bv,
        "BR": getattr(tile, "br", None), "BT": tiles.chunk, "GROUP": group,
        "RESCAN": kernel == "rescan", "L2NORM": True, "EPS": L2_NORM_EPS,
        "PRECISION": triton_chunk.precision_of(dtype),
    }  # fmt: skip
    if kernel == "scan":
        without = (*without, "owners")
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
        archs=_archs(kd, vd, dtype, tiles),
    )
