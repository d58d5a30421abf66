"""What the folders of runs and evaluations hold, as plain data. What cannot be read is noted and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from refine.evaluation.predictions import FILE as PREDICTIONS
from refine.evaluation.predictions import RESULTS
from refine.evaluation.report import NeedleShares, needle_shares
from refine.training.tracking import split_metrics

LONGEST_TEXT = 20_000  # characters of a sample's text


class ReportError(ValueError):
    """A report that cannot be made: the message says why."""


@dataclass
class Evaluation:
    """What ``refine.eval`` left in a folder.

    Attributes:
        name: the folder's.
        results: measure -> value.
        intervals: measure -> the ends of its 95 % interval.
        needles: task -> the shares of needles found.
    """

    name: str
    results: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    needles: dict[str, NeedleShares]


@dataclass
class Run:
    """What ``refine.train`` left in a folder.

    Attributes:
        name: the folder's.
        settings: as resolved.
        environment: machine and versions; empty for runs of earlier versions.
        lines: of metrics.jsonl, in order.
        documents: the samples as JSON, by kind (``held-out``, ``step``) and then by update.
        texts: (update, text) of the first and the last sample, where there is none as JSON.
        evaluations: of the final model, found in the run's folder.
        notes: what could not be read.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[int, str]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(update, value) of every line that has a finite number of that name."""
        return [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]

    @property
    def last_step(self) -> int:
        """The update of the last line."""
        return max((line["step"] for line in self.lines), default=0)


def read_folders(paths: list[Path]) -> tuple[list[Run], list[Evaluation]]:
    """The runs among the folders, with the evaluations in them, and the evaluations named by themselves.

    Raises:
        ReportError: a folder is neither.
    """
    runs, evaluations = [], []
    for path in paths:
        if not path.is_dir():
            what = "a file" if path.exists() else "not there"
            raise ReportError(f"{str(path)!r} is {what}: name the folder of a run or of an evaluation")
        if (path / "metrics.jsonl").is_file():
            runs.append(read_run(path))
        elif (path / RESULTS).is_file():
            notes: list[str] = []
            found = _read_evaluation(path, notes)
            if found is None:
                raise ReportError(notes[0])
            evaluations.append(found)
        else:
            raise ReportError(
                f"{str(path)!r} holds neither metrics.jsonl (a run of refine.train) nor {RESULTS} (an evaluation)"
            )
    _tell_apart(runs, paths)
    return runs, evaluations


def read_run(path: Path) -> Run:
    """A run's folder, also of an earlier version or of a run that is still going on."""
    run = Run(path.resolve().name)
    run.lines, broken = split_metrics(path / "metrics.jsonl")
    if broken:
        run.notes.append(f"metrics.jsonl: {len(broken)} broken lines are left out")
    run.settings = _read(path / "config.yaml", yaml.safe_load, run.notes)
    run.environment = _read(path / "environment.json", json.loads, run.notes)
    samples = path / "samples"
    for file in sorted(samples.glob("*.json")):
        document = _read(file, json.loads, run.notes)
        if not document:
            continue
        if not _is_document(document):
            run.notes.append(f"samples/{file.name} is no sample of this version and is left out")
        elif document["step"] <= run.last_step:  # later ones are of a run that was gone back from
            run.documents.append(document)
    run.documents.sort(key=lambda document: (document["kind"], document["step"]))
    texts = [file for file in sorted(samples.glob("step-*.txt")) if file.stem[5:].isdigit()]
    texts = [file for file in texts if int(file.stem[5:]) <= run.last_step]
    if not any(document["kind"] == "step" for document in run.documents):
        for file in texts[:1] + texts[1:][-1:]:
            text = file.read_text(encoding="utf-8", errors="replace")
            cut = "" if len(text) <= LONGEST_TEXT else "\n..."
            run.texts.append((int(file.stem[5:]), text[:LONGEST_TEXT] + cut))
    for results in sorted(path.glob(f"*/{RESULTS}")) + sorted(path.glob(RESULTS)):
        found = _read_evaluation(results.parent, run.notes)
        run.evaluations += [] if found is None else [found]
    return run


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_evaluation(folder: Path, notes: list[str]) -> Evaluation | None:
    record = _read(folder / RESULTS, json.loads, notes)
    results = record.get("results")
    if not isinstance(results, dict):
        notes.append(f"{folder.name}/{RESULTS} holds no results of refine.eval")
        return None
    intervals = record.get("intervals") or {}
    needles: dict[str, NeedleShares] = {}
    try:
        lines = (folder / PREDICTIONS).read_text(encoding="utf-8", errors="replace").splitlines()
        needles = needle_shares([json.loads(line) for line in lines])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{folder.name}/{PREDICTIONS} cannot be read ({error})")
    return Evaluation(
        folder.resolve().name,
        {name: value for name, value in results.items() if is_number(value)},
        {name: tuple(ends) for name, ends in intervals.items() if ends is not None and len(ends) == 2},
        needles,
    )


def _read(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """A mapping in a file; empty where there is none."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}) and is left out")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} is no mapping and is left out")
        return {}
    return found


def _is_document(document: dict[str, Any]) -> bool:
    """Whether a sample has everything that is shown of it."""
    try:
        ok = isinstance(document["step"], int) and document["kind"] in ("step", "held-out")
        ok = ok and is_number(document["mean_entropy"]) and is_number(document["length"])
        for stretch in document["stretches"]:
            ok = (
                ok and len(stretch["tokens"]) == len(stretch["entropy"]) and isinstance(stretch["first"], int)
            )
            ok = ok and all(value is None or is_number(value) for value in stretch["entropy"])
        for rollout in document["rollouts"]:
            count = len(rollout["tokens"])
            ok = ok and count == len(rollout["match"]) == len(rollout["similarity"]) == len(rollout["truth"])
            numbers = ("position", "entropy", "percentile", "reward", "advantage", "cosine", "exact_match")
            ok = ok and all(is_number(rollout[name]) for name in numbers)
            ok = ok and all(map(is_number, rollout["similarity"]))
    except (KeyError, TypeError):
        return False
    return ok and bool(document["rollouts"]) and bool(document["stretches"])


def _tell_apart(runs: list[Run], paths: list[Path]) -> None:
    """Runs of the same name are called by the folder above too, else by their number."""
    names = [run.name for run in runs]
    folders = [path.resolve() for path in paths if (path / "metrics.jsonl").is_file()]
    for run, folder in zip(runs, folders):
        if names.count(run.name) > 1:
            run.name = f"{folder.parent.name}/{folder.name}"
    names = [run.name for run in runs]
    for number, run in enumerate(runs, 1):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({number})"
