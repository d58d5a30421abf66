"""The one place that chooses a backend, and refuses what no backend computes.

``"reference"``  plain, sequential PyTorch: the definition.
``"torch"``      chunkwise PyTorch with a hand-written backward: the fast path on a CPU.
``"triton"``     the kernels: the fast path on a GPU; under ``TRITON_INTERPRET=1`` also on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

BACKENDS = ("triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "REFINE_KERNELS_BACKEND"

_interpreter_computes_bfloat16 = False


def interpreter_computes_bfloat16(right: bool) -> None:
    """Say whether bfloat16 may run in Triton's interpreter.

    The interpreter that comes with Triton computes on bfloat16's bit patterns, so bfloat16 is refused there. Who
    installs one that is right (a test tool that patches it, say) calls this with ``True``, and with ``False`` when
    it is taken out again.
    """
    global _interpreter_computes_bfloat16
    _interpreter_computes_bfloat16 = right


def choose_backend(
    backend: str | None,
    arithmetic: torch.dtype,
    *inputs: torch.Tensor | None,
    available: Sequence[str] = BACKENDS,
) -> str:
    """The backend to run: the caller's choice, else the environment's, else what suits the first tensor's device.

    float64 is computed in PyTorch whatever is asked for (:mod:`refine_kernels.precision`). Tensors on the meta
    device take any backend: shapes are all that is worked out.

    Args:
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` to let this function choose.
        arithmetic: the dtype of the op's arithmetic, float32 or float64.
        inputs: the op's tensors, ``None`` where one is not given.
        available: the backends that this op has.

    Raises:
        ValueError: the backend asked for is unknown, is not available for this op, or cannot run on this
            device, or the tensors are bfloat16 and Triton's interpreter would run them.
        NotImplementedError: a tensor carries a tangent of forward-mode AD and the backend is not ``"reference"``.
    """
    tensors = [x for x in inputs if x is not None]
    device = tensors[0].device.type
    asked_by = "backend"
    if backend is None and (backend := os.environ.get(ENVIRONMENT_VARIABLE)):
        asked_by = ENVIRONMENT_VARIABLE
    if backend is None:
        wants_triton = device == "cuda" or (_interpreting() and device != "meta")
        backend = "triton" if wants_triton and "triton" in available else "torch"
    elif backend not in available:
        raise ValueError(f"{asked_by} must be one of {', '.join(available)} or None here, got {backend!r}")
    elif backend == "triton" and device not in ("cuda", "meta") and not _interpreting():
        raise ValueError(
            f"{asked_by} is 'triton' but the tensors are on {device}: "
            "move them to a GPU, or set TRITON_INTERPRET=1 before importing triton"
        )
    if backend == "triton" and arithmetic == torch.float64:
        backend = "torch"
    if backend == "triton" and _interpreting() and not _interpreter_computes_bfloat16:
        _refuse_bfloat16(tensors)
    if backend != "reference" and not torch.compiler.is_compiling() and _forward_mode():
        _refuse_tangents(tensors, backend)
    return backend


def _refuse_bfloat16(tensors: list[torch.Tensor]) -> None:
    if any(x.dtype == torch.bfloat16 for x in tensors):
        raise ValueError(
            "bfloat16 cannot run under TRITON_INTERPRET=1, whose arithmetic on it is wrong: "
            "use float32 or float16, or backend='torch'"
        )


def _refuse_tangents(tensors: list[torch.Tensor], backend: str) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "forward-mode AD (torch.func.jvp, torch.autograd.forward_ad) has no formula in backend "
            f"{backend!r}: use reverse mode, or backend='reference'"
        )


def _forward_mode() -> bool:
    """Whether a dual level is open; asking every tensor takes as long as the rest of this file."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
