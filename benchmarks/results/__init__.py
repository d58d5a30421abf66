"""Results: one JSON a measurement, machine and date; appended, never edited."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


def record(kind: str, table: Any, **about: Any) -> str:
    """Append a results file; its path from the project's root.

    Args:
        kind: ``step_cost``, ``ratios`` or ``gpu``: what ``benchmarks.report`` finds it by.
        table: the measurements.
        **about: what else a reader must know (the model, the shapes).
    """
    now = datetime.datetime.now(datetime.UTC)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contents = {
        "kind": kind,
        **about,
        "date": now.date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "table": table,
    }
    name = "_".join([kind, *(str(value) for key, value in about.items() if key == "name"), device])
    path = FOLDER / f"{name}_{now:%Y%m%d_%H%M}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return f"benchmarks/results/{path.name}"


def read(kind: str, device: str | None = None) -> list[tuple[str, dict]]:
    """All files of a kind, oldest first, with their paths from the project's root."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        contents = json.loads(path.read_text())
        # the first file was written before files named their kind
        if contents.get("kind", "step_cost") == kind and (device is None or f"_{device}_" in path.name):
            found.append((f"benchmarks/results/{path.name}", contents))
    return sorted(found, key=lambda pair: pair[0].rsplit("_", 2)[-2:])


def machine() -> dict[str, Any]:
    """Processor, threads, load, and the GPU if there is one."""
    about: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return about


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    from importlib import metadata

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "flash-linear-attention", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
