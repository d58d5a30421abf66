"""What a task hands to those who answer and score: items that make their prompts when they are asked to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refine.evaluation.metrics import string_match_all

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


class SampleGenerator(ABC):
    """Samples of one generated task of RULER at one length.

    Attributes:
        length: tokens of the prompt and of the answer together.
    """

    length: int

    @property
    @abstractmethod
    def task_name(self) -> str:
        """The task, as reported."""

    @property
    @abstractmethod
    def answer_tokens(self) -> int:
        """The answer's longest."""

    @abstractmethod
    def make(self, index: int) -> Prompt:
        """Sample ``index``, the largest that keeps within the length.

        Raises:
            ValueError: not even the smallest does; names the least length.
        """

    @abstractmethod
    def smallest(self, index: int) -> list[int]:
        """The tokens of sample ``index`` with the least context."""

    def least_length(self, index: int) -> int:
        """The shortest length at which sample ``index`` can be made."""
        return len(self.smallest(index)) + self.answer_tokens

    def items(self, samples: int) -> list[Item]:
        """The first ``samples`` samples.

        Raises:
            ValueError: the length is too short for one of them.
        """
        if self.length < 2 * self.least_length(0):  # else no sample can be too long
            least = max(self.least_length(index) for index in range(samples))
            if self.length < least:
                raise ValueError(self.too_short(least))
        return [
            Item(
                key=f"{self.task_name}/{self.length}/{index}",
                task=self.task_name,
                length=self.length,
                score=string_match_all,
                max_new_tokens=self.answer_tokens,
                make=lambda index=index: self.make(index),
                source=f"{self.task_name} {index}",
            )
            for index in range(samples)
        ]

    def too_short(self, least: int) -> str:
        """The sentence for a length below the least."""
        return (
            f"length {self.length} is too short for {self.task_name}: the least is {least} tokens with this "
            f"tokenizer, {self.answer_tokens} of them for the answer"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_bos_token: bool = True) -> list[int]:
    """Tokens of a prompt: with the beginning that the tokenizer adds, without an end, which would say that
    there is nothing to come."""
    ids = tokenizer(text, add_special_tokens=add_bos_token, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
