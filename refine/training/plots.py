"""The pictures of a run, drawn from its metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refine.pictures import import_pyplot
from refine.training.tracking import read_metrics

_INK, _PALE, _SECOND = "#1f4e79", "#9dbbd8", "#c0504d"


def draw_plots(output_dir: Path) -> list[Path]:
    """Draw ``loss.png`` and, where there were rollouts, ``reward.png``; returns what was drawn.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a picture cannot be written.
    """
    plt = import_pyplot()
    lines = read_metrics(output_dir / "metrics.jsonl")
    drawn = []
    reward = ("reward", "cosine", "eval_cosine", "cosine reward of rollouts")
    if not any("cosine" in line for line in lines):  # phase grpo
        reward = ("reward", "reward", "eval_reward", "reward of completions")
    for name, train_key, eval_key, label in (
        ("loss", "ntp_loss", "eval_loss", "next-token loss (nats)"),
        reward,
    ):
        train = [(line["step"], line[train_key]) for line in lines if line.get(train_key) is not None]
        held_out = [(line["step"], line[eval_key]) for line in lines if line.get(eval_key) is not None]
        if len(train) < 2:
            continue
        figure, axes = plt.subplots(figsize=(7, 3.6), dpi=140)
        steps, values = zip(*train)
        axes.plot(steps, values, color=_PALE, linewidth=1, label="each update")
        axes.plot(steps, running_mean(values), color=_INK, linewidth=2, label="running mean")
        if held_out:
            axes.plot(*zip(*held_out), "o--", color=_SECOND, linewidth=1, label="held out")
        axes.set_xlabel("update")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(output_dir / f"{name}.png")
        plt.close(figure)
        drawn.append(output_dir / f"{name}.png")
    return drawn


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a tenth of the run, corrected for its start."""
    keep = 1 - 1 / max(2.0, len(values) / 10)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out
