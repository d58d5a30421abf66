"""One token of the delta rule from known states, in PyTorch and without gradients: the step of decoding.

The write and the read are folded so that the old state is read once and written once:

    [r_q, r_k] = a [q, k]^T S        u = beta (v - r_k)
    S' = a S + k u^T                 o = scale (r_q + (q . k) u)
"""

from __future__ import annotations

import torch

from refine_kernels.delta_rule.reference import L2_NORM_EPS
from refine_kernels.precision import accumulation_dtype


def step(
    q: torch.Tensor,  # [B, 1, H, K]
    k: torch.Tensor,  # [B, 1, H, K]
    v: torch.Tensor,  # [B, 1, HV, V]
    beta: torch.Tensor,  # [B, 1, HV]
    g: torch.Tensor | None,  # [B, 1, HV]
    state: torch.Tensor | None,  # [B, HV, K, V]
    scale: float,
    l2norm: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(o [B, 1, HV, V], S' [B, HV, K, V] or None)``; ``state`` is not written."""
    (b, _, h, vd), kd, dtype = v.shape, q.shape[-1], accumulation_dtype(q)
    qk = torch.stack((q, k), 3).to(dtype)  # [B, 1, H, 2, K]
    if h != q.shape[2]:
        qk = qk.repeat_interleave(h // q.shape[2], 2)
    qk = qk.view(b * h, 2, kd)
    beta = beta.reshape(b * h, 1, 1)
    if l2norm:
        qk = qk * (qk.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt()
    u = v.reshape(b * h, 1, vd).to(dtype)
    key = qk[:, 1:]
    product = (qk[:, :1] * key).sum(-1, keepdim=True)
    if state is None:
        u = u * beta
        o = product * u
    else:
        state = state.reshape(b * h, kd, vd)
        read = torch.bmm(qk, state)
        if g is not None:
            decay = g.to(dtype).reshape(b * h, 1, 1).exp()
            read = read * decay
        u = (u - read[:, 1:]) * beta
        o = torch.addcmul(read[:, :1], product, u)
    o = (o * scale).to(q.dtype).view(b, 1, h, vd)
    if not output_final_state:
        return o, None
    if state is None:
        final = key.transpose(1, 2) * u
    else:
        final = torch.addcmul(state if g is None else state * decay, key.transpose(1, 2), u)
    return o, final.view(b, h, kd, vd)
