"""A DeltaNet layer's memory, some tokens further, without gradients: all between its projections and its norm.

While a model decodes, what lies between the projections and the output norm is a dozen small operations on a
few numbers a head, around one large tensor, the state. Here they are one call, and on a GPU one kernel: the
short convolutions with their tails, SiLU, l2 norms, the sigmoid of beta, the decay, the delta rule and the new
tails. States and tails are read through ``rows`` and never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.custom_op import custom_op
from refine_kernels.delta_rule.checks import INTEGERS, MAX_HEAD_SIZE, prepare_scale
from refine_kernels.delta_rule.op import recurrent_delta_rule
from refine_kernels.dispatch import choose_backend
from refine_kernels.precision import FLOAT_DTYPES, accumulation_dtype, autocast


def delta_net_decode(
    q: torch.Tensor,  # [B, T, H K]
    k: torch.Tensor,  # [B, T, H K]
    v: torch.Tensor,  # [B, T, HV V]
    beta: torch.Tensor,  # [B, T, HV]
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # of q, k, v: [D, W]
    tails: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # of q, k, v: [N, W - 1, D]
    state: torch.Tensor,  # [N, HV, K, V]
    *,
    g: torch.Tensor | None = None,  # [B, T, HV]
    rows: torch.Tensor | None = None,  # [B]
    scale: float | None = None,
    beta_scale: float = 1.0,
    use_qk_l2norm_in_kernel: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Read T tokens (1 to about 8) of B branches, row b from ``state[rows[b]]`` and the tails of that row.

    With ``x~ = silu(conv(x))`` for x in q, k, v, per head: ``o, state = recurrent_delta_rule(q~, k~, v~,
    beta_scale * sigmoid(beta), g=g, initial_state=state, state_indices=rows)``.

    Args:
        q, k, v: projections ``[B, T, H K]``, ``[B, T, H K]``, ``[B, T, HV V]`` before their convolutions, K and V
            at most 256, HV a multiple of H; float32, bfloat16, float16 or float64. Views of one fused projection
            are not copied.
        beta: ``[B, T, HV]`` before the sigmoid, any float dtype.
        weights: of the causal depthwise convolutions, ``[H K, W]``, ``[H K, W]``, ``[HV V, W]``.
        tails: the last W - 1 inputs of each convolution, ``[N, W - 1, ...]``.
        state: ``[N, HV, K, V]`` of any float dtype.
        g: log-decays ``[B, T, HV]``, any float dtype; ``None`` for the plain delta rule.
        rows: ``[B]`` int32 or int64 in ``[0, N)``, several branches may share one; ``None``: B = N, in order.
        scale: factor on the outputs, ``K ** -0.5`` by default.
        beta_scale: factor on the sigmoid of beta (2 allows negative eigenvalues).
        use_qk_l2norm_in_kernel: normalise q~ and k~: ``x / sqrt(sum x^2 + 1e-6)`` over the head.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` to choose by device. float64 is computed in
            PyTorch whatever is asked for.

    Returns:
        o ``[B, T, HV, V]`` in q's dtype, the new state ``[B, HV, K, V]`` (float32, float64 with float64 inputs) and
        the new tails ``[B, W - 1, ...]``.
        ``"torch"`` and ``"reference"`` round q~, k~, v~ and beta to their dtypes on the way, as a layer that
        calls one operation after another does; ``"triton"`` keeps them in float32.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, beta, weights, tails, state, g, rows)
    state = state.to(accumulation_dtype(q))
    scale = prepare_scale(scale, state.shape[2])
    backend = choose_backend(backend, accumulation_dtype(q), q, k, v, beta, g, *weights, *tails)
    arguments = (q, k, v, beta, g, list(weights), list(tails), state, rows)
    call = DecodeCall(*arguments, scale, float(beta_scale), use_qk_l2norm_in_kernel)
    if backend == "triton":
        o, new_state, *new_tails = _decode_op(*call)
        return o, new_state, tuple(new_tails)
    with torch.no_grad():
        return _one_after_another(call, backend)


class DecodeCall(NamedTuple):
    """The arguments of the kernel's op, in the order of ``triton_recurrent.decode_forward``."""

    q: torch.Tensor  # [B, T, H K]
    k: torch.Tensor  # [B, T, H K]
    v: torch.Tensor  # [B, T, HV V]
    beta: torch.Tensor  # [B, T, HV]
    g: torch.Tensor | None  # [B, T, HV]
    weights: list[torch.Tensor]  # of q, k, v: [D, W]
    tails: list[torch.Tensor]  # of q, k, v: [N, W - 1, D]
    state: torch.Tensor  # [N, HV, K, V]
    rows: torch.Tensor | None  # [B]
    scale: float
    beta_scale: float
    l2norm: bool


def _one_after_another(call: DecodeCall, backend: str):
    read, new_tails = [], []
    kd, vd = call.state.shape[2:]
    for x, weight, tail, size in zip(call[:3], call.weights, call.tails, (kd, kd, vd)):
        tokens, width = x.shape[1], weight.shape[1]
        tail = tail if call.rows is None else tail.index_select(0, call.rows)
        inputs = torch.cat([tail.to(x.dtype), x], 1)  # [B, W - 1 + T, D]
        y = sum(inputs[:, w : w + tokens] * weight[:, w].to(x.dtype) for w in range(width))
        read.append(F.silu(y).unflatten(-1, (-1, size)))
        new_tails.append(inputs[:, tokens:])
    o, new_state = recurrent_delta_rule(
        *read, call.beta.sigmoid() * call.beta_scale, g=call.g, scale=call.scale, initial_state=call.state,
        state_indices=call.rows, output_final_state=True, use_qk_l2norm_in_kernel=call.l2norm, backend=backend,
    )  # fmt: skip
    return o, new_state, tuple(new_tails)


def _fake_decode(call: DecodeCall) -> tuple[torch.Tensor, ...]:
    (b, tokens), (_, heads, _, vd) = call.q.shape[:2], call.state.shape
    return (
        call.q.new_empty(b, tokens, heads, vd),
        call.state.new_empty(b, *call.state.shape[1:]),
        *(call.q.new_empty(b, *tail.shape[1:]) for tail in call.tails),
    )


@custom_op("delta_net_decode", DecodeCall, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_decode)
def _decode_op(call: DecodeCall) -> tuple[torch.Tensor, ...]:
    """``(o, new state, *new tails)``."""
    from refine_kernels.delta_rule import triton_recurrent

    o, new_state, new_tails = triton_recurrent.decode_forward(*call)
    return o, new_state, *new_tails


def _check(q, k, v, beta, weights, tails, state, g, rows) -> None:
    """Shapes, dtypes and devices agree."""
    if q.dim() != 3 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H K] with T >= 1, got {list(q.shape)}")
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if state.dim() != 4 or not all(1 <= size <= MAX_HEAD_SIZE for size in state.shape[2:]):
        raise ValueError(
            f"state must be [N, H, K, V] with K, V in [1, {MAX_HEAD_SIZE}], got {list(state.shape)}"
        )
    (b, tokens), (n, heads, kd, vd), width = q.shape[:2], state.shape, weights[0].shape[-1]
    key_heads = q.shape[2] // kd
    if key_heads < 1 or heads % key_heads or q.shape[2] % kd:
        raise ValueError(
            f"q must be [B, T, H K] with K = {kd} and H a divisor of state's {heads} heads, got {list(q.shape)}"
        )
    if rows is None and n != b:
        raise ValueError(f"state must have q's B = {b} rows without rows, got {n}")
    shapes = {
        "q": (q, (b, tokens, key_heads * kd)),
        "k": (k, (b, tokens, key_heads * kd)),
        "v": (v, (b, tokens, heads * vd)),
        "state": (state, tuple(state.shape)),
    }
    shapes |= {"beta": (beta, (b, tokens, heads)), "g": (g, (b, tokens, heads)), "rows": (rows, (b,))}
    sizes = (key_heads * kd, key_heads * kd, heads * vd)
    for name, weight, tail, size in zip("qkv", weights, tails, sizes):
        shapes[f"weights of {name}"] = weight, (size, width)
        shapes[f"tails of {name}"] = tail, (n, width - 1, size)
    for name, (x, shape) in shapes.items():
        if x is None and name in ("g", "rows"):
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if name == "rows" and x.dtype not in INTEGERS:
            raise ValueError(f"rows must be int32 or int64, got {x.dtype}")
        if name != "rows" and not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
