"""The public functions of the delta rule: what they promise, what they refuse, and how autograd sees them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from refine_kernels.custom_op import custom_op, differentiate
from refine_kernels.delta_rule import checks, recurrent, reference
from refine_kernels.dispatch import choose_backend
from refine_kernels.precision import accumulation_dtype, autocast, no_autocast

# backend -> a module with forward, backward and checkpoint_count, imported when it is first asked for: one
# may do without Triton
IMPLEMENTATIONS = {
    "torch": "refine_kernels.delta_rule.chunked",
    "triton": "refine_kernels.delta_rule.triton_chunk",
}


def chunk_delta_rule(
    q: torch.Tensor,  # [B, T, H, K]
    k: torch.Tensor,  # [B, T, H, K]
    v: torch.Tensor,  # [B, T, HV, V]
    beta: torch.Tensor,  # [B, T, HV]
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,  # [N + 1]
    cu_seqlens_cpu: torch.Tensor | None = None,  # [N + 1]
    *,
    g: torch.Tensor | None = None,  # [B, T, HV]
    state_stride: int | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The delta rule (DeltaNet) and, with ``g``, the gated delta rule (Gated DeltaNet) over whole sequences.

    Per head, with ``a_t = exp(g_t)`` (1 without ``g``)::

        S_t = a_t S_{t-1} + k_t (beta_t (v_t - a_t S_{t-1}^T k_t))^T        o_t = scale * S_t^T q_t

    Differentiable in q, k, v, beta, g and ``initial_state``, from the outputs, the final state and the states
    at strides alike. Arithmetic is float32 (float64 for float64 inputs); nothing but the inputs and a few
    states is kept for the backward.

    Args:
        q, k: queries and keys ``[B, T, H, K]``, K at most 256; float32, bfloat16, float16 or float64.
        v: values ``[B, T, HV, V]``, V at most 256, of q's dtype. HV is a multiple of H: value heads
            ``j HV / H`` up to ``(j + 1) HV / H`` share the queries and keys of head j, of which no copy is made.
        beta: writing strengths ``[B, T, HV]``, any float dtype.
        g: log-decays ``[B, T, HV]``, any float dtype, -inf allowed; ``None`` for the plain delta rule.
        scale: factor on the outputs, ``K ** -0.5`` by default.
        initial_state: ``[N, HV, K, V]`` of any float dtype, used in that of the arithmetic; N = B, or the number
            of packed sequences; zeros by default.
        output_final_state: also return the state after the last token.
        state_stride: a multiple of 64: also return the states before tokens 0, s, 2s, ... of each sequence.
        cu_seqlens: ``[N + 1]`` integers from 0 to T, a tensor (int32 or int64) or a list: B = 1 and sequence n is
            tokens ``cu_seqlens[n]`` up to ``cu_seqlens[n + 1]``. Sequences do not see one another; an empty one
            passes its state on.
        cu_seqlens_cpu: the same numbers on the CPU, where they are at hand: they are checked without a wait for the
            device.
        use_qk_l2norm_in_kernel: normalise q and k first: ``x / sqrt(sum x^2 + 1e-6)`` over the head.
        chunk_size: accepted for fla's sake and not looked at: it changes no result.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` to choose by device. float64 is computed in
            PyTorch whatever is asked for.

    Returns:
        ``(o, final_state)``, with ``state_stride`` also ``states``: o ``[B, T, HV, V]`` in q's dtype;
        final_state ``[N, HV, K, V]`` or ``None``; states ``[N, ceil(longest / state_stride), HV, K, V]``, zero
        past a packed sequence's end. States are float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
        NotImplementedError: forward-mode AD (``torch.func.jvp``).

    Under autocast q, k and v are brought to the autocast dtype, as a matrix product would. With both
    ``cu_seqlens`` and ``state_stride`` the number of states depends on data, and
    ``torch.compile(fullgraph=True)`` needs ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``.
    Of ``torch.func``, ``vmap`` works (row by row) and ``grad`` raises, as for every custom op of PyTorch; there is
    no second derivative. A token that is not finite makes its own sequence not finite from its chunk on: tokens
    before it in the chunk (32 or 64) too, for inside a chunk they meet it in products with zeros. Other
    sequences, rows and heads keep every bit.

    The positional arguments and their order are those of ``fla.ops.delta_rule.chunk_delta_rule``.

    Sources: Yang et al., arXiv 2406.06484 (DeltaNet); Yang et al., arXiv 2412.06464 (Gated DeltaNet).
    """
    q, k, v = autocast(q, k, v)
    checks.check_inputs(q, k, v, beta, g)
    stride = checks.prepare_stride(state_stride)
    cu_seqlens = checks.prepare_cu_seqlens(cu_seqlens, cu_seqlens_cpu, q, stride)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    initial_state = checks.prepare_state(initial_state, rows, q, v)
    scale = checks.prepare_scale(scale, q.shape[-1])

    backend = choose_backend(backend, accumulation_dtype(q), q, k, v, beta, g, initial_state)
    if backend == "reference":
        if cu_seqlens is not None:
            checks.check_bounds(cu_seqlens, q.shape[1], needed=True)
        with no_autocast(q):
            return reference.chunk_delta_rule(
                q, k, v, beta, g=g, scale=scale, initial_state=initial_state,
                output_final_state=output_final_state, state_stride=state_stride, cu_seqlens=cu_seqlens,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
    for_backward = _needs_gradient(q, k, v, beta, g, initial_state)
    o, final_state, states, *_ = _chunk_op(
        q, k, v, beta, g, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel, output_final_state,
        stride, for_backward, backend,
    )  # fmt: skip
    final_state = final_state if output_final_state else None
    return (o, final_state, states) if stride else (o, final_state)


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
    """The same rule for decoding: a few tokens (1 to about 8), many rows, each continuing a given state.

    Row b starts from ``initial_state[state_indices[b]]``, or ``initial_state[b]`` without indices. Several
    rows may start from one state; ``initial_state`` is never written (copy on write). Differentiable like
    :func:`chunk_delta_rule`, whose arguments these are but for:

    Args:
        initial_state: ``[N, HV, K, V]``; N = B unless ``state_indices`` is given.
        state_indices: ``[B]`` integers in ``[0, N)``. The range is checked for CPU tensors, and elsewhere
            with ``REFINE_KERNELS_DEBUG=1`` (looking would wait for the device).

    Returns:
        ``(o [B, T, HV, V], final_state [B, HV, K, V] or None)``.

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.
        NotImplementedError: forward-mode AD (``torch.func.jvp``).
    """
    q, k, v = autocast(q, k, v)
    checks.check_inputs(q, k, v, beta, g)
    if state_indices is not None:
        checks.check_indices(state_indices, initial_state, q)
    rows = q.shape[0] if state_indices is None else initial_state.shape[0]
    initial_state = checks.prepare_state(initial_state, rows, q, v)
    scale = checks.prepare_scale(scale, q.shape[-1])

    backend = choose_backend(backend, accumulation_dtype(q), q, k, v, beta, g, initial_state)
    if backend == "reference":
        with no_autocast(q):
            return reference.recurrent_delta_rule(
                q, k, v, beta, g=g, scale=scale, initial_state=initial_state, state_indices=state_indices,
                output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip
    if backend == "triton" and not _needs_gradient(q, k, v, beta, g, initial_state):
        o, final_state = _recurrent_op(
            q, k, v, beta, g, initial_state, state_indices, scale, use_qk_l2norm_in_kernel, output_final_state
        )
        return o, final_state if output_final_state else None
    state = initial_state if state_indices is None else initial_state.index_select(0, state_indices)
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        with no_autocast(q):
            return recurrent.step(q, k, v, beta, g, state, scale, use_qk_l2norm_in_kernel, output_final_state)
    return chunk_delta_rule(
        q, k, v, beta, g=g, scale=scale, initial_state=state, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, backend=backend,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# The custom ops. A backend's ``forward`` and ``backward`` take the fields of ``Call`` and ``BackwardCall`` in
# order, without the backend's name.


class Call(NamedTuple):
    """The arguments of the chunk op."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    beta: torch.Tensor  # [B, T, HV]
    g: torch.Tensor | None  # [B, T, HV]
    initial_state: torch.Tensor | None  # [N, HV, K, V]
    cu_seqlens: torch.Tensor | None  # [N + 1]
    scale: float
    l2norm: bool
    output_final_state: bool
    state_stride: int  # 0: no states
    for_backward: bool
    backend: str


class BackwardCall(NamedTuple):
    """The arguments of its backward."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    beta: torch.Tensor  # [B, T, HV]
    g: torch.Tensor | None  # [B, T, HV]
    initial_state: torch.Tensor | None  # [N, HV, K, V]
    cu_seqlens: torch.Tensor | None  # [N + 1]
    checkpoints: torch.Tensor  # [checkpoint_count, B, HV, K, V]
    kept: torch.Tensor  # [kept_count]
    d_o: torch.Tensor | None  # [B, T, HV, V]
    d_final: torch.Tensor | None  # [N, HV, K, V]
    d_states: torch.Tensor | None  # [N, ceil(longest / state_stride), HV, K, V]
    scale: float
    l2norm: bool
    state_stride: int
    backend: str


INPUTS = Call._fields[:7]  # tensors; all but the last are differentiable


def _fake_chunk(call: Call) -> tuple[torch.Tensor, ...]:
    (rows, tokens, heads, vd), kd = call.v.shape, call.q.shape[-1]
    counted = -(-tokens // call.state_stride) if call.state_stride else 0
    if call.cu_seqlens is not None:
        rows = call.cu_seqlens.shape[0] - 1
        counted = torch.library.get_ctx().new_dynamic_size() if call.state_stride else 0
    implementation = _implementation(call.backend)
    checkpoints = implementation.checkpoint_count(call.v, call.cu_seqlens) if call.for_backward else 0
    kept = implementation.kept_count(call.q, call.v, call.g) if call.for_backward else 0

    def new_states(*shape: int) -> torch.Tensor:
        return call.q.new_empty((*shape, heads, kd, vd), dtype=accumulation_dtype(call.q))

    return (
        call.q.new_empty(call.v.shape),
        new_states(rows if call.output_final_state else 0),
        new_states(rows, counted),
        new_states(checkpoints, call.q.shape[0]),
        call.q.new_empty(kept),
    )


@custom_op("chunk_delta_rule", Call, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_chunk)
def _chunk_op(call: Call) -> tuple[torch.Tensor, ...]:
    """``(o, final_state, states, checkpoints, kept)``, what is not asked for with length 0; the last two are the
    backward's own."""
    if call.cu_seqlens is not None:
        checks.check_bounds(call.cu_seqlens, call.q.shape[1])
    return _implementation(call.backend).forward(*call[:-1])


def _fake_chunk_backward(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    rows = call.q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    shape = (rows, call.v.shape[2], call.q.shape[3], call.v.shape[3])
    return (
        *(x.new_empty(x.shape) for x in call[:4]),
        call.q.new_empty(0) if call.g is None else call.g.new_empty(call.g.shape),
        call.q.new_empty(shape, dtype=accumulation_dtype(call.q)),
    )


@custom_op(
    "chunk_delta_rule_backward",
    BackwardCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_chunk_backward,
)
def _chunk_backward_op(call: BackwardCall) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, beta, g (length 0 without g) and of the initial state."""
    return _implementation(call.backend).backward(*call[:-1])


def _save(ctx, call: Call, output: tuple[torch.Tensor, ...]) -> None:
    *_, checkpoints, kept = output
    ctx.save_for_backward(*call[: len(INPUTS)], checkpoints, kept)
    ctx.settings = (call.scale, call.l2norm, call.state_stride, call.backend)
    ctx.returned = (call.output_final_state, call.state_stride)


def _gradients(ctx, d_o, d_final, d_states, *_) -> dict[str, torch.Tensor]:
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    d_final, d_states = (d if returned else None for d, returned in zip((d_final, d_states), ctx.returned))
    if d_o is None and d_final is None and d_states is None:
        return {}
    gradients = _chunk_backward_op(*saved, d_o, d_final, d_states, *ctx.settings)
    inputs = zip(INPUTS[:-1], saved, gradients)
    return {name: d_x.to(x.dtype) for name, x, d_x in inputs if x is not None}


differentiate(_chunk_op, Call, _save, _gradients)


class RecurrentCall(NamedTuple):
    """The arguments of the recurrent kernel's op, in the order of ``triton_recurrent.forward``."""

    q: torch.Tensor  # [B, T, H, K]
    k: torch.Tensor  # [B, T, H, K]
    v: torch.Tensor  # [B, T, HV, V]
    beta: torch.Tensor  # [B, T, HV]
    g: torch.Tensor | None  # [B, T, HV]
    initial_state: torch.Tensor | None  # [N, HV, K, V]
    state_indices: torch.Tensor | None  # [B]
    scale: float
    l2norm: bool
    output_final_state: bool


def _no_state(call: RecurrentCall, rows: int) -> torch.Tensor:
    shape = (rows, call.v.shape[2], call.q.shape[3], call.v.shape[3])
    return call.q.new_empty(shape, dtype=accumulation_dtype(call.q))


def _fake_recurrent(call: RecurrentCall) -> tuple[torch.Tensor, torch.Tensor]:
    return call.q.new_empty(call.v.shape), _no_state(call, call.q.shape[0] if call.output_final_state else 0)


@custom_op("recurrent_delta_rule", RecurrentCall, "(Tensor, Tensor)", _fake_recurrent)
def _recurrent_op(call: RecurrentCall) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o, final_state)``, the latter of no rows where it is not asked for."""
    from refine_kernels.delta_rule import triton_recurrent

    o, final_state = triton_recurrent.forward(*call)
    return o, _no_state(call, 0) if final_state is None else final_state


@functools.cache
def _implementation(backend: str) -> ModuleType:
    return importlib.import_module(IMPLEMENTATIONS[backend])


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
