"""The settings of a training run. How they are read stands in :mod:`refine.settings`, and what training and
evaluation share in :mod:`refine.prepare`. Knows nothing of models, data or the loop.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from refine.data.curriculum import check_lengths
from refine.method.config import RefineConfig
from refine.settings import (
    SettingsError,
    build,
    check_values,
    nearest,
    read_command_line,
    read_file,
    setting,
)
from refine.shared_settings import (
    AdapterSettings,
    ModelSettings,
    NewModelSettings,
    OptimizerSettings,
    TextSettings,
)
from refine.training.text_rewards import TextRewards

PHASES = ("mid", "sft", "post", "grpo")
SCALES = ("group", "batch", "none")
ANSWER_UPDATES = ("each", "draw")
PROMPT_STEPS = ("refine", "sft", "none")
REPORTERS = ("tensorboard", "wandb")
PARALLEL = ("none", "ddp", "fsdp2", "context")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
_ASSETS = resources.files("refine") / "assets"
DEFAULT_JOB = _ASSETS / "default.yaml"
RECIPES = _ASSETS / "recipes"
EXAMPLES = (
    ("the tiny model on documents made to be remembered: under two minutes on two cores", "refine train"),
    (
        "your text: a file, or a folder of .txt, .md, .jsonl, .json, .csv and .parquet files",
        "refine train --dataset_name_or_path my_text/ --output_dir runs/mine",
    ),
    (
        "a published checkpoint, at the paper's settings",
        "refine train --model_name_or_path fla-hub/delta_net-1.3B-100B --dataset_name_or_path my_text/ --bf16",
    ),
    (
        "go on with a run that was stopped",
        "refine train --config runs/mine/config.yaml --resume_from_checkpoint auto",
    ),
)
TINY_LEARNING_RATE = 1e-3  # of a small new model, where nothing else is said


@dataclass(kw_only=True)
class PairSettings:
    """How a file of pairs is read (phase post)."""

    prompt_column: str = setting("prompt", "of a file of pairs (phase post)")
    answer_column: str = setting("answer", "a text, or a list whose first is learned")
    question_column: str = setting("question", "with passages_column")
    passages_column: str | None = setting(
        None, "make RULER's QA prompts of these passages, the question, and others' passages"
    )
    pair_lengths: list[int] = setting(
        [], "only rows whose max_seq_length is one of these; default: all", least=1
    )
    answer_eos: bool = setting(True, "end-of-text behind each answer is learned too")
    answer_updates: str = setting(
        "each",
        "each: an update on the answers after every update on prompts; draw: one on all pairs that a draw of "
        "rollouts serves, after their updates",
        choices=ANSWER_UPDATES,
    )


@dataclass(kw_only=True)
class GroupSettings:
    """Completions of prompts and their rewards (phase grpo); the names are TRL's."""

    reward_funcs: list[str] = setting([], "module:function(prompts, completions, **columns), one or several")
    reward_weights: list[float] | None = setting(None, "of reward_funcs; default: 1 each")
    num_generations: int = setting(8, "completions per prompt, a group", least=2)
    max_completion_length: int = setting(256, "tokens a completion may have", least=1)
    num_iterations: int = setting(1, "times that completions are trained on", least=1)
    scale_rewards: str = setting(
        "group",
        "advantages are divided by the standard deviation of the rewards of their group, or of all of the draw",
        choices=SCALES,
    )
    mask_truncated_completions: bool = setting(
        False, "leave completions out of the loss that did not end by themselves"
    )
    top_k: int | None = setting(None, "sample among so many tokens", least=1)
    top_p: float | None = setting(None, "sample among tokens of so much probability together", over=0, most=1)
    min_p: float | None = setting(None, "sample among tokens of this share of the largest", least=0, most=1)
    max_branches: int | None = setting(None, "completions whose activations are alive at a time", least=1)


@dataclass(kw_only=True)
class StreamSettings(TextSettings):
    """What to train on, what to measure on, and how both are cut."""

    eval_dataset_name_or_path: str | None = setting(None, "default: documents held out of the training data")
    eval_fraction: float = setting(0.05, "of the documents, held out for evaluation", least=0, under=1)
    recall_weight: float = setting(
        0.5, "of the windows of default+recall or default+needles", over=0, under=1
    )
    answers_column: str | None = setting(
        None,
        "a row's answers: a list of texts in it (the last place is meant) or of [first, behind] in characters",
    )
    answer_weight: float = setting(
        1.0,
        "of an answer's tokens in the next-token loss; tokens of documents without answers count 1",
        over=0,
    )
    context_weight: float = setting(1.0, "of the other tokens of a document with answers", least=0)
    shuffle_buffer: int = setting(128, "sequences shuffled together; 1: in order", least=1)
    max_length: int = setting(16384, "tokens a sequence")
    length_schedule: dict[str, Any] = setting(
        {},
        "a curriculum of lengths, as update=tokens,update=tokens: 0=128,500=512,900=1024; shorter sequences come "
        "in larger batches, of about as many tokens",
    )
    min_length: int | None = setting(
        None, "shorter documents are skipped; default: what the method needs (1 for pairs' answers)"
    )


@dataclass(kw_only=True)
class RunSettings:
    """What kind of training, and where it goes."""

    phase: str = setting(
        "mid",
        "mid: REFINE steps; sft: next-token loss alone; post: for each batch of pairs a step on the prompts "
        "(prompt_step), then one on the answers; grpo: completions of prompts, rewarded by reward_funcs",
        choices=PHASES,
    )
    prompt_step: str = setting("refine", "the step on the prompts, in phase post", choices=PROMPT_STEPS)
    output_dir: str = setting(
        "runs/refine", "the run's folder: settings, metrics, samples, checkpoints, final model"
    )
    overwrite_output_dir: bool = setting(False, "write into a folder that has files")
    resume_from_checkpoint: str = setting(
        "none", "auto (the newest good one), none, or a checkpoint's folder"
    )


@dataclass(kw_only=True)
class UpdateSettings:
    """How many updates, of how much, on how many devices."""

    max_steps: int = setting(100, "optimizer updates", least=1)
    per_device_train_batch_size: int = setting(1, "sequences a forward pass", least=1)
    gradient_accumulation_steps: int = setting(1, "forward passes an update", least=1)
    num_mini_batches: int = setting(
        1, "updates that one draw of rollouts serves; 1: on-policy, 4: the paper's off-policy", least=1
    )
    lr_scheduler_type: str = setting("constant_with_warmup", "of the learning rate", choices=SCHEDULES)
    warmup_steps: int = setting(0, "updates of linear warm-up", least=0)
    max_skipped_updates: int = setting(
        5, "stop after so many non-finite losses or gradients in a row", least=1
    )
    parallel: str = setting(
        "none", "under torchrun; context: processes share each document", choices=PARALLEL
    )
    packing: bool = setting(
        False, "put the sequences of a forward pass into one row, without padding (phases mid and sft)"
    )
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward")


@dataclass(kw_only=True)
class ReportSettings:
    """What is logged, measured and saved, and how often."""

    logging_steps: int = setting(1, "updates between two lines of metrics.jsonl", least=1)
    sample_steps: int = setting(10, "updates between two rollout samples; 0: none", least=0)
    eval_steps: int = setting(0, "updates between two evaluations; 0: first and last", least=0)
    eval_samples: int = setting(16, "held-out sequences an evaluation; 0: none", least=0)
    recall_samples: int = setting(
        0,
        "needles (niah_single_1, niah_single_2) and recall questions each, asked at every evaluation",
        least=0,
        most=10_000,  # they are made before the first update
    )
    save_steps: int = setting(50, "updates between two checkpoints; 0: only the end", least=0)
    save_total_limit: int | None = setting(2, "checkpoints kept; none: all", least=1)
    report_to: list[str] = setting([], "where metrics go besides metrics.jsonl", choices=REPORTERS)
    run_name: str | None = setting(None, "shown by the reporters")


@dataclass(kw_only=True)
class TrainSettings(
    RefineConfig,
    ModelSettings,
    NewModelSettings,
    AdapterSettings,
    StreamSettings,
    PairSettings,
    GroupSettings,
    OptimizerSettings,
    UpdateSettings,
    ReportSettings,
    RunSettings,
):
    """Everything that ``python -m refine.train`` can be told; the method's own settings are inherited.

    Names are those of transformers and TRL where they have one. The defaults are the paper's mid-training
    values (AdamW 1e-6, betas 0.9 and 0.999, weight decay 0.01, gradient clip 0.2).
    """

    ABOUT_CONFIG: ClassVar[str] = (
        "a YAML file of settings, or the name of a recipe of this package; the command line goes over it"
    )
    GROUPS: ClassVar[dict[str, type]] = {
        "run": RunSettings, "model": ModelSettings, "data": StreamSettings, "updates": UpdateSettings,
        "optimizer": OptimizerSettings, "method": RefineConfig, "reports": ReportSettings,
        "adapters": AdapterSettings, "new_model": NewModelSettings, "pairs": PairSettings, "groups": GroupSettings,
    }  # fmt: skip
    ALIASES: ClassVar[dict[str, str]] = {
        "model": "model_name_or_path", "loss_type": "objective", "epsilon": "clip_range",
        "epsilon_high": "clip_range_high", "delta": "dual_clip",
    }  # fmt: skip

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        check_values(self)
        if self.resume_from_checkpoint.lower() in ("true", "false", "latest", "last"):
            raise SettingsError(
                "resume_from_checkpoint must be auto (the newest checkpoint of output_dir), none or a checkpoint's "
                f"folder, got {self.resume_from_checkpoint!r}"
            )
        if self.add_bos_token is None:
            self.add_bos_token = True
        if self.decay_vectors is None:
            self.decay_vectors = False
        if self.model_name_or_path and self.model_type:
            raise SettingsError(
                "model_name_or_path and model_type exclude each other: a checkpoint or a new model"
            )
        if self.config_overrides and not self.model_type:
            raise SettingsError("config_overrides describe a new model: they need model_type")
        if self.mimetic_init and not self.model_type:
            raise SettingsError("mimetic_init is about a new model: it needs model_type")
        least = 1 if self.phase == "grpo" else self.min_tokens
        if self.min_length is None:
            self.min_length = least
        if self.min_length < least:
            raise SettingsError(
                f"min_length must be at least {self.min_tokens} for num_chunks={self.num_chunks} and "
                f"rollout_length={self.rollout_length}, got {self.min_length}"
            )
        if self.max_length < self.min_length:
            raise SettingsError(
                f"max_length must be at least min_length={self.min_length} (num_chunks={self.num_chunks}, "
                f"rollout_length={self.rollout_length}), got {self.max_length}"
            )
        if self.length_schedule:
            self._check_lengths()
        if self.weighs_answers and self.phase not in ("mid", "sft"):
            raise SettingsError(
                "answer_weight and context_weight are about the documents of phases mid and sft, and must be 1 in "
                f"phase {self.phase}; got {self.answer_weight:g} and {self.context_weight:g}"
            )
        if self.packing:
            self._check_packing()
        if self.parallel == "context" and self.segment_length is None:
            raise SettingsError("parallel context shares documents by segments: set segment_length")
        if self.phase in ("post", "grpo") and self.parallel == "context":
            raise SettingsError("parallel context shares the documents of phases mid and sft, not pairs")
        if self.phase != "grpo" and not self.draws_rollouts and self.num_mini_batches > 1:
            raise SettingsError(
                "num_mini_batches is about rollouts: it must be 1 with phase sft and without prompt_step refine"
            )
        self._check_groups()
        self.check_adapters()

    def _check_groups(self) -> None:
        if self.phase != "grpo":
            for name in ("reward_funcs", "reward_weights"):
                if getattr(self, name):
                    raise SettingsError(
                        f"{name} is for phase grpo; the reward of phase {self.phase} is 'reward'"
                    )
            if self.num_iterations > 1:
                raise SettingsError("num_iterations is for phase grpo; others have num_mini_batches")
            if self.mask_truncated_completions:
                raise SettingsError("mask_truncated_completions is for phase grpo")
            return
        try:
            TextRewards(self.reward_funcs, self.reward_weights)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def _check_packing(self) -> None:
        for wrong, what in (
            (self.phase not in ("mid", "sft"), f"phase {self.phase}"),
            (self.segment_length is not None, "segment_length"),
            (self.step == "per_prefix", "step=per_prefix"),
        ):
            if wrong:
                raise SettingsError(f"packing is about padding in phases mid and sft; it goes without {what}")

    def _check_lengths(self) -> None:
        if self.phase == "post":
            raise SettingsError("length_schedule is about the documents of phases mid and sft, not pairs")
        try:
            self.length_schedule = check_lengths(self.length_schedule, self.max_length, self.min_length)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    @property
    def weighs_answers(self) -> bool:
        """Whether tokens of a document count differently in the loss."""
        return (self.answer_weight, self.context_weight) != (1, 1)

    @property
    def draws_rollouts(self) -> bool:
        """Whether the steps of this run are REFINE steps."""
        return self.phase == "mid" or (self.phase == "post" and self.prompt_step == "refine")


def parse_settings(arguments: list[str]) -> TrainSettings:
    """Settings from a command line: ``[--config run.yaml] [--key value ...]``.

    The command line goes over the file. Where neither names a model, the package's default job lies under both;
    with a model the defaults are the paper's.

    Raises:
        SettingsError: an unknown setting (the nearest is suggested), a value of the wrong kind, a file that
            is not there or is not YAML.
        SystemExit: ``--help``.
    """
    default_job = read_file(TrainSettings, DEFAULT_JOB)
    given = read_command_line(
        TrainSettings, arguments, "refine train",
        "Train a fast-weight language model with REFINE (arXiv 2602.16704). Without arguments: mid-train the "
        "tiny model of this package on documents made to be remembered, in under two minutes.",
        shown=default_job, examples=EXAMPLES,
    )  # fmt: skip
    path = given.pop("config", None)
    said = ({} if path is None else read_file(TrainSettings, find_config(path))) | given
    merged = dict(said)
    if "model_name_or_path" in given and "model_type" not in given:
        merged |= {"model_type": None, "config_overrides": {}}
    if "model_type" in given and "model_name_or_path" not in given:
        merged["model_name_or_path"] = None
    small = None  # whose values lie under those that were given
    if merged.get("model_name_or_path") is None and (path is None or merged.get("model_type") is None):
        small = dict(default_job)
        if merged.get("model_type") and "config_overrides" not in merged:
            small |= _tiny_model(merged["model_type"])
        merged = small | merged
        if "recall_samples" not in said and not _asks_needles(merged):
            merged["recall_samples"] = 0
    settings = build(TrainSettings, merged)
    unsaid = [name for name in ("learning_rate", "max_length") if name not in said]
    if unsaid and (path is not None or small is None) and os.environ.get("RANK", "0") == "0":
        values = ", ".join(f"{name}={getattr(settings, name)}" for name in unsaid)
        whose = "the paper's" if small is None else "the default job's, as no model was named"
        print(f"{values} ({whose}; say otherwise with --NAME VALUE or in the file)")
    return settings


def find_config(given: str) -> Path:
    """A file of settings: by its path, or a recipe of this package by its name.

    Raises:
        SettingsError: there is neither.
    """
    path = Path(given).expanduser()
    if path.exists():
        return path
    recipes = sorted(file.name.removesuffix(".yaml") for file in RECIPES.iterdir())
    if given.removesuffix(".yaml") in recipes:
        return Path(str(RECIPES / f"{given.removesuffix('.yaml')}.yaml"))
    meant = nearest(
        given.removesuffix(".yaml"), recipes, f"; this package's recipes are {', '.join(recipes)}"
    )
    raise SettingsError(f"config {given!r} cannot be read: No such file{meant}")


def _asks_needles(settings: dict[str, Any]) -> bool:
    """Whether the default job's questions fit a run: documents that hold one, in a phase that reads documents."""
    length = settings.get("max_length")
    return settings.get("phase") != "grpo" and isinstance(length, int) and length >= 512


def _tiny_model(model_type: str | None) -> dict[str, Any]:
    """What the default job sets for a small new model of a type: its registered small size, a learning rate for it,
    and plain text to begin with. Nothing for an unknown type, which is refused where the model is made."""
    from refine.models.registry import ENTRIES, resolve_type  # here: --help needs no transformers

    try:
        tiny = ENTRIES[resolve_type(model_type)].tiny
    except ValueError:
        return {}
    if not tiny:
        return {}
    return {
        "learning_rate": TINY_LEARNING_RATE,
        "config_overrides": dict(tiny),
        "dataset_name_or_path": "default",
    }
