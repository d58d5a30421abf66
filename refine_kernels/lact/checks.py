"""What the public functions refuse. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

import torch

from refine_kernels.lact.layout import Widths
from refine_kernels.lact.state import LaCTState
from refine_kernels.precision import check_float


def check_weights(w0: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> None:
    """w0 and w2 are [N, dh, dk], w1 is [N, dv, dh]; one dtype of float, one device."""
    if w0.dim() != 3:
        raise ValueError(f"w0 must be [N, dh, dk], got {_shape(w0)}")
    if w2.shape != w0.shape:
        raise ValueError(f"w2 must have w0's shape {_shape(w0)}, got {_shape(w2)}")
    if w1.dim() != 3 or w1.shape[0] != w0.shape[0] or w1.shape[2] != w0.shape[1]:
        raise ValueError(f"w1 must be [N, dv, dh] with w0's N, dh = {list(w0.shape[:2])}, got {_shape(w1)}")
    for name, x in (("w0", w0), ("w1", w1), ("w2", w2)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
        if x.device != w0.device:
            raise ValueError(f"{name} must be on w0's device {w0.device}, got {x.device}")


def check_tokens(
    k: torch.Tensor,  # [N, L, dk]
    v: torch.Tensor,  # [N, L, dv]
    lr0: torch.Tensor,  # [N, L, 1]
    lr1: torch.Tensor,  # [N, L, 1]
    lr2: torch.Tensor,  # [N, L, 1]
    momentum: torch.Tensor | None,  # [N, L, 1]
    rows: int,
    widths: Widths,
) -> None:
    """What an update reads: shapes, dtypes and devices agree with one another and with the weights."""
    if k.dim() != 3 or k.shape[0] != rows or k.shape[2] != widths.dk or k.shape[1] < 1:
        raise ValueError(f"k must be [N, L, dk] with N = {rows}, L >= 1, dk = {widths.dk}, got {_shape(k)}")
    check_float("k", k)
    if v.shape != (*k.shape[:2], widths.dv):
        raise ValueError(f"v must be [N, L, dv] = {[*k.shape[:2], widths.dv]}, got {_shape(v)}")
    if v.dtype != k.dtype:
        raise ValueError(f"v must have k's dtype {k.dtype}, got {v.dtype}")
    for name, x in (("lr0", lr0), ("lr1", lr1), ("lr2", lr2), ("momentum", momentum)):
        if x is None:
            continue
        if x.shape != (*k.shape[:2], 1):
            raise ValueError(f"{name} must be [N, L, 1] = {[*k.shape[:2], 1]}, got {_shape(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
    for name, x in (("v", v), ("lr0", lr0), ("lr1", lr1), ("lr2", lr2), ("momentum", momentum)):
        if x is not None and x.device != k.device:
            raise ValueError(f"{name} must be on k's device {k.device}, got {x.device}")


def check_queries(q: torch.Tensor, rows: int, widths: Widths, device: torch.device) -> None:
    """q is [N, L, dk] of a float dtype on the weights' device."""
    if q.dim() != 3 or q.shape[0] != rows or q.shape[2] != widths.dk or q.shape[1] < 1:
        raise ValueError(f"q must be [N, L, dk] with N = {rows}, L >= 1, dk = {widths.dk}, got {_shape(q)}")
    check_float("q", q)
    if q.device != device:
        raise ValueError(f"q must be on the weights' device {device}, got {q.device}")


def check_chunk_size(chunk_size: int) -> None:
    """At least one token."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")


def check_flat(name: str, x: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A packed tensor has the shape and the dtype that the others ask for."""
    if x is not None and (tuple(x.shape) != shape or x.dtype != dtype):
        raise ValueError(f"{name} must be {list(shape)} of {dtype}, got {_shape(x)} of {x.dtype}")


def check_state(
    state: LaCTState,
    rows: int,
    widths: Widths,
    chunk_size: int,
    prenorm: bool,
    momentum: bool,
    dtype: torch.dtype,
) -> None:
    """The state is one of the same op with the same settings."""
    if not isinstance(state, LaCTState):
        raise ValueError(f"initial_state must be a LaCTState or None, got {type(state).__name__}")
    for name, given, expected in (
        ("widths (dk, dh, dv)", tuple(state.widths), tuple(widths)),
        ("chunk_size", state.chunk_size, chunk_size),
        ("rows", state.k.shape[0], rows),
        ("prenorm", state.weights.unnormalised is not None, prenorm),
        ("momentum", state.weights.momentum is not None, momentum),
        ("dtype", state.weights.applied.dtype, dtype),
    ):
        if given != expected:
            raise ValueError(
                f"initial_state is of another configuration: its {name} is {given}, expected {expected}"
            )


def _shape(x: torch.Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"
