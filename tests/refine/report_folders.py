"""Folders of runs and evaluations as training and evaluation write them, made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

NASTY = '<script>alert("1")</script> & $x_1$'


def lines_of(updates: int, held_out_every: int = 0) -> list[dict[str, Any]]:
    """Metrics of so many updates, with an evaluation before and after."""

    def evaluated(step: int) -> dict[str, Any]:
        loss = 3.6 - 0.001 * step / max(1, updates)
        ends = {"eval_loss_low": loss - 0.2, "eval_loss_high": loss + 0.2}
        return {"step": step, "eval_loss": loss, "eval_cosine": 0.3, "eval_sequences": 4} | ends

    lines = [evaluated(0)]
    for step in range(1, updates + 1):
        lines.append(
            {
                "step": step,
                "loss": 3.5 + math.sin(1.7 * step) / step,
                "ntp_loss": 3.4 + math.sin(1.7 * step) / step,
                "reward": 0.3 + 0.1 * math.cos(step),
                "cosine": 0.3 + 0.1 * math.cos(step),
                "entropy": 3.9,
                "chosen_entropy": 4.5 + 0.1 * math.sin(step),
                "grad_norm": 1.5 + 100.0 * (step == 7),
                "tokens": 4096,
                "tokens_per_second": 2000.0 + step,
                "total_tokens": 4096 * step,
                "skipped_updates": 0,
            }
        )
        if held_out_every and step % held_out_every == 0 and step < updates:
            lines.append(evaluated(step))
    return [*lines, evaluated(updates)]


def document(kind: str, step: int, tokens: int = 60, first_token: str = "Once") -> dict[str, Any]:
    """A sample with a rollout at token 20 and one at token 40."""
    rollouts = [
        {
            "position": position,
            "entropy": 4.5,
            "percentile": 91.0,
            "tokens": [" a", " b", "\n"],
            "truth": [" a", " c", "\n"],
            "match": [True, False, True],
            "similarity": [1.0, 0.25, 1.0],
            "reward": 0.75 - 0.001 * step,
            "advantage": -0.00001,
            "cosine": 0.75,
            "exact_match": 0.66667,
        }
        for position in (20, 40)
    ]
    texts = [first_token, *(f" w{number}" for number in range(1, tokens))]
    entropy = [None, *(round(5.0 * number / tokens, 3) for number in range(1, tokens))]
    stretches = [{"first": 0, "tokens": texts, "entropy": entropy}]
    about = {"step": step, "kind": kind, "length": tokens, "mean_entropy": 2.5}
    return about | {"stretches": stretches, "rollouts": rollouts}


def write_run(path: Path, updates: int = 30, **settings: Any) -> Path:
    """A run's folder without samples, of the default job but for ``settings``."""
    path.mkdir(parents=True)
    written = {"phase": "mid", "max_steps": updates, "learning_rate": 1e-4, "reward": "cosine", "seed": 0}
    (path / "config.yaml").write_text(yaml.safe_dump(written | settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(updates)))
    return path


def add_samples(path: Path, *documents: dict[str, Any]) -> None:
    """Documents into a run's folder."""
    (path / "samples").mkdir(exist_ok=True)
    for one in documents:
        (path / "samples" / f"{one['kind']}-{one['step']:06d}.json").write_text(json.dumps(one))


def write_evaluation(path: Path) -> Path:
    """An evaluation of needles: found at 1,024 tokens, and at 2,048 in the first half alone."""
    path.mkdir(parents=True)
    lines = [
        {
            "key": f"{length}/{depth}",
            "task": "niah_single_1",
            "length": length,
            "score": float(found),
            "prediction": "It is 4711." if found else "?",
            "references": ["4711"],
            "depths": [float(depth)],
        }
        for length in (1024, 2048)
        for depth in range(0, 101, 5)
        for found in [length == 1024 or depth < 50]
    ]
    (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "results": {"niah_single_1_1024": 1.0, "eval_loss": 3.5},
        "intervals": {"eval_loss": [3.4, 3.6]},
    }
    (path / "results.json").write_text(json.dumps(results | {"settings": {}, "versions": {}}))
    return path
