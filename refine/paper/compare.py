"""SFT against REFINE at equal compute: equal updates, equal tokens, equal time, over several seeds, in one table.

The authors' code takes one SFT update on the sequences that one draw of rollouts serves, and as many REFINE
updates as there are mini-batches (100 against 400). So three kinds of SFT stand beside a REFINE row:

- *equal updates*: as many updates on as many sequences each; the tokens are then equal too;
- *equal tokens*: one update on all sequences of a draw, so fewer updates, as in the authors' code;
- *equal time*: the updates of the first kind, as many as fit into the time that REFINE's training took.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine.paper.rows import Row
from refine.paper.tables import Column, columns_of, describe_row, with_interval
from refine.settings import SettingsError
from refine.training.tracking import read_metrics

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond, the last is on the safe side
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Load = Callable[[dict[str, Any]], Row]  # a row with these overrides
Run = Callable[[Row], str | None]  # what went wrong, or None


@dataclass(frozen=True)
class Arm:
    """One way of training, and its row for every seed."""

    name: str
    rows: list[Row]


def arms_of(load: Load, seeds: Sequence[int]) -> list[Arm]:
    """REFINE and the SFT of equal updates and of equal tokens.

    Raises:
        SettingsError: the row has no REFINE mid-training.
    """
    plain = load({})
    stage = next((stage for stage in plain.training if stage.settings.get("phase", "mid") == "mid"), None)
    if stage is None:
        raise SettingsError(
            f"{plain.name}: compare needs a row with REFINE mid-training, as table3_lact_refine"
        )
    settings = stage.settings
    draws, steps = settings.get("num_mini_batches", 1), settings.get("max_steps", 100)
    sft = {"mid.phase": "sft", "mid.num_mini_batches": 1}

    def arm(name: str, changes: dict[str, Any]) -> Arm:
        return Arm(name, [load({"seed": seed} | changes) for seed in seeds])

    arms = [arm("REFINE", {}), arm("SFT, equal updates", sft)]
    if draws > 1:
        larger = {
            "mid.gradient_accumulation_steps": settings.get("gradient_accumulation_steps", 1) * draws,
            "mid.max_steps": max(1, steps // draws),
        }
        arms.append(arm("SFT, equal tokens (one update per draw)", sft | larger))
    return arms


def equal_time_arm(load: Load, seeds: Sequence[int], arms: Sequence[Arm], root: Path) -> Arm | None:
    """SFT for as long as REFINE's training took; None: the times are not known, as a run is missing."""
    spent = [[training_spent(row, root) for row in arm.rows] for arm in arms[:2]]
    if any(one is None for arm in spent for one in arm):
        return None
    refine = statistics.fmean(one["seconds"] for one in spent[0])
    per_update = statistics.fmean(one["seconds"] / one["updates"] for one in spent[1])
    steps = max(1, round(refine / per_update))
    changes = {"mid.phase": "sft", "mid.num_mini_batches": 1, "mid.max_steps": steps}
    return Arm("SFT, equal time", [load({"seed": seed} | changes) for seed in seeds])


def training_spent(row: Row, root: Path) -> dict[str, float] | None:
    """Updates, tokens and seconds of a row's mid-training; None: it has not run."""
    if not row.training[0].done(root):
        return None
    lines = read_metrics(row.training[0].folder(root) / "metrics.jsonl")
    last = next((line for line in reversed(lines) if "train_seconds" in line), None)
    if last is None:
        return None
    return {"updates": last["step"], "tokens": last["total_tokens"], "seconds": last["train_seconds"]}


def compare(
    load: Load,
    seeds: Sequence[int],
    root: Path,
    run: Run,
    published: dict[str, Any],
    about_run: dict[str, Any],
) -> tuple[dict[str, Any], str, list[str]]:
    """Run what is missing of the comparison of one row: its record, its table, and what failed."""
    failures: list[str] = []

    def run_arm(arm: Arm) -> None:
        for seed, row in zip(seeds, arm.rows):
            print(f"{arm.name}, seed {seed}", flush=True)
            if failure := run(row):
                failures.append(f"{arm.name}, seed {seed}: {failure}")

    arms = arms_of(load, seeds)
    for arm in arms:
        run_arm(arm)
    longer = equal_time_arm(load, seeds, arms, root)
    if longer is not None:
        run_arm(longer)
        arms.append(longer)
    row = arms[0].rows[0]
    about = published.get(row.table)
    if about is None:
        raise SettingsError(f"there is no table {row.table!r} in the published numbers")
    record, text = _table(arms, seeds, root, about, row, about_run)
    return record, text, failures


def _table(
    arms: list[Arm], seeds, root: Path, about: dict[str, Any], row: Row, about_run
) -> tuple[dict, str]:
    columns = columns_of(about)
    described = [describe_row(one, root) for arm in arms for one in arm.rows]
    known = [one["is_papers_model"] for one in described if one["is_papers_model"] is not None]
    whose = row.label if known and all(known) else f"{row.label}: not the paper's model"
    model = Path(str(row.stages[0].settings["model_name_or_path"])).name
    lines = [
        f"**{about['title']}**: {whose} ({model}), seeds {', '.join(map(str, seeds))}; mean and, in brackets, ",
        "",
    ]
    lines[0] += "the standard deviation over seeds; times are of the training on this machine"
    head = ["updates", "tokens", "seconds", *(column.label for column in columns)]
    lines += ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    record: dict[str, Any] = {
        "title": about["title"], "row": row.name, "seeds": list(seeds), "model": model,
        "is_papers_model": bool(known) and all(known), **about_run, "arms": {}, "REFINE minus": {},
    }  # fmt: skip
    values: dict[str, list[list[float | None]]] = {}
    for arm in arms:
        spent = [training_spent(one, root) for one in arm.rows]
        values[arm.name] = [_numbers(one, root, columns) for one in arm.rows]
        cells = []
        for name in ("updates", "tokens", "seconds"):
            there = [one[name] for one in spent if one is not None]
            cells.append(f"{statistics.fmean(there):,.0f}" if there else "-")
        cells += [_over_seeds(by_seed) for by_seed in zip(*values[arm.name])]
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
        record["arms"][arm.name] = {
            "training": spent,
            "values": values[arm.name],
            "rows": [r.stages[0].name for r in arm.rows],
        }
    for arm in arms[1:]:
        differences = [
            _difference(ours, theirs) for ours, theirs in zip(zip(*values["REFINE"]), zip(*values[arm.name]))
        ]
        lines.append(f"| REFINE - {arm.name} | - | - | - | " + " | ".join(map(_signed, differences)) + " |")
        record["REFINE minus"][arm.name] = differences
    lines += ["", "Differences are taken seed by seed, with 95 % intervals of Student's t over seeds."]
    lines += [f"{key}: {value}." for key, value in about_run.items() if value]
    return record, "\n".join(lines)


def _numbers(row: Row, root: Path, columns: Sequence[Column]) -> list[float | None]:
    scores = describe_row(row, root)["scores"]
    found = [column.of(scores) for column in columns]
    return [None if one is None else one["value"] for one in found]


def _over_seeds(values: Sequence[float | None]) -> str:
    if not values or any(value is None for value in values):
        return "-"
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, Any] | None:
    if any(value is None for value in (*ours, *theirs)):
        return None
    each = [one - other for one, other in zip(ours, theirs)]
    mean, interval = statistics.fmean(each), None
    if len(each) > 1:
        around = _T[min(len(each) - 1, len(_T)) - 1] * statistics.stdev(each) / math.sqrt(len(each))
        interval = [mean - around, mean + around]
    return {"difference": mean, "interval": interval}


def _signed(found: dict[str, Any] | None) -> str:
    return "-" if found is None else with_interval(found["difference"], found["interval"], "+.1f")


def write(root: Path, records: list[dict[str, Any]], texts: list[str]) -> None:
    """compare.json and compare.md."""
    from refine.files import write_whole

    write_whole(root / "compare.json", json.dumps(records, indent=2) + "\n")
    write_whole(root / "compare.md", "\n\n".join(texts) + "\n")
