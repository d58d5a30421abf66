"""How the chunk kernels are cut: sizes that follow from head sizes, dtype and chip."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from refine_kernels.chips import chip_of
from refine_kernels.sizes import power_of_two

GROUP_TOKENS = 512  # from one kept state to the next
FEW = 64  # rows x heads that do not occupy a GPU
JOIN_ROWS = 32  # of a state that join_kernel multiplies at a time


class Tile(NamedTuple):
    """How a kernel is cut: columns of V a program holds at a time, warps, and loads in flight."""

    bv: int
    num_warps: int
    num_stages: int


class GradientTile(NamedTuple):
    """How ``gradient_kernel`` is cut: columns of K at a time, at least half of them, and of V; warps and loads in
    flight."""

    bk: int
    bv: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of all kernels for one pair of head sizes."""

    chunk: int  # tokens
    inverse: Tile
    scan: Tile
    reverse: Tile
    join: Tile
    states: Tile
    gradient: GradientTile


@functools.cache
def choose_tiles(kd: int, vd: int, itemsize: int, *, few: bool = False, tensor_memory: bool = False) -> Tiles:
    """The tiles for head sizes ``kd`` and ``vd``, ``itemsize`` bytes a number, ``few`` rows x heads (too few to
    occupy a GPU by themselves). Chips with ``tensor_memory`` (Blackwell) hold products of 64 rows there, and it has
    no room for all of gradient_kernel's: Triton then compiles a trap."""
    bk, whole = block(kd), block(vd)
    at_once = bk if bk <= 64 else bk // 2
    if tensor_memory or max(bk, whole) > 128 or (itemsize > 2 and max(bk, whole) > 64):
        bv = min(whole, 16 if bk > 128 else 32)
        tile = Tile(bv, 4, 1)
        states = Tile(bv, 4, 2 if tensor_memory else 1)  # what spills less
        return Tiles(32, tile, tile, tile, tile, states, GradientTile(at_once, bv, 4, 1))
    large = bk == 128
    scan = Tile(min(whole, 32 if large or few else 64), 4, 2)
    alone = Tile(scan.bv, 4, 1)
    # Four warps: a product of 64 rows stays in one warpgroup, two programs fit a multiprocessor, half the barriers
    gradient = GradientTile(at_once, 64 if whole > 64 else min(whole, 32), 4, 1)
    return Tiles(64, alone, scan, scan, alone, Tile(min(whole, 64), 4, 2), gradient)


def block(size: int) -> int:
    """The power of two that holds a head size; a tensor-core product takes no less than 16."""
    return max(power_of_two(size), 16)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether it is a data-centre Blackwell, whose tensor cores keep their results in a memory of their own."""
    chip = chip_of(device)
    return chip is not None and chip.has_tensor_memory


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in full for float32 inputs; M is worked out in TF32 for shorter ones."""
    return "ieee" if dtype == torch.float32 else "tf32"


def program_slots(device: torch.device) -> int:
    """Programs of a scan that a chip holds at once: two on a multiprocessor (their registers and shared memory). 0
    where there is no GPU."""
    chip = chip_of(device)
    return 0 if chip is None else 2 * chip.multiprocessors


def span_tokens(tokens: int, programs: int, slots: int, chunk: int) -> int:
    """Tokens of the spans that sequences of up to ``tokens`` are split into, a multiple of ``GROUP_TOKENS``, where
    ``programs`` of an unsplit scan leave most of a chip's ``slots`` empty; 0: leave them whole.

    Counted in chunks that programs go through one after another: n spans take ``chunks / n`` for the scan, about
    1.2 times as many for what maps the spans (three of five products, twice the columns), and n steps of joining.
    So the chip has to hold n >= 4 times the programs, and more than ``sqrt(2 chunks)`` spans do not pay.
    """
    most = min(slots // max(programs, 1), math.isqrt(2 * tokens // chunk))
    size = -(-tokens // max(most, 1) // GROUP_TOKENS) * GROUP_TOKENS
    return size if tokens > 3 * size else 0
