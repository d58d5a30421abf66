"""The delta rules under fla's names: its order of arguments, its defaults, its return values.

``from refine_kernels import chunk_gated_delta_rule`` takes the place of ``from fla.ops.gated_delta_rule import
chunk_gated_delta_rule`` (flash-linear-attention 0.6), and so do the two recurrent ops; ``chunk_delta_rule`` has
fla's order itself. What the gate and the sigmoid do "in kernel" there happens before the rule here, in the dtype of
the arithmetic, and autograd goes through it: the recurrent ops have a backward too. Arguments that only steer how
fla computes (``chunk_size``, ``chunk_indices``) are accepted; those that would change a result and are not
implemented are refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from refine_kernels.delta_rule.op import chunk_delta_rule, recurrent_delta_rule
from refine_kernels.precision import accumulation_dtype


def chunk_gated_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    g: torch.Tensor | None = None,  # [B, T, HV]
    beta: torch.Tensor | None = None,  # [B, T, HV]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,  # [N + 1]
    cu_seqlens_cpu: torch.Tensor | None = None,  # [N + 1]
    chunk_indices: torch.Tensor | None = None,
    cp_context: object | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,  # [HV]
    dt_bias: torch.Tensor | None = None,  # [HV]
    transpose_state_layout: bool | None = None,
    state_stride: int | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """:func:`~refine_kernels.chunk_delta_rule` as fla calls the gated rule.

    Args:
        q, k, v, scale, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, cu_seqlens_cpu: as there.
        g: log-decays ``[B, T, HV]``, or, with ``use_gate_in_kernel``, what the gate is made of; ``None``: no decay.
        beta: writing strengths ``[B, T, HV]``, or their logits; ``None``: 1.
        initial_state: ``[N, HV, K, V]`` of any float dtype; ``[N, HV, V, K]`` with ``state_v_first``.
        use_beta_sigmoid_in_kernel: beta is ``sigmoid(beta)``, with ``allow_neg_eigval`` twice that.
        state_v_first: all states, given and returned, are ``[..., V, K]``; ``transpose_state_layout`` before.
        use_gate_in_kernel: g is ``-exp(A_log) softplus(g + dt_bias)``; ``A_log`` and ``dt_bias`` ``[HV]`` are only
            looked at then.
        chunk_size, chunk_indices: accepted and not looked at: they change no result.
        cp_context: not implemented, and refused.
        state_stride, backend: as in :func:`~refine_kernels.chunk_delta_rule`.

    Returns:
        ``(o, final_state or None)``, with ``state_stride`` also the states.

    Raises:
        ValueError: an argument does not fit or is not implemented; the message names it.
    """
    if cp_context is not None:
        raise ValueError("cp_context must be None: context parallelism inside the op is not implemented")
    state_v_first = _layout(state_v_first, transpose_state_layout)
    beta = _beta(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    g = _decay(g, v, use_gate_in_kernel, A_log, dt_bias)
    outputs = chunk_delta_rule(
        q, k, v, beta, scale, _transposed(initial_state, state_v_first), output_final_state,
        use_qk_l2norm_in_kernel, cu_seqlens, cu_seqlens_cpu, g=g, state_stride=state_stride, backend=backend,
    )  # fmt: skip
    return (outputs[0], *(_transposed(states, state_v_first) for states in outputs[1:]))


def fused_recurrent_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor | None = None,  # [B, T, HV]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,  # [N + 1]
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The plain rule for a few tokens, as fla calls it; arguments as in :func:`chunk_gated_delta_rule`."""
    return _recurrent(
        q, k, v, None, _beta(beta, v, False, False), scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, cu_seqlens, backend,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    g: torch.Tensor | None = None,  # [B, T, HV]
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,  # [B, T, HV]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,  # [HV]
    dt_bias: torch.Tensor | None = None,  # [HV]
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,  # [N + 1]
    *,
    transpose_state_layout: bool | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated rule for a few tokens, as fla calls it; arguments as in :func:`chunk_gated_delta_rule`.

    ``gk`` and ``gv``, decays of their own for rows and columns of a state, are another rule and are refused.
    """
    for name, decay in (("gk", gk), ("gv", gv)):
        if decay is not None:
            raise ValueError(f"{name} must be None: a decay for each channel is not implemented")
    state_v_first = _layout(state_v_first, transpose_state_layout)
    beta = _beta(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    g = _decay(g, v, use_gate_in_kernel, A_log, dt_bias)
    o, final_state = _recurrent(
        q, k, v, g, beta, scale, _transposed(initial_state, state_v_first), output_final_state,
        use_qk_l2norm_in_kernel, cu_seqlens, backend,
    )  # fmt: skip
    return o, _transposed(final_state, state_v_first)


def _recurrent(q, k, v, g, beta, scale, initial_state, output_final_state, l2norm, cu_seqlens, backend):
    """fla's recurrent ops take q, k and v of different dtypes; the output has v's."""
    options = {"initial_state": initial_state, "output_final_state": output_final_state, "backend": backend}
    options |= {"g": g, "scale": scale, "use_qk_l2norm_in_kernel": l2norm}
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    qkv = (x.to(common) for x in (q, k, v))
    if cu_seqlens is not None:
        o, final_state = chunk_delta_rule(*qkv, beta, cu_seqlens=cu_seqlens, **options)
    else:
        o, final_state = recurrent_delta_rule(*qkv, beta, **options)
    return (o if torch.is_autocast_enabled(v.device.type) else o.to(v.dtype)), final_state


def _beta(beta: torch.Tensor | None, v: torch.Tensor, logits: bool, twice: bool) -> torch.Tensor:
    """Writing strengths ``[B, T, HV]``."""
    if twice and not logits:
        raise ValueError("allow_neg_eigval needs use_beta_sigmoid_in_kernel=True, got False")
    if beta is None:
        return v.new_ones(v.shape[:-1])
    if not logits:
        return beta
    beta = beta.to(accumulation_dtype(beta)).sigmoid()
    return 2 * beta if twice else beta


def _decay(
    g: torch.Tensor | None,  # [B, T, HV]
    v: torch.Tensor,  # [B, T, HV, V]
    in_kernel: bool,
    A_log: torch.Tensor | None,  # [HV]
    dt_bias: torch.Tensor | None,  # [HV]
) -> torch.Tensor | None:
    """Log-decays ``[B, T, HV]``."""
    if not in_kernel:
        return g
    for name, x in (("g", g), ("A_log", A_log)):
        if x is None:
            raise ValueError(f"{name} must be given with use_gate_in_kernel=True, got None")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.numel() != v.shape[2]:
            raise ValueError(f"{name} must be [HV] = [{v.shape[2]}], got {list(x.shape)}")
    dtype = accumulation_dtype(g)
    g = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype).flatten()
    return -A_log.to(dtype).flatten().exp() * F.softplus(g)


def _layout(state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError("state_v_first and transpose_state_layout are one setting: give only state_v_first")
    warnings.warn(
        "transpose_state_layout is now called state_v_first, as in fla", DeprecationWarning, stacklevel=3
    )
    return transpose_state_layout


def _transposed(states: torch.Tensor | None, state_v_first: bool) -> torch.Tensor | None:
    """Between ``[..., K, V]`` and ``[..., V, K]``, where states are laid out so."""
    return states.mT.contiguous() if state_v_first and states is not None else states
