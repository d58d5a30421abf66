"""The public functions: checks, flattening, autocast, and the custom ops that autograd and compile see.

Each of the two paths is one custom op. What follows from shapes and settings is checked here, once; the
files below trust their arguments.
"""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import NamedTuple

import torch

from refine_kernels.custom_op import custom_op, differentiate
from refine_kernels.dispatch import choose_backend
from refine_kernels.linear_logprob import chunked, reference
from refine_kernels.linear_logprob.partials import VocabGroup, vocab_slices
from refine_kernels.linear_logprob.reference import LinearLogprobOutput, resolve_seeds
from refine_kernels.precision import accumulation_dtype, autocast

CHECK_VARIABLE = "REFINE_KERNELS_CHECK"  # 1: values of targets are checked on a GPU, too
_REDUCTIONS = ("mean", "sum", "none")


def linear_logprob(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    target: torch.Tensor | None = None,  # [...]
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_lse: bool = False,
    sample: bool = False,
    seed: int | torch.Tensor | None = None,  # [...] when a tensor
    bias: torch.Tensor | None = None,  # [V]
    logit_softcap: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> LinearLogprobOutput:
    """Log-probs, entropies, log-sum-exps and samples of a linear head, without the logits.

    With ``z = softcap(x W^T + b)``, everything is of ``softmax(z / temperature)``. Differentiable in
    ``logprob``, ``entropy`` and ``lse`` with respect to ``x``, ``weight`` and ``bias``; the backward
    recomputes logits, for those rows only whose upstream gradient is not zero.

    Args:
        x: hidden states, ``[..., D]``, float32, bfloat16, float16 or float64; any leading shape, any strides.
        weight: the head, ``[V, D]``.
        target: int64 or int32, ``[...]``, in ``[0, V)`` or ``ignore_index``. An ignored row has log-prob 0
            and passes no gradient through it; its entropy and lse are those of any other row.
            Another value is an error; but on a GPU the kernels, which nobody waits for, give that row log-prob
            and gradients of nan instead, unless the environment has ``REFINE_KERNELS_CHECK=1``.
        temperature: divides the logits. 0 is allowed when sampling: the token is then the arg-max (lowest
            index on ties), and log-prob, entropy and lse are reported at temperature 1.
        return_entropy: also return the entropy, in nats.
        return_lse: also return the log-sum-exp of ``z / temperature``.
        sample: also draw one token per row. Without a ``target``, ``logprob`` is the drawn token's. A row that has
            no distribution, because a logit is NaN or infinite, draws -1 (and its other values are NaN), which is
            no token of any vocabulary.
        seed: for sampling: an int (row ``r`` uses ``row_seeds(seed, ...)[r]``), or one int64 per row,
            ``[...]``: such a row's token depends on its own seed, x and the weight alone, not on the batch.
            ``None`` takes a seed from PyTorch's default generator.
        bias: ``[V]``, finite.
        logit_softcap: ``c`` in ``z = c tanh(z / c)``, positive.
        process_group: the vocabulary is cut over these ranks: ``weight`` (and ``bias``) is this rank's slice, the
            ranks' slices in order make up the whole, of equal or unequal sizes. x, target, seed and the settings
            are the same on all ranks, and so are all outputs: those of the whole weight, the drawn token too
            (a seed of ``None`` needs equal generators for that). Targets and tokens are of the whole
            vocabulary. The backward sums dx over the ranks and must run on all of them. One integer and then
            O(N) numbers a rank are exchanged, which ``torch.compile(fullgraph=True)`` cannot trace.
        backend: ``"triton"``, ``"torch"``, ``"reference"`` or ``None`` (see ``refine_kernels.dispatch``). float64
            takes the PyTorch path in place of Triton; the reference knows no process group.

    Returns:
        ``LinearLogprobOutput(logprob, entropy, lse, token)``, each ``[...]``: float32 (float64 for float64
        inputs), the token int64; ``None`` where not asked for. Under autocast x, weight and bias are taken
        in the autocast dtype; the arithmetic stays float32.

    Raises:
        ValueError: an argument has a wrong type, shape, device or value, or nothing is asked for.
    """
    _check_head(x, weight, bias, logit_softcap)
    _check_temperature(temperature, sample)
    group, V = _vocabulary(weight, process_group)
    if target is not None:
        _check_target(target, x)
    if sample:
        _check_seed(seed, x)
    elif target is None and not (return_entropy or return_lse):
        raise ValueError("target is None: give one, or ask for return_entropy, return_lse or sample")
    x, weight, bias = autocast(x, weight, bias)

    backend = _backend(backend, x, weight, bias, group)
    if target is not None:
        _check_target_values(target, V, ignore_index, backend, group)
    if backend == "reference":
        return reference.linear_logprob(
            x, weight, target, temperature=temperature, ignore_index=ignore_index,
            return_entropy=return_entropy, return_lse=return_lse, sample=sample, seed=seed,
            bias=bias, logit_softcap=logit_softcap,
        )  # fmt: skip
    leading = x.shape[:-1]
    if target is None:
        ignore_index = -1  # a drawn token is never ignored, whatever its number
    seeds = resolve_seeds(seed, leading, x.device) if sample and temperature > 0 else None
    outputs = _linear_logprob(
        _rows(x), weight, bias,
        None if target is None else target.reshape(-1).long(),
        None if seeds is None else seeds.reshape(-1),
        float(temperature), logit_softcap, ignore_index, return_entropy, return_lse or group is not None, sample,
        backend, *_named(group),
    )  # fmt: skip
    asked = (target is not None or sample, return_entropy, return_lse, sample)
    return LinearLogprobOutput(*(out.view(leading) if a else None for out, a in zip(outputs, asked)))


def linear_cross_entropy(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # [...]
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    row_weight: torch.Tensor | None = None,  # [...]
    return_entropy: bool = False,
    bias: torch.Tensor | None = None,  # [V]
    logit_softcap: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of a linear head without the logits, and the entropies of all rows off the same pass.

    For ``"mean"`` and ``"sum"`` the gradients are taken in the forward pass, when one is needed: three
    matrix products in all, and the backward only multiplies by the upstream scalar.

    Args:
        x: hidden states, ``[..., D]``, float32, bfloat16, float16 or float64; any leading shape, any strides.
        weight: the head, ``[V, D]``.
        target: int64 or int32, ``[...]``, in ``[0, V)`` or ``ignore_index`` (no loss, no gradient).
            Another value is an error; but on a GPU the kernels, which nobody waits for, give a loss and
            gradients of nan instead, unless the environment has ``REFINE_KERNELS_CHECK=1``.
        reduction: ``"sum"``; ``"mean"``, the sum divided by the number of rows that are not ignored,
            whatever their ``row_weight`` (0 when all are ignored); or ``"none"``, ``[...]``.
        row_weight: ``[...]``, multiplies each row's loss; a constant. A row of weight 0 costs as little as an
            ignored one.
        return_entropy: also return the entropy of every row, of ignored rows too. It carries no gradient
            (``linear_logprob``'s does).
        bias: ``[V]``, finite.
        logit_softcap: ``c`` in ``z = c tanh(z / c)``, positive.
        process_group: the vocabulary is cut over these ranks: ``weight`` (and ``bias``) is this rank's slice, the
            ranks' slices in order make up the whole, of equal or unequal sizes. x, target, seed and the settings
            are the same on all ranks, and so are all outputs: those of the whole weight, the drawn token too
            (a seed of ``None`` needs equal generators for that). Targets and tokens are of the whole
            vocabulary. The backward sums dx over the ranks and must run on all of them. One integer and then
            O(N) numbers a rank are exchanged, which ``torch.compile(fullgraph=True)`` cannot trace.
        backend: ``"triton"``, ``"torch"``, ``"reference"`` or ``None`` (see ``refine_kernels.dispatch``). float64
            takes the PyTorch path in place of Triton; the reference knows no process group.

    Returns:
        The loss, a scalar or ``[...]``; with ``return_entropy`` the pair (loss, entropy ``[...]``). float32
        (float64 for float64 inputs). Autocast as in ``linear_logprob``.

    Raises:
        ValueError: an argument has a wrong type, shape, device or value.
    """
    _check_head(x, weight, bias, logit_softcap)
    group, V = _vocabulary(weight, process_group)
    _check_target(target, x)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if row_weight is not None:
        _check_row_weight(row_weight, x)
    x, weight, bias = autocast(x, weight, bias)

    backend = _backend(backend, x, weight, bias, group)
    _check_target_values(target, V, ignore_index, backend, group)
    if backend == "reference":
        return reference.linear_cross_entropy(
            x, weight, target, reduction=reduction, ignore_index=ignore_index, row_weight=row_weight,
            return_entropy=return_entropy, bias=bias, logit_softcap=logit_softcap,
        )  # fmt: skip
    leading = x.shape[:-1]
    rows, y = _rows(x), target.reshape(-1).long()
    dtype = accumulation_dtype(x, weight)
    scale = torch.ones_like(y, dtype=dtype) if row_weight is None else row_weight.reshape(-1).to(dtype)  # [N]

    if reduction == "mean":
        scale = scale / (y != ignore_index).sum().clamp_min(1)
    if reduction == "none" or group is not None:
        # The upstream gradient is one number per row, or the row is not known before the ranks have exchanged
        # what they have of it: the general path.
        logprob, entropy, _, _ = _linear_logprob(
            rows, weight, bias, y, None, 1.0, logit_softcap, ignore_index, return_entropy, group is not None, False,
            backend, *_named(group),
        )  # fmt: skip
        loss = -(logprob * scale)
        loss = loss.view(leading) if reduction == "none" else loss.sum()
    else:
        grad = torch.is_grad_enabled()
        loss, entropy, _, _, _ = _dense_cross_entropy(
            rows, weight, bias, y, scale, logit_softcap, ignore_index, return_entropy,
            grad and x.requires_grad, grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad, backend,
        )  # fmt: skip
    return (loss, entropy.detach().view(leading)) if return_entropy else loss


# ---- the general path as a custom op ---------------------------------------------------------------------


class LogprobCall(NamedTuple):
    """The arguments of the general path."""

    x: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    target: torch.Tensor | None  # [N]
    seed: torch.Tensor | None  # [N]
    temperature: float
    softcap: float | None
    ignore_index: int
    need_entropy: bool
    need_lse: bool  # beside a group always
    sample: bool
    backend: str = "torch"
    group: str = ""
    group_start: int = 0


class LogprobBackwardCall(NamedTuple):
    """The arguments of its backward."""

    x: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    target: torch.Tensor | None  # [N]
    entropy: torch.Tensor | None  # [N]
    lse: torch.Tensor | None  # [N]
    grad_logprob: torch.Tensor | None  # [N]
    grad_entropy: torch.Tensor | None  # [N]
    grad_lse: torch.Tensor | None  # [N]
    temperature: float
    softcap: float | None
    ignore_index: int
    need_x: bool
    need_weight: bool
    need_bias: bool
    backend: str
    group: str
    group_start: int


def _fake_logprob(call: LogprobCall) -> tuple[torch.Tensor, ...]:
    N, dtype = call.x.shape[0], accumulation_dtype(call.x, call.weight)
    needs = (call.target is not None or call.sample, call.need_entropy, call.need_lse)
    values = (call.x.new_empty(N if need else 0, dtype=dtype) for need in needs)
    return (*values, call.x.new_empty(N if call.sample else 0, dtype=torch.int64))


@custom_op("linear_logprob", LogprobCall, "(Tensor, Tensor, Tensor, Tensor)", _fake_logprob)
def _linear_logprob(call: LogprobCall) -> tuple[torch.Tensor, ...]:
    """Log-prob, entropy, lse, token: ``[N]``, or ``[0]`` where not needed."""
    path = _path(call.backend)
    return path.forward(
        call.x,
        path.head_of(call.x, call.weight, call.bias, call.softcap, call.temperature or 1.0),
        call.target,
        call.seed,
        ignore_index=call.ignore_index,
        need_logprob=call.target is not None or call.sample,
        need_entropy=call.need_entropy,
        need_lse=call.need_lse,
        sample=call.sample,
        greedy=call.temperature == 0,
        group=_group(call.group, call.group_start),
    )


def _fake_logprob_backward(call: LogprobBackwardCall) -> tuple[torch.Tensor, ...]:
    x, weight, bias = call[:3]
    bias_dtype = accumulation_dtype(x, weight) if bias is None else bias.dtype
    return (
        x.new_empty(x.shape if call.need_x else 0),
        weight.new_empty(weight.shape if call.need_weight else 0),
        weight.new_empty(weight.shape[0] if call.need_bias else 0, dtype=bias_dtype),
    )


@custom_op("linear_logprob_backward", LogprobBackwardCall, "(Tensor, Tensor, Tensor)", _fake_logprob_backward)
def _linear_logprob_backward(call: LogprobBackwardCall) -> tuple[torch.Tensor, ...]:
    """dx ``[N, D]``, dW ``[V, D]``, db ``[V]``, dtypes of x, weight and bias; ``[0]`` where not needed."""
    x, weight, bias, grad_logprob = *call[:3], call.grad_logprob
    if grad_logprob is None:
        grad_logprob = x.new_zeros(x.shape[0], dtype=accumulation_dtype(x, weight))
    path = _path(call.backend)
    gradients = path.backward(
        x,
        path.head_of(x, weight, bias, call.softcap, call.temperature or 1.0),
        call.target,
        chunked.Upstream(grad_logprob, call.grad_entropy, call.grad_lse, call.entropy),
        ignore_index=call.ignore_index,
        needs=(call.need_x, call.need_weight, call.need_bias),
        lse=call.lse,
        group=_group(call.group, call.group_start),
    )
    bias_dtype = gradients.bias.dtype if bias is None else bias.dtype
    return gradients.x.to(x.dtype), gradients.weight.to(weight.dtype), gradients.bias.to(bias_dtype)


def _save_logprob(ctx, call: LogprobCall, output: tuple[torch.Tensor, ...]) -> None:
    _, entropy, lse, token = output
    y = token if call.target is None and call.sample else call.target
    entropy, lse = entropy if call.need_entropy else None, lse if call.group else None
    ctx.save_for_backward(*call[:3], y, entropy, lse)
    ctx.asked = (y is not None, call.need_entropy, call.need_lse)
    ctx.settings = (call.temperature, call.softcap, call.ignore_index)
    ctx.where = (call.backend, call.group, call.group_start)


def _logprob_gradients(ctx, grad_logprob, grad_entropy, grad_lse, _) -> dict[str, torch.Tensor]:
    upstream = (g if asked else None for g, asked in zip((grad_logprob, grad_entropy, grad_lse), ctx.asked))
    needs = ctx.needs_input_grad[:3]
    gradients = _linear_logprob_backward(*ctx.saved_tensors, *upstream, *ctx.settings, *needs, *ctx.where)
    return {name: g for name, g, need in zip(LogprobCall._fields, gradients, needs) if need}


differentiate(_linear_logprob, LogprobCall, _save_logprob, _logprob_gradients)


# ---- the dense path as a custom op -----------------------------------------------------------------------


class DenseCall(NamedTuple):
    """The arguments of the dense path."""

    x: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    target: torch.Tensor  # [N]
    row_scale: torch.Tensor  # [N]
    softcap: float | None
    ignore_index: int
    need_entropy: bool
    need_x: bool
    need_weight: bool
    need_bias: bool
    backend: str = "torch"


def _fake_dense(call: DenseCall) -> tuple[torch.Tensor, ...]:
    x, weight = call[:2]
    shapes = [(), x.shape[:1], x.shape, weight.shape, weight.shape[:1]]
    needed = [True, call.need_entropy, call.need_x, call.need_weight, call.need_bias]
    dtype = accumulation_dtype(x, weight)
    return tuple(x.new_empty(shape if need else 0, dtype=dtype) for shape, need in zip(shapes, needed))


@custom_op("dense_cross_entropy", DenseCall, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_dense)
def _dense_cross_entropy(call: DenseCall) -> tuple[torch.Tensor, ...]:
    """Loss ``[]``, entropy ``[N]``, and the loss's dx, dW, db, float32 (float64); ``[0]`` where not needed.

    The gradients stay float32 until the backward has multiplied them by the upstream scalar: rounded once,
    and a loss scale for float16 still finds what is below float16's range.
    """
    path = _path(call.backend)
    loss, entropy, gradients = path.loss_and_gradients(
        call.x,
        path.head_of(call.x, call.weight, call.bias, call.softcap),
        call.target,
        call.row_scale,
        ignore_index=call.ignore_index,
        need_entropy=call.need_entropy,
        needs=(call.need_x, call.need_weight, call.need_bias),
    )
    return loss, entropy, gradients.x, gradients.weight, gradients.bias


def _save_dense(ctx, call: DenseCall, output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if x is None else x.dtype for x in call[:3]]


def _dense_gradients(ctx, grad_loss, *_) -> dict[str, torch.Tensor]:
    if grad_loss is None:
        return {}
    inputs = zip(DenseCall._fields, ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3])
    return {
        name: torch.mul(gradient, grad_loss, out=torch.empty_like(gradient, dtype=dtype))
        for name, gradient, dtype, need in inputs
        if need
    }


differentiate(_dense_cross_entropy, DenseCall, _save_dense, _dense_gradients)


# ---- paths and groups ------------------------------------------------------------------------------------


def _backend(
    backend: str | None,
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    group: VocabGroup | None,
) -> str:
    """``"triton"``, ``"torch"`` or ``"reference"``."""
    backend = choose_backend(backend, accumulation_dtype(x, weight), x, weight, bias)
    if backend == "reference" and group is not None:
        raise ValueError("backend must be 'triton' or 'torch' beside a process_group, got 'reference'")
    return backend


def _path(backend: str) -> ModuleType:
    """The module that computes: ``head_of``, ``forward``, ``backward`` and ``loss_and_gradients``."""
    if backend == "torch":
        return chunked
    from refine_kernels.linear_logprob import fused  # here: not everybody has Triton

    return fused


def _vocabulary(
    weight: torch.Tensor,  # [V, D]
    process_group: torch.distributed.ProcessGroup | None,
) -> tuple[VocabGroup | None, int]:
    """Where this rank's slice begins, and the size of the whole vocabulary."""
    if process_group is None:
        return None, weight.shape[0]
    starts = vocab_slices(process_group, weight.shape[0], weight.device)
    return VocabGroup(process_group.group_name, starts[process_group.rank()]), starts[-1]


def _named(group: VocabGroup | None) -> tuple[str, int]:
    """The group as a custom op takes it."""
    return ("", 0) if group is None else tuple(group)


def _group(name: str, start: int) -> VocabGroup | None:
    return VocabGroup(name, start) if name else None


# ---- arguments -------------------------------------------------------------------------------------------


def _rows(
    x: torch.Tensor,  # [..., D]
) -> torch.Tensor:  # [N, D]
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_head(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    logit_softcap: float | None,
) -> None:
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"x must be a floating-point tensor [..., D], got {_described(x)}")
    if not weight.is_floating_point() or weight.ndim != 2 or weight.shape[0] < 1:
        raise ValueError(
            f"weight must be a floating-point tensor [V, D] with V >= 1, got {_described(weight)}"
        )
    if hasattr(weight, "placements"):  # its local part alone would give the entropy of a slice
        raise ValueError(
            f"weight must be a plain tensor, got a DTensor {list(weight.shape)}: give weight.to_local() and, "
            "where V is cut, its process_group"
        )
    V, D = weight.shape
    if x.shape[-1] != D:
        raise ValueError(f"x must end in D = {D} like weight [V, D] = {[V, D]}, got {_described(x)}")
    _check_device("weight", weight, x)
    if bias is not None:
        if not bias.is_floating_point() or bias.shape != (V,):
            raise ValueError(f"bias must be a floating-point tensor [V] = {[V]}, got {_described(bias)}")
        _check_device("bias", bias, x)
    if logit_softcap is not None and not 0 < logit_softcap < math.inf:
        raise ValueError(f"logit_softcap must be a positive number or None, got {logit_softcap!r}")


def _check_temperature(temperature: float, sample: bool) -> None:
    if isinstance(temperature, torch.Tensor) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number >= 0, got {temperature!r}")
    if temperature == 0 and not sample:
        raise ValueError("temperature must be > 0 unless sample=True (0 means greedy sampling), got 0")


def _check_target(
    target: torch.Tensor,  # [...]
    x: torch.Tensor,  # [..., D]
) -> None:
    if target.dtype not in (torch.int64, torch.int32) or target.shape != x.shape[:-1]:
        raise ValueError(
            f"target must be an int64 or int32 tensor {list(x.shape[:-1])}, the leading shape of x, "
            f"got {_described(target)}"
        )
    _check_device("target", target, x)


def _check_target_values(
    target: torch.Tensor,  # [...]
    V: int,
    ignore_index: int,
    backend: str,
    group: VocabGroup | None,
) -> None:
    """Not where it would make the host wait for a GPU, unless asked for: the kernels give such a row nan. Beside a
    group the host has waited already, and over slices only this tells who holds a target."""
    if torch.compiler.is_compiling() or target.is_meta:  # no values
        return
    asked = os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")
    if target.is_cuda and backend == "triton" and group is None and not asked:
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= V))
    if wrong.any():
        hint = " (is weight a slice of the vocabulary? Then give its process_group)" if group is None else ""
        raise ValueError(
            f"target must be in [0, {V}) or ignore_index = {ignore_index}, got {target[wrong][0].item()}{hint}"
        )


def _check_seed(
    seed: int | torch.Tensor | None,  # [...] when a tensor
    x: torch.Tensor,  # [..., D]
) -> None:
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.shape != x.shape[:-1]:
            raise ValueError(
                f"seed must be an int or an int64 tensor {list(x.shape[:-1])}, the leading shape of x, "
                f"got {_described(seed)}"
            )
        _check_device("seed", seed, x)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")


def _check_row_weight(
    row_weight: torch.Tensor,  # [...]
    x: torch.Tensor,  # [..., D]
) -> None:
    if not row_weight.is_floating_point() or row_weight.shape != x.shape[:-1]:
        raise ValueError(
            f"row_weight must be a floating-point tensor {list(x.shape[:-1])}, the leading shape of x, "
            f"got {_described(row_weight)}"
        )
    if row_weight.requires_grad:
        raise ValueError(
            "row_weight must be a constant, got a tensor that requires a gradient: "
            "take reduction='none' and multiply the losses yourself"
        )
    _check_device("row_weight", row_weight, x)


def _check_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
