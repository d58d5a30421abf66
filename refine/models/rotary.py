"""Rotary position embedding (Su et al., arXiv 2104.09864): half rotation, angles in float32."""

from __future__ import annotations

import torch


def rotary_angles(
    positions: torch.Tensor,  # [..., T] int64
    head_dim: int,
    theta: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # [..., T, 1, head_dim / 2] float32 each
    """Cosines and sines of ``position * theta^(-2 i / head_dim)``, for :func:`rotate`."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    return angle.cos()[..., None, :], angle.sin()[..., None, :]


def rotate(
    x: torch.Tensor,  # [..., T, heads, head_dim]
    angles: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:  # [..., T, heads, head_dim]
    """Turn the pair (x_i, x_{i + head_dim/2}) of every head by its angle."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
