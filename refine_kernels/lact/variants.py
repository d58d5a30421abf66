"""What ``python -m refine_kernels.inspect`` compiles: every kernel at every tile that its launcher can choose."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refine_kernels.kernel_variant import KernelVariant
from refine_kernels.lact import triton_edges as edges
from refine_kernels.lact import triton_products as products
from refine_kernels.lact import triton_update as update
from refine_kernels.lact.layout import Widths
from refine_kernels.lact.reference import NORM_EPS

# of LaCT-760M; unequal ones; ones that no vector load divides
WIDTHS = (Widths(384, 384, 384), Widths(192, 96, 160), Widths(60, 100, 60))
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CHUNKS = (2048, 5)  # tokens of a chunk at hand: training, decoding


def kernel_variants() -> Iterator[KernelVariant]:
    """Every kernel for every dtype of tokens at the first widths, for bfloat16 tokens at the others."""
    for widths in WIDTHS:
        for dtype in POINTERS if widths == WIDTHS[0] else (torch.bfloat16,):
            for tokens in CHUNKS:
                yield from _hidden_variants(widths, dtype, tokens)
                yield from _output_variants(widths, dtype, tokens)
            yield _outer_variant(widths, dtype)
            yield _hidden_backward_variant(widths, dtype)
            if dtype != torch.float16:  # its state is handled as beside float32 tokens
                yield from _step_variants(widths, dtype)
                yield from _step_backward_variants(widths, dtype)
            yield from _edge_variants(widths, dtype)


def _hidden_variants(widths: Widths, dtype: torch.dtype, tokens: int) -> Iterator[KernelVariant]:
    held = products.arithmetic_of(dtype).dtype
    tile = products.hidden_tile(held, tokens)
    constants = _constants(widths, dtype, BT=tile.rows, BH=tile.columns, BK=tile.depth)
    pointers = dict.fromkeys(("x", "u", "w", "d", "h"), POINTERS[held]) | {"rates": "*fp32"}
    for purpose, without in (("read", ("u", "rates", "d")), ("gradient", ("rates",)), ("update", ())):
        yield _variant(
            f"hidden {purpose}", products.hidden_kernel, widths, dtype, tile, pointers, constants, without
        )


def _outer_variant(widths: Widths, dtype: torch.dtype) -> KernelVariant:
    held = products.arithmetic_of(dtype).dtype
    tile = products.outer_tile(held)
    constants = _constants(widths, dtype, BM=tile.rows, BN=tile.columns, BT=tile.depth)
    pointers = dict.fromkeys(("d", "x", "h", "u"), POINTERS[held]) | {"out": "*fp32"}
    return _variant("outer", products.outer_kernel, widths, dtype, tile, pointers, constants)


def _output_variants(widths: Widths, dtype: torch.dtype, tokens: int) -> Iterator[KernelVariant]:
    held = products.arithmetic_of(dtype).dtype
    tile = products.output_tile(held, tokens, widths)
    constants = _constants(widths, dtype, BT=tile.rows, BN=tile.columns, BK=tile.depth)
    keys, values = ("d1", "w_k1", "d2", "w_k2"), ("h1", "w_v1", "h2", "w_v2")
    written = dict.fromkeys(("o_keys", "o_values"), POINTERS[dtype])
    pointers = dict.fromkeys((*keys, *values), POINTERS[held]) | written
    for purpose, without in (
        ("values", (*keys, "o_keys", "h2", "w_v2")),
        ("keys", (*values, "o_values", "d2", "w_k2")),
        ("both", ()),
    ):
        yield _variant(
            f"output {purpose}", products.output_kernel, widths, dtype, tile, pointers, constants, without
        )


def _hidden_backward_variant(widths: Widths, dtype: torch.dtype) -> KernelVariant:
    held = products.arithmetic_of(dtype).dtype
    tile = update.hidden_backward_tile(held)
    constants = _constants(widths, dtype, BT=tile.rows, BH=tile.columns, BK=tile.depth)
    pointers = dict.fromkeys(("k", "v", "w", "c", "d", "d_y", "h", "d_g"), POINTERS[held])
    pointers |= {"rates": "*fp32", "d_rates": "*fp32"}
    return _variant(
        "hidden backward", update.hidden_backward_kernel, widths, dtype, tile, pointers, constants
    )


def _step_variants(widths: Widths, dtype: torch.dtype) -> Iterator[KernelVariant]:
    momentum, norm = ("before", "rate", "step"), ("base", "norms", "divisor", "applied", "rounded")
    for purpose, used in (
        ("momentum pre-norm", ("parts", *momentum, *norm, "total")),
        ("momentum", ("parts", *momentum, *norm)),
        ("plain", ("parts", *norm)),
        ("before Muon", ("parts", *momentum)),
    ):
        yield _state_variant(f"step {purpose}", update.step_kernel, widths, dtype, used, "rounded")


def _step_backward_variants(widths: Widths, dtype: torch.dtype) -> Iterator[KernelVariant]:
    norm = ("parts", "d_applied", "applied", "divisor", "norms", "d_norms")
    momentum = ("d_step", "before", "rate", "d_steps", "d_mean")
    for purpose, used in (
        ("momentum pre-norm", (*norm, "d_sum", "d_sums", "d_gradient", *momentum)),
        ("momentum", (*norm, "carry", "d_total", "d_gradient", *momentum)),
        ("plain", (*norm, "carry", "d_total", "d_gradient")),
        ("before Muon", ("d_direction", "d_gradient", *momentum)),
    ):
        yield _state_variant(
            f"step backward {purpose}", update.step_backward_kernel, widths, dtype, used, "d_gradient"
        )


def _edge_variants(widths: Widths, dtype: torch.dtype) -> Iterator[KernelVariant]:
    """Turned by angles of 32 pairs a head where they divide it, and gated."""
    rows, channels = edges.edge_tile(max(widths.dk, widths.dv))
    tile = products.Tile(rows, channels, 1, edges.NUM_WARPS, 1)
    turned = widths.dk % 64 == 0
    constants = {"H": 4, "D": widths.dk, "V": widths.dv, "R": 32 if turned else 0, "EPS": edges.UNIT_EPS}
    constants |= {"SILU": True, "V_SILU": True, "BT": rows, "BD": channels, "STEPS": edges.STEPS}
    exact = ("scale", "offset", "cos", "sin", "parts", "weight", "gate", "d_gate")
    for purpose, kernel in (
        ("prepare", edges.prepare_kernel),
        ("prepare backward", edges.prepare_backward_kernel),
        ("finish", edges.finish_kernel),
        ("finish backward", edges.finish_backward_kernel),
    ):
        names = kernel.arg_names
        first_stride = next(i for i, name in enumerate(names) if name.startswith("s_"))
        pointers = {n: "*fp32" if n in exact else POINTERS[dtype] for n in names[:first_stride]}
        used = {name: value for name, value in constants.items() if name in names}
        without = () if turned else [n for n in ("cos", "sin") if n in names]
        yield _variant(purpose, kernel, widths, dtype, tile, pointers, used, without, tensor_core=False)


def _state_variant(purpose, kernel, widths, dtype, used, rounded) -> KernelVariant:
    """Tensors are float32, but for the one that the products read."""
    tensors = kernel.arg_names[: kernel.arg_names.index("PARTS")]
    pointers = dict.fromkeys(tensors, "*fp32") | {rounded: POINTERS[dtype]}
    tile = update.state_tile(widths)
    constants = {"DK": widths.dk, "DH": widths.dh, "DV": widths.dv, "BR": tile.rows, "BC": tile.columns}
    without = [name for name in tensors if name not in used]
    constants |= {"EPS": NORM_EPS}
    return _variant(purpose, kernel, widths, dtype, tile, pointers, constants, without, tensor_core=False)


def _constants(widths: Widths, dtype: torch.dtype, **tile: int) -> dict:
    sizes = {"DK": widths.dk, "DH": widths.dh, "DV": widths.dv}
    return sizes | tile | {"PRECISION": products.arithmetic_of(dtype).precision}


def _variant(
    purpose, kernel, widths, dtype, tile, pointers, constants, without=(), tensor_core=None
) -> KernelVariant:
    """Integer arguments are strides and counts; strides are multiples of 16 where all widths are."""
    present = {name: kind for name, kind in pointers.items() if name not in without}
    constants = constants | dict.fromkeys(without)
    kinds = dict.fromkeys(constants, "constexpr") | present
    aligned = all(width % 16 == 0 for width in widths)
    strides = [n for n in kernel.arg_names if n.startswith("s_") and aligned and n not in UNALIGNED]
    return KernelVariant(
        name=f"lact {purpose}, {'x'.join(map(str, widths))} {str(dtype).removeprefix('torch.')}, "
        f"tile {tile.rows}x{tile.columns}",
        kernel=kernel,
        signature={name: kinds.get(name, "i32") for name in kernel.arg_names},
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=frozenset([*present, *strides]),
        # without bfloat16 nothing is near a limit, and ptxas may trade a few bytes for fewer registers
        spill_budget=0 if dtype == torch.bfloat16 else 64,
        tensor_core=dtype != torch.float32 if tensor_core is None else tensor_core,
    )


UNALIGNED = ("s_r_n", "s_r_t", "s_dr_h", "s_dr_n", "s_dr_t", "s_rate")  # of the rates, three a token
