"""A DeltaNet layer's memory, some tokens further, without gradients: all between its projections and its norm.

While a model decodes, what lies between the projections and the output norm is a dozen small operations on a
few numbers a head, around one large tensor, the state. Here they are one call, and on a GPU one kernel: the
short convolutions with their tails, SiLU, l2 norms, the sigmoid of beta, the decay, the delta rule and the new
tails. States and tails are read through ``rows`` and never written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from refine_kernels.delta_rule import reference
from refine_kernels.delta_rule.checks import MAX_HEAD_SIZE
from refine_kernels.delta_rule.op import recurrent_delta_rule
from refine_kernels.dispatch import choose_backend


def delta_net_decode(
    q: torch.Tensor,  # [B, T, H K]
    k: torch.Tensor,  # [B, T, H K]
    v: torch.Tensor,  # [B, T, H V]
    beta: torch.Tensor,  # [B, T, H]
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # of q, k, v: [D, W]
    tails: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # of q, k, v: [N, W - 1, D]
    state: torch.Tensor,  # [N, H, K, V]
    *,
    g: torch.Tensor | None = None,  # [B, T, H]
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
        q, k, v: projections ``[B, T, H K]``, ``[B, T, H K]``, ``[B, T, H V]`` before their convolutions, K and V
            at most 256; float32, bfloat16, float16 or float64. Views of one fused projection are not copied.
        beta: ``[B, T, H]`` before the sigmoid, any float dtype.
        weights: of the causal depthwise convolutions, ``[H K, W]``, ``[H K, W]``, ``[H V, W]``.
        tails: the last W - 1 inputs of each convolution, ``[N, W - 1, ...]``.
        state: ``[N, H, K, V]`` float32 (float64 with float64 inputs).
        g: log-decays ``[B, T, H]``, at most 0, any float dtype; ``None`` for the plain delta rule.
        rows: ``[B]`` int32 or int64 in ``[0, N)``, several branches may share one; ``None``: B = N, in order.
        scale: factor on the outputs, ``K ** -0.5`` by default.
        beta_scale: factor on the sigmoid of beta (2 allows negative eigenvalues).
        use_qk_l2norm_in_kernel: normalise q~ and k~: ``x / sqrt(sum x^2 + 1e-6)`` over the head.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` to choose by device.

    Returns:
        o ``[B, T, H, V]`` in q's dtype, the new state ``[B, H, K, V]`` and the new tails ``[B, W - 1, ...]``.
        ``"torch"`` and ``"reference"`` round q~, k~, v~ and beta to their dtypes on the way, as a layer that
        calls one operation after another does; ``"triton"`` keeps them in float32.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
    """
    _check(q, k, v, beta, weights, tails, state, g, rows)
    scale = state.shape[2] ** -0.5 if scale is None else float(scale)
    backend = choose_backend(backend, q)
    if backend == "triton":
        o, new_state, *new_tails = _decode_op(
            q,
            k,
            v,
            beta,
            g,
            list(weights),
            list(tails),
            state,
            rows,
            scale,
            beta_scale,
            use_qk_l2norm_in_kernel,
        )
        return o, new_state, tuple(new_tails)
    with torch.no_grad():
        return _one_after_another(
            q, k, v, beta, g, weights, tails, state, rows, scale, beta_scale, use_qk_l2norm_in_kernel, backend
        )


def _one_after_another(q, k, v, beta, g, weights, tails, state, rows, scale, beta_scale, l2norm, backend):
    heads, new_tails, read = state.shape[1], [], []
    for x, weight, tail in zip((q, k, v), weights, tails):
        tokens, width = x.shape[1], weight.shape[1]
        tail = tail if rows is None else tail.index_select(0, rows)
        inputs = torch.cat([tail.to(x.dtype), x], 1)  # [B, W - 1 + T, D]
        y = sum(inputs[:, w : w + tokens] * weight[:, w].to(x.dtype) for w in range(width))
        read.append(F.silu(y).unflatten(-1, (heads, -1)))
        new_tails.append(inputs[:, tokens:])
    rule = reference.recurrent_delta_rule if backend == "reference" else recurrent_delta_rule
    o, new_state = rule(
        *read, beta.sigmoid() * beta_scale, g=g, scale=scale, initial_state=state, state_indices=rows,
        output_final_state=True, use_qk_l2norm_in_kernel=l2norm, backend=backend,
    )  # fmt: skip
    return o, new_state, tuple(new_tails)


@torch.library.custom_op("refine_kernels::delta_net_decode", mutates_args=())
def _decode_op(
    q: torch.Tensor,  # [B, T, H K]
    k: torch.Tensor,  # [B, T, H K]
    v: torch.Tensor,  # [B, T, H V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
    weights: list[torch.Tensor],  # of q, k, v: [D, W]
    tails: list[torch.Tensor],  # of q, k, v: [N, W - 1, D]
    state: torch.Tensor,  # [N, H, K, V]
    rows: torch.Tensor | None,  # [B]
    scale: float,
    beta_scale: float,
    l2norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from refine_kernels.delta_rule import triton_recurrent

    o, new_state, new_tails = triton_recurrent.decode_forward(
        q, k, v, beta, g, weights, tails, state, rows, scale, beta_scale, l2norm
    )
    return o, new_state, *new_tails


@_decode_op.register_fake
def _(q, k, v, beta, g, weights, tails, state, rows, scale, beta_scale, l2norm):
    b, tokens = q.shape[:2]
    return (
        q.new_empty(b, tokens, state.shape[1], state.shape[3]),
        state.new_empty(b, *state.shape[1:]),
        *(q.new_empty(b, *tail.shape[1:]) for tail in tails),
    )


def _check(q, k, v, beta, weights, tails, state, g, rows) -> None:
    """Shapes, dtypes and devices agree."""
    if q.dim() != 3 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, T, H K] with T >= 1, got {list(q.shape)}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if state.dim() != 4 or not all(1 <= size <= MAX_HEAD_SIZE for size in state.shape[2:]):
        raise ValueError(
            f"state must be [N, H, K, V] with K, V in [1, {MAX_HEAD_SIZE}], got {list(state.shape)}"
        )
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"state must be {wanted} with q in {q.dtype}, got {state.dtype}")
    (b, tokens), (n, heads, kd, vd), width = q.shape[:2], state.shape, weights[0].shape[-1]
    if rows is None and n != b:
        raise ValueError(f"state must have q's B = {b} rows without rows, got {n}")
    shapes = {
        "q": (q, (b, tokens, heads * kd)),
        "k": (k, (b, tokens, heads * kd)),
        "v": (v, (b, tokens, heads * vd)),
    }
    shapes |= {"beta": (beta, (b, tokens, heads)), "g": (g, (b, tokens, heads)), "rows": (rows, (b,))}
    for name, weight, tail, size in zip("qkv", weights, tails, (kd, kd, vd)):
        shapes[f"weights of {name}"] = weight, (heads * size, width)
        shapes[f"tails of {name}"] = tail, (n, width - 1, heads * size)
    for name, (x, shape) in shapes.items():
        if x is None and name in ("g", "rows"):
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if name == "rows" and x.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be int32 or int64, got {x.dtype}")
        if name != "rows" and not x.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, got {x.dtype}")
