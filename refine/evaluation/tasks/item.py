"""What a task hands to those who answer and score: items that make their prompts when they are asked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be read.

    Attributes:
        ids: [P] int32, with the tokens that the tokenizer puts at a beginning.
        references: what is scored against.
        depths: for needles, where each reference stands in the context, in percent.
        cut: the middle was left out to keep within the limit.
    """

    ids: np.ndarray
    references: tuple[str, ...]
    depths: tuple[float, ...] | None = None
    cut: bool = False


@dataclass(frozen=True)
class Item:
    """One sample of a task.

    Attributes:
        key: unique within an evaluation and the same in every run with the same settings.
        task: as reported.
        length: tokens that prompts of this kind may have, where the task has several; else None.
        score: of an answer, given the references.
        max_new_tokens: the answer's longest.
        make: the prompt; costs tokenising, so it waits until it is needed.
        source: where the sample comes from, for people.
        kind: ``generated``; of rows of a file, ``question`` (its answer is one line) or ``document``.
    """

    key: str
    task: str
    length: int | None
    score: Callable[[str, tuple[str, ...]], float]
    max_new_tokens: int
    make: Callable[[], Prompt]
    source: str
    kind: str = "generated"


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_bos_token: bool = True) -> list[int]:
    """Tokens of a prompt: with the beginning that the tokenizer adds, without an end, which would say that
    there is nothing to come."""
    ids = tokenizer(text, add_special_tokens=add_bos_token, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
