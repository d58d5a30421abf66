"""RULER's eight needle-in-a-haystack tasks (arXiv 2404.06654), from a generator of our own.

A prompt follows from the task, the seed, the index and the tokenizer alone. The needles of an index are the same
at every length; the haystack is the largest whose prompt, with the tokens to generate, keeps within the length.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from refine.data.needles import HELD_OUT_WORDING
from refine.evaluation.tasks.haystack import Cost, Essay, Haystack, Lines, Noise
from refine.evaluation.tasks.item import Prompt, SampleGenerator, encode
from refine.evaluation.tasks.words import find_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 500
NEW_TOKENS = 128

WORDINGS = ("ruler", "held_out")  # held_out: that of no needle document to train on
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)


@dataclass(frozen=True)
class NiahTask:
    """What is hidden in what.

    Attributes:
        haystack: ``noise``, ``essay`` or ``needles``.
        key, value: what they are made of: ``words``, ``numbers`` or ``uuids``.
        keys, values, queries: how many keys are hidden, values each has, and keys are asked for.
    """

    name: str
    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needles(self) -> int:
        return self.keys * self.values


NIAH_TASKS = {
    task.name: task
    for task in (
        NiahTask("niah_single_1", "noise"),
        NiahTask("niah_single_2", "essay"),
        NiahTask("niah_single_3", "essay", value="uuids"),
        NiahTask("niah_multikey_1", "essay", keys=4),
        NiahTask("niah_multikey_2", "needles"),
        NiahTask("niah_multikey_3", "needles", key="uuids", value="uuids"),
        NiahTask("niah_multivalue", "essay", values=4),
        NiahTask("niah_multiquery", "essay", keys=4, queries=4),
    )
}


class Draw(NamedTuple):
    """The needles of one sample."""

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]  # of each key
    needles: tuple[str, ...]  # all of them, in the order in which they are put into the haystack
    asked: tuple[int, ...]  # which keys


def draw_needles(task: NiahTask, rng: random.Random, wording: str = "ruler") -> Draw:
    """Keys and values, no two of them alike."""
    keys = _distinct(task.key, task.keys, rng)
    flat = _distinct(task.value, task.needles, rng)
    values = tuple(tuple(flat[i * task.values : (i + 1) * task.values]) for i in range(task.keys))
    needles = [write_needle(task, key, value, wording) for key, own in zip(keys, values) for value in own]
    rng.shuffle(needles)
    return Draw(tuple(keys), values, tuple(needles), tuple(rng.sample(range(task.keys), task.queries)))


def write_needle(task: NiahTask, key: str, value: str, wording: str = "ruler") -> str:
    """The sentence that tells the value of a key."""
    if wording == "ruler":
        return NEEDLE.format(kind=task.value, key=key, value=value)
    return HELD_OUT_WORDING.needle.format(kind=task.value[:-1], key=key, value=value)


def write_prompt(task: NiahTask, draw: Draw, context: str, wording: str = "ruler") -> str:
    """RULER's prompt with its answer prefix, singular where one value of one key is asked for; or the context and a
    question in the held-out wording, which can only ask for one value."""
    asked = [draw.keys[i] for i in draw.asked]
    if wording == "held_out":
        return f"{context}\n{HELD_OUT_WORDING.question.format(kind=task.value[:-1], key=asked[0])}"
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    if task.queries * task.values == 1:
        return _ONE.format(kind=task.value[:-1], context=context, query=query)
    return _SEVERAL.format(kind=task.value, context=context, query=query)


def _distinct(kind: str, count: int, rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_draw(kind, rng)] = None
    return list(found)


def _draw(kind: str, rng: random.Random) -> str:
    if kind == "words":
        return find_words().draw(rng)
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


class TokenCounter:
    """Tokens by one tokenizer: exact for a prompt, approximate for a piece of one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool = True):
        self.tokenizer, self.add_bos_token = tokenizer, add_bos_token
        self.cost: Cost = self._cost  # one object, by which an essay knows its costs again
        self._before = len(self._plain(["x"])[0])

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return encode(self.tokenizer, text, self.add_bos_token)

    def _cost(self, pieces: Sequence[str]) -> list[int]:
        """What each piece adds after other text; never less than a token."""
        if not pieces:
            return []
        return [max(1, len(ids) - self._before) for ids in self._plain([f"x{piece}" for piece in pieces])]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass(frozen=True)
class NiahGenerator(SampleGenerator):
    """Samples of one task at one length.

    Attributes:
        length: tokens of the prompt and ``new_tokens`` together.
        essay: the text of tasks with that haystack.
    """

    task: NiahTask
    counter: TokenCounter
    length: int
    essay: Essay | None = None
    seed: int = 0
    new_tokens: int = NEW_TOKENS
    wording: str = "ruler"

    def __post_init__(self):
        if self.wording == "held_out" and self.task.queries * self.task.values > 1:
            raise ValueError(
                f"{self.task.name} asks for several values, which the held-out wording has no words for"
            )

    def make(self, index: int) -> Prompt:
        draw, haystack, name = self._begin(index)
        budget = self.length - self.new_tokens
        fitting: dict[int, tuple[str, list[int]]] = {}  # units -> context, tokens; of the largest so far

        def tokens_with(units: int) -> int:
            context = haystack.context(units, draw.needles, random.Random(f"{name}/places"))
            ids = self.counter.encode(write_prompt(self.task, draw, context, self.wording))
            if len(ids) <= budget:
                fitting[units] = context, ids
            return len(ids)

        units = _largest(self._least_units, budget, tokens_with, haystack, self.counter.cost)
        if units is None:
            raise ValueError(self.too_short(self.least_length(index)))
        context, ids = fitting[units]
        references = tuple(value for i in draw.asked for value in draw.values[i])
        depths = tuple(_depth(context, value) for value in references)
        return Prompt(np.asarray(ids, np.int32), references, depths)

    def smallest(self, index: int) -> list[int]:
        draw, haystack, name = self._begin(index)
        context = haystack.context(self._least_units, draw.needles, random.Random(f"{name}/places"))
        return self.counter.encode(write_prompt(self.task, draw, context, self.wording))

    @property
    def task_name(self) -> str:
        return self.task.name

    @property
    def answer_tokens(self) -> int:
        return self.new_tokens

    @property
    def _least_units(self) -> int:
        return 1 if self.task.haystack == "essay" else self.task.needles

    def _begin(self, index: int) -> tuple[Draw, Haystack, str]:
        name = f"niah/{self.task.name}/{self.seed}/{index}"
        draw = draw_needles(self.task, random.Random(name), self.wording)
        if self.task.haystack == "noise":
            return draw, Noise(), name
        if self.task.haystack == "essay":
            return draw, self.essay, name
        other = _other_needles(self.task, draw, random.Random(f"{name}/haystack"), self.wording)
        return draw, Lines(other), name


def _other_needles(task: NiahTask, draw: Draw, rng: random.Random, wording: str) -> Callable[[], str]:
    """A function that gives one more needle a call, never of a key of ``draw``."""

    def line() -> str:
        while (key := _draw(task.key, rng)) in draw.keys:
            pass
        return write_needle(task, key, _draw(task.value, rng), wording)

    return line


def _depth(context: str, value: str) -> float:
    """Where a value stands, in percent of the context."""
    return round(100 * context.index(value) / max(1, len(context) - len(value)), 1)


def _largest(
    least: int, budget: int, tokens_with: Callable[[int], int], haystack: Haystack, cost: Cost
) -> int | None:
    """The n from ``least`` on whose prompt keeps within the budget while that of n + 1 does not; None: not even
    ``least`` does.

    Each exact count corrects the estimate, so that three or four of them are enough.
    """
    at, too_many, counts = least, None, 1
    tokens = tokens_with(at)
    if tokens > budget:
        return None
    fits = at
    while too_many is None or too_many - fits > 1:
        at = haystack.units_within(haystack.tokens_of(at, cost) + budget - tokens, cost)
        ahead = 2 ** max(0, counts - 4)  # a bad estimate does not creep on
        at = max(at, fits + (ahead if too_many is None else 1))
        at = at if too_many is None else min(at, too_many - 1)
        tokens, counts = tokens_with(at), counts + 1
        if tokens <= budget:
            fits = at
        else:
            too_many = at
    return fits
