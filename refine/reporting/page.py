"""From what folders hold to what the page shows: numbers with their names, curves, documents token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from refine.reporting.charts import Curve, draw_curves, draw_needles, draw_samples
from refine.reporting.collect import Evaluation, Run, is_number
from refine.terminal import duration, fixed
from refine.training.report import EVALUATED

ROLLOUTS = 64  # of a document that are shown, at most
CELLS = 32  # tokens of a rollout that are shown, at most
CONTEXT = 12  # tokens before a rollout
LEVELS = 9  # of entropy, in colours; level 0 has none


class Measure(NamedTuple):
    """A chart of training, and what is measured of held-out data in the same units."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]  # (name in metrics.jsonl, in the legend)
    held_out: tuple[tuple[str, str], ...] = ()
    logarithmic: bool = False


_MEASURES = (
    Measure("Next-token loss", "nats a token", (("ntp_loss", "training"),), (("eval_loss", "held out"),)),
    Measure("Loss", "", (("loss", "training"),)),
    Measure(
        "Answer loss", "nats a token", (("answer_loss", "training"),), (("eval_answer_loss", "held out"),)
    ),
    Measure("Reward", "", (("reward", "training"),), (("eval_reward", "held out"),)),
    Measure("Cosine reward", "", (("cosine", "training"),), (("eval_cosine", "held out"),)),
    Measure("Binary reward", "", (("exact_match", "training"),), (("eval_exact_match", "held out"),)),
    Measure("Entropy", "nats", (("entropy", "all predictions"), ("chosen_entropy", "where rollouts begin"))),
    Measure("Gradient norm", "", (("grad_norm", "training"),), logarithmic=True),
    Measure("Tokens per second", "", (("tokens_per_second", "training"),)),
    Measure("Next-token accuracy", "", (), (("eval_accuracy", "held out"),)),
    Measure(
        "Questions answered", "share",
        (),
        (
            ("eval_niah_single_1", "needles in noise"), ("eval_niah_single_2", "needles in prose"),
            ("eval_recall", "recall"),
        ),
    ),
    Measure("Learning rate", "", (("learning_rate", "training"),)),
    Measure("Spread of rewards", "standard deviation", (("reward_std", "training"),)),
    Measure("Clipped tokens", "share", (("clip_fraction", "training"),)),
    Measure("Length of rollouts", "tokens", (("rollout_length", "training"),)),
    Measure("Length of completions", "tokens", (("completions/mean_length", "training"),)),
    Measure("KL to the reference", "nats a token", (("kl", "training"),)),
)  # fmt: skip
_SAME_AS_REWARD = {"cosine": "cosine", "binary": "exact_match"}  # reward -> the metric that is the same
_FIRST_SETTINGS = (
    *("phase", "model_name_or_path", "model_type", "dataset_name_or_path", "max_length", "max_steps"),
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "reward", "selection"),
    *("num_chunks", "rollout_length", "num_rollouts", "lambda_rl", "seed"),
)


@dataclass(frozen=True)
class Number:
    """A number as it is shown, with its value as it was written."""

    value: float
    text: str

    @classmethod
    def of(cls, value: float, sign: bool = False, digits: int | None = None) -> Number:
        """``digits``: decimals; None: by its size."""
        if digits is not None:
            return cls(value, fixed(value, digits, sign))
        if isinstance(value, int):
            return cls(value, f"{value:+,}" if sign else f"{value:,}")
        if value == 0 or 1e-3 <= abs(value) < 1e4:
            return cls(value, fixed(value, 4, sign))
        if 1e4 <= abs(value) < 1e9:
            return cls(value, f"{value:+,.0f}" if sign else f"{value:,.0f}")
        return cls(value, f"{value:+.3g}" if sign else f"{value:.3g}")


def _change(before: float, after: float) -> Number:
    """From one number to another, with the decimals that these have."""
    plain = all(value == 0 or 1e-3 <= abs(value) < 1e4 for value in (before, after))
    return Number.of(after - before, sign=True, digits=4 if plain else None)


def build_page(runs: Sequence[Run], evaluations: Sequence[Evaluation], charts: bool) -> dict[str, Any]:
    """Everything that the template shows.

    Args:
        runs, evaluations: of :func:`refine.reporting.collect.read_folders`.
        charts: whether they can be drawn; without them the page says how to get them.
    """
    differing = _differing_settings(runs)
    found = [(run, evaluation) for run in runs for evaluation in run.evaluations]
    found += [(None, evaluation) for evaluation in evaluations]
    return {
        "title": " and ".join(run.name for run in runs) or " and ".join(e.name for e in evaluations),
        "single": len(runs) <= 1,
        "compared": _compare(runs) if len(runs) > 1 else [],
        "runs": [_show_run(run, number, charts) for number, run in enumerate(runs)],
        "charts": _charts(runs) if charts else [],
        "no_charts": not charts,
        "differing": differing,
        "evaluations": [
            _show_evaluation(evaluation, run.name if run and len(runs) > 1 else None, charts)
            for run, evaluation in found
        ],
        "levels": range(LEVELS + 1),
    }


def _show_run(run: Run, number: int, charts: bool) -> dict[str, Any]:
    documents = _chosen_documents(run)
    scale = _scale(documents)
    settings = {name: run.settings[name] for name in _FIRST_SETTINGS if name in run.settings}
    settings |= {name: value for name, value in sorted(run.settings.items()) if name not in settings}
    return {
        "name": run.name,
        "number": number,
        "notes": run.notes,
        "overview": _overview(run),
        "held_out": list(_held_out(run)),
        "facts": list(_facts(run)),
        "settings": {name: _plain(value) for name, value in settings.items()},
        "environment": _flat(run.environment),
        "documents": [_show_document(document, scale) for document in documents],
        "scale": scale,
        "open": int(
            len(documents) > 1 and documents[1]["kind"] == "held-out"
        ),  # the held-out one, after training
        "texts": run.texts,
        "choice": _choice(run),
        "choice_charts": _choice_charts(run) if charts else [],
    }


def _overview(run: Run) -> list[tuple[str, str]]:
    """What kind of run it is and how far it came, in a few words."""
    settings, rows = run.settings, []
    total = settings.get("max_steps")
    rows.append(("updates", f"{run.last_step:,} of {total:,}" if is_number(total) else f"{run.last_step:,}"))
    if tokens := run.series("total_tokens"):
        rows.append(("tokens", f"{tokens[-1][1]:,}"))
    seconds = sum(
        line["tokens"] / line["tokens_per_second"]
        for line in run.lines
        if is_number(line.get("tokens")) and is_number(line.get("tokens_per_second"))
        if line["tokens_per_second"] > 0
    )
    if seconds and settings.get("logging_steps", 1) == 1:
        rows.append(("time in updates", duration(seconds)))
    skipped = run.series("skipped_updates")
    if skipped and skipped[-1][1]:
        rows.append(("updates skipped", f"{skipped[-1][1]:,}"))
    if settings.get("phase"):
        rows.append(("phase", str(settings["phase"])))
    model = settings.get("model_name_or_path") or settings.get("model_type")
    rows.append(("model", str(model or "the tiny model of the package")))
    if is_number(parameters := run.environment.get("parameters")):
        rows.append(("parameters", f"{parameters:,}"))
    rows.append(("data", str(settings.get("dataset_name_or_path") or "default")))
    machine = run.environment.get("machine")
    if isinstance(machine, dict):
        rows.append(("device", str(machine.get("gpu") or machine.get("device"))))
    if begun := run.environment.get("begun"):
        rows.append(("begun", str(begun)))
    return rows


def _held_out(run: Run) -> Iterator[dict[str, Any]]:
    """The measures of held-out data: at the first evaluation, at the last, and the change."""
    keys = dict.fromkeys(key for line in run.lines for key in line if key.startswith("eval_"))
    keys = [key for key in keys if not key.endswith(("_low", "_high"))]
    for key in sorted(keys, key=lambda key: list(EVALUATED).index(key) if key in EVALUATED else 99):
        points = run.series(key)
        if not points or key in ("eval_sequences", "eval_tokens"):
            continue
        (first_step, first), (last_step, last) = points[0], points[-1]
        low, high = run.series(f"{key}_low"), run.series(f"{key}_high")
        yield {
            "key": key,
            "name": EVALUATED.get(key, key.removeprefix("eval_")),
            "first_step": first_step,
            "last_step": last_step,
            "first": Number.of(first),
            "last": Number.of(last),
            "change": _change(first, last) if len(points) > 1 else None,
            "low": Number.of(low[-1][1]) if low else None,
            "high": Number.of(high[-1][1]) if high else None,
        }


def _compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The measures of held-out data of several runs: each run's last, with its change."""
    found = [{row["key"]: row for row in _held_out(run)} for run in runs]
    keys = dict.fromkeys(key for rows in found for key in rows)
    return [
        {
            "key": key,
            "name": next(rows[key]["name"] for rows in found if key in rows),
            "runs": [rows.get(key) for rows in found],
        }
        for key in keys
    ]


def _facts(run: Run) -> Iterator[dict[str, Any]]:
    """Every number of the updates: from all lines, however the curves are thinned."""
    for key in dict.fromkeys(key for line in run.lines for key in line):
        points = run.series(key)
        if key == "step" or key.startswith("eval_") or not points:
            continue
        values = [value for _, value in points]
        tail = values[-max(1, len(values) // 10) :]
        yield {
            "key": key,
            "first": Number.of(values[0]),
            "last": Number.of(values[-1]),
            "least": Number.of(min(values)),
            "most": Number.of(max(values)),
            "late": Number.of(math.fsum(tail) / len(tail)),
        }


def _charts(runs: Sequence[Run]) -> list[str]:
    """(title, drawing) of every measure that moved in one of the runs, the runs laid over one another."""
    charts = []
    for measure in _MEASURES:
        if measure.title == "Loss" and any(run.series("ntp_loss") for run in runs):
            continue
        curves = [curve for number, run in enumerate(runs) for curve in _curves(measure, run, number, runs)]
        values = {value for curve in curves for _, value in curve.points}
        if len(values) < 2:
            continue
        charts.append((measure.title, draw_curves(measure.title, curves, measure.unit, measure.logarithmic)))
    return charts


def _curves(measure: Measure, run: Run, number: int, runs: Sequence[Run]) -> Iterator[Curve]:
    """What one run has to show of a measure."""
    several = len(runs) > 1
    same = _SAME_AS_REWARD.get(str(run.settings.get("reward")))
    if not several and any(key == same for key, _ in measure.keys) and run.series("reward"):
        return  # the chart of rewards shows it
    held_out = measure.held_out
    if measure.title == "Reward" and same and run.series("reward") and not run.series("eval_reward"):
        held_out = ((f"eval_{same}", "held out"),)
    color = number
    for place, (key, label) in enumerate(measure.keys):
        points = run.series(key)
        if len(points) > 1:
            name = label
            if several:
                name = f"{run.name}: {label}" if place else run.name
            yield Curve(name, points, color, smooth=key != "learning_rate")
            color += 0 if several else 1
    color = number if several else color if measure.keys else 0
    for place, (key, label) in enumerate(held_out):
        points = run.series(key)
        low, high = dict(run.series(f"{key}_low")), dict(run.series(f"{key}_high"))
        intervals = [(low.get(step, value), high.get(step, value)) for step, value in points]
        if points:
            name = label
            if several:  # a colour a run; only what is no training curve's needs a name
                name = "" if measure.keys else f"{run.name}: {label}"
            yield Curve(
                name, points,
                color if several else color + place, dots=True, intervals=intervals if low else None,
            )  # fmt: skip


def _chosen_documents(run: Run) -> list[dict[str, Any]]:
    """The first and the last of each kind."""
    chosen = []
    for kind in ("held-out", "step"):
        own = [document for document in run.documents if document["kind"] == kind]
        chosen += own[:1] + own[1:][-1:]
    return chosen


def _scale(documents: Sequence[dict[str, Any]]) -> float:
    """The entropy in nats that has the strongest colour: exceeded by one token in fifty."""
    values = sorted(
        value
        for document in documents
        for stretch in document["stretches"]
        for value in stretch["entropy"]
        if value is not None
    )
    return max(1e-6, values[int(0.98 * (len(values) - 1))]) if values else 1.0


def _show_document(document: dict[str, Any], scale: float) -> dict[str, Any]:
    """A document token by token, and its rollouts beside the truth."""
    numbers: dict[int, int] = {}  # position -> its number on the page
    for rollout in document["rollouts"]:
        numbers.setdefault(rollout["position"], len(numbers) + 1)
    longest = max(len(rollout["tokens"]) for rollout in document["rollouts"])
    truth = {p + offset for p in numbers for offset in range(longest)}
    texts: dict[int, str] = {}
    stretches, behind = [], 0
    for stretch in document["stretches"]:
        tokens = []
        for place, (text, entropy) in enumerate(zip(stretch["tokens"], stretch["entropy"]), stretch["first"]):
            texts[place] = str(text)
            level = 0 if entropy is None else min(LEVELS, int(LEVELS * entropy / scale + 0.5))
            tokens.append(
                {
                    "text": texts[place],
                    "level": level,
                    "entropy": "" if entropy is None else f"{entropy:.2f}",
                    "number": numbers.get(place),
                    "truth": place in truth,
                }
            )
        stretches.append({"left_out": stretch["first"] - behind, "tokens": tokens})
        behind = stretch["first"] + len(stretch["tokens"])
    return {
        "name": _name_of(document),
        "kind": document["kind"],
        "step": document["step"],
        "length": document["length"],
        "mean_entropy": Number.of(document["mean_entropy"], digits=2),
        "stretches": stretches,
        "left_out": document["length"] - behind,
        "rollouts": [
            _show_rollout(rollout, numbers[rollout["position"]], texts)
            for rollout in islice(document["rollouts"], ROLLOUTS)
        ],
        "rollouts_left_out": max(0, len(document["rollouts"]) - ROLLOUTS),
    }


def _name_of(document: dict[str, Any]) -> str:
    step = document["step"]
    if document["kind"] == "step":
        return f"trained on at update {step:,}"
    return "held out, before training" if step == 0 else f"held out, after update {step:,}"


def _show_rollout(rollout: dict[str, Any], number: int, texts: dict[int, str]) -> dict[str, Any]:
    p = rollout["position"]
    cells = [
        {"rollout": _visible(own), "truth": _visible(true), "match": match, "similarity": f"{similarity:.2f}"}
        for own, true, match, similarity in islice(
            zip(rollout["tokens"], rollout["truth"], rollout["match"], rollout["similarity"]), CELLS
        )
    ]
    return {
        "number": number,
        "position": p,
        "before": "".join(texts.get(place, "") for place in range(p - CONTEXT, p)),
        "cells": cells,
        "cells_left_out": len(rollout["tokens"]) - len(cells),
        "entropy": Number.of(rollout["entropy"], digits=2),
        "percentile": f"{rollout['percentile']:.0f}",
        "reward": Number.of(rollout["reward"], digits=3),
        "advantage": Number.of(rollout["advantage"], sign=True, digits=2),
        "matches": sum(map(bool, rollout["match"])),
        "length": len(rollout["match"]),
    }


def _visible(text: Any) -> str:
    """A token by itself: line breaks shown, and blanks where it has nothing else."""
    text = str(text).replace("\n", "⏎").replace("\t", "⇥")
    return text if text.strip() else text.replace(" ", "·") or "-"


def _choice(run: Run) -> list[dict[str, Any]]:
    """What changed from the first to the last sample of each kind, in means over rollouts."""
    tables = []
    for kind, title in (("held-out", "the held-out document"), ("step", "documents trained on")):
        own = [document for document in run.documents if document["kind"] == kind]
        if len(own) < 2:
            continue
        first, last = own[0], own[-1]
        rows = []
        for name, value_of in (
            ("entropy of all predictions, nats", lambda document: document["mean_entropy"]),
            ("entropy where rollouts begin, nats", lambda document: _mean(document, "entropy")),
            ("predictions less uncertain than there, %", lambda document: _mean(document, "percentile")),
            ("reward", lambda document: _mean(document, "reward")),
            ("best reward", lambda document: max(r["reward"] for r in document["rollouts"])),
            ("cosine reward", lambda document: _mean(document, "cosine")),
            ("tokens that are the true ones, share", lambda document: _mean(document, "exact_match")),
        ):
            before, after = float(value_of(first)), float(value_of(last))
            rows.append((name, Number.of(before), Number.of(after), _change(before, after)))
        positions = [{rollout["position"] for rollout in document["rollouts"]} for document in (first, last)]
        kept = len(positions[0] & positions[1]) if kind == "held-out" else None
        tables.append(
            {
                "title": title,
                "first": f"update {first['step']:,}",
                "last": f"update {last['step']:,}",
                "rows": rows,
                "kept": kept,
                "positions": len(positions[0]),
            }
        )
    return tables


def _choice_charts(run: Run) -> list[tuple[str, str]]:
    """Where rollouts began and what they were rewarded, sample by sample."""
    charts = []
    for title, key, up in (
        ("Rewards of single rollouts", "reward", "reward"),
        ("Uncertainty where rollouts begin", "percentile", "% of predictions below"),
    ):
        groups = [
            Curve(label, points, color)
            for color, (kind, label) in enumerate((("step", "trained on"), ("held-out", "held out")))
            if (
                points := [
                    (document["step"], float(rollout[key]))
                    for document in run.documents
                    if document["kind"] == kind
                    for rollout in document["rollouts"]
                ]
            )
        ]
        if len({step for group in groups for step, _ in group.points}) > 1:
            charts.append((title, draw_samples(title, groups, up)))
    return charts


def _show_evaluation(evaluation: Evaluation, run: str | None, charts: bool) -> dict[str, Any]:
    return {
        "name": f"{run}: {evaluation.name}" if run else evaluation.name,
        "rows": [
            (name, Number.of(value), [Number.of(end) for end in evaluation.intervals.get(name, ())])
            for name, value in evaluation.results.items()
        ],
        "needles": [
            (task, draw_needles(task, needles)) for task, needles in evaluation.needles.items() if charts
        ],
    }


def _differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """name -> its value in every run, of the settings that differ; where it is written is none."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [_plain(run.settings.get(name)) for run in runs]) for name in names]
    free = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in free]


def _mean(document: dict[str, Any], key: str) -> float:
    values = [rollout[key] for rollout in document["rollouts"]]
    return math.fsum(values) / len(values)


def _plain(value: Any) -> str:
    """A setting in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_plain(own)}" for name, own in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(mapping: dict[str, Any]) -> dict[str, str]:
    """Mappings within a mapping, with their names."""
    found: dict[str, str] = {}
    for name, value in mapping.items():
        found |= _flat(value) if isinstance(value, dict) else {name: _plain(value)}
    return found
