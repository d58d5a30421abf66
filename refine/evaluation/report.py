"""What an evaluation leaves to look at: a table on the screen, results.json, and a picture of the needles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine.evaluation.metrics import found_in, interval_of_mean, wilson_interval
from refine.evaluation.settings import GROUPS
from refine.pictures import import_pyplot

_DEPTH_BINS = 10
_AVERAGES = ("niah_single", "niah_multikey", "longbench")


@dataclass(frozen=True)
class Score:
    """The mean over the samples of one task and length, or a plain mean of several of these."""

    task: str
    length: int | None
    score: float
    interval: tuple[float, float]
    samples: int
    cut_prompts: int = 0
    not_trained: int = 0  # prompts too short for the step of test-time training
    mean_prompt_tokens: float | None = None

    @property
    def name(self) -> str:
        return self.task if self.length is None else f"{self.task}_{self.length}"


def score_predictions(lines: Iterable[dict[str, Any]], trained: bool) -> list[Score]:
    """Scores by task and length, in the order in which they first appear."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["task"], line["length"]), []).append(line)
    return [
        Score(
            task=task,
            length=length,
            score=(mean := math.fsum(line["score"] for line in group) / len(group)),
            interval=wilson_interval(min(1.0, mean), len(group)),
            samples=len(group),
            cut_prompts=sum(line["cut"] for line in group),
            not_trained=sum(not line["trained"] for line in group) if trained else 0,
            mean_prompt_tokens=math.fsum(line["prompt_tokens"] for line in group) / len(group),
        )
        for (task, length), group in groups.items()
    ]


def average_scores(scores: Sequence[Score]) -> list[Score]:
    """Plain means: of each task over its lengths, and of a family of tasks where all of them were measured at the
    same lengths (``niah_single`` and ``niah_multikey``, three tasks each; ``longbench``, the 12 of its average)."""
    averages = []
    by_task: dict[str, list[Score]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    for task, own in by_task.items():
        if len(own) > 1:
            averages.append(_average(f"{task}_mean", own))
    for family in _AVERAGES:
        own = [score for score in scores if score.task in GROUPS[family]]
        lengths = [{score.length for score in own if score.task == task} for task in GROUPS[family]]
        if own and all(found == lengths[0] for found in lengths):
            averages.append(_average(f"{family}_mean", own))
    return averages


def _average(name: str, scores: list[Score]) -> Score:
    means = [score.score for score in scores]
    return Score(
        task=name,
        length=None,
        score=math.fsum(means) / len(means),
        interval=interval_of_mean(means, [score.interval for score in scores]),
        samples=sum(score.samples for score in scores),
        cut_prompts=sum(score.cut_prompts for score in scores),
        not_trained=sum(score.not_trained for score in scores),
    )


def table(scores: Sequence[Score], averages: Sequence[Score]) -> list[str]:
    """One line a task, one column a length, in percent with the 95 % interval."""
    lengths = sorted({score.length for score in scores if score.length is not None})
    columns: list[int | None] = [*([None] if any(s.length is None for s in scores) else []), *lengths]
    means = {average.task: average for average in averages}
    tasks = list(dict.fromkeys(score.task for score in scores))
    families = [average for average in averages if average.task.removesuffix("_mean") not in tasks]
    width = max(len(name) for name in [*tasks, *(average.task for average in families), "score in %"]) + 2
    titles = ["all" if column is None else f"{column:,}" for column in columns] + ["mean", "samples"]
    lines = ["score in %".ljust(width) + "".join(f"{title:>21}" for title in titles)]
    for task in tasks:
        own = {score.length: score for score in scores if score.task == task}
        cells = [_cell(own.get(column)) for column in columns]
        cells.append(_cell(means.get(f"{task}_mean")))
        cells.append(f"{sum(score.samples for score in own.values()):,}")
        lines.append(task.ljust(width) + "".join(f"{cell:>21}" for cell in cells))
    for average in families:
        cells = [""] * len(columns) + [_cell(average), f"{average.samples:,}"]
        lines.append(average.task.ljust(width) + "".join(f"{cell:>21}" for cell in cells))
    return lines


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    low, high = score.interval
    return f"{100 * score.score:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def score_records(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For results.json."""
    return [asdict(score) for score in scores]


def describe_model(model) -> dict[str, Any]:
    """What says which model a number is of: its type, sizes and number of parameters (shared ones once)."""
    config = model.config
    sizes = {name: getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    return {
        "model_type": config.model_type,
        **sizes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class NeedleShares(NamedTuple):
    """How many needles of a task were found."""

    lengths: list[int]  # of prompts, in tokens
    share: np.ndarray  # [depth bins, lengths] float64, in percent; NaN where no needle lay


def needle_shares(lines: Iterable[dict[str, Any]]) -> dict[str, NeedleShares]:
    """The share of needles found by the prompt's length and the needle's depth in tenths, of each needle task.

    Args:
        lines: of predictions.jsonl.
    """
    panels: dict[str, dict[int, list[tuple[float, bool]]]] = {}
    for line in lines:
        if line["depths"] is not None:
            found = found_in(line["prediction"], line["references"])
            panels.setdefault(line["task"], {}).setdefault(line["length"], []).extend(
                zip(line["depths"], found)
            )
    shares = {}
    for task, by_length in panels.items():
        lengths = sorted(by_length)
        share = np.full((_DEPTH_BINS, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            for depth_bin in range(_DEPTH_BINS):
                own = [ok for depth, ok in by_length[length] if _bin(depth) == depth_bin]
                if own:
                    share[depth_bin, column] = 100 * sum(own) / len(own)
        shares[task] = NeedleShares(lengths, share)
    return shares


def draw_heat_maps(lines: Iterable[dict[str, Any]], path: Path) -> bool:
    """A panel a needle task: :func:`needle_shares`.

    Returns whether there was anything to draw, and matplotlib to draw it with.
    """
    try:
        plt = import_pyplot()
    except ImportError:
        return False
    panels = needle_shares(lines)
    if not panels:
        return False
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(1 + 3.1 * across, 0.4 + 3.1 * down),
        dpi=140,
        squeeze=False,
        layout="constrained",
    )
    image = None
    for panel, (task, (lengths, share)) in zip(axes.flat, panels.items()):
        image = panel.imshow(share, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
        panel.set_title(task, fontsize=9)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        panel.set_yticks(
            np.arange(0, _DEPTH_BINS + 1, 2) - 0.5, [f"{10 * i} %" for i in range(0, 11, 2)], fontsize=7
        )
        panel.set_facecolor("#d9d9d9")  # no needle of that depth
        for (row, column), value in np.ndenumerate(share):
            if not np.isnan(value):
                ink = "white" if value > 60 else "black"
                panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=ink)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    figure.supxlabel("tokens of the prompt and the answer", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, label="needles found (%)", shrink=0.8)
    figure.savefig(path)
    plt.close(figure)
    return True


def _bin(depth: float) -> int:
    return min(_DEPTH_BINS - 1, int(depth * _DEPTH_BINS / 100))
