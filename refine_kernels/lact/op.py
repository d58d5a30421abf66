"""The public functions of LaCT: what they promise, what they refuse, and how autograd sees them.

The op is two custom ops. The *scan* goes over keys and values and leaves the weights of every chunk; it is
sequential. *Apply* reads queries with them, all chunks at once. Whoever needs the weights of a chunk in the
autograd graph (a branch that goes on from there) calls the two apart.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch

from refine_kernels.custom_op import custom_op, differentiate
from refine_kernels.dispatch import choose_backend
from refine_kernels.lact import checks, chunked, reference
from refine_kernels.lact.layout import Widths, count_entries, widths_of
from refine_kernels.lact.state import LaCTState, LaCTWeights
from refine_kernels.precision import accumulation_dtype, autocast, no_autocast

_TRITON = {"scan": "triton_update", "apply": "triton_apply"}


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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, LaCTState]:
    """LaCT's SwiGLU fast weights: read a chunk with the weights as they stand, then update them by it.

    ``o_t = W1 (silu(W0 q_t) * (W2 q_t))``. If a token follows a chunk of ``chunk_size`` tokens, the weights take
    one step of gradient ascent on ``sum_t <f(k_t), v_t>`` with a rate for each token and matrix, with momentum
    ``M <- G + mean(momentum) M`` and through Newton-Schulz (Muon) if asked for; every row is then brought back to
    the norm it had at first. N rows are batch x heads.

    Differentiable in all tensors and in the tensors of ``initial_state``, from the output and the final state.

    Args:
        w0, w2: initial fast weights ``[N, dh, dk]``, any float dtype; used in float32.
        w1: ``[N, dv, dh]``. With ``initial_state`` the three only give the rows' norms.
        q, k: ``[N, L, dk]``, float32, bfloat16, float16 or float64; L >= 1.
        v: ``[N, L, dv]``, k's dtype.
        lr0, lr1, lr2: ``[N, L, 1]``, rates of w0, w1 and w2, any float dtype.
        momentum: ``[N, L, 1]`` in (0, 1), or ``None``: no momentum.
        chunk_size: tokens between updates, at least 1.
        use_muon: orthogonalise each matrix's step by five Newton-Schulz iterations.
        prenorm: sum the updates without normalising, and normalise only what is applied.
        initial_state: go on from here, also inside a chunk.
        output_final_state: also return the state after the last token.
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` to choose by device.

    Returns:
        o ``[N, L, dv]`` in q's dtype; with ``output_final_state`` the pair (o, :class:`LaCTState`).

    Raises:
        ValueError: an argument does not fit; the message names it, what was given and what is allowed.

    Source: Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884.
    """
    checks.check_weights(w0, w1, w2)
    checks.check_chunk_size(chunk_size)
    q, k, v = autocast(q, k, v)
    widths, dtype = widths_of(w0, w1), accumulation_dtype(q)
    checks.check_queries(q, len(w0), widths, w0.device)
    checks.check_tokens(k, v, lr0, lr1, lr2, momentum, len(w0), widths)
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(
            f"k must have q's shape {list(q.shape)} and dtype {q.dtype}, got {list(k.shape)}, {k.dtype}"
        )
    if initial_state is not None:
        checks.check_state(initial_state, len(w0), widths, chunk_size, prenorm, momentum is not None, dtype)

    backend = choose_backend(backend, dtype, q, k, v, lr0, lr1, lr2, momentum)
    if backend == "reference":
        with no_autocast(q):
            return reference.chunk_lact(
                w0, w1, w2, q, k, v, lr0, lr1, lr2, momentum=momentum, chunk_size=chunk_size, use_muon=use_muon,
                prenorm=prenorm, initial_state=initial_state, output_final_state=output_final_state,
            )  # fmt: skip
    initial = widths.pack(w0, w1, w2).to(dtype)
    if initial_state is None:
        weights = LaCTWeights.first(initial, prenorm, momentum is not None)
        tokens, opened = (k, v, lr0, lr1, lr2, momentum), 0
    else:
        weights = initial_state.weights
        tokens = initial_state.followed_by(k, v, lr0, lr1, lr2, momentum)
        opened = initial_state.tokens
    entries = count_entries(opened + q.shape[1], chunk_size)
    stack = lact_scan(
        weights, widths.row_norms(initial), *tokens, widths=widths, chunk_size=chunk_size, updates=entries - 1,
        use_muon=use_muon, backend=backend,
    )  # fmt: skip
    o = lact_apply(stack.applied, q, widths=widths, chunk_size=chunk_size, offset=opened, backend=backend)
    if not output_final_state:
        return o
    rest = (None if x is None else x[:, (entries - 1) * chunk_size :] for x in tokens)
    last = stack.map(lambda x: x[:, -1])
    return o, LaCTState(last, *rest, chunk_size=chunk_size, widths=widths)


def lact_scan(
    weights: LaCTWeights,  # tensors [N, P]
    norms: torch.Tensor,  # [N, R]
    k: torch.Tensor,  # [N, L, dk]
    v: torch.Tensor,  # [N, L, dv]
    lr0: torch.Tensor,  # [N, L, 1]
    lr1: torch.Tensor,  # [N, L, 1]
    lr2: torch.Tensor,  # [N, L, 1]
    momentum: torch.Tensor | None = None,  # [N, L, 1]
    *,
    widths: Widths,
    chunk_size: int,
    updates: int,
    use_muon: bool = False,
    backend: str | None = None,
) -> LaCTWeights:
    """The fast weights before and after each of ``updates`` chunks of keys and values.

    Args:
        weights: at the first chunk's start, tensors ``[N, P]`` (see :class:`LaCTWeights`). With
            ``unnormalised`` the updates are summed without normalising (pre-norm).
        norms: ``[N, R]``, what :meth:`Widths.row_norms` says of the initial weights.
        k, v, lr0, lr1, lr2, momentum: as in :func:`chunk_lact`; the first ``updates * chunk_size`` tokens are read.
        updates: how many, at least 0.

    Returns:
        :class:`LaCTWeights` of tensors ``[N, updates + 1, P]``, with gradients through every entry.
    """
    checks.check_chunk_size(chunk_size)
    k, v = autocast(k, v)
    checks.check_tokens(k, v, lr0, lr1, lr2, momentum, weights.applied.shape[0], widths)
    if k.shape[1] < updates * chunk_size:
        raise ValueError(f"k must have {updates} x {chunk_size} tokens for as many updates, got {k.shape[1]}")
    dtype, rows = accumulation_dtype(k), len(k)
    for name, x in zip(("applied", "unnormalised", "momentum"), weights.tensors()):
        checks.check_flat(f"weights.{name}", x, (rows, widths.size), dtype)
    checks.check_flat("norms", norms, (rows, widths.rows), dtype)
    if (momentum is None) != (weights.momentum is None):
        raise ValueError("momentum's rates and weights.momentum belong together: give both or neither")
    prenorm = weights.unnormalised is not None

    backend = choose_backend(backend, dtype, k, v, lr0, lr1, lr2, momentum, norms, *weights.tensors())
    if backend == "reference":
        with no_autocast(k):
            entries = [weights]
            for i in range(updates):
                chunk = slice(i * chunk_size, (i + 1) * chunk_size)
                tokens = (None if x is None else x[:, chunk] for x in (k, v, lr0, lr1, lr2, momentum))
                entries.append(
                    reference.update_fast_weight(
                        entries[-1], norms, *tokens, widths=widths, use_muon=use_muon
                    )
                )
            stacks = zip(*(entry.tensors() for entry in entries))
            return LaCTWeights(*(None if xs[0] is None else torch.stack(xs, dim=1) for xs in stacks))
    stack, sums, steps, _ = _scan_op(
        *weights.tensors(), norms, k, v, lr0, lr1, lr2, momentum, list(widths), chunk_size, updates, use_muon,
        backend,
    )  # fmt: skip
    return LaCTWeights(stack, sums if prenorm else None, None if momentum is None else steps)


def lact_apply(
    stack: torch.Tensor,  # [N, S, P]
    q: torch.Tensor,  # [N, L, dk]
    *,
    widths: Widths,
    chunk_size: int,
    offset: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Read queries with the weights of their chunks: token t with entry ``(offset + t) // chunk_size``.

    Args:
        stack: ``[N, S, P]``, the ``applied`` tensor of :func:`lact_scan`.
        q: ``[N, L, dk]``.
        offset: tokens of the first entry's chunk that stand before q.

    Returns:
        ``[N, L, dv]`` in q's dtype.
    """
    checks.check_chunk_size(chunk_size)
    (q,) = autocast(q)
    checks.check_queries(q, stack.shape[0], widths, stack.device)
    entries = (offset + q.shape[1] - 1) // chunk_size + 1
    if stack.dim() != 3 or stack.shape[2] != widths.size or stack.shape[1] < entries:
        raise ValueError(
            f"stack must be [N, S, P] with S >= {entries} and P = {widths.size}, got {list(stack.shape)}"
        )
    backend = choose_backend(backend, accumulation_dtype(q), q, stack)
    if backend == "reference":
        with no_autocast(q):
            entry = (offset + torch.arange(q.shape[1], device=q.device)) // chunk_size
            parts = [
                reference.apply_fast_weight(stack[:, e], q[:, entry == e], widths)
                for e in entry.unique().tolist()
            ]
            return torch.cat(parts, dim=1).to(q.dtype)
    return _apply_op(stack, q, list(widths), chunk_size, offset, backend)


# ---- the custom ops: torch.library's schemas know no named tuples, so widths travel as a list ---------------


class ScanCall(NamedTuple):
    """The arguments of the scan's op; see :func:`chunked.scan_forward`."""

    applied: torch.Tensor  # [N, P]
    unnormalised: torch.Tensor | None  # [N, P]
    momentum: torch.Tensor | None  # [N, P]
    norms: torch.Tensor  # [N, R]
    k: torch.Tensor  # [N, L, dk]
    v: torch.Tensor  # [N, L, dv]
    lr0: torch.Tensor  # [N, L, 1]
    lr1: torch.Tensor  # [N, L, 1]
    lr2: torch.Tensor  # [N, L, 1]
    gate: torch.Tensor | None  # [N, L, 1], the momentum's rates
    widths: list[int]
    chunk_size: int
    updates: int
    use_muon: bool
    backend: str


class ScanBackwardCall(NamedTuple):
    """The arguments of its backward; see :func:`chunked.scan_backward`."""

    stack: torch.Tensor  # [N, S, P]
    steps: torch.Tensor  # [N, S, P] or [0]
    divisors: torch.Tensor  # [N, S, R]
    norms: torch.Tensor  # [N, R]
    k: torch.Tensor  # [N, L, dk]
    v: torch.Tensor  # [N, L, dv]
    lr0: torch.Tensor  # [N, L, 1]
    lr1: torch.Tensor  # [N, L, 1]
    lr2: torch.Tensor  # [N, L, 1]
    gate: torch.Tensor | None  # [N, L, 1]
    d_stack: torch.Tensor | None  # [N, S, P]
    d_sums: torch.Tensor | None  # [N, S, P]
    d_steps: torch.Tensor | None  # [N, S, P]
    widths: list[int]
    chunk_size: int
    use_muon: bool
    prenorm: bool
    backend: str


_TENSORS = ScanCall._fields[:10]


def _fake_scan(call: ScanCall) -> tuple[torch.Tensor, ...]:
    applied = call.applied
    stack = applied.new_empty(applied.shape[0], call.updates + 1, applied.shape[1])
    return (
        stack,
        applied.new_empty(0) if call.unnormalised is None else torch.empty_like(stack),
        torch.empty_like(stack) if call.gate is not None or call.use_muon else applied.new_empty(0),
        applied.new_empty(applied.shape[0], call.updates + 1, call.norms.shape[1]),
    )


@custom_op("lact_scan", ScanCall, "(Tensor, Tensor, Tensor, Tensor)", _fake_scan)
def _scan_op(call: ScanCall) -> tuple[torch.Tensor, ...]:
    call = call._replace(widths=Widths(*call.widths))
    return _implementation(call.backend, "scan").scan_forward(*call[:-1])


def _fake_scan_backward(call: ScanBackwardCall) -> list[torch.Tensor]:
    flat = call.stack.new_empty(call.stack.shape[0], call.stack.shape[2])
    return [
        flat,
        torch.empty_like(flat) if call.prenorm else flat.new_empty(0),
        torch.empty_like(flat) if call.gate is not None else flat.new_empty(0),
        torch.empty_like(call.norms),
        *(x.new_empty(x.shape) for x in (call.k, call.v, call.lr0, call.lr1, call.lr2)),
        flat.new_empty(0) if call.gate is None else call.gate.new_empty(call.gate.shape),
    ]


@custom_op("lact_scan_backward", ScanBackwardCall, "Tensor[]", _fake_scan_backward)
def _scan_backward_op(call: ScanBackwardCall) -> list[torch.Tensor]:
    """Gradients of the scan's tensors in their order, of length 0 where there is no such tensor."""
    call = call._replace(widths=Widths(*call.widths))
    return list(_implementation(call.backend, "scan").scan_backward(*call[:-1]))


def _save_scan(ctx, call: ScanCall, output: tuple[torch.Tensor, ...]) -> None:
    stack, _, steps, divisors = output
    ctx.save_for_backward(stack, steps, divisors, *call[3 : len(_TENSORS)])
    ctx.there = [x is not None for x in call[: len(_TENSORS)]]
    prenorm = call.unnormalised is not None
    ctx.settings = (call.widths, call.chunk_size, call.use_muon, prenorm, call.backend)


def _scan_gradients(ctx, d_stack, d_sums, d_steps, _) -> dict[str, torch.Tensor]:
    there = dict(zip(_TENSORS, ctx.there))
    d_sums, d_steps = d_sums if there["unnormalised"] else None, d_steps if there["gate"] else None
    if d_stack is None and d_sums is None and d_steps is None:
        return {}
    gradients = _scan_backward_op(*ctx.saved_tensors, d_stack, d_sums, d_steps, *ctx.settings)
    return {name: d for name, d in zip(_TENSORS, gradients) if there[name]}


differentiate(_scan_op, ScanCall, _save_scan, _scan_gradients)


class ApplyCall(NamedTuple):
    """The arguments of the op that reads; see :func:`chunked.apply_forward`."""

    stack: torch.Tensor  # [N, S, P]
    q: torch.Tensor  # [N, L, dk]
    widths: list[int]
    chunk_size: int
    offset: int
    backend: str


class ApplyBackwardCall(NamedTuple):
    """The arguments of its backward; see :func:`chunked.apply_backward`."""

    stack: torch.Tensor  # [N, S, P]
    q: torch.Tensor  # [N, L, dk]
    d_o: torch.Tensor  # [N, L, dv]
    widths: list[int]
    chunk_size: int
    offset: int
    backend: str


@custom_op(
    "lact_apply", ApplyCall, "Tensor", lambda call: call.q.new_empty(*call.q.shape[:2], call.widths[2])
)
def _apply_op(call: ApplyCall) -> torch.Tensor:
    call = call._replace(widths=Widths(*call.widths))
    return _implementation(call.backend, "apply").apply_forward(*call[:-1])


@custom_op(
    "lact_apply_backward",
    ApplyBackwardCall,
    "(Tensor, Tensor)",
    lambda call: tuple(x.new_empty(x.shape) for x in call[:2]),
)
def _apply_backward_op(call: ApplyBackwardCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the stack and of q."""
    call = call._replace(widths=Widths(*call.widths))
    return _implementation(call.backend, "apply").apply_backward(*call[:-1])


def _save_apply(ctx, call: ApplyCall, output: torch.Tensor) -> None:
    ctx.save_for_backward(*call[:2])
    ctx.settings = call[2:]


def _apply_gradients(ctx, d_o) -> dict[str, torch.Tensor]:
    return dict(zip(("stack", "q"), _apply_backward_op(*ctx.saved_tensors, d_o, *ctx.settings)))


differentiate(_apply_op, ApplyCall, _save_apply, _apply_gradients)


def _implementation(backend: str, part: str) -> ModuleType:
    """The module that runs "scan" or "apply", forward and backward; the kernels are imported at their first use."""
    if backend == "torch":
        return chunked
    return importlib.import_module(f"refine_kernels.lact.{_TRITON[part]}")
