"""LongBench's English tasks (arXiv 2308.14508): which score, how long an answer, and what of it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from refine.evaluation.metrics import (
    TREC_CLASSES,
    check_rouge,
    classification_accuracy,
    edit_similarity,
    first_line,
    rouge_l,
    token_f1,
)
from refine.evaluation.tasks.item import Item
from refine.evaluation.tasks.qa import make_prompt, nothing_left
from refine.evaluation.tasks.rows import BadRows, Columns, Row, read_rows, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LongBenchTask(NamedTuple):
    """How a task is asked and scored."""

    metric: Callable[..., float]
    new_tokens: int
    first_line: bool = False  # only the first line of the answer counts: the prompt shows examples one a line


LONGBENCH_TASKS = {
    "narrativeqa": LongBenchTask(token_f1, 128),
    "qasper": LongBenchTask(token_f1, 128),
    "multifieldqa_en": LongBenchTask(token_f1, 64),
    "hotpotqa": LongBenchTask(token_f1, 32),
    "2wikimqa": LongBenchTask(token_f1, 32),
    "musique": LongBenchTask(token_f1, 32),
    "gov_report": LongBenchTask(rouge_l, 512),
    "qmsum": LongBenchTask(rouge_l, 512),
    "multi_news": LongBenchTask(rouge_l, 512),
    "trec": LongBenchTask(classification_accuracy, 64, first_line=True),
    "triviaqa": LongBenchTask(token_f1, 32, first_line=True),
    "samsum": LongBenchTask(rouge_l, 128, first_line=True),
    "lcc": LongBenchTask(edit_similarity, 64),
    "repobench-p": LongBenchTask(edit_similarity, 64),
}
QUESTIONS = tuple(
    name for name, task in LONGBENCH_TASKS.items() if task.metric is token_f1 and not task.first_line
)
LEFT_OUT = ("musique", "gov_report")  # of the paper's average
PREFIX = "longbench_"


def longbench_items(
    paths: Sequence[str],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bad: BadRows,
    tasks: Sequence[str],
    samples: int | None = None,
    max_prompt_length: int | None = None,
    add_bos_token: bool = True,
    setting: str = "longbench_files",
) -> list[Item]:
    """The questions of these files for the tasks named (as in :data:`LONGBENCH_TASKS`).

    Rows of a known task that is not named are passed over; a row of an unknown one is a bad row. ``max_gen_tokens``
    and ``all_classes`` of a row go before the task's own. See :func:`refine.evaluation.tasks.qa.qa_items` for the
    rest.

    Raises:
        ValueError: see there; or a task needs a package that is not installed.
    """
    if any(LONGBENCH_TASKS[task].metric is rouge_l for task in tasks):
        try:
            check_rouge()
        except ImportError as error:
            raise ValueError(str(error)) from error
    items, taken = [], dict.fromkeys(tasks, 0)
    for row in read_rows(paths, setting, columns, bad):
        if row.task not in LONGBENCH_TASKS:
            bad.add(row.source, f"there is no LongBench task {row.task!r}")
        elif row.task in taken and (samples is None or taken[row.task] < samples):
            taken[row.task] += 1
            new_tokens = whole_number(row.values.get("max_gen_tokens"))
            items.append(
                Item(
                    key=f"{PREFIX}{row.task}/{row.key}",
                    task=f"{PREFIX}{row.task}",
                    length=None,
                    score=longbench_score(row),
                    max_new_tokens=new_tokens or LONGBENCH_TASKS[row.task].new_tokens,
                    make=lambda row=row: make_prompt(row, tokenizer, max_prompt_length, add_bos_token),
                    source=row.source,
                    kind="question" if row.task in QUESTIONS else "document",
                )
            )
    if not items:
        raise ValueError(nothing_left(paths, setting, tasks, bad))
    return items


def longbench_score(row: Row) -> Callable[[str, tuple[str, ...]], float]:
    """The score of an answer to a row, given its references."""
    task = LONGBENCH_TASKS[row.task]
    extra = {}
    if task.metric is classification_accuracy:
        classes = row.values.get("all_classes")
        given = isinstance(classes, list) and all(isinstance(name, str) and name for name in classes)
        extra = {"classes": classes if given and classes else TREC_CLASSES}

    def score(answer: str, references: tuple[str, ...]) -> float:
        return task.metric(first_line(answer) if task.first_line else answer, references, **extra)

    return score
