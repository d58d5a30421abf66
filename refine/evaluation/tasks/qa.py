"""RULER's question answering (SQuAD, HotpotQA): any file of prompts and answers, scored by any answer found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from refine.data.document import cut_middle
from refine.evaluation.metrics import string_match_part
from refine.evaluation.tasks.item import Item, Prompt, encode
from refine.evaluation.tasks.rows import BadRows, Columns, Row, read_rows, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 32
QA_TASKS = ("ruler_squadqa", "ruler_hotpotqa")


def qa_items(
    paths: Sequence[str],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bad: BadRows,
    samples: int | None = None,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (),
    max_prompt_length: int | None = None,
    add_bos_token: bool = True,
    setting: str = "ruler_qa_files",
) -> list[Item]:
    """The questions of these files, by task and by ``max_seq_length`` where rows have one.

    Args:
        bad: filled with the rows that are left out.
        samples: at most so many of each task and length; None: all.
        tasks: only rows of these; None: all.
        lengths: only rows of these ``max_seq_length``; (): all.
        max_prompt_length: longer prompts are cut in the middle.
        add_bos_token: prompts begin with what the tokenizer puts at a beginning.

    Raises:
        ValueError: a file or column is not there, or nothing is left.
    """
    items, taken = [], {}
    for row in read_rows(paths, setting, columns, bad):
        if tasks is not None and row.task not in tasks:
            continue
        length = whole_number(row.values.get("max_seq_length"))
        if lengths and length not in lengths:
            continue
        taken[row.task, length] = taken.get((row.task, length), 0) + 1
        if samples is None or taken[row.task, length] <= samples:
            items.append(
                Item(
                    key=f"{row.task}/{length}/{row.key}",
                    task=row.task,
                    length=length,
                    score=string_match_part,
                    max_new_tokens=NEW_TOKENS,
                    make=lambda row=row: make_prompt(row, tokenizer, max_prompt_length, add_bos_token),
                    source=row.source,
                    kind="question",
                )
            )
    if not items:
        raise ValueError(nothing_left(paths, setting, [*(tasks or ()), *map(str, lengths)], bad))
    return items


def make_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None, add_bos_token: bool = True
) -> Prompt:
    """A row's prompt, within the limit."""
    ids = encode(tokenizer, row.prompt, add_bos_token)
    kept = ids if max_prompt_length is None else cut_middle(ids, max_prompt_length)
    return Prompt(np.asarray(kept, np.int32), row.references, cut=len(kept) < len(ids))


def nothing_left(paths: Sequence[str], setting: str, tasks: Sequence[str] | None, bad: BadRows) -> str:
    """The sentence for files without a row to evaluate on."""
    of = f" of {', '.join(tasks)}" if tasks else ""
    first = f"; {bad.count} bad rows, the first: {bad.reasons[0]}" if bad.count else ""
    return f"{setting}: no row{of} to evaluate on in {', '.join(paths)}{first}"
