"""The delta rule, token by token: the definition that every backend is tested against.

Per head, with state ``S [K, V]``, decay ``a_t = exp(g_t)`` (1 without ``g``) and writing strength ``beta_t``:

    u_t = beta_t (v_t - a_t S_{t-1}^T k_t)      what the state does not yet say about k_t
    S_t = a_t S_{t-1} + k_t u_t^T               write it
    o_t = scale * S_t^T q_t                     read, after the write

Value heads may be a multiple of key heads: then each key head has ``G = HV / H`` states that follow one another
(value head ``G h + j`` belongs to key head ``h``), and its keys and queries write and read all of them.

Plain PyTorch and plain autograd, in float64 for float64 inputs and in float32 otherwise. Nothing is checked
here and nothing is fast: the public functions in ``op.py`` check, ``chunked.py`` is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from refine_kernels.precision import accumulation_dtype

L2_NORM_EPS = 1e-6  # inside the square root: x / sqrt(sum x^2 + eps)


def chunk_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    *,
    g: torch.Tensor | None = None,  # [B, T, HV]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    state_stride: int | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,  # [N + 1]
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """``(o [B, T, HV, V], final_state [N, HV, K, V] | None)``, with ``state_stride`` also the states
    ``[N, ceil(T / state_stride), HV, K, V]`` before tokens 0, ``state_stride``, ... of every sequence
    (zero past a packed sequence's end). ``backend`` is ignored: this is the reference.
    """
    if cu_seqlens is None:
        spans = [(slice(None), slice(0, q.shape[1]))]
    else:
        bounds = torch.as_tensor(cu_seqlens).tolist()
        spans = [(slice(0, 1), slice(a, b)) for a, b in pairwise(bounds)]

    outputs, finals, boundaries = [], [], []
    for n, (rows, tokens) in enumerate(spans):
        if initial_state is None:
            state = q.new_zeros(
                q[rows].shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=accumulation_dtype(q)
            )
        else:
            state = initial_state[rows] if cu_seqlens is None else initial_state[n : n + 1]
        o, state, states = _one_pass(
            *(None if x is None else x[rows, tokens] for x in (q, k, v, beta, g)),
            scale=scale, state=state, state_stride=state_stride, l2norm=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        outputs.append(o)
        finals.append(state)
        boundaries.append(states)

    result = (torch.cat(outputs, 1), torch.cat(finals) if output_final_state else None)
    if state_stride is None:
        return result
    most = max(states.shape[1] for states in boundaries)
    padded = [torch.cat([s, s.new_zeros(s.shape[0], most - s.shape[1], *s.shape[2:])], 1) for s in boundaries]
    return (*result, torch.cat(padded))


def recurrent_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    *,
    g: torch.Tensor | None = None,  # [B, T, HV]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, HV, K, V]
    state_indices: torch.Tensor | None = None,  # [B]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(o [B, T, HV, V], final_state [B, HV, K, V] | None)``; row b starts from
    ``initial_state[state_indices[b]]``."""
    if state_indices is not None:
        initial_state = initial_state[state_indices]
    return chunk_delta_rule(
        q, k, v, beta, g=g, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def _one_pass(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    g: torch.Tensor | None,  # [B, T, HV]
    *,
    scale: float | None,
    state: torch.Tensor,  # [B, HV, K, V]
    state_stride: int | None,
    l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [B, T, HV, V], the last state [B, HV, K, V], states [B, ceil(T / stride), HV, K, V]."""
    out_dtype, dtype = q.dtype, accumulation_dtype(q)
    q, k, v, beta, state = (x.to(dtype) for x in (q, k, v, beta, state))
    decay = None if g is None else g.to(dtype).exp()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + L2_NORM_EPS).rsqrt() for x in (q, k))
    heads = q.shape[2], v.shape[2] // max(q.shape[2], 1)  # H, G
    v, beta, state = v.unflatten(2, heads), beta.unflatten(2, heads), state.unflatten(1, heads)
    decay = None if decay is None else decay.unflatten(2, heads)

    outputs, states = [], []
    for t in range(q.shape[1]):
        if state_stride is not None and t % state_stride == 0:
            states.append(state.flatten(1, 2))
        if decay is not None:
            state = state * decay[:, t, ..., None, None]
        known = torch.einsum("bhgkv,bhk->bhgv", state, k[:, t])
        u = beta[:, t, ..., None] * (v[:, t] - known)
        state = state + k[:, t, :, None, :, None] * u[..., None, :]
        outputs.append(scale * torch.einsum("bhgkv,bhk->bhgv", state, q[:, t]))

    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    state = state.flatten(1, 2)
    none = state.new_zeros(state.shape[0], 0, *state.shape[1:])
    return o.flatten(2, 3).to(out_dtype), state, torch.stack(states, 1) if states else none
