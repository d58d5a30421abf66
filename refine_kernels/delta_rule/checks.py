"""What the public functions refuse. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

import os
from itertools import pairwise

import torch

MAX_HEAD_SIZE = 256
STRIDE_UNIT = 64  # state_stride is a multiple of it, and it of every backend's chunk
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
) -> None:
    """Shapes, dtypes and devices of q, k, v, beta and g agree."""
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H, K] with T >= 1, got {_shape(q)}")
    if q.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise ValueError(f"q must have one of the dtypes {allowed}, got {q.dtype}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {_shape(q)}, got {_shape(k)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with q's B, T, H = {_shape(q[..., 0])}, got {_shape(v)}")
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_SIZE:
            raise ValueError(f"{name}'s head size must be 1 to {MAX_HEAD_SIZE}, got {x.shape[-1]}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    for name, x in (("beta", beta), ("g", g)):
        if x is None and name == "g":
            continue
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {_shape(q[..., 0])}, got {_shape(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
    for name, x in (("k", k), ("v", v), ("beta", beta), ("g", g)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_state(
    initial_state: torch.Tensor | None,  # [rows, H, K, V]
    rows: int,
    q: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
) -> None:
    """The initial state has the shape, dtype and device that the inputs ask for."""
    if initial_state is None:
        return
    expected = (rows, q.shape[2], q.shape[3], v.shape[3])
    if initial_state.shape != expected:
        raise ValueError(
            f"initial_state must be [N, H, K, V] = {list(expected)}, got {_shape(initial_state)}"
        )
    allowed = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    if initial_state.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"initial_state must be {names} with q in {q.dtype}, got {initial_state.dtype}")
    if initial_state.device != q.device:
        raise ValueError(f"initial_state must be on q's device {q.device}, got {initial_state.device}")


def check_state_stride(state_stride: int | None) -> None:
    """The stride is a positive multiple of 64."""
    if state_stride is not None and (state_stride <= 0 or state_stride % STRIDE_UNIT):
        raise ValueError(
            f"state_stride must be a positive multiple of {STRIDE_UNIT} or None, got {state_stride}"
        )


def check_cu_seqlens(
    cu_seqlens: torch.Tensor,  # [N + 1]
    q: torch.Tensor,  # [B, T, H, K]
) -> None:
    """Packed sequences begin at 0, never go back and end at T."""
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row: q must have B = 1, got {_shape(q)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be [N + 1] of int32 or int64 with N >= 1, "
            f"got {_shape(cu_seqlens)} of {cu_seqlens.dtype}"
        )


def check_cu_seqlens_cpu(
    cu_seqlens_cpu: torch.Tensor | None,  # [N + 1]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
) -> None:
    """The copy on the CPU is of nothing else."""
    if cu_seqlens_cpu is None:
        return
    if cu_seqlens is None:
        raise ValueError("cu_seqlens_cpu needs cu_seqlens, got cu_seqlens=None")
    if cu_seqlens_cpu.shape != cu_seqlens.shape or cu_seqlens_cpu.device.type != "cpu":
        raise ValueError(
            f"cu_seqlens_cpu must be {_shape(cu_seqlens)} on the CPU as cu_seqlens is, "
            f"got {_shape(cu_seqlens_cpu)} on {cu_seqlens_cpu.device}"
        )


def check_bounds(
    cu_seqlens: torch.Tensor,  # [N + 1]
    tokens: int,
) -> None:
    """The values of ``cu_seqlens``: for backends that read them anyway."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    if bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at T = {tokens}, got {bounds[-1]}")
    for n, (a, b) in enumerate(pairwise(bounds)):
        if b < a:
            raise ValueError(f"cu_seqlens must not decrease, got {a} then {b} at entry {n + 1}")


def check_indices(
    state_indices: torch.Tensor,  # [B]
    initial_state: torch.Tensor | None,  # [N, H, K, V]
    q: torch.Tensor,  # [B, T, H, K]
) -> None:
    """State indices are whole numbers within the states; their range is read on a CPU or in debug mode alone."""
    if initial_state is None:
        raise ValueError("state_indices needs initial_state, got initial_state=None")
    if initial_state.dim() != 4:
        raise ValueError(f"initial_state must be [N, H, K, V], got {_shape(initial_state)}")
    if state_indices.shape != q.shape[:1] or state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"state_indices must be [B] = [{q.shape[0]}] of int32 or int64, "
            f"got {_shape(state_indices)} of {state_indices.dtype}"
        )
    if state_indices.device != q.device:
        raise ValueError(f"state_indices must be on q's device {q.device}, got {state_indices.device}")
    free = state_indices.device.type == "cpu" or os.environ.get("REFINE_KERNELS_DEBUG", "0") == "1"
    if free and not torch.compiler.is_compiling() and state_indices.numel():
        low, high = (x.item() for x in torch.aminmax(state_indices))
        if low < 0 or high >= initial_state.shape[0]:
            raise ValueError(
                f"state_indices must be in [0, {initial_state.shape[0]}), got values from {low} to {high}"
            )


def _shape(x: torch.Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"
