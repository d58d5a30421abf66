"""The one policy for dtypes, for every op and every backend.

*Inputs* are float32, bfloat16, float16 or float64. *Arithmetic*, states and what an op adds up are float32, or
float64 as soon as one input is float64. *float64* is for checking numbers: every op computes it in PyTorch, also
where ``backend="triton"`` is asked for. *Autocast* brings an op's main inputs to its dtype, as a matrix product
does, and leaves float64 alone; inside an op it is off. *Meta* tensors have no autocast, as everywhere in PyTorch.
"""

from __future__ import annotations

import contextlib

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(*inputs: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 when any input is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32


def autocast(*inputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The inputs in the autocast dtype of their device, where autocast is on."""
    device = inputs[0].device.type
    if not _autocast_is_on(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    stays = lambda x: x is None or x.dtype == torch.float64 or not x.is_floating_point()  # noqa: E731
    return tuple(x if stays(x) else x.to(dtype) for x in inputs)


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast is off inside: an op's arithmetic chooses its own dtypes."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocast_is_on(device) else contextlib.nullcontext()


def check_float(name: str, x: torch.Tensor) -> None:
    """One of the dtypes that the main inputs of an op may have."""
    if x.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise ValueError(f"{name} must have one of the dtypes {allowed}, got {x.dtype}")


def _autocast_is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)
