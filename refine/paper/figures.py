"""The paper's figures from the files of stages: validation curves, entropies, rewards, ablations, rollouts.

Each function returns what it draws as plain numbers (written beside the picture) and draws it. A picture's
title says which model its numbers are of, and where that is not the paper's.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from refine.evaluation.settings import expand_tasks
from refine.files import write_whole
from refine.paper.rows import Figure, Row, is_papers_model, model_name
from refine.paper.stages import Stage
from refine.paper.tables import Column, describe_row
from refine.pictures import import_pyplot
from refine.training.tracking import read_metrics

_LABELS = {
    "eval_accuracy": "next-token accuracy, validation",
    "eval_loss": "next-token loss, validation (nats)",
}
_SAMPLE = re.compile(
    r"--- position (\d+)  reward (\S+)  advantage (\S+)\ncontext : (.*)\nrollout : (.*)\ntruth   : (.*)\n"
)


def draw_figure(
    figure: Figure, rows: Sequence[Row], root: Path, published: dict[str, Any], about_run: dict[str, Any]
) -> list[Path]:
    """Draw a figure of rows whose stages have run; returns the files written, none where there are no numbers."""
    data, paint = _DRAW[figure.draw](figure, rows, root, published)
    if not data:
        return []
    said = _whose(rows, root)
    record = {"figure": figure.name, **said, **about_run, "data": data}
    path = root / f"{figure.name}.json"
    write_whole(path, json.dumps(record, indent=2) + "\n")
    if paint is None:
        text = f"# {figure.name}: {said['model']}\n\n{_examples(data)}"
        write_whole(root / f"{figure.name}.md", text)
        return [path, root / f"{figure.name}.md"]
    try:
        plt = import_pyplot()
    except ImportError:
        print(
            f"{figure.name}: no picture, matplotlib is not installed (pip install 'refine-fast-weights[plots]')"
        )
        return [path]
    drawn, axes = plt.subplots(figsize=(6, 3.8), dpi=140, layout="constrained")
    paint(axes, data)
    axes.set_title(f"{figure.name}: {said['model']}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)
    drawn.savefig(root / f"{figure.name}.png")
    plt.close(drawn)
    return [path, root / f"{figure.name}.png"]


def _whose(rows: Sequence[Row], root: Path) -> dict[str, Any]:
    """The model that a figure is of, said as what it is."""
    name, first = model_name(rows[0].family), rows[0].stages[0].settings["model_name_or_path"]
    same = _is_papers(rows, root)
    text = name if same else f"{Path(str(first)).name}, not the paper's {name}"
    return {"model": text, "model_path": first, "is_papers_model": same}


def _is_papers(rows: Sequence[Row], root: Path) -> bool:
    """By an evaluation's record, else by the number of parameters of a trained model."""
    for row in rows:
        about = describe_row(row, root)
        if about["is_papers_model"] is not None:
            return about["is_papers_model"]
        for stage in row.training:
            final = stage.folder(root) / "final"
            if (final / "config.json").is_file():
                config = json.loads((final / "config.json").read_text(encoding="utf-8"))
                return is_papers_model(row.family, config.get("model_type"), _parameters(final))
    return False


def _parameters(folder: Path) -> int:
    """Of the weights in a folder, from their headers alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if name != "__metadata__":
                count = 1
                for size in about["shape"]:
                    count *= size
                total += count
    return total


def _curves(figure: Figure, rows: Sequence[Row], root: Path, published) -> tuple[Any, Callable]:
    """Figures 4 and E.1: a measure of the validation text over the tokens trained on."""
    data = {}
    for row in rows:
        tokens, points = 0, []
        for line in read_metrics(row.training[0].folder(root) / "metrics.jsonl"):
            tokens = line.get("total_tokens", tokens)
            if line.get(figure.measure) is not None:
                points.append([tokens, line[figure.measure]])
        if points:
            data[row.label.partition(" + ")[2] or row.label] = points

    def paint(axes, data) -> None:
        for label, points in data.items():
            axes.plot(*zip(*points), "o-", markersize=3, label=label)
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(_LABELS[figure.measure])

    return data, paint


def _entropies(figure: Figure, rows: Sequence[Row], root: Path, published) -> tuple[Any, Callable]:
    """Figure E.2: the mean entropy of the predictions by position."""
    data = []
    path = rows[0].tests[0].folder(root) / "results.json"
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        prefix = "entropy_by_position_"
        found = {
            int(key.removeprefix(prefix)): value for key, value in results.items() if key.startswith(prefix)
        }
        data = [[end, found[end]] for end in sorted(found)]

    def paint(axes, data) -> None:
        axes.plot(*zip(*data), "-")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("position, up to")
        axes.set_ylabel("entropy of the prediction (nats)")

    return data, paint


def _rewards(figure: Figure, rows: Sequence[Row], root: Path, published) -> tuple[Any, Callable]:
    """Figure E.3: mean and variance of the cosine reward by the rollout's length, over the updates of training."""
    data = []
    for row in rows:
        lines = read_metrics(row.training[0].folder(root) / "metrics.jsonl")
        lines = [line for line in lines if line.get("reward_std") is not None]
        if lines:
            mean = statistics.fmean(line["cosine"] for line in lines)
            variance = statistics.fmean(line["reward_std"] ** 2 for line in lines)
            data.append({"k": int(row.name.rpartition("_")[2]), "mean": mean, "variance": variance})

    def paint(axes, data) -> None:
        k = [one["k"] for one in data]
        axes.plot(k, [one["mean"] for one in data], "o-", label="mean")
        axes.plot(k, [one["variance"] for one in data], "s--", label="variance")
        axes.set_xlabel("k, tokens per rollout")
        axes.set_ylabel("cosine reward")

    return sorted(data, key=lambda one: one["k"]), paint


def _ablations(figure: Figure, rows: Sequence[Row], root: Path, published) -> tuple[Any, Callable]:
    """Figure 5: the mean of LongBench's 12 tasks by k and by c, with the paper's numbers where it has some."""
    column = Column("LongBench", tuple(expand_tasks(["longbench"])), (), True)
    data: dict[str, Any] = {}
    for row in rows:
        found = column.of(describe_row(row, root)["scores"])
        theirs = (published.get(row.table, {}).get("rows") or {}).get(row.label)
        name, value = row.label.rpartition(", ")[2].split(" = ")
        data.setdefault(name, []).append(
            {"value": int(value), "ours": found, "paper": theirs and theirs[0], "row": row.name}
        )
    if not any(one["ours"] for points in data.values() for one in points):
        return {}, lambda axes, data: None

    def paint(axes, data) -> None:
        for name, points in data.items():
            ours = [(one["value"], one["ours"]["value"]) for one in points if one["ours"]]
            if ours:
                axes.plot(*zip(*ours), "o-", label=f"{name}, measured here")
            if theirs := [(one["value"], one["paper"]) for one in points if one["paper"] is not None]:
                axes.plot(*zip(*theirs), "x:", label=f"{name}, paper's model and numbers")
        axes.set_xlabel("k: tokens per rollout, c: positions per sequence")
        axes.set_ylabel("LongBench, mean of 12 tasks (%)")

    return data, paint


def _rollouts(figure: Figure, rows: Sequence[Row], root: Path, published) -> tuple[Any, None]:
    """Table F.1: rollouts beside the true continuation, of the highest, the middle and the lowest rewards."""
    found = read_samples(rows[0].training[0], root)
    found.sort(key=lambda one: one["reward"], reverse=True)
    middle = len(found) // 2
    chosen = found if len(found) <= 12 else [*found[:4], *found[middle - 2 : middle + 2], *found[-4:]]
    return chosen, None


def read_samples(stage: Stage, root: Path) -> list[dict[str, Any]]:
    """The rollouts that a training stage has written down."""
    found = []
    for path in sorted((stage.folder(root) / "samples").glob("step-*.txt")):
        for match in _SAMPLE.finditer(path.read_text(encoding="utf-8", errors="replace")):
            position, reward, _, context, rollout, truth = match.groups()
            found.append(
                {"step": int(path.stem[5:]), "position": int(position), "reward": float(reward), "context": context,
                 "rollout": rollout, "truth": truth}
            )  # fmt: skip
    return found


def _examples(data: list[dict[str, Any]]) -> str:
    lines = ["| reward | true continuation | rollout | after |", "|---|---|---|---|"]
    for one in data:
        cells = (one["truth"], one["rollout"], one["context"][-60:])
        shown = [cell.replace("|", "\\|").replace("`", "'") for cell in cells]
        lines.append(f"| {one['reward']:.3f} | `{shown[0]}` | `{shown[1]}` | `{shown[2]}` |")
    return "\n".join(lines) + "\n"


_DRAW = {
    "curves": _curves,
    "entropies": _entropies,
    "rewards": _rewards,
    "ablations": _ablations,
    "rollouts": _rollouts,
}
