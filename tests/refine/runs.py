"""Very small runs for the tests of reliability."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import refine.train as training
from refine.training.tracking import read_metrics

SMALL = {
    "model_type": "delta_net",
    "config_overrides": "hidden_size=16,num_hidden_layers=1,num_heads=2,intermediate_size=24",
    "max_length": 200,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "eval_samples": 0,
    "save_steps": 2,
    "save_total_limit": "none",
    "sample_steps": 0,
    "shuffle_buffer": 8,
}


def write_text(path: Path, word: str = "grass", rows: int = 30) -> Path:
    """Documents of a few hundred tokens each."""
    texts = (f"Document {i}. " + f"The {word} is green and the sky is blue. " * (20 + i) for i in range(rows))
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def arguments(output_dir: Path, data: Path, **changes) -> list[str]:
    """The command line of a small run."""
    settings = SMALL | {"output_dir": output_dir, "dataset_name_or_path": data} | changes
    return [
        part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))
    ]


def run(output_dir: Path, data: Path, **changes) -> int:
    """A small run in this process; its exit code."""
    return training.main(arguments(output_dir, data, **changes))


def checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints in a folder."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def steps(folder: Path) -> list[int]:
    """The step of every line of metrics."""
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder."""
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Bit for bit."""
    expected = weights(other)
    return all(torch.equal(value, expected[name]) for name, value in weights(one).items())


def spoil_weights(folder: Path) -> None:
    """One NaN, and no checksums that could tell."""
    found = weights(folder)
    next(iter(found.values())).view(-1)[0] = float("nan")
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "checksums.json").unlink(missing_ok=True)
