"""RULER's other generated tasks (arXiv 2404.06654): variable tracking, common words, frequent words; from
generators of our own.

The settings are those of RULER's benchmark: one chain of four hops in the noise of the needle tasks (``vt``); ten
words 30 times each among others of 3 times, and, under 4,096 tokens, 6 times among others of once (``cwe``); coded
words after Zipf's law with exponent 2, the first of which is dots (``fwe``). ``vt`` and ``cwe`` show an example
first. ``cwe`` draws from the words of :mod:`~refine.evaluation.tasks.words`; where RULER goes on to a larger list,
it ends. Each sample follows from the task, the seed, the index and the tokenizer alone, and is the largest that
keeps within its length.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np

from refine.evaluation.tasks.haystack import NOISE
from refine.evaluation.tasks.item import Prompt, SampleGenerator
from refine.evaluation.tasks.niah import TokenCounter
from refine.evaluation.tasks.words import find_words

SAMPLES = 500
HOPS = 4
COMMON_WORDS = 10
ALPHA = 2.0  # of Zipf's law
CODED_LETTERS = 6
FREQUENT_TOKENS = 50  # of the answer
EXAMPLE_TOKENS, EXAMPLE_LINES = 500, 5  # of the example of vt: the most, and the fewest

Count = Callable[[str], int]  # tokens of a text

_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to "
    "the chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, "
    "they are: "
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top "
    "10 words that appear most often in the list are:"
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? Answer: According to the coded "
    "text above, the three most frequently appeared words are:"
)


class Sample(NamedTuple):
    """A prompt's text, and what is to be named."""

    text: str
    references: tuple[str, ...]


def variable_tracking(units: int, name: str, length: int, count: Count) -> Sample:
    """A chain ``VAR B = VAR A`` of :data:`HOPS` hops hidden in ``units`` lines of noise, after an example of up to
    500 tokens."""

    def example_of(lines: int) -> Sample:
        return _chain(Random(f"{name}/example"), lines, letters=3)

    lines = largest_that_fits(EXAMPLE_LINES, EXAMPLE_TOKENS, lambda lines: count(example_of(lines).text))
    example = example_of(lines or EXAMPLE_LINES)
    asked = _chain(Random(name), units, letters=5)
    return Sample(f"{example.text} {' '.join(example.references)}\n\n{asked.text}", asked.references)


def _chain(rng: Random, units: int, letters: int) -> Sample:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    variables, value = list(names), str(rng.randint(10_000, 99_998))
    statements = [f"VAR {variables[0]} = {value}"]
    statements += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    lines = [NOISE] * units
    places = sorted(rng.sample(range(units), len(statements)))
    for number, (place, statement) in enumerate(zip(places, statements)):
        lines.insert(place + number, statement)
    text = _TRACKING.format(context="\n".join(lines), value=value, count=len(variables))
    return Sample(text, tuple(variables))


def common_words(units: int, name: str, length: int, count: Count) -> Sample:
    """A numbered list of ``units`` different words, ten of them often, after a short example of the same kind."""
    short = length < 4096
    often, seldom = (6, 1) if short else (30, 3)
    example = _word_list(Random(f"{name}/example"), 20 if short else 40, *((3, 1) if short else (10, 3)))
    asked = _word_list(Random(name), units, often, seldom)
    shown = " ".join(f"{number}. {word}" for number, word in enumerate(example.references, 1))
    return Sample(f"{example.text} {shown}\n{asked.text}", asked.references)


def _word_list(rng: Random, units: int, often: int, seldom: int) -> Sample:
    words = rng.sample(_all_words(), units)
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listed = common * often + others * seldom
    rng.shuffle(listed)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return Sample(_COMMON.format(context=context), tuple(common))


def _all_words() -> list[str]:
    words = find_words()
    return sorted({*words.adjectives, *words.nouns, *words.verbs})


def frequent_words(units: int, name: str, length: int, count: Count) -> Sample:
    """About ``units`` coded words, the r-th of the vocabulary ``units / (zeta(2) r^2)`` times; dots come first."""
    rng = Random(name)
    coded: dict[str, None] = {}
    while len(coded) < max(10, (length - FREQUENT_TOKENS) // 50):
        coded["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
    vocabulary = ["...", *list(coded)[1:]]
    zeta = np.pi**2 / 6  # of ALPHA = 2
    counts = (units / zeta * np.arange(1, len(vocabulary) + 1) ** -ALPHA).astype(int)
    words = [word for word, count in zip(vocabulary, counts.tolist()) for _ in range(count)]
    rng.shuffle(words)
    return Sample(_FREQUENT.format(context=" ".join(words)), tuple(vocabulary[1:4]))


@dataclass(frozen=True)
class RulerTask:
    """A generated task.

    Attributes:
        write: (units, the sample's name, length, tokens of a text) -> the sample with so many units of context.
        least: units of the smallest sample.
        most: units of the largest, where there are so many; None: any number.
        new_tokens: of the answer.
    """

    write: Callable[[int, str, int, Count], Sample]
    least: int
    new_tokens: int
    most: Callable[[], int] | None = None


RULER_TASKS = {
    "vt": RulerTask(variable_tracking, least=HOPS + 1, new_tokens=30),
    "cwe": RulerTask(common_words, least=COMMON_WORDS + 1, new_tokens=120, most=lambda: len(_all_words())),
    # from 60 units on the three most frequent words differ in number
    "fwe": RulerTask(frequent_words, least=60, new_tokens=FREQUENT_TOKENS),
}


@dataclass(frozen=True)
class RulerGenerator(SampleGenerator):
    """Samples of one task at one length."""

    name: str
    counter: TokenCounter
    length: int
    seed: int = 0

    @property
    def task(self) -> RulerTask:
        return RULER_TASKS[self.name]

    @property
    def task_name(self) -> str:
        return self.name

    @property
    def answer_tokens(self) -> int:
        return self.task.new_tokens

    def make(self, index: int) -> Prompt:
        budget = self.length - self.task.new_tokens
        fitting: dict[int, tuple[Sample, list[int]]] = {}

        def tokens_with(units: int) -> int:
            sample, ids = self._write(units, index)
            if len(ids) <= budget:
                fitting[units] = sample, ids
            return len(ids)

        most = self.task.most() if self.task.most else None
        units = largest_that_fits(self.task.least, budget, tokens_with, most)
        if units is None:
            raise ValueError(self.too_short(self.least_length(index)))
        sample, ids = fitting[units]
        return Prompt(np.asarray(ids, np.int32), sample.references)

    def smallest(self, index: int) -> list[int]:
        return self._write(self.task.least, index)[1]

    def _write(self, units: int, index: int) -> tuple[Sample, list[int]]:
        name = f"ruler/{self.name}/{self.seed}/{index}"
        sample = self.task.write(units, name, self.length, lambda text: len(self.counter.encode(text)))
        return sample, self.counter.encode(sample.text)


def largest_that_fits(
    least: int, budget: int, tokens_with: Callable[[int], int], most: int | None = None
) -> int | None:
    """The largest number of units from ``least`` to ``most`` whose prompt keeps within the budget, where prompts
    grow about evenly with their units; None: not even ``least`` does.

    Where one more unit can make a prompt shorter, the result keeps within the budget and the next one does not.
    """
    tokens = tokens_with(least)
    if tokens > budget:
        return None
    fits, fitting_tokens, too_many = least, tokens, None if most is None else most + 1
    per_unit = tokens / least
    while too_many is None or too_many - fits > 1:
        at = fits + max(1, int((budget - fitting_tokens) / per_unit))
        at = at if too_many is None else min(at, too_many - 1)
        tokens = tokens_with(at)
        per_unit = max((tokens - fitting_tokens) / (at - fits), 1 / 16)
        if tokens <= budget:
            fits, fitting_tokens = at, tokens
        else:
            too_many = at
    return fits
