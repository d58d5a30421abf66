"""The pictures of a run, drawn from its metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refine.pictures import import_pyplot
from refine.training.tracking import read_metrics

_INK, _PALE, _SECOND = "#1f4e79", "#9dbbd8", "#c0504d"


def draw_plots(output_dir: Path) -> list[Path]:
    """Draw ``loss.png``, ``reward.png`` where there were rollouts, and ``held_out_reward.png`` where held-out text
    was measured three times or more; returns what was drawn.

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
        axes.set_ylabel(label)
        axes.legend(frameon=False)
        drawn.append(_save(plt, figure, output_dir / f"{name}.png"))
    measured = [line for line in lines if len(line.get("eval_cosine_by_sequence") or []) > 1]
    if len(measured) > 2:
        figure = _draw_changes(plt, measured)
        drawn.append(_save(plt, figure, output_dir / "held_out_reward.png"))
    return drawn


def _draw_changes(plt, measured: list[dict]):
    """The held-out reward against that of the first evaluation. The rollouts are at the same places of the same
    sequences each time, so the spread is that of the sequences' differences."""
    each = np.array(
        [line["eval_cosine_by_sequence"] for line in measured], dtype=float
    )  # [points, sequences]
    change = each - each[0]
    spread = 1.96 * change.std(1, ddof=1) / each.shape[1] ** 0.5
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=140)
    steps = [line["step"] for line in measured]
    axes.axhline(0, color=_PALE, linewidth=1)
    axes.errorbar(steps, change.mean(1), spread, fmt="o-", color=_INK, linewidth=2, capsize=3)
    axes.set_ylabel("change of the held-out cosine reward")
    axes.set_title(f"{each.shape[1]} sequences, 95 % intervals; {each[0].mean():.3f} before", fontsize=9)
    return figure


def _save(plt, figure, path: Path) -> Path:
    figure.axes[0].set_xlabel("update")
    figure.axes[0].spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a tenth of the run, corrected for its start."""
    keep = 1 - 1 / max(2.0, len(values) / 10)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out
