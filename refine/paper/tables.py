"""The tables: our numbers under the paper's, each with what it was measured on.

A number of ours stands in a line of its own, which names the model and says where it is not the paper's. A
column is a mean over certain tasks and lengths; where one of them was not measured, there is no number. Under
each table stand the checkpoint, changed settings, samples and lengths of every line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from refine.evaluation.metrics import interval_of_mean
from refine.evaluation.settings import expand_tasks
from refine.paper.rows import Row, is_papers_model, model_name
from refine.settings import SettingsError, nearest, read_yaml

PUBLISHED = resources.files("refine") / "assets" / "paper_numbers.yaml"
_TABLE_KEYS = ("title", "columns", "rows", "lengths", "plain", "note")


@dataclass(frozen=True)
class Column:
    """The mean over tasks, at certain lengths or at all that there are."""

    label: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]  # (): whatever lengths were measured
    percent: bool

    def of(self, scores: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """The number with its interval and samples; None: not all of it was measured."""
        own = [
            s for s in scores if s["task"] in self.tasks and (not self.lengths or s["length"] in self.lengths)
        ]
        needed = {(task, length) for task in self.tasks for length in self.lengths or (None,)}
        if not {(s["task"], s["length"] if self.lengths else None) for s in own} >= needed:
            return None
        scale, means = 100 if self.percent else 1, [s["score"] for s in own]
        interval = None
        if all(s.get("interval") for s in own):
            interval = [scale * end for end in interval_of_mean(means, [tuple(s["interval"]) for s in own])]
        value = scale * sum(means) / len(means)
        return {"value": value, "interval": interval, "samples": sum(s["samples"] for s in own)}


def load_published(path: Any) -> dict[str, Any]:
    """The tables' columns, and the paper's numbers as far as they are known."""
    loaded = read_yaml(path, "published")
    if not isinstance(loaded, dict) or not isinstance(loaded.get("tables"), dict):
        raise SettingsError(f"published {str(path)!r} must be a mapping with the key tables")
    for name, about in loaded["tables"].items():
        if wrong := [key for key in about if key not in _TABLE_KEYS]:
            end = nearest(str(wrong[0]), _TABLE_KEYS)
            raise SettingsError(f"published {str(path)!r}, table {name}: unknown key {wrong[0]!r}{end}")
        count = len(columns_of(about))
        for label, numbers in (about.get("rows") or {}).items():
            if len(numbers) != count:
                raise SettingsError(
                    f"published {str(path)!r}, table {name}: {label} has {len(numbers)} numbers for {count} columns"
                )
    return {str(name): about for name, about in loaded["tables"].items()}


def columns_of(about: dict[str, Any]) -> list[Column]:
    """A table's columns in their order: with lengths, one for each and then the mean."""
    found, lengths = [], tuple(about.get("lengths") or ())
    for label, names in about["columns"].items():
        label, tasks, percent = str(label), tuple(_tasks(names)), label not in (about.get("plain") or ())
        found += [Column(f"{label} {length // 1024}K", tasks, (length,), percent) for length in lengths]
        found.append(Column(f"{label} mean" if lengths else label, tasks, lengths, percent))
    return found


def _tasks(names: list[str]) -> list[str]:
    return [task for name in names for task in ([name] if name.startswith("lm_") else expand_tasks([name]))]


def make_tables(
    rows: Sequence[Row], root: Path, published: dict[str, Any], about_run: dict[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """The tables of these rows, as a record and as text, in the paper's order.

    Args:
        rows: of any tables.
        root: where their stages are.
        published: see :func:`load_published`.
        about_run: what is to be said of all of them, such as ``protocol`` and ``overrides``.

    Raises:
        SettingsError: a row's table is not in ``published``.
    """
    for row in rows:
        if row.table not in (*published, "-"):
            raise SettingsError(
                f"there is no table {row.table!r} in the published numbers: they have {', '.join(published)}"
            )
    record: dict[str, Any] = {}
    parts = []
    for name, about in published.items():
        own = [row for row in rows if row.table == name]
        if not own:
            continue
        order = list(about.get("rows") or {})
        own.sort(key=lambda row: order.index(row.label) if row.label in order else len(order))
        record[name], text = _table(own, root, about, about_run or {})
        parts.append(text)
    return record, "\n\n".join(parts)


def _table(rows: list[Row], root: Path, about: dict[str, Any], about_run) -> tuple[dict[str, Any], str]:
    columns = columns_of(about)
    record = {"title": about["title"], "columns": [column.label for column in columns], "rows": {}}
    lines = [f"**{about['title']}** (%; ours with 95 % intervals)", ""]
    if "note" in about:
        lines[0] += f"; the paper's: {about['note']}"
    lines += ["| | " + " | ".join(record["columns"]) + " |", "|---" * (len(columns) + 1) + "|"]
    notes = []
    for row in rows:
        theirs = (about.get("rows") or {}).get(row.label)
        cells = ["-"] * len(columns) if theirs is None else [f"{value:.1f}" for value in theirs]
        lines.append(f"| {row.label}, paper | " + " | ".join(cells) + " |")
        ours = describe_row(row, root)
        found = [column.of(ours["scores"]) for column in columns]
        number = f"({len(notes) + 1})"
        lines.append(f"| {_own_label(row, ours)} {number} | " + " | ".join(map(_cell, found)) + " |")
        notes.append(f"{number} {_note(row, ours, about_run)}")
        record["rows"][row.label] = {
            "row": row.name, "paper": theirs, "ours": [one and one["value"] for one in found], "cells": found,
        } | ours | about_run  # fmt: skip
    return record, "\n".join([*lines, "", *notes])


def describe_row(row: Row, root: Path) -> dict[str, Any]:
    """What a row's files say: its scores, its model, whether that is the paper's, and where it came from."""
    found: dict[str, Any] = {"state": "not run", "model": None, "about_model": None, "is_papers_model": None}
    found |= {"checkpoints": [], "scores": []}
    for stage in row.tests:
        path = stage.folder(root) / "results.json"
        if not path.is_file():
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        about = results.get("about_model") or {}
        first = row.stages[0].settings["model_name_or_path"]
        found |= {"model": first, "about_model": about}
        found["is_papers_model"] = is_papers_model(
            row.family, about.get("model_type"), about.get("parameters")
        )
        found["checkpoints"].append(str(results["model"]))
        found["scores"] += results["scores"]
    done = len(found["checkpoints"])
    if done:
        found["state"] = "done" if done == len(row.tests) else f"{done} of {len(row.tests)} evaluations"
    return found


def _own_label(row: Row, ours: dict[str, Any]) -> str:
    name = model_name(row.family)
    if ours["state"] == "not run":
        return f"{row.label}, not run here"
    if ours["is_papers_model"]:
        return f"{row.label}, ours"
    added = row.label.removeprefix(name) if row.label.startswith(name) else f", {row.label}"
    return f"**not {name}**: {Path(str(ours['model'])).name}{added}"


def _note(row: Row, ours: dict[str, Any], about_run: dict[str, Any]) -> str:
    said = [f"row {row.name}"]
    said += [f"{key} {value}" for key, value in about_run.items() if value]
    if ours["state"] == "not run":
        return "; ".join([*said, "not run"]) + "."
    about, name = ours["about_model"], model_name(row.family)
    sizes = f"{about.get('model_type')}, {about.get('parameters', 0):,} parameters"
    same = f"the size of {name}" if ours["is_papers_model"] else f"not the paper's model, {name}"
    said.append(f"model {ours['model']} ({sizes}: {same})")
    said.append("evaluated " + ", ".join(dict.fromkeys(ours["checkpoints"])))
    counts: dict[tuple[int, Any], list[str]] = {}
    for score in ours["scores"]:
        counts.setdefault((score["samples"], score["length"]), []).append(score["task"])
    for (samples, length), tasks in counts.items():
        at = "" if length is None else f" at {length:,} tokens"
        names = tasks if len(tasks) <= 4 else [f"{len(tasks)} tasks"]
        said.append(f"{samples} samples of {', '.join(names)}{at}")
    if ours["state"] != "done":
        said.append(ours["state"])
    return "; ".join(said) + "."


def _cell(found: dict[str, Any] | None) -> str:
    return "-" if found is None else with_interval(found["value"], found["interval"])


def with_interval(value: float, interval: Sequence[float] | None, form: str = ".1f") -> str:
    """``61.0 [58.2, 63.7]``, or the value alone where there is no interval."""
    ends = "" if interval is None else f" [{', '.join(format(end, form) for end in interval)}]"
    return format(value, form) + ends
