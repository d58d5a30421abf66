"""``python -m refine.reproduce``: the rows of the paper's tables, run one after the other, and the tables printed.

A row is a YAML file: the ``table`` and the ``row`` it fills, the model's ``family``, and its ``stages`` in order.
A stage holds the settings of ``refine.train`` or ``refine.eval``, is checked by them, and runs in a process of its
own in a folder named by a hash of its settings and of the stages before it: rows that share a stage share it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refine.evaluation import settings as evaluation
from refine.training import settings as training
from refine.training.settings import SettingsError

FAMILIES = ("lact", "delta_net")
ROW_KEYS = ("extends", "table", "row", "family", "stages")
KINDS = {"train": training, "eval": evaluation}
PLACEHOLDERS = ("model", "text", "qa_train", "qa_test", "longbench")
PUBLISHED = "published.yaml"
# How and where a stage runs; nothing that its result is named by.
_FREE = ("output_dir", "overwrite_output_dir", "resume", "resume_from_checkpoint", "device")


@dataclass(frozen=True)
class Stage:
    """One call of ``refine.train`` or ``refine.eval``.

    Attributes:
        name: ``train-0123456789ab``: the kind, and a hash of the resolved settings and of the stage before.
        kind: ``train`` or ``eval``.
        settings: for its YAML file; the model of a stage with a parent is filled in when it runs.
        parent: the training stage whose model it starts from.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    parent: Stage | None

    def done(self, root: Path) -> bool:
        """Whether its last file is there; both commands write it whole or not at all."""
        last = "results.json" if self.kind == "eval" else "final/config.json"
        return (root / "stages" / self.name / last).is_file()

    def command(self, root: Path, processes: int) -> list[str]:
        """The process to run, going on where an earlier one stopped."""
        folder = root / "stages" / self.name
        launcher = [sys.executable, "-m"]
        if processes > 1 and self.kind == "train":
            launcher += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
        command = [*launcher, f"refine.{self.kind}", "--config", str(folder) + ".yaml"]
        command += ["--output_dir", str(folder)]
        if self.kind == "train" and any(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "auto"]
        elif self.kind == "eval" and (folder / "predictions.jsonl").is_file():
            command += ["--resume"]
        elif folder.is_dir() and any(folder.iterdir()):
            command += ["--overwrite_output_dir"]
        return command

    def write_config(self, root: Path) -> None:
        """Its settings as a file beside its folder, with the model of the stage before."""
        settings = dict(self.settings)
        if self.parent is not None:
            settings[_model_setting(self.kind)] = str(root / "stages" / self.parent.name / "final")
        (root / "stages").mkdir(parents=True, exist_ok=True)
        (root / "stages" / f"{self.name}.yaml").write_text(
            yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, and its stages; the last is an evaluation."""

    path: Path
    table: str
    label: str
    stages: list[Stage]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when every row is there, 1 when one failed, 2 when it could not begin."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        return reproduce(options)
    except SettingsError as error:
        print(f"refine.reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refine.reproduce: stopped; the same command goes on", file=sys.stderr)
        return 130


def reproduce(options: argparse.Namespace) -> int:
    """Run the rows as told, and print their tables."""
    root = Path(options.output_dir)
    values = _values(options)
    overrides = dict(_override(text) for text in options.set or [])
    rows = [
        load_row(Path(path), values, overrides, options.nproc_per_node)
        for path in options.rows
        if Path(path).name != PUBLISHED
    ]
    published = load_published(options.published or Path(options.rows[0]).parent / PUBLISHED)
    if options.list:
        for row in rows:
            state = "done" if row.stages[-1].done(root) else "-"
            print(f"table {row.table:<8} {row.label:<44} {state:<5} {row.path}")
        return 0
    missing = {name for row in rows for stage in row.stages for name in _unfilled(stage.settings)}
    if missing:
        raise SettingsError("these rows need " + ", ".join(f"--{name}" for name in sorted(missing)))
    if options.dry_run:
        for stage in dict.fromkeys(stage.name for row in rows for stage in row.stages):
            found = next(own for row in rows for own in row.stages if own.name == stage)
            found.write_config(root)
            print(
                ("# done: " if found.done(root) else "")
                + " ".join(found.command(root, options.nproc_per_node))
            )
        return 0
    failures: dict[str, str] = {}
    if not options.print_tables:
        broken: set[str] = set()
        for number, row in enumerate(rows, 1):
            print(f"[{number}/{len(rows)}] table {row.table}: {row.label}", flush=True)
            failure = _run_row(row, root, options.nproc_per_node, broken)
            if failure:
                failures[f"table {row.table}, {row.label}"] = failure
                print(f"  failed: {failure}", file=sys.stderr, flush=True)
    record, text = make_tables(rows, root, published)
    print(text)
    root.mkdir(parents=True, exist_ok=True)
    (root / "tables.md").write_text(text + "\n", encoding="utf-8")
    (root / "tables.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for label, failure in failures.items():
        print(f"refine.reproduce: {label}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def load_row(
    path: Path,
    values: dict[str, str] | None = None,
    overrides: dict[str, Any] | None = None,
    processes: int = 1,
) -> Row:
    """A row from its file, every stage checked by the settings class of its command.

    Args:
        values: for the placeholders ``$model``, ``$text``, ...; what is not given stays as it is. A model may be
            given for one family, as ``model.lact``.
        overrides: settings that replace those of every stage that knows them; ``train.`` or ``eval.`` before a
            name limits it to that kind.
        processes: of a training stage; its accumulation steps are divided by them, so the batch stays.

    Raises:
        SettingsError: names the file and what is wrong in it.
    """
    values, overrides = values or {}, overrides or {}
    try:
        merged = _read(path)
        for key in ("table", "row", "family", "stages"):
            if not merged.get(key):
                raise SettingsError(f"{key} is missing")
        if merged["family"] not in FAMILIES:
            raise SettingsError(f"family must be one of {', '.join(FAMILIES)}, got {merged['family']!r}")
        given = {name: values[name] for name in PLACEHOLDERS if name in values}
        if f"model.{merged['family']}" in values:
            given["model"] = values[f"model.{merged['family']}"]
        _check_overrides(overrides)
        stages: list[Stage] = []
        for name, content in merged["stages"].items():
            if content is None:
                continue
            if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KINDS:
                raise SettingsError(
                    f"stage {name!r} must hold either train or eval settings, got {content!r}"
                )
            ((kind, settings),) = content.items()
            if stages and stages[-1].kind == "eval":
                raise SettingsError(f"stage {name!r} comes after an evaluation, which must be the last")
            stages.append(_stage(kind, settings or {}, stages, given, overrides, processes))
        if not stages or stages[-1].kind != "eval":
            raise SettingsError("the last stage must be an evaluation")
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    return Row(path, str(merged["table"]), str(merged["row"]), stages)


def load_published(path: str | Path) -> dict[str, Any]:
    """The tables' columns, and the paper's numbers as far as they are known."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))["tables"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise SettingsError(f"published {str(path)!r} cannot be read: {error}") from error


def make_tables(rows: list[Row], root: Path, published: dict[str, Any]) -> tuple[dict, str]:
    """The tables of these rows, as a record and as text: ours beside the paper's, in percent.

    A column is the plain mean over its tasks and their lengths. A dash stands for what was not run, or what the
    paper's number is not known of.
    """
    record: dict[str, Any] = {}
    parts = []
    for name in dict.fromkeys(row.table for row in rows):
        if name not in published:
            raise SettingsError(f"there is no table {name!r} in {PUBLISHED}: it has {', '.join(published)}")
        about = published[name]
        columns = about["columns"]
        lines = [f"**{about['title']}** (ours / paper, %)", ""]
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        record[name] = {"title": about["title"], "columns": list(columns), "rows": {}}
        for row in [row for row in rows if row.table == name]:
            ours = _measured(row, root, columns)
            theirs = (about.get("rows") or {}).get(row.label) or [None] * len(columns)
            cells = [f"{_number(own)} / {_number(other)}" for own, other in zip(ours, theirs, strict=True)]
            lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
            record[name]["rows"][row.label] = {"ours": ours, "paper": theirs, "file": row.path.name}
        parts.append("\n".join(lines))
    return record, "\n\n".join(parts)


def _measured(row: Row, root: Path, columns: dict[str, list[str]]) -> list[float | None]:
    path = root / "stages" / row.stages[-1].name / "results.json"
    if not path.is_file():
        return [None] * len(columns)
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    means = []
    for tasks in columns.values():
        names = set(evaluation.expand_tasks(tasks))
        own = [score["score"] for score in scores if score["task"] in names]
        covered = {score["task"] for score in scores} >= names
        means.append(100 * sum(own) / len(own) if covered else None)
    return means


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _run_row(row: Row, root: Path, processes: int, broken: set[str]) -> str | None:
    """Run the stages that are not done; what went wrong, or None. ``broken`` are stages that failed already."""
    for stage in row.stages:
        if stage.done(root):
            print(f"  {stage.name}: done before", flush=True)
            continue
        log = root / "stages" / f"{stage.name}.log"
        if stage.name not in broken:
            stage.write_config(root)
            print(f"  {stage.name}: running", flush=True)
            with log.open("a", encoding="utf-8") as file:
                command = stage.command(root, processes)
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
                try:
                    code = process.wait()
                except KeyboardInterrupt:  # the stage got it too: it saves and ends by itself
                    process.wait()
                    raise
            if code == 0 and stage.done(root):
                continue
            broken.add(stage.name)
        lines = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        return f"{stage.name} did not end well ({lines[-1].strip() if lines else 'no output'}); see {log}"
    return None


def _stage(kind, settings, before, values, overrides, processes) -> Stage:
    """One stage: placeholders filled, overrides laid over, checked, and named."""
    settings = _fill(settings, values)
    for name, value in overrides.items():
        wanted, _, bare = name.rpartition(".")
        if wanted in ("", kind) and bare in _names(kind):
            settings[bare] = value
    model = _model_setting(kind)
    if before:
        settings[model] = f"stage:{before[-1].name}"
    else:
        settings.setdefault(model, _fill("$model", values))
    resolved = _resolve(kind, settings)
    if kind == "train" and processes > 1:
        if resolved["gradient_accumulation_steps"] % processes:
            raise SettingsError(
                f"nproc_per_node must divide gradient_accumulation_steps="
                f"{resolved['gradient_accumulation_steps']}, got {processes}"
            )
        settings["gradient_accumulation_steps"] = resolved["gradient_accumulation_steps"] // processes
        if settings.get("parallel", "none") == "none":
            settings["parallel"] = "ddp"
        _resolve(kind, settings)
    identity = json.dumps({name: resolved[name] for name in sorted(resolved) if name not in _FREE})
    digest = hashlib.sha256(f"{kind} {identity}".encode()).hexdigest()[:12]
    return Stage(f"{kind}-{digest}", kind, settings, before[-1] if before else None)


def _resolve(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with every default, checked by the command's own class."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return dataclasses.asdict(KINDS[kind].parse_settings(["--config", str(path)]))


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A row's file over what it extends: mappings are merged, all else is replaced."""
    if path.resolve() in seen:
        raise SettingsError(f"extends goes in a circle at {path.name}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"must be a mapping, got {type(loaded).__name__}")
    for key in loaded:
        if key not in ROW_KEYS:
            raise SettingsError(f"unknown key {key!r}{_near(str(key), ROW_KEYS)}")
    base = loaded.pop("extends", None)
    if base is None:
        return loaded
    return _merge(_read(path.parent / base, (*seen, path.resolve())), loaded)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _fill(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(own, values) for key, own in value.items()}
    if isinstance(value, list):
        return [_fill(own, values) for own in value]
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in PLACEHOLDERS:
            raise SettingsError(f"unknown placeholder {value!r}{_near(value[1:], PLACEHOLDERS)}")
        return values.get(value[1:], value)
    return value


def _unfilled(settings: Any) -> set[str]:
    if isinstance(settings, dict | list):
        parts = settings.values() if isinstance(settings, dict) else settings
        return set().union(*(_unfilled(part) for part in parts)) if parts else set()
    return {settings[1:]} if isinstance(settings, str) and settings.startswith("$") else set()


def _model_setting(kind: str) -> str:
    return "model_name_or_path" if kind == "train" else "model"


def _names(kind: str) -> list[str]:
    of = training.TrainSettings if kind == "train" else evaluation.EvalSettings
    return [field.name for field in dataclasses.fields(of)]


def _check_overrides(overrides: dict[str, Any]) -> None:
    known = [*_names("train"), *_names("eval")]
    for name in overrides:
        kind, _, bare = name.rpartition(".")
        if (kind and kind not in KINDS) or bare not in (_names(kind) if kind else known):
            raise SettingsError(f"set: unknown setting {name!r}{_near(bare, known)}")


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _override(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"set takes name=value, got {text!r}")
    return name.removeprefix("--"), value


def _values(options: argparse.Namespace) -> dict[str, str]:
    values = {name: getattr(options, name) for name in PLACEHOLDERS[1:] if getattr(options, name) is not None}
    for text in options.model or []:
        family, equals, path = text.partition("=")
        if equals and family not in FAMILIES:
            raise SettingsError(f"model takes PATH, or FAMILY=PATH with {', '.join(FAMILIES)}, got {text!r}")
        values[f"model.{family}" if equals else "model"] = path if equals else text
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refine.reproduce",
        description="Run rows of the paper's tables (arXiv 2602.16704) and print them beside the paper's numbers.",
        allow_abbrev=False,
    )
    parser.add_argument("rows", nargs="+", metavar="ROW.yaml", help="files of configs/paper, in this order")
    parser.add_argument("--output_dir", default="runs/paper", help="stages, logs, tables.md, tables.json")
    parser.add_argument(
        "--model", nargs="+", help="a folder or hub name, or one a family: lact=PATH delta_net=PATH"
    )
    parser.add_argument("--text", help="mid-training text, as dataset_name_or_path of refine.train")
    parser.add_argument("--qa_train", help="pairs for post-training, likewise")
    parser.add_argument("--qa_test", help="RULER QA rows, as ruler_qa_files of refine.eval")
    parser.add_argument("--longbench", help="LongBench rows, as longbench_files of refine.eval")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="NAME=VALUE",
        help="in every stage that knows the name; also train.NAME, eval.NAME",
    )
    parser.add_argument(
        "--nproc_per_node", type=int, default=1, help="processes of a training stage (torchrun)"
    )
    parser.add_argument("--published", help=f"the paper's numbers; default: {PUBLISHED} beside the first row")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="show the rows, run nothing")
    only.add_argument("--dry_run", action="store_true", help="write the stages' files and print the commands")
    only.add_argument("--print_tables", action="store_true", help="print from what is there, run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
