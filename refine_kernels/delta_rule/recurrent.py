"""One token of the delta rule from known states, in PyTorch and without gradients: the step of decoding.

The write and the read are folded so that the old state is read once and written once:

    [r_q, r_k] = a [q, k]^T S        u = beta (v - r_k)
    S' = a S + k u^T                 o = scale (r_q + (q . k) u)
"""

from __future__ import annotations

import torch

from refine_kernels.delta_rule.reference import L2_NORM_EPS


def step(
    q: torch.Tensor,  # [B, 1, H, K]
    k: torch.Tensor,  # [B, 1, H, K]
    v: torch.Tensor,  # [B, 1, H, V]
    beta: torch.Tensor,  # [B, 1, H]
    g: torch.Tensor | None,  # [B, 1, H]
    state: torch.Tensor | None,  # [B, H, K, V]
    scale: float,
    l2norm: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(o [B, 1, H, V], S' [B, H, K, V] or None)``; ``state`` is not written."""
    (b, _, h, kd), vd = q.shape, v.shape[-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    qk = torch.stack((q, k), 3).to(dtype).view(b * h, 2, kd)
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
        state = state.to(dtype).reshape(b * h, kd, vd)
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
