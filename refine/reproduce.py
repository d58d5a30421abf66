"""``python -m refine.reproduce``: the rows of the paper's tables and its figures, run one after the other.

What the rows are stands in assets/paper_rows.yaml and :mod:`refine.paper.rows`; others are YAML files. Every
stage of a row runs in a process of its own, in a folder named by a hash of its settings and of the stages
before it: rows that share a stage share it. With ``--compare`` each row is run beside SFT of equal updates,
tokens and time.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from refine.evaluation.settings import PROTOCOLS
from refine.files import FolderInUse, owned, why, write_whole
from refine.paper import compare
from refine.paper.figures import draw_figure
from refine.paper.rows import (
    FAMILIES,
    PLACEHOLDERS,
    Figure,
    Row,
    expand_names,
    figures,
    load_row,
    row_names,
    unfilled,
)
from refine.paper.stages import Stage, run_stages
from refine.paper.tables import PUBLISHED, load_published, make_tables
from refine.settings import SettingsError, build, check_values, read_command_line, read_file, setting

__all__ = ["PUBLISHED", "Options", "Row", "Stage", "expand_names", "load_published", "load_row", "main",
           "make_tables", "reproduce", "row_names"]  # fmt: skip
Texts = list[str]  # Options has a setting of the name "list"
Numbers = list[int]
EXAMPLES = (
    ("which rows there are", "refine reproduce '*' --list"),
    (
        "what one row would run",
        "refine reproduce table3_lact_refine --model MODEL --text TEXT --qa_train PAIRS --qa_test ROWS --dry_run",
    ),
    ("print the tables from what is there", "refine reproduce '*' --print_tables"),
)


@dataclass(kw_only=True)
class Options:
    """Everything that ``python -m refine.reproduce`` can be told."""

    ALIASES: ClassVar[dict[str, str]] = {"model_name_or_path": "model", "dataset_name_or_path": "text"}

    rows: Texts = setting([], "names of rows and figures (with * for several), or YAML files, in this order")
    output_dir: str = setting("runs/paper", "stages, logs, tables.md, tables.json, figures")
    model: Texts = setting(
        [], "a folder or hub name, or one a family: lact=PATH delta_net=PATH", commas=False
    )
    text: str | None = setting(None, "mid-training text, as dataset_name_or_path of refine.train")
    validation: str | None = setting(
        None, "text that mid-training is measured on, every tenth batch (figures 4 and E.1)"
    )
    qa_train: str | None = setting(None, "pairs for post-training: a file, or a folder of files")
    qa_test: str | None = setting(None, "RULER QA rows, as ruler_qa_files of refine.eval")
    longbench: str | None = setting(None, "LongBench rows, as longbench_files of refine.eval")
    protocol: str = setting(
        "ours", "paper: train and evaluate as the authors' code does", choices=tuple(PROTOCOLS)
    )
    set: Texts = setting(
        [],
        "NAME=VALUE in every stage that knows the name; also KIND.NAME (train, eval, lm_eval) and STAGE.NAME (mid, "
        "post, test)",
        commas=False,
    )
    compare: bool = setting(False, "run each row beside SFT of equal updates, equal tokens and equal time")
    seeds: Numbers = setting([0, 1, 2], "of compare", least=0)
    nproc_per_node: int = setting(1, "processes of a training stage (torchrun)", least=1)
    published: str | None = setting(
        None, "the paper's numbers; default: published.yaml beside the first row's file, else the package's"
    )
    list: bool = setting(False, "show the rows, run nothing")
    dry_run: bool = setting(False, "write the stages' files and print the commands")
    print_tables: bool = setting(False, "print and draw from what is there, run nothing")

    def __post_init__(self):
        check_values(self)
        if not self.rows:
            raise SettingsError("name the rows to run, as table3_lact_refine or 'ablation_k_*'")
        if self.list + self.dry_run + self.print_tables > 1:
            raise SettingsError("list, dry_run and print_tables exclude each other")
        if self.compare and (self.list or self.dry_run):
            raise SettingsError("compare decides what to run by what ran before: without list and dry_run")
        if self.compare and len({*self.seeds}) != len(self.seeds):
            raise SettingsError(f"seeds must differ, got {self.seeds}")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when every row is there, 1 when one failed, 2 when it could not begin."""
    try:
        given = read_command_line(
            Options, sys.argv[1:] if arguments is None else arguments, "refine reproduce",
            "Run rows of the paper's tables (arXiv 2602.16704), draw its figures, and print our numbers under the "
            "paper's.",
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
    """Run the rows as told, print their tables and draw the figures."""
    root = Path(options.output_dir)
    names = [name for given in options.rows for name in expand_names(given)]
    drawn = [figures()[name] for name in names if name in figures()]
    wanted = [name for name in names if name not in figures()]
    rows = {
        name: _load(options, name) for name in dict.fromkeys([*wanted, *(n for f in drawn for n in f.rows)])
    }
    beside = Path(options.rows[0]).parent / "published.yaml"
    published = load_published(options.published or (beside if beside.is_file() else PUBLISHED))
    if options.list:
        for name in wanted:
            state = "done" if all(stage.done(root) for stage in rows[name].tests) else "-"
            print(f"table {rows[name].table:<10} {rows[name].label:<68} {state:<5} {name}")
        for figure in drawn:
            print(f"figure           {', '.join(figure.rows):<68} -     {figure.name}")
        return 0
    todo = _todo(wanted, drawn, rows)
    missing = {name for stages in todo.values() for stage in stages for name in unfilled(stage.settings)}
    missing |= {"validation"} if options.validation is None and any(f.measure for f in drawn) else set()
    if missing:
        raise SettingsError("these rows need " + ", ".join(f"--{name}" for name in sorted(missing)))
    if options.dry_run:
        for stage in {stage.name: stage for stages in todo.values() for stage in stages}.values():
            stage.write_config(root)
            done = "# done: " if stage.done(root) else ""
            print(done + " ".join(stage.command(root, options.nproc_per_node)))
        return 0
    root.mkdir(parents=True, exist_ok=True)
    try:
        with owned(root):
            if options.compare:
                return _compare(wanted, root, options, published)
            failures = {} if options.print_tables else _run(todo, rows, root, options)
            return _report(wanted, drawn, rows, root, options, published, failures)
    except FolderInUse as error:
        raise SettingsError(f"output_dir {error}") from error


def _todo(wanted: Texts, drawn: list[Figure], rows: dict[str, Row]) -> dict[str, list[Stage]]:
    """The stages to run of each row: all where its table is asked for or a figure needs its evaluation."""
    whole = {*wanted, *(name for figure in drawn if not figure.training_only for name in figure.rows)}
    return {name: row.stages if name in whole else row.training for name, row in rows.items()}


def _run(todo: dict[str, list[Stage]], rows: dict[str, Row], root: Path, options: Options) -> dict[str, str]:
    """Run what is missing; what failed, by row."""
    failures: dict[str, str] = {}
    broken: set[str] = set()
    for number, (name, stages) in enumerate(todo.items(), 1):
        row = rows[name]
        print(f"[{number}/{len(todo)}] table {row.table}: {row.label}", flush=True)
        failure = run_stages(stages, root, options.nproc_per_node, broken)
        if failure:
            failures[f"table {row.table}, {row.label}"] = failure
            print(f"  failed: {failure}", file=sys.stderr, flush=True)
    return failures


def _report(wanted, drawn, rows, root: Path, options: Options, published, failures: dict[str, str]) -> int:
    """Write the tables and the figures; 1 when a row failed."""
    record, text = make_tables([rows[name] for name in wanted], root, published, _about(options))
    if record:
        print(text)
        write_whole(root / "tables.md", text + "\n")
        write_whole(root / "tables.json", json.dumps(record, indent=2) + "\n")
    for figure in drawn:
        files = draw_figure(figure, [rows[name] for name in figure.rows], root, published, _about(options))
        for path in files:
            print(f"{figure.name}  {path}")
        if not files:
            failures[figure.name] = "there are no numbers to draw"
    for label, failure in failures.items():
        print(f"refine.reproduce: {label}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _compare(names: Texts, root: Path, options: Options, published: dict[str, Any]) -> int:
    """The comparison of each row at equal compute; 1 when something failed."""
    if not names:
        raise SettingsError("compare takes rows of tables, not figures")
    records, texts, failures = [], [], []
    broken: set[str] = set()

    def run(row: Row) -> str | None:
        if missing := {name for stage in row.stages for name in unfilled(stage.settings)}:
            raise SettingsError("these rows need " + ", ".join(f"--{name}" for name in sorted(missing)))
        return None if options.print_tables else run_stages(row.stages, root, options.nproc_per_node, broken)

    for name in names:
        found = compare.compare(
            lambda changes, name=name: _load(options, name, changes), options.seeds, root, run, published,
            _about(options),
        )  # fmt: skip
        records.append(found[0]), texts.append(found[1]), failures.extend(found[2])
        print(found[1])
    compare.write(root, records, texts)
    for failure in failures:
        print(f"refine.reproduce: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _load(options: Options, name: str, changes: dict[str, Any] | None = None) -> Row:
    overrides = dict(_override(text) for text in options.set) | (changes or {})
    return load_row(name, _values(options), overrides, options.nproc_per_node, options.protocol)


def _about(options: Options) -> dict[str, Any]:
    """What all tables and figures of this command say of themselves."""
    return {"protocol": options.protocol, "changed settings": ", ".join(options.set)}


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
