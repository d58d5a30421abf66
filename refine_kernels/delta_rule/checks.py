"""What the public functions refuse. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise

import torch

from refine_kernels.precision import accumulation_dtype, check_float

MAX_HEAD_SIZE = 256
STRIDE_UNIT = 64  # state_stride is a multiple of it, and it of every backend's chunk
INTEGERS = (torch.int32, torch.int64)


def check_inputs(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    g: torch.Tensor | None,  # [B, T, HV]
) -> None:
    """Shapes, dtypes and devices of q, k, v, beta and g agree."""
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1, got {_shape(q)}")
    check_float("q", q)
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {_shape(q)}, got {_shape(k)}")
    heads = q.shape[2]
    if v.dim() != 4 or v.shape[:2] != q.shape[:2] or not _is_multiple(v.shape[2], heads):
        raise ValueError(
            f"v must be [B, T, H, V] with q's B, T = {_shape(q[..., 0, 0])} and q's H = {heads} heads "
            f"or a multiple of them, got {_shape(v)}"
        )
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_SIZE:
            raise ValueError(f"{name}'s head size must be 1 to {MAX_HEAD_SIZE}, got {x.shape[-1]}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    for name, x in (("beta", beta), ("g", g)):
        if x is None and name == "g":
            continue
        if x.shape != v.shape[:3]:
            raise ValueError(f"{name} must be [B, T, {_letter(q, v)}] = {_shape(v[..., 0])}, got {_shape(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
    for name, x in (("k", k), ("v", v), ("beta", beta), ("g", g)):
        if x is not None:
            _check_device(name, x, q)


def prepare_state(
    initial_state: torch.Tensor | None,  # [rows, HV, K, V]
    rows: int,
    q: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
) -> torch.Tensor | None:
    """The initial state in the dtype of the arithmetic, if its shape and device are what the inputs ask for."""
    if initial_state is None:
        return None
    expected = (rows, v.shape[2], q.shape[3], v.shape[3])
    if initial_state.shape != expected:
        raise ValueError(
            f"initial_state must be [N, {_letter(q, v)}, K, V] = {list(expected)}, got {_shape(initial_state)}"
        )
    if not initial_state.is_floating_point():
        raise ValueError(f"initial_state must have a floating-point dtype, got {initial_state.dtype}")
    _check_device("initial_state", initial_state, q)
    return initial_state.to(accumulation_dtype(q))


def prepare_scale(scale: float | None, head_size: int) -> float:
    """The factor on the outputs. A tensor in its place is a caller who has fla's gated rule in mind."""
    if scale is None:
        return head_size**-0.5
    if isinstance(scale, torch.Tensor) or not hasattr(scale, "__float__"):
        given = f"a tensor {_shape(scale)}" if isinstance(scale, torch.Tensor) else repr(scale)
        raise ValueError(
            f"scale must be a number or None, got {given}: the gated rule is chunk_delta_rule(q, k, v, beta, g=g), "
            "or chunk_gated_delta_rule(q, k, v, g, beta) in fla's order"
        )
    return float(scale)


def prepare_stride(state_stride: int | None) -> int:
    """The stride, a positive multiple of 64, or 0 for None."""
    if state_stride is None:
        return 0
    whole = hasattr(state_stride, "__index__") and not isinstance(state_stride, torch.Tensor)
    if not whole or state_stride <= 0 or state_stride % STRIDE_UNIT:
        raise ValueError(
            f"state_stride must be a positive multiple of {STRIDE_UNIT} or None, got {state_stride!r}"
        )
    return int(state_stride)


def prepare_cu_seqlens(
    cu_seqlens: torch.Tensor | Sequence[int] | None,  # [N + 1]
    cu_seqlens_cpu: torch.Tensor | None,  # [N + 1]
    q: torch.Tensor,  # [B, T, H, K]
    state_stride: int,
) -> torch.Tensor | None:
    """Bounds of packed sequences as a tensor on q's device; a list becomes one."""
    if cu_seqlens is None:
        if cu_seqlens_cpu is not None:
            raise ValueError("cu_seqlens_cpu needs cu_seqlens, got cu_seqlens=None")
        return None
    if not isinstance(cu_seqlens, torch.Tensor):
        if not all(hasattr(bound, "__index__") for bound in cu_seqlens):
            raise ValueError(f"cu_seqlens must be integers, [N + 1] of them, got {cu_seqlens!r}")
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int64)
        check_bounds(cu_seqlens, q.shape[1])
        cu_seqlens = cu_seqlens.to(q.device)
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row: q must have B = 1, got {_shape(q)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            "cu_seqlens must be [N + 1] of int32 or int64 with N >= 1, "
            f"got {_shape(cu_seqlens)} of {cu_seqlens.dtype}"
        )
    _check_device("cu_seqlens", cu_seqlens, q)
    if cu_seqlens_cpu is not None:
        if cu_seqlens_cpu.shape != cu_seqlens.shape or cu_seqlens_cpu.device.type != "cpu":
            raise ValueError(
                f"cu_seqlens_cpu must be {_shape(cu_seqlens)} on the CPU as cu_seqlens is, "
                f"got {_shape(cu_seqlens_cpu)} on {cu_seqlens_cpu.device}"
            )
        check_bounds(cu_seqlens_cpu, q.shape[1])
    if q.is_meta and state_stride:
        raise ValueError(
            f"state_stride must be None with cu_seqlens on the meta device, got {state_stride}: "
            "how many states there are depends on values"
        )
    return cu_seqlens


def check_bounds(
    cu_seqlens: torch.Tensor,  # [N + 1]
    tokens: int,
    needed: bool = False,
) -> None:
    """Packed sequences begin at 0, never go back and end at T. Values are read where they are needed, or where that
    waits for no device."""
    if needed and cu_seqlens.is_meta:
        raise ValueError("cu_seqlens must not be on the meta device with backend='reference', which reads it")
    if not needed and not _values_are_free(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0] if bounds else '[]'}")
    if bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at T = {tokens}, got {bounds[-1]}")
    for n, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease, got {a} then {b} at entry {n + 1}")


def check_indices(
    state_indices: torch.Tensor,  # [B]
    initial_state: torch.Tensor | None,  # [N, HV, K, V]
    q: torch.Tensor,  # [B, T, H, K]
) -> None:
    """State indices are whole numbers within the states; their range is read where that waits for no device."""
    if initial_state is None:
        raise ValueError("state_indices needs initial_state, got initial_state=None")
    if initial_state.dim() != 4:
        raise ValueError(f"initial_state must be [N, H, K, V], got {_shape(initial_state)}")
    if state_indices.shape != q.shape[:1] or state_indices.dtype not in INTEGERS:
        raise ValueError(
            f"state_indices must be [B] = [{q.shape[0]}] of int32 or int64, "
            f"got {_shape(state_indices)} of {state_indices.dtype}"
        )
    _check_device("state_indices", state_indices, q)
    if _values_are_free(state_indices) and state_indices.numel():
        low, high = (x.item() for x in torch.aminmax(state_indices))
        if low < 0 or high >= initial_state.shape[0]:
            raise ValueError(
                f"state_indices must be in [0, {initial_state.shape[0]}), got values from {low} to {high}"
            )


def _values_are_free(x: torch.Tensor) -> bool:
    """On a CPU, or in debug mode; not while a graph is traced."""
    if x.is_meta or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("REFINE_KERNELS_DEBUG", "0") == "1"


def _is_multiple(n: int, heads: int) -> bool:
    return n == heads or (heads > 0 and n > 0 and n % heads == 0)


def _letter(q: torch.Tensor, v: torch.Tensor) -> str:  # [B, T, H, K], [B, T, HV, V]
    """How messages call the number of value heads."""
    return "H" if q.shape[2] == v.shape[2] else "HV"


def _check_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def _shape(x: torch.Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"
