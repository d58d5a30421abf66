"""The two ends of a LaCT layer: what stands between its projections and the fast weights, on either side.

Before: a scale and an offset a channel, SiLU, unit length a fast head, rotary embedding, regrouping. After: RMSNorm
a fast head, a gate a head, the attention's output added. Arithmetic is float32 (float64 for float64 inputs); a
result is rounded once. Plain PyTorch on a CPU; on a GPU one kernel each way (`triton_edges.py`).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F

from refine_kernels.dispatch import choose_backend
from refine_kernels.lact.state import accumulation_dtype

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
    if _backend(backend, q) == "triton" and q.dtype != torch.float64 and q.numel() > 0:
        return _prepare_op(q, k, v, scale, offset, cos, sin, num_heads, silu, v_silu)
    dtype = accumulation_dtype(q)
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
    if _backend(backend, o) == "triton" and o.dtype != torch.float64 and o.numel() > 0:
        return _finish_op(o, attended, weight, gate, eps)
    dtype = accumulation_dtype(o)
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


def _backend(backend: str | None, x: torch.Tensor) -> str:
    return choose_backend(backend, x, ("triton", "torch"))


def _kernels() -> ModuleType:
    """Imported at their first use."""
    return importlib.import_module("refine_kernels.lact.triton_edges")


# ---- the custom ops of the kernels -------------------------------------------------------------------------


@torch.library.custom_op("refine_kernels::lact_prepare", mutates_args=())
def _prepare_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    silu: bool,
    v_silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _kernels().prepare_forward(q, k, v, scale, offset, cos, sin, num_heads, silu, v_silu)


@_prepare_op.register_fake
def _(q, k, v, scale, offset, cos, sin, num_heads, silu, v_silu):
    return tuple(x.new_empty(x.shape[0], num_heads, x.shape[1], x.shape[2] // num_heads) for x in (q, k, v))


@torch.library.custom_op("refine_kernels::lact_prepare_backward", mutates_args=())
def _prepare_backward_op(
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    d_v: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    silu: bool,
    v_silu: bool,
) -> list[torch.Tensor]:
    return _kernels().prepare_backward(
        d_q, d_k, d_v, q, k, v, scale, offset, cos, sin, num_heads, silu, v_silu
    )


@_prepare_backward_op.register_fake
def _(d_q, d_k, d_v, q, k, v, scale, offset, cos, sin, num_heads, silu, v_silu):
    return [x.new_empty(x.shape) for x in (q, k, v, scale, offset)]


def _remember_prepare(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.silu, ctx.v_silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_prepare(ctx, d_q, d_k, d_v):
    options = (ctx.num_heads, ctx.silu, ctx.v_silu)
    return *_prepare_backward_op(d_q, d_k, d_v, *ctx.saved_tensors, *options), *(None,) * 5


_prepare_op.register_autograd(_differentiate_prepare, setup_context=_remember_prepare)


@torch.library.custom_op("refine_kernels::lact_finish", mutates_args=())
def _finish_op(
    o: torch.Tensor, attended: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return _kernels().finish_forward(o, attended, weight, gate, eps)


@_finish_op.register_fake
def _(o, attended, weight, gate, eps):
    return attended.new_empty(attended.shape)


@torch.library.custom_op("refine_kernels::lact_finish_backward", mutates_args=())
def _finish_backward_op(
    d_out: torch.Tensor, o: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None, eps: float
) -> list[torch.Tensor]:
    return _kernels().finish_backward(d_out, o, weight, gate, eps)


@_finish_backward_op.register_fake
def _(d_out, o, weight, gate, eps):
    d_gate = weight.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return [o.new_empty(o.shape), weight.new_empty(weight.shape), d_gate]


def _remember_finish(ctx, inputs, output):
    o, _, weight, gate, ctx.eps = inputs
    ctx.save_for_backward(o, weight, gate)


def _differentiate_finish(ctx, d_out):
    o, weight, gate = ctx.saved_tensors
    d_o, d_weight, d_gate = _finish_backward_op(d_out, o, weight, gate, ctx.eps)
    return d_o, d_out, d_weight, None if gate is None else d_gate, None


_finish_op.register_autograd(_differentiate_finish, setup_context=_remember_finish)
