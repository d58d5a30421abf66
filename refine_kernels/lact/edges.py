"""The two ends of a LaCT layer: what stands between its projections and the fast weights, on either side.

Before: a scale and an offset a channel, SiLU, unit length a fast head, rotary embedding, regrouping. After: RMSNorm
a fast head, a gate a head, the attention's output added. Arithmetic is float32 (float64 for float64 inputs); a
result is rounded once. Plain PyTorch on a CPU; on a GPU one kernel each way (`triton_edges.py`).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.custom_op import custom_op, differentiate
from refine_kernels.dispatch import choose_backend
from refine_kernels.precision import accumulation_dtype, autocast

UNIT_EPS = 1e-5


def lact_prepare(
    q: torch.Tensor,  # [B, T, H D]
    k: torch.Tensor,  # [B, T, H D]
    v: torch.Tensor,  # [B, T, H V]
    scale: torch.Tensor,  # [H D, 2]
    offset: torch.Tensor,  # [H D, 2]
    angles: tuple[torch.Tensor, torch.Tensor] | None,  # cosines and sines, [B, T, R] each
    *,
    num_heads: int,
    silu: bool = True,
    v_silu: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of the fast weights from a layer's projections.

    ``x <- silu(x * scale + offset)``, ``x <- x / (|x| + 1e-5)`` a head of D, then the pairs (i, i + R) of every run
    of 2 R channels turned by their angles; v only passes through SiLU. Differentiable in q, k, v, scale, offset.

    Args:
        q, k, v: ``[B, T, H D]``, ``[B, T, H D]``, ``[B, T, H V]``, one float dtype, any strides.
        scale, offset: ``[H D, 2]``, q's in column 0 and k's in column 1, any float dtype.
        angles: cosines and sines ``[B, T, R]`` with 2 R dividing D, or ``None``: nothing is turned.
        num_heads: fast heads, H.
        silu: whether SiLU is applied to q and k.
        v_silu: and to v.
        backend: ``"triton"``, ``"torch"``, or ``None`` to choose by device.

    Returns:
        ``[B, H, T, D]``, ``[B, H, T, D]``, ``[B, H, T, V]``, contiguous, in q's dtype.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.

    Source: Zhang et al., arXiv 2505.23884.
    """
    q, k, v = autocast(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[:2] != q.shape[:2] or x.shape[2] % num_heads or not x.is_floating_point():
            raise ValueError(
                f"{name} must be [B, T, heads * width] of a float dtype with {num_heads} heads, "
                f"got {list(x.shape)} of {x.dtype}"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {list(q.shape)}, got {list(k.shape)}")
    for name, x in (("scale", scale), ("offset", offset)):
        if x.shape != (q.shape[2], 2):
            raise ValueError(f"{name} must be [H D, 2] = {[q.shape[2], 2]}, got {list(x.shape)}")
    width = q.shape[2] // num_heads
    for name, x in () if angles is None else (("cosines", angles[0]), ("sines", angles[1])):
        if x.dim() != 3 or x.shape[:2] != q.shape[:2] or x.shape[2] < 1 or width % (2 * x.shape[2]):
            raise ValueError(
                f"angles' {name} must be [B, T, R] = [{q.shape[0]}, {q.shape[1]}, R] with 2 R dividing {width}, "
                f"got {list(x.shape)}"
            )
    cos, sin = (None, None) if angles is None else angles
    dtype = accumulation_dtype(q)
    backend = choose_backend(backend, dtype, q, k, v, scale, offset, cos, sin, available=("triton", "torch"))
    if backend == "triton" and q.numel() > 0:
        return _prepare_op(q, k, v, scale, offset, cos, sin, num_heads, silu, v_silu)
    prepared = []
    for j, x in enumerate((q, k)):
        x = torch.addcmul(offset[:, j].to(dtype), x.to(dtype), scale[:, j].to(dtype))
        x = (F.silu(x) if silu else x).unflatten(-1, (num_heads, width))
        x = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + UNIT_EPS)
        if angles is not None:
            x = _turn(x, cos.to(dtype), sin.to(dtype))
        prepared.append(x)
    prepared.append((F.silu(v.to(dtype)) if v_silu else v).unflatten(-1, (num_heads, -1)))
    return tuple(x.transpose(1, 2).to(q.dtype).contiguous() for x in prepared)


def lact_finish(
    o: torch.Tensor,  # [B, H, T, V]
    attended: torch.Tensor,  # [B, T, H V]
    weight: torch.Tensor,  # [V]
    gate: torch.Tensor | None,  # [B, T, H]
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> torch.Tensor:
    """``attended + RMSNorm(o) * silu(gate)``, regrouped: a layer's output before its last projection.

    Args:
        o: what the fast weights read, ``[B, H, T, V]``.
        attended: the window attention's output, ``[B, T, H V]``, o's dtype.
        weight: of the norm over a head, ``[V]``, any float dtype.
        gate: a scalar a head and token, before SiLU, ``[B, T, H]``, any float dtype; ``None``: no gate.
        eps: of the norm.
        backend: as in :func:`lact_prepare`.

    Returns:
        ``[B, T, H V]`` in o's dtype, differentiable in all tensors.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
    """
    o, attended = autocast(o, attended)
    if o.dim() != 4 or not o.is_floating_point():
        raise ValueError(f"o must be [B, H, T, V] of a float dtype, got {list(o.shape)} of {o.dtype}")
    batch, heads, tokens, width = o.shape
    if attended.shape != (batch, tokens, heads * width) or attended.dtype != o.dtype:
        raise ValueError(
            f"attended must be [B, T, H V] = {[batch, tokens, heads * width]} of {o.dtype}, "
            f"got {list(attended.shape)} of {attended.dtype}"
        )
    if weight.shape != (width,):
        raise ValueError(f"weight must be [V] = {[width]}, got {list(weight.shape)}")
    if gate is not None and gate.shape != (batch, tokens, heads):
        raise ValueError(f"gate must be [B, T, H] = {[batch, tokens, heads]}, got {list(gate.shape)}")
    dtype = accumulation_dtype(o)
    backend = choose_backend(backend, dtype, o, attended, weight, gate, available=("triton", "torch"))
    if backend == "triton" and o.numel() > 0:
        return _finish_op(o, attended, weight, gate, eps)
    y = o.transpose(1, 2).to(dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    if gate is not None:
        y = y * F.silu(gate.to(dtype))[..., None]
    return (attended.to(dtype) + y.flatten(-2)).to(o.dtype)


def _turn(
    x: torch.Tensor,  # [B, T, H, D]
    cos: torch.Tensor,  # [B, T, R]
    sin: torch.Tensor,  # [B, T, R]
) -> torch.Tensor:
    """Half rotation of every run of 2 R channels."""
    a, b = x.unflatten(-1, (-1, 2, cos.shape[-1])).unbind(-2)
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3)


# ---- the custom ops of the kernels -------------------------------------------------------------------------


class PrepareCall(NamedTuple):
    """The arguments of :func:`lact_prepare`'s kernel."""

    q: torch.Tensor  # [B, T, H D]
    k: torch.Tensor  # [B, T, H D]
    v: torch.Tensor  # [B, T, H V]
    scale: torch.Tensor  # [H D, 2]
    offset: torch.Tensor  # [H D, 2]
    cos: torch.Tensor | None  # [B, T, R]
    sin: torch.Tensor | None  # [B, T, R]
    num_heads: int
    silu: bool
    v_silu: bool


class PrepareBackwardCall(NamedTuple):
    """The arguments of its backward."""

    d_q: torch.Tensor  # [B, H, T, D]
    d_k: torch.Tensor  # [B, H, T, D]
    d_v: torch.Tensor  # [B, H, T, V]
    q: torch.Tensor  # [B, T, H D]
    k: torch.Tensor  # [B, T, H D]
    v: torch.Tensor  # [B, T, H V]
    scale: torch.Tensor  # [H D, 2]
    offset: torch.Tensor  # [H D, 2]
    cos: torch.Tensor | None  # [B, T, R]
    sin: torch.Tensor | None  # [B, T, R]
    num_heads: int
    silu: bool
    v_silu: bool


def _fake_prepare(call: PrepareCall) -> tuple[torch.Tensor, ...]:
    n = call.num_heads
    return tuple(x.new_empty(x.shape[0], n, x.shape[1], x.shape[2] // n) for x in call[:3])


@custom_op("lact_prepare", PrepareCall, "(Tensor, Tensor, Tensor)", _fake_prepare)
def _prepare_op(call: PrepareCall) -> tuple[torch.Tensor, ...]:
    return _kernels().prepare_forward(*call)


@custom_op(
    "lact_prepare_backward",
    PrepareBackwardCall,
    "Tensor[]",
    lambda call: [x.new_empty(x.shape) for x in call[3:8]],
)
def _prepare_backward_op(call: PrepareBackwardCall) -> list[torch.Tensor]:
    """Gradients of q, k, v, scale and offset."""
    return _kernels().prepare_backward(*call)


def _save_prepare(ctx, call: PrepareCall, output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*call[:7])
    ctx.settings = call[7:]


def _prepare_gradients(ctx, d_q, d_k, d_v) -> dict[str, torch.Tensor]:
    gradients = _prepare_backward_op(d_q, d_k, d_v, *ctx.saved_tensors, *ctx.settings)
    return dict(zip(PrepareCall._fields, gradients))


differentiate(_prepare_op, PrepareCall, _save_prepare, _prepare_gradients, materialize=True)


class FinishCall(NamedTuple):
    """The arguments of :func:`lact_finish`'s kernel."""

    o: torch.Tensor  # [B, H, T, V]
    attended: torch.Tensor  # [B, T, H V]
    weight: torch.Tensor  # [V]
    gate: torch.Tensor | None  # [B, T, H]
    eps: float


class FinishBackwardCall(NamedTuple):
    """The arguments of its backward."""

    d_out: torch.Tensor  # [B, T, H V]
    o: torch.Tensor  # [B, H, T, V]
    weight: torch.Tensor  # [V]
    gate: torch.Tensor | None  # [B, T, H]
    eps: float


@custom_op("lact_finish", FinishCall, "Tensor", lambda call: call.attended.new_empty(call.attended.shape))
def _finish_op(call: FinishCall) -> torch.Tensor:
    return _kernels().finish_forward(*call)


def _fake_finish_backward(call: FinishBackwardCall) -> list[torch.Tensor]:
    there = [x for x in (call.o, call.weight, call.gate) if x is not None]
    return [x.new_empty(x.shape) for x in there] + [call.weight.new_empty(0)] * (3 - len(there))


@custom_op("lact_finish_backward", FinishBackwardCall, "Tensor[]", _fake_finish_backward)
def _finish_backward_op(call: FinishBackwardCall) -> list[torch.Tensor]:
    """Gradients of o, weight and gate (length 0 without a gate)."""
    return _kernels().finish_backward(*call)


def _save_finish(ctx, call: FinishCall, output: torch.Tensor) -> None:
    ctx.save_for_backward(call.o, call.weight, call.gate)
    ctx.eps = call.eps


def _finish_gradients(ctx, d_out: torch.Tensor) -> dict[str, torch.Tensor]:
    o, weight, gate = ctx.saved_tensors
    d_o, d_weight, d_gate = _finish_backward_op(d_out, o, weight, gate, ctx.eps)
    return {"o": d_o, "attended": d_out, "weight": d_weight, "gate": None if gate is None else d_gate}


differentiate(_finish_op, FinishCall, _save_finish, _finish_gradients)


def _kernels() -> ModuleType:
    """Imported at their first use."""
    return importlib.import_module("refine_kernels.lact.triton_edges")
