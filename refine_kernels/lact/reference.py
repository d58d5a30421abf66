"""LaCT's fast weights as plain PyTorch with autograd: the definition.

Large-chunk test-time training (Zhang et al., arXiv 2505.23884). The fast weight is a SwiGLU network
``f(x) = W1 (silu(W0 x) * (W2 x))`` a row (batch x head). A chunk of tokens is first read with the weights as they
stand, then, if a token follows it, the weights take one step of gradient ascent on ``sum_t <f(k_t), v_t>``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from refine_kernels.lact.layout import Widths, count_entries, widths_of
from refine_kernels.lact.newton_schulz import newton_schulz
from refine_kernels.lact.state import LaCTState, LaCTWeights
from refine_kernels.precision import accumulation_dtype

NORM_EPS = 1e-5


def chunk_lact(
    w0: torch.Tensor,  # [N, dh, dk]
    w1: torch.Tensor,  # [N, dv, dh]
    w2: torch.Tensor,  # [N, dh, dk]
    q: torch.Tensor,  # [N, L, dk]
    k: torch.Tensor,  # [N, L, dk]
    v: torch.Tensor,  # [N, L, dv]
    lr0: torch.Tensor,  # [N, L, 1]
    lr1: torch.Tensor,  # [N, L, 1]
    lr2: torch.Tensor,  # [N, L, 1]
    *,
    momentum: torch.Tensor | None = None,  # [N, L, 1]
    chunk_size: int = 2048,
    use_muon: bool = False,
    prenorm: bool = False,
    initial_state: LaCTState | None = None,
    output_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LaCTState]:
    """See :func:`refine_kernels.chunk_lact`."""
    dtype = accumulation_dtype(q)
    widths = widths_of(w0, w1)
    initial = widths.pack(w0, w1, w2).to(dtype)
    norms = widths.row_norms(initial)
    if initial_state is None:
        weights = LaCTWeights.first(initial, prenorm, momentum is not None)
        tokens = (k, v, lr0, lr1, lr2, momentum)
        opened = 0
    else:
        weights = initial_state.weights
        tokens = initial_state.followed_by(k, v, lr0, lr1, lr2, momentum)
        opened = initial_state.tokens
    chunk_outputs = []
    total = opened + q.shape[1]
    for i in range(count_entries(total, chunk_size)):
        start, end = i * chunk_size, min((i + 1) * chunk_size, total)
        if end > opened:
            read = q[:, max(start - opened, 0) : end - opened]
            chunk_outputs.append(apply_fast_weight(weights.applied, read, widths))
        if end < total:
            chunk = (None if x is None else x[:, start:end] for x in tokens)
            weights = update_fast_weight(weights, norms, *chunk, widths=widths, use_muon=use_muon)
    o = torch.cat(chunk_outputs, dim=1).to(q.dtype)
    if not output_final_state:
        return o
    rest = (None if x is None else x[:, start:] for x in tokens)
    return o, LaCTState(weights, *rest, chunk_size=chunk_size, widths=widths)


def apply_fast_weight(
    weights: torch.Tensor,  # [..., P]
    q: torch.Tensor,  # [..., L, dk]
    widths: Widths,
) -> torch.Tensor:  # [..., L, dv]
    """``o_t = W1 (silu(W0 q_t) * (W2 q_t))``."""
    w0, w1, w2 = widths.unpack(weights)
    q = q.to(weights.dtype)
    return (F.silu(q @ w0.mT) * (q @ w2.mT)) @ w1.mT


def update_fast_weight(
    weights: LaCTWeights,  # of one chunk, [N, P]
    norms: torch.Tensor,  # [N, R]
    k: torch.Tensor,  # [N, C, dk]
    v: torch.Tensor,  # [N, C, dv]
    lr0: torch.Tensor,  # [N, C, 1]
    lr1: torch.Tensor,  # [N, C, 1]
    lr2: torch.Tensor,  # [N, C, 1]
    momentum: torch.Tensor | None,  # [N, C, 1]
    *,
    widths: Widths,
    use_muon: bool,
) -> LaCTWeights:
    """One step on a whole chunk: gradient, momentum, Muon, addition, row norms brought back."""
    w0, w1, w2 = widths.unpack(weights.applied)
    k, v, lr0, lr1, lr2 = (x.to(w0.dtype) for x in (k, v, lr0, lr1, lr2))
    y0, y2, g = k @ w0.mT, k @ w2.mT, v @ w1
    s = y0.sigmoid()
    a = y0 * s
    g0 = (lr0 * g * y2 * s * (1 + y0 * (1 - s))).mT @ k
    g1 = (lr1 * v).mT @ (a * y2)
    g2 = (lr2 * g * a).mT @ k
    step = widths.pack(g0, g1, g2)
    if momentum is not None:
        step = step + momentum.to(w0.dtype).mean((1, 2))[:, None] * weights.momentum
    kept = None if momentum is None else step
    if use_muon:
        m0, m1, m2 = widths.unpack(step)
        step = widths.pack(newton_schulz(m0), newton_schulz(m1), newton_schulz(m2))
    total = (weights.applied if weights.unnormalised is None else weights.unnormalised) + step
    applied = widths.scale_rows(total, norms / (widths.row_norms(total) + NORM_EPS))
    return LaCTWeights(applied, None if weights.unnormalised is None else total, kept)
