"""The one place that chooses a backend.

``"reference"``  plain, sequential PyTorch: the definition.
``"torch"``      chunkwise PyTorch with a hand-written backward: the fast path on a CPU.
``"triton"``     the kernels: the fast path on a GPU; under ``TRITON_INTERPRET=1`` also on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

BACKENDS = ("triton", "torch", "reference")
ENVIRONMENT_VARIABLE = "REFINE_KERNELS_BACKEND"


def choose_backend(backend: str | None, tensor: torch.Tensor, available: Sequence[str] = BACKENDS) -> str:
    """The backend to run: the caller's choice, else the environment's, else what suits the tensor's device.

    Args:
        backend: ``"triton"``, ``"torch"``, ``"reference"``, or ``None`` to let this function choose.
        tensor: the op's first input; its device decides when nobody else does.
        available: the backends that this op has.

    Raises:
        ValueError: the backend asked for is unknown, is not available for this op, or cannot run on this
            device.
    """
    asked_by = "backend"
    if backend is None and (backend := os.environ.get(ENVIRONMENT_VARIABLE)):
        asked_by = ENVIRONMENT_VARIABLE
    if backend is None:
        wants_triton = tensor.device.type == "cuda" or _interpreting()
        return "triton" if wants_triton and "triton" in available else "torch"
    if backend not in available:
        raise ValueError(f"{asked_by} must be one of {', '.join(available)} or None here, got {backend!r}")
    if backend == "triton" and tensor.device.type != "cuda" and not _interpreting():
        raise ValueError(
            f"{asked_by} is 'triton' but the tensors are on {tensor.device.type}: "
            "move them to a GPU, or set TRITON_INTERPRET=1 before importing triton"
        )
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
