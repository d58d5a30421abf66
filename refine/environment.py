"""What numbers were made with: the machine, the device, the packages."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("refine-fast-weights", "torch", "transformers", "tokenizers", "triton", "flash-linear-attention")


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_machine(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """The machine as a run finds it, for JSON.

    Args:
        device: that the model is on.
        processes: that train together.
    """
    found: dict[str, Any] = {"device": str(device), "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    found |= {"processor": _processor(), "threads": torch.get_num_threads(), "processes": processes}
    if backend := os.environ.get("REFINE_KERNELS_BACKEND"):
        found["REFINE_KERNELS_BACKEND"] = backend
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")
