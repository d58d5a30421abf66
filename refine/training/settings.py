"""The settings of a training run: one flat namespace, command line over file over default.

Knows how to read, check and write settings. Knows nothing of models, data or the loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from refine.method.config import RefineConfig

PHASES = ("mid", "sft", "post")
PROMPT_STEPS = ("refine", "sft", "none")
REPORTERS = ("tensorboard", "wandb")
PARALLEL = ("none", "ddp", "fsdp2", "context")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
DEFAULT_JOB = "default.yaml"
TINY_MODELS = "tiny_models.yaml"


class SettingsError(ValueError):
    """A setting that cannot be: the message names it, what was given and what is allowed."""


@dataclass(kw_only=True)
class TrainSettings(RefineConfig):
    """Everything that ``python -m refine.train`` can be told; the method's own settings are inherited.

    Names are those of transformers and TRL where they have one. The defaults are the paper's mid-training
    values (AdamW 1e-6, betas 0.9 and 0.999, weight decay 0.01, gradient clip 0.2).
    """

    phase: str = field(
        default="mid",
        metadata={
            "help": "mid: REFINE steps; sft: next-token loss alone; post: for each batch of pairs a step on the "
            "prompts (prompt_step), then one on the answers"
        },
    )
    prompt_step: str = field(
        default="refine", metadata={"help": "with phase post: " + ", ".join(PROMPT_STEPS)}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "of a file of pairs (phase post)"})
    answer_column: str = field(
        default="answer", metadata={"help": "a text, or a list whose first is learned"}
    )
    question_column: str = field(default="question", metadata={"help": "with passages_column"})
    passages_column: str | None = field(
        default=None,
        metadata={"help": "make RULER's QA prompts of these passages, the question, and others' passages"},
    )

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a folder or a hub name; none: the tiny model of this package"}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "start from random weights of this type instead of a checkpoint"}
    )
    config_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "model configuration, as key=value,key=value"}
    )
    mimetic_init: bool = field(
        default=False, metadata={"help": "begin a new model near in-context recall (arXiv 2410.11135)"}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "default: the model's own"})

    dataset_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "a .parquet, .jsonl or .txt file, a folder, a hub name, or default, recall, default+recall: "
            "the text of every Python installation, generated recall documents, both"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "the configuration of a hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "the split of a hub dataset"})
    text_column: str | None = field(default=None, metadata={"help": "default: found"})
    eval_dataset_name_or_path: str | None = field(
        default=None, metadata={"help": "default: documents held out of the training data"}
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "of the documents, held out for evaluation"})
    recall_weight: float = field(default=0.5, metadata={"help": "of the windows of default+recall"})
    shuffle_buffer: int = field(default=128, metadata={"help": "sequences shuffled together; 1: in order"})
    max_length: int = field(default=16384, metadata={"help": "tokens a sequence"})
    min_length: int | None = field(
        default=None, metadata={"help": "shorter documents are skipped; default: what the method needs"}
    )

    output_dir: str = field(default="runs/refine", metadata={"help": "where everything goes"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write into a folder that has files"})
    resume_from_checkpoint: str = field(
        default="none", metadata={"help": "auto (the newest good one), none, or a checkpoint's folder"}
    )

    per_device_train_batch_size: int = field(default=1, metadata={"help": "sequences a forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes an update"})
    num_mini_batches: int = field(
        default=1,
        metadata={
            "help": "updates that one draw of rollouts serves; 1: on-policy, 4: the paper's off-policy"
        },
    )
    max_steps: int = field(default=100, metadata={"help": "optimizer updates"})
    learning_rate: float = field(default=1e-6, metadata={"help": "peak rate"})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": ", ".join(SCHEDULES)})
    warmup_steps: int = field(default=0, metadata={"help": "updates of linear warm-up"})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = field(default=0.2, metadata={"help": "gradients are clipped to this norm"})
    max_skipped_updates: int = field(
        default=5, metadata={"help": "stop after so many non-finite losses or gradients in a row"}
    )
    bf16: bool = field(default=False, metadata={"help": "autocast to bfloat16; parameters stay float32"})
    parallel: str = field(
        default="none",
        metadata={"help": ", ".join(PARALLEL) + " (under torchrun); context: processes share each document"},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute blocks in the backward"})

    logging_steps: int = field(default=1, metadata={"help": "updates between two lines of metrics.jsonl"})
    sample_steps: int = field(default=10, metadata={"help": "updates between two rollout samples; 0: none"})
    eval_steps: int = field(
        default=0, metadata={"help": "updates between two evaluations; 0: first and last"}
    )
    eval_samples: int = field(default=16, metadata={"help": "held-out sequences an evaluation; 0: none"})
    save_steps: int = field(default=50, metadata={"help": "updates between two checkpoints; 0: only the end"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept; none: all"})
    report_to: list[str] = field(default_factory=list, metadata={"help": ", ".join(REPORTERS)})
    run_name: str | None = field(default=None, metadata={"help": "shown by the reporters"})
    seed: int = 0
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1; default: a GPU if any"})

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        for name, allowed in (
            ("phase", PHASES),
            ("prompt_step", PROMPT_STEPS),
            ("lr_scheduler_type", SCHEDULES),
            ("parallel", PARALLEL),
        ):
            if getattr(self, name) not in allowed:
                raise SettingsError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for reporter in self.report_to:
            if reporter not in REPORTERS:
                raise SettingsError(f"report_to takes {', '.join(REPORTERS)}, got {reporter!r}")
        least = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_mini_batches": 1,
            "max_steps": 1,
            "logging_steps": 1,
            "max_skipped_updates": 1,
            "shuffle_buffer": 1,
            "warmup_steps": 0,
            "sample_steps": 0,
            "eval_steps": 0,
            "eval_samples": 0,
            "save_steps": 0,
            "seed": 0,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise SettingsError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise SettingsError(f"save_total_limit must be at least 1 or none, got {self.save_total_limit}")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} must be over 0 and finite, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 0 and under 1, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise SettingsError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.model_name_or_path and self.model_type:
            raise SettingsError(
                "model_name_or_path and model_type exclude each other: a checkpoint or a new model"
            )
        if self.config_overrides and not self.model_type:
            raise SettingsError("config_overrides describe a new model: they need model_type")
        if self.mimetic_init and not self.model_type:
            raise SettingsError("mimetic_init is about a new model: it needs model_type")
        if not 0 < self.recall_weight < 1:
            raise SettingsError(f"recall_weight must be over 0 and under 1, got {self.recall_weight}")
        if self.min_length is None:
            self.min_length = self.min_tokens
        if self.min_length < self.min_tokens:
            raise SettingsError(
                f"min_length must be at least {self.min_tokens} for num_chunks={self.num_chunks} and "
                f"rollout_length={self.rollout_length}, got {self.min_length}"
            )
        if self.max_length < self.min_length:
            raise SettingsError(
                f"max_length must be at least min_length={self.min_length} (num_chunks={self.num_chunks}, "
                f"rollout_length={self.rollout_length}), got {self.max_length}"
            )
        if self.parallel == "context" and self.segment_length is None:
            raise SettingsError("parallel context shares documents by segments: set segment_length")
        if self.phase == "post" and self.parallel == "context":
            raise SettingsError("parallel context shares the documents of phases mid and sft, not pairs")
        if not self.draws_rollouts and self.num_mini_batches > 1:
            raise SettingsError(
                "num_mini_batches is about rollouts: it must be 1 with phase sft and without prompt_step refine"
            )

    @property
    def draws_rollouts(self) -> bool:
        """Whether the steps of this run are REFINE steps."""
        return self.phase == "mid" or (self.phase == "post" and self.prompt_step == "refine")


def parse_settings(arguments: list[str]) -> TrainSettings:
    """Settings from a command line: ``[--config run.yaml] [--key value ...]``.

    Without ``--config`` and ``--model_name_or_path`` the file is the package's default job.

    Raises:
        SettingsError: an unknown setting (the nearest is suggested), a value of the wrong kind, a file that
            is not there or is not YAML.
        SystemExit: ``--help``.
    """
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    given = vars(known)
    if unknown:
        raise SettingsError(_unknown(unknown[0].lstrip("-").split("=")[0]))
    default_job = "config" not in given
    path = given.pop("config", None)
    if path is None and "model_name_or_path" not in given:
        path = resources.files("refine") / "assets" / DEFAULT_JOB
    merged = {} if path is None else read_file(path)
    if default_job and "model_type" in given and "config_overrides" not in given:
        merged |= _tiny_model(given["model_type"])
    merged |= {name: _convert(name, value) for name, value in given.items()}
    if "model_type" in given and "model_name_or_path" not in given:
        merged["model_name_or_path"] = None
    if "model_name_or_path" in given and "model_type" not in given:
        merged |= {"model_type": None, "config_overrides": {}}
    return TrainSettings(**merged)


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, checked by name and kind."""
    try:
        loaded = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(
            f"config {str(path)!r} must be a mapping of settings, got {type(loaded).__name__}"
        )
    for name in loaded:
        if name not in _fields():
            raise SettingsError(_unknown(str(name)))
    return {name: _convert(name, value) for name, value in loaded.items()}


def _tiny_model(model_type: str) -> dict[str, Any]:
    """What the default job sets for a small new model of this type; nothing for an unknown one."""
    text = (resources.files("refine") / "assets" / TINY_MODELS).read_text(encoding="utf-8")
    return yaml.safe_load(text).get(model_type, {})


def to_yaml(settings: TrainSettings) -> str:
    """The settings as resolved, in the order of their definition; :func:`read_file` reads them back."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True)


def _fields() -> dict[str, Any]:
    hints = typing.get_type_hints(TrainSettings)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainSettings)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refine.train",
        description="Train a fast-weight language model with REFINE (arXiv 2602.16704). Without arguments: "
        "mid-train the tiny model of this package on text that every Python has, in under two minutes.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these settings")
    for f in dataclasses.fields(TrainSettings):
        kind = _fields()[f.name]
        text = f.metadata.get("help", "see refine.RefineConfig").replace("%", "%%")
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        arguments: dict[str, Any] = {"help": f"{text} (default: {default})", "metavar": "VALUE"}
        if kind is bool:
            arguments |= {"nargs": "?", "const": True}
        elif typing.get_origin(kind) is list:
            arguments |= {"nargs": "*"}
        parser.add_argument(f"--{f.name}", **arguments)
    return parser


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*_fields(), "config"], n=1, cutoff=0.5)
    return f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else "; --help lists all")


def _convert(name: str, value: Any) -> Any:
    """A value from YAML or the command line as the kind that the setting has."""
    kind = _fields()[name]
    options = [kind]
    if isinstance(kind, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
    kind = options[0]
    try:
        if kind is bool:
            return _to_bool(value)
        if kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            return int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if typing.get_origin(kind) is list:
            items = [value] if isinstance(value, str) else list(value or [])
            return [part for item in items for part in str(item).split(",") if part and part != "none"]
        if typing.get_origin(kind) is dict:
            return _to_mapping(value)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise ValueError
    except (TypeError, ValueError, OverflowError, yaml.YAMLError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
            kind, "key=value,key=value" if typing.get_origin(kind) is dict else "a list of names"
        )
        raise SettingsError(f"{name} must be {wanted}, got {value!r}") from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return value.lower() in ("true", "yes", "on", "1")
    raise ValueError


def _to_mapping(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError
    pairs = [pair.split("=", 1) for pair in value.split(",") if pair]
    return {key.strip(): yaml.safe_load(text) for key, text in pairs}
