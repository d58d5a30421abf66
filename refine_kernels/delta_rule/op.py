"""The public functions of the delta rule: what they promise, what they refuse, and how autograd sees them."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

import torch

from refine_kernels.delta_rule import checks, recurrent, reference
from refine_kernels.dispatch import choose_backend

# backend -> a module with forward, backward and checkpoint_count, imported when it is first asked for: one
# may do without Triton
IMPLEMENTATIONS = {
    "torch": "refine_kernels.delta_rule.chunked",
    "triton": "refine_kernels.delta_rule.triton_chunk",
}
CHUNK_BACKENDS = ("reference", *IMPLEMENTATIONS)
RECURRENT_BACKENDS = ("reference", "torch", "triton")


def chunk_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: torch.Tensor | None = None,  # [N + 1]
    *,
    g: torch.Tensor | None = None,  # [B, T, H]
    state_stride: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The delta rule (DeltaNet) and, with ``g``, the gated delta rule (Gated DeltaNet) over whole sequences.

    Per head, with ``a_t = exp(g_t)`` (1 without ``g``)::

        S_t = a_t S_{t-1} + k_t (beta_t (v_t - a_t S_{t-1}^T k_t))^T        o_t = scale * S_t^T q_t

    Differentiable in q, k, v, beta, g and ``initial_state``, from the outputs, the final state and the states
    at strides alike. Arithmetic is float32 (float64 for float64 inputs); nothing but the inputs and a few
    states is kept for the backward. There is no second derivative.

    Args:
        q, k: queries and keys ``[B, T, H, K]``, K at most 256; float32, bfloat16, float16 or float64.
        v: values ``[B, T, H, V]``, V at most 256, of q's dtype.
        beta: writing strengths ``[B, T, H]``, any float dtype.
        g: log-decays ``[B, T, H]``, at most 0, any float dtype; ``None`` for the plain delta rule.
        scale: factor on the outputs, ``K ** -0.5`` by default.
        initial_state: ``[N, H, K, V]`` float32 (or float64 with float64 inputs), N = B, or the number of
            packed sequences; zeros by default.
        output_final_state: also return the state after the last token.
        state_stride: a multiple of 64: also return the states before tokens 0, s, 2s, ... of each sequence.
        cu_seqlens: ``[N + 1]`` integers from 0 to T: B = 1 and sequence n is tokens ``cu_seqlens[n]`` up to
            ``cu_seqlens[n + 1]``. Sequences do not see one another; an empty one passes its state on.
        cu_seqlens_cpu: the same numbers on the CPU, where they are at hand; only looked at for agreement in length.
        use_qk_l2norm_in_kernel: normalise q and k first: ``x / sqrt(sum x^2 + 1e-6)`` over the head.
        backend: ``"triton"`` (not for float64), ``"torch"``, ``"reference"``, or ``None`` to choose by device.

    Returns:
        ``(o, final_state)``, with ``state_stride`` also ``states``: o ``[B, T, H, V]`` in q's dtype;
        final_state ``[N, H, K, V]`` or ``None``; states ``[N, ceil(longest / state_stride), H, K, V]``, zero
        past a packed sequence's end. States are float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.

    Under autocast q, k and v are brought to the autocast dtype, as a matrix product would. With both
    ``cu_seqlens`` and ``state_stride`` the number of states depends on data, and
    ``torch.compile(fullgraph=True)`` needs ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``.

    The positional arguments and their order are those of ``fla.ops.delta_rule.chunk_delta_rule``.

    Sources: Yang et al., arXiv 2406.06484 (DeltaNet); Yang et al., arXiv 2412.06464 (Gated DeltaNet).
    """
    q, k, v = _autocast(q, k, v)
    checks.check_inputs(q, k, v, beta, g)
    checks.check_state_stride(state_stride)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, q)
    checks.check_cu_seqlens_cpu(cu_seqlens_cpu, cu_seqlens)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checks.check_state(initial_state, rows, q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    backend = _chunk_backend(backend, q)
    if backend == "reference":
        if cu_seqlens is not None:
            checks.check_bounds(cu_seqlens, q.shape[1])
        with _no_autocast(q):
            return reference.chunk_delta_rule(
                q, k, v, beta, g=g, scale=scale, initial_state=initial_state,
                output_final_state=output_final_state, state_stride=state_stride, cu_seqlens=cu_seqlens,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
    for_backward = _needs_gradient(q, k, v, beta, g, initial_state)
    o, final_state, states, *_ = _chunk_op(
        q, k, v, beta, g, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel, output_final_state,
        state_stride or 0, for_backward, backend,
    )  # fmt: skip
    final_state = final_state if output_final_state else None
    return (o, final_state) if state_stride is None else (o, final_state, states)


def recurrent_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    *,
    g: torch.Tensor | None = None,  # [B, T, H]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, H, K, V]
    state_indices: torch.Tensor | None = None,  # [B]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same rule for decoding: a few tokens (1 to about 8), many rows, each continuing a given state.

    Row b starts from ``initial_state[state_indices[b]]``, or ``initial_state[b]`` without indices. Several
    rows may start from one state; ``initial_state`` is never written (copy on write). Differentiable like
    :func:`chunk_delta_rule`, whose arguments these are but for:

    Args:
        initial_state: ``[N, H, K, V]``; N = B unless ``state_indices`` is given.
        state_indices: ``[B]`` integers in ``[0, N)``. The range is checked for CPU tensors, and elsewhere
            with ``REFINE_KERNELS_DEBUG=1`` (looking would wait for the device).

    Returns:
        ``(o [B, T, H, V], final_state [B, H, K, V] or None)``.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
    """
    q, k, v = _autocast(q, k, v)
    checks.check_inputs(q, k, v, beta, g)
    if state_indices is None:
        checks.check_state(initial_state, q.shape[0], q, v)
    else:
        checks.check_indices(state_indices, initial_state, q)
        checks.check_state(initial_state, initial_state.shape[0], q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    backend = choose_backend(backend, q, RECURRENT_BACKENDS)
    if backend == "reference":
        with _no_autocast(q):
            return reference.recurrent_delta_rule(
                q, k, v, beta, g=g, scale=scale, initial_state=initial_state, state_indices=state_indices,
                output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
    if backend == "triton" and not _needs_gradient(q, k, v, beta, g, initial_state):
        o, final_state = _recurrent_op(
            q, k, v, beta, g, initial_state, state_indices, scale, use_qk_l2norm_in_kernel, output_final_state
        )
        return o, final_state if output_final_state else None
    if q.dtype == torch.float64 and backend == "triton":
        backend = "torch"  # the chunk kernels have no float64
    state = initial_state if state_indices is None else initial_state.index_select(0, state_indices)
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        with _no_autocast(q):
            return recurrent.step(q, k, v, beta, g, state, scale, use_qk_l2norm_in_kernel, output_final_state)
    return chunk_delta_rule(
        q, k, v, beta, g=g, scale=scale, initial_state=state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, backend=backend,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# The custom ops. Forward returns (o, final_state, states, checkpoints, kept), what is not asked for with length 0;
# the last two are the backward's own.


@torch.library.custom_op("refine_kernels::chunk_delta_rule", mutates_args=())
def _chunk_op(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
    initial_state: torch.Tensor | None,  # [N, H, K, V]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
    scale: float,
    l2norm: bool,
    output_final_state: bool,
    state_stride: int,
    for_backward: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if cu_seqlens is not None:
        checks.check_bounds(cu_seqlens, q.shape[1])
    with _no_autocast(q):
        return _implementation(backend).forward(
            q,
            k,
            v,
            beta,
            g,
            initial_state,
            cu_seqlens,
            scale,
            l2norm,
            output_final_state,
            state_stride,
            for_backward,
        )


@_chunk_op.register_fake
def _(
    q, k, v, beta, g, initial_state, cu_seqlens,
    scale, l2norm, output_final_state, state_stride, for_backward, backend,
):  # fmt: skip
    (rows, tokens, heads, kd), vd = q.shape, v.shape[-1]
    counted = -(-tokens // state_stride) if state_stride else 0
    if cu_seqlens is not None:
        rows = cu_seqlens.shape[0] - 1
        counted = torch.library.get_ctx().new_dynamic_size() if state_stride else 0
    implementation = _implementation(backend)
    checkpoints = implementation.checkpoint_count(q, cu_seqlens) if for_backward else 0

    def new_states(*shape: int) -> torch.Tensor:
        return q.new_empty((*shape, heads, kd, vd), dtype=_state_dtype(q))

    return (
        q.new_empty(v.shape),
        new_states(rows if output_final_state else 0),
        new_states(rows, counted),
        new_states(checkpoints, q.shape[0]),
        q.new_empty(implementation.kept_count(q, v, g) if for_backward else 0),
    )


@torch.library.custom_op("refine_kernels::chunk_delta_rule_backward", mutates_args=())
def _chunk_backward_op(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
    initial_state: torch.Tensor | None,  # [N, H, K, V]
    cu_seqlens: torch.Tensor | None,  # [N + 1]
    checkpoints: torch.Tensor,  # [checkpoint_count, B, H, K, V]
    kept: torch.Tensor,  # [kept_count]
    o: torch.Tensor | None,  # [B, T, H, V]
    d_o: torch.Tensor | None,  # [B, T, H, V]
    d_final: torch.Tensor | None,  # [N, H, K, V]
    d_states: torch.Tensor | None,  # [N, ceil(longest / state_stride), H, K, V]
    scale: float,
    l2norm: bool,
    state_stride: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with _no_autocast(q):
        return _implementation(backend).backward(
            q, k, v, beta, g, initial_state, cu_seqlens, checkpoints, kept, o, d_o, d_final, d_states,
            scale, l2norm, state_stride,
        )  # fmt: skip


@_chunk_backward_op.register_fake
def _(
    q, k, v, beta, g, initial_state, cu_seqlens, checkpoints, kept, o, d_o, d_final, d_states,
    scale, l2norm, state_stride, backend,
):  # fmt: skip
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        *(x.new_empty(x.shape) for x in (q, k, v, beta)),
        q.new_empty(0) if g is None else g.new_empty(g.shape),
        q.new_empty((rows, q.shape[2], q.shape[3], v.shape[3]), dtype=_state_dtype(q)),
    )


def _remember(ctx, inputs, output):
    *tensors, ctx.scale, ctx.l2norm, ctx.output_final_state, ctx.state_stride, _, ctx.backend = inputs
    needs_o = ctx.l2norm and ctx.backend == "triton"
    ctx.save_for_backward(*tensors, output[3], output[4], output[0] if needs_o else None)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_o, d_final, d_states, *_):
    *inputs, checkpoints, kept, o = (
        ctx.saved_tensors
    )  # once: activation checkpointing hands them out a single time
    d_final = d_final if ctx.output_final_state else None
    d_states = d_states if ctx.state_stride else None
    if d_o is None and d_final is None and d_states is None:
        return (None,) * 13
    gradients = _chunk_backward_op(
        *inputs,
        checkpoints,
        kept,
        o,
        d_o,
        d_final,
        d_states,
        ctx.scale,
        ctx.l2norm,
        ctx.state_stride,
        ctx.backend,
    )
    gradients = [None if x is None else d_x.to(x.dtype) for x, d_x in zip(inputs, gradients)]
    return (*gradients, *(None,) * 7)


_chunk_op.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("refine_kernels::recurrent_delta_rule", mutates_args=())
def _recurrent_op(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, H, V]
    beta: torch.Tensor,  # [B, T, H]
    g: torch.Tensor | None,  # [B, T, H]
    initial_state: torch.Tensor | None,  # [N, H, K, V]
    state_indices: torch.Tensor | None,  # [B]
    scale: float,
    l2norm: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from refine_kernels.delta_rule import triton_recurrent

    o, final_state = triton_recurrent.forward(
        q, k, v, beta, g, initial_state, state_indices, scale, l2norm, output_final_state
    )
    if final_state is None:
        final_state = q.new_empty((0, *q.shape[2:], v.shape[-1]), dtype=_state_dtype(q))
    return o, final_state


@_recurrent_op.register_fake
def _(q, k, v, beta, g, initial_state, state_indices, scale, l2norm, output_final_state):
    rows = q.shape[0] if output_final_state else 0
    return (
        q.new_empty(v.shape),
        q.new_empty((rows, q.shape[2], q.shape[3], v.shape[3]), dtype=_state_dtype(q)),
    )


# ---------------------------------------------------------------------------------------------------------
# Backends


def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(IMPLEMENTATIONS[backend])


def _chunk_backend(backend: str | None, q: torch.Tensor) -> str:
    """The Triton kernels have no float64: it is refused where they are asked for, else goes to PyTorch."""
    if q.dtype != torch.float64:
        return choose_backend(backend, q, CHUNK_BACKENDS)
    if backend == "triton":
        raise ValueError(
            "q must be float32, bfloat16 or float16 with backend='triton', got torch.float64: "
            "backends 'torch' and 'reference' take it"
        )
    chosen = choose_backend(backend, q, CHUNK_BACKENDS)
    return "torch" if chosen == "triton" else chosen


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ---------------------------------------------------------------------------------------------------------
# Dtypes


def _state_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """To the autocast dtype where autocast is on; float64 stays what it is, as everywhere in PyTorch."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _no_autocast(q: torch.Tensor) -> contextlib.AbstractContextManager:
    """The arithmetic inside an op chooses its own dtypes."""
    device = q.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else contextlib.nullcontext()
    )
