"""``python -m refine.reproduce``: the rows of the paper's tables, run one after the other, and the tables printed.

A row has a ``table`` and a ``row`` that it fills, the model's ``family``, and its ``stages`` in order; the paper's
rows are made of assets/paper_rows.yaml by name, others are YAML files. A stage holds the settings of
``refine.train`` or ``refine.eval``, is checked by them, and runs in a process of its own in a folder named by a
hash of its settings and of the stages before it: rows that share a stage share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml

from refine.evaluation.settings import EvalSettings, expand_tasks
from refine.files import FolderInUse, owned, why, write_whole
from refine.settings import (
    SettingsError,
    build,
    check_values,
    kinds_of,
    nearest,
    read_command_line,
    read_file,
    read_mapping,
    read_yaml,
    setting,
)
from refine.training.settings import TrainSettings

FAMILIES = ("lact", "delta_net")
ROW_KEYS = ("extends", "table", "row", "family", "stages")
_TABLE_KEYS = ("title", "columns", "rows")
KINDS = {"train": TrainSettings, "eval": EvalSettings}
PLACEHOLDERS = ("model", "text", "qa_train", "qa_test", "longbench")
PAPER = resources.files("refine") / "assets" / "paper_rows.yaml"
PUBLISHED = resources.files("refine") / "assets" / "paper_numbers.yaml"
Texts = list[str]  # Options has a setting of the name "list"
EXAMPLES = (
    ("which rows there are", "refine reproduce '*' --list"),
    (
        "what one row would run",
        "refine reproduce table3_lact_refine --model MODEL --text TEXT --qa_train PAIRS --qa_test ROWS --dry_run",
    ),
    ("print the tables from what is there", "refine reproduce '*' --print_tables"),
)
# How and where a stage runs; nothing that its result is named by.
_FREE = ("output_dir", "overwrite_output_dir", "resume", "resume_from_checkpoint", "device")


@dataclass(kw_only=True)
class Options:
    """Everything that ``python -m refine.reproduce`` can be told."""

    ALIASES: ClassVar[dict[str, str]] = {"model_name_or_path": "model", "dataset_name_or_path": "text"}

    rows: Texts = setting([], "names of the paper's rows (with * for several), or YAML files, in this order")
    output_dir: str = setting("runs/paper", "stages, logs, tables.md, tables.json")
    model: Texts = setting(
        [], "a folder or hub name, or one a family: lact=PATH delta_net=PATH", commas=False
    )
    text: str | None = setting(None, "mid-training text, as dataset_name_or_path of refine.train")
    qa_train: str | None = setting(None, "pairs for post-training, likewise")
    qa_test: str | None = setting(None, "RULER QA rows, as ruler_qa_files of refine.eval")
    longbench: str | None = setting(None, "LongBench rows, as longbench_files of refine.eval")
    set: Texts = setting(
        [], "NAME=VALUE in every stage that knows the name; also train.NAME, eval.NAME", commas=False
    )
    nproc_per_node: int = setting(1, "processes of a training stage (torchrun)", least=1)
    published: str | None = setting(
        None, "the paper's numbers; default: published.yaml beside the first row's file"
    )
    list: bool = setting(False, "show the rows, run nothing")
    dry_run: bool = setting(False, "write the stages' files and print the commands")
    print_tables: bool = setting(False, "print from what is there, run nothing")

    def __post_init__(self):
        check_values(self)
        if not self.rows:
            raise SettingsError("name the rows to run, as table3_lact_refine or 'ablation_k_*'")
        if self.list + self.dry_run + self.print_tables > 1:
            raise SettingsError("list, dry_run and print_tables exclude each other")


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
        if self.kind == "train":
            return [*command, "--resume_from_checkpoint", "auto"]
        return [*command, "--resume"]

    def write_config(self, root: Path) -> None:
        """Its settings as a file beside its folder, with the model of the stage before."""
        settings = dict(self.settings)
        if self.parent is not None:
            settings["model_name_or_path"] = str(root / "stages" / self.parent.name / "final")
        (root / "stages").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_whole(root / "stages" / f"{self.name}.yaml", text)


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, and its stages; the last is an evaluation."""

    name: str  # of the paper's row, or of the file
    table: str
    label: str
    stages: list[Stage]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when every row is there, 1 when one failed, 2 when it could not begin."""
    try:
        given = read_command_line(
            Options, sys.argv[1:] if arguments is None else arguments, "refine reproduce",
            "Run rows of the paper's tables (arXiv 2602.16704) and print them beside the paper's numbers.",
            words_are="rows", examples=EXAMPLES,
        )  # fmt: skip
        path = given.pop("config", None)
        return reproduce(build(Options, ({} if path is None else read_file(Options, path)) | given))
    except SettingsError as error:
        print(f"refine.reproduce: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"refine.reproduce: {why(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refine.reproduce: stopped; the same command goes on", file=sys.stderr)
        return 130


def reproduce(options: Options) -> int:
    """Run the rows as told, and print their tables."""
    root = Path(options.output_dir)
    values = _values(options)
    overrides = dict(_override(text) for text in options.set)
    names = [name for given in options.rows for name in expand_names(given)]
    rows = [load_row(name, values, overrides, options.nproc_per_node) for name in names]
    beside = Path(options.rows[0]).parent / "published.yaml"
    published = load_published(options.published or (beside if beside.is_file() else PUBLISHED))
    if options.list:
        for row in rows:
            state = "done" if row.stages[-1].done(root) else "-"
            print(f"table {row.table:<10} {row.label:<68} {state:<5} {row.name}")
        return 0
    missing = {name for row in rows for stage in row.stages for name in _unfilled(stage.settings)}
    if missing:
        raise SettingsError("these rows need " + ", ".join(f"--{name}" for name in sorted(missing)))
    if options.dry_run:
        for stage in {stage.name: stage for row in rows for stage in row.stages}.values():
            stage.write_config(root)
            done = "# done: " if stage.done(root) else ""
            print(done + " ".join(stage.command(root, options.nproc_per_node)))
        return 0
    root.mkdir(parents=True, exist_ok=True)
    try:
        with owned(root):
            return _run(rows, root, options, published)
    except FolderInUse as error:
        raise SettingsError(f"output_dir {error}") from error


def _run(rows: list[Row], root: Path, options: Options, published: dict[str, Any]) -> int:
    """Run what is missing, and write the tables; 1 when a row failed."""
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
    write_whole(root / "tables.md", text + "\n")
    write_whole(root / "tables.json", json.dumps(record, indent=2) + "\n")
    for label, failure in failures.items():
        print(f"refine.reproduce: {label}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def row_names() -> list[str]:
    """The names of the paper's rows."""
    return list(_paper_rows())


def expand_names(given: str) -> list[str]:
    """The rows that a name means: a file's, a row's of the paper, or all that fit where it has a ``*``.

    Raises:
        SettingsError: there is none; the nearest is suggested.
    """
    if Path(given).is_file():
        return [] if Path(given).name == "published.yaml" else [given]
    name = Path(given).name.removesuffix(".yaml")
    found = [row for row in _paper_rows() if fnmatchcase(row, name)]
    if not found:
        end = nearest(name, _paper_rows(), "; --list '*' shows all")
        raise SettingsError(f"there is no file and no row of the paper {given!r}{end}")
    return found


def load_row(
    name: str | Path,
    values: dict[str, str] | None = None,
    overrides: dict[str, Any] | None = None,
    processes: int = 1,
) -> Row:
    """A row by its name or from its file, every stage checked by the settings class of its command.

    Args:
        name: of a row of the paper, or a YAML file's path.
        values: for the placeholders ``$model``, ``$text``, ...; what is not given stays as it is. A model may be
            given for one family, as ``model.lact``.
        overrides: settings that replace those of every stage that knows them; ``train.`` or ``eval.`` before a
            name limits it to that kind.
        processes: of a training stage; its accumulation steps are divided by them, so the batch stays.

    Raises:
        SettingsError: names the row and what is wrong in it.
    """
    values, overrides = values or {}, overrides or {}
    try:
        merged = _read(name)
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
        if not isinstance(merged["stages"], dict):
            raise SettingsError(f"stages must be a mapping, got {type(merged['stages']).__name__}")
        for stage, content in merged["stages"].items():
            if content is None:
                continue
            if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in KINDS:
                raise SettingsError(
                    f"stage {stage!r} must hold either train or eval settings, got {content!r}"
                )
            ((kind, settings),) = content.items()
            if not isinstance(settings, dict | None):
                raise SettingsError(
                    f"stage {stage!r} must be a mapping of settings, got {type(settings).__name__}"
                )
            if stages and stages[-1].kind == "eval":
                raise SettingsError(f"stage {stage!r} comes after an evaluation, which must be the last")
            stages.append(_stage(kind, settings or {}, stages, given, overrides, processes))
        if not stages or stages[-1].kind != "eval":
            raise SettingsError("the last stage must be an evaluation")
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from error
    return Row(Path(name).stem, str(merged["table"]), str(merged["row"]), stages)


def load_published(path: str | Path) -> dict[str, Any]:
    """The tables' columns, and the paper's numbers as far as they are known."""
    loaded = read_yaml(path, "published")
    if not isinstance(loaded, dict) or not isinstance(loaded.get("tables"), dict):
        raise SettingsError(f"published {str(path)!r} must be a mapping with the key tables")
    for name, about in loaded["tables"].items():
        if unknown := [key for key in about if key not in _TABLE_KEYS]:
            end = nearest(str(unknown[0]), _TABLE_KEYS)
            raise SettingsError(f"published {str(path)!r}, table {name}: unknown key {unknown[0]!r}{end}")
    return loaded["tables"]


def make_tables(rows: list[Row], root: Path, published: dict[str, Any]) -> tuple[dict, str]:
    """The tables of these rows, as a record and as text: ours beside the paper's, in percent.

    A column is the plain mean over its tasks and their lengths. A dash stands for what was not run, or what the
    paper's number is not known of.
    """
    record: dict[str, Any] = {}
    parts = []
    for name in dict.fromkeys(row.table for row in rows):
        if name not in published:
            raise SettingsError(
                f"there is no table {name!r} in the published numbers: they have {', '.join(published)}"
            )
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
            record[name]["rows"][row.label] = {"ours": ours, "paper": theirs, "file": row.name}
        parts.append("\n".join(lines))
    return record, "\n\n".join(parts)


def _measured(row: Row, root: Path, columns: dict[str, list[str]]) -> list[float | None]:
    path = root / "stages" / row.stages[-1].name / "results.json"
    if not path.is_file():
        return [None] * len(columns)
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    means = []
    for tasks in columns.values():
        names = set(expand_tasks(tasks))
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
    cls = KINDS[kind]
    settings = read_mapping(cls, _fill(settings, values))
    for name, value in overrides.items():
        wanted, _, bare = name.rpartition(".")
        if wanted in ("", kind) and bare in kinds_of(cls):
            settings |= read_mapping(cls, {bare: value})
    if before:
        settings["model_name_or_path"] = f"stage:{before[-1].name}"
    else:
        settings.setdefault("model_name_or_path", _fill("$model", values))
    resolved = dataclasses.asdict(build(cls, settings))
    if kind == "train" and processes > 1:
        if resolved["gradient_accumulation_steps"] % processes:
            raise SettingsError(
                f"nproc_per_node must divide gradient_accumulation_steps="
                f"{resolved['gradient_accumulation_steps']}, got {processes}"
            )
        settings["gradient_accumulation_steps"] = resolved["gradient_accumulation_steps"] // processes
        if settings.get("parallel", "none") == "none":
            settings["parallel"] = "ddp"
        build(cls, settings)
    identity = json.dumps({name: resolved[name] for name in sorted(resolved) if name not in _FREE})
    digest = hashlib.sha256(f"{kind} {identity}".encode()).hexdigest()[:12]
    return Stage(f"{kind}-{digest}", kind, settings, before[-1] if before else None)


@cache
def _paper() -> dict[str, Any]:
    return read_yaml(PAPER)


@cache
def _paper_rows() -> dict[str, dict[str, Any]]:
    """name -> the keys of each row of the paper."""
    found = {}
    for table, about in _paper()["tables"].items():
        if "vary" in about:
            ((stage, inside),) = about["vary"].items()
            ((kind, name),) = inside.items()
            rows = {
                str(value): {
                    "label": f", {about['table']} = {value}",
                    "stages": {stage: {kind: {name: value}}},
                }
                for value in about["values"]
            }
        else:
            rows = about["rows"]
        for family, model in _paper()["families"].items():
            for name, row in rows.items():
                found[f"{table}_{family}_{name}"] = {
                    "extends": about["extends"], "table": about["table"], "row": model + row["label"],
                    "family": family, "stages": row.get("stages", {}),
                }  # fmt: skip
    return found


def _read(name: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A row's keys over what it extends: mappings are merged, all else is replaced."""
    if str(name) in seen:
        raise SettingsError(f"extends goes in a circle at {Path(name).name}")
    if Path(name).is_file():
        loaded = read_yaml(name, "row")
    elif str(name) in _paper_rows():
        loaded = _paper_rows()[str(name)]
    elif str(name) in _paper()["bases"]:
        loaded = _paper()["bases"][str(name)]
    else:
        raise SettingsError(f"there is no file, row or base {str(name)!r}")
    if not isinstance(loaded, dict):
        raise SettingsError(f"must be a mapping, got {type(loaded).__name__}")
    for key in loaded:
        if key not in ROW_KEYS:
            raise SettingsError(f"unknown key {key!r}{nearest(str(key), ROW_KEYS)}")
    own = {key: value for key, value in loaded.items() if key != "extends"}
    base = loaded.get("extends")
    if base is None:
        return own
    beside = Path(name).parent / str(base)
    return _merge(_read(beside if beside.is_file() else str(base), (*seen, str(name))), own)


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
            raise SettingsError(f"unknown placeholder {value!r}{nearest(value[1:], PLACEHOLDERS)}")
        return values.get(value[1:], value)
    return value


def _unfilled(settings: Any) -> set[str]:
    if isinstance(settings, dict | list):
        parts = settings.values() if isinstance(settings, dict) else settings
        return set().union(*(_unfilled(part) for part in parts)) if parts else set()
    return {settings[1:]} if isinstance(settings, str) and settings.startswith("$") else set()


def _check_overrides(overrides: dict[str, Any]) -> None:
    known = list(dict.fromkeys([*kinds_of(TrainSettings), *kinds_of(EvalSettings)]))
    for name in overrides:
        kind, _, bare = name.rpartition(".")
        if (kind and kind not in KINDS) or bare not in (kinds_of(KINDS[kind]) if kind else known):
            raise SettingsError(f"set: unknown setting {name!r}{nearest(bare, known)}")


def _override(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"set takes name=value, got {text!r}")
    return name.removeprefix("--"), value


def _values(options: Options) -> dict[str, str]:
    values = {name: getattr(options, name) for name in PLACEHOLDERS[1:] if getattr(options, name) is not None}
    for text in options.model:
        family, equals, path = text.partition("=")
        if equals and family not in FAMILIES:
            raise SettingsError(f"model takes PATH, or FAMILY=PATH with {', '.join(FAMILIES)}, got {text!r}")
        values[f"model.{family}" if equals else "model"] = path if equals else text
    return values


if __name__ == "__main__":
    sys.exit(main())
