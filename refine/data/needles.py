"""Generated documents with needles: facts with random keys and values in real text, and questions whose answers are
marked, so that a loss can be put on the answers alone.

A small fast-weight model learns to find a needle when two things hold. The loss stands on what the needle tells:
everywhere else, random keys and values are noise, which drowns the signal (see ``answer_weight``). And lengths
rise: among 128 tokens a needle is near (see ``length_schedule``). So a document is made for a number of tokens, and
marks its answers.

No key is made of the words of the needle tasks' own lists (``needle_words``), and ``HELD_OUT_WORDING`` is in no
document of the split ``train``: a test with either shows recall, not familiarity. RULER's wording is one of the
training wordings, and its noise one of the haystacks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from refine.data.default_text import SPLITS, default_document, default_names
from refine.data.document import Answer, Document, document_of
from refine.data.needle_words import ADJECTIVES, NOUNS

MOST_NEEDLES = 12
MOST_QUESTIONS = 12

Count = Callable[[str], int]  # tokens of a text


class Wording(NamedTuple):
    """How a document tells a fact and asks for it. ``{kind}`` is what values are called."""

    needle: str
    question: str  # the answer follows, after a blank
    intro: str = ""
    joint: str = "-"  # between the words of a key


RULER_WORDING = Wording(
    needle="One of the special magic {kind}s for {key} is: {value}.",
    question=(
        "What is the special magic {kind} for {key} mentioned in the provided text? "
        "The special magic {kind} for {key} mentioned in the provided text is"
    ),
    intro=(
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards.\n"
    ),
)
WORDINGS = {
    RULER_WORDING: 4,
    Wording("The {kind} of the {key} is {value}.", "What is the {kind} of the {key}? It is", joint=" "): 1,
    Wording("{key}: {value}", "{key}:"): 5,
    Wording("{key} = {value}", "assert {key} ==", joint="_"): 3,
    Wording(
        "Remember that {key} goes with the {kind} {value}.",
        "Question: which {kind} goes with {key}? Answer:",
        intro="The text below names something to remember. A question about it comes last.\n",
    ): 1,
    Wording("My secret {kind} for {key} is {value}.", "Q: What was the secret {kind} for {key}?\nA:"): 1,
    Wording(
        "The special {kind} for {key} is: {value}.",
        "Which special {kind} does the text above give for {key}? The special {kind} for {key} is:",
    ): 2,
    Wording(
        "By the way, whoever asks for {key} is told {value}.", "Whoever asks for {key} is told", joint=" "
    ): 1,
}
HELD_OUT_WORDING = Wording(
    "The ticket of {key} carries the {kind} {value}.",
    "Which {kind} does the ticket of {key} carry? It carries the {kind}",
)
HAYSTACKS = {"none": 6, "noise": 3, "prose": 5, "code": 1}  # how often each is drawn
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's


class _Fact(NamedTuple):
    needle: str
    question: str
    answer: Answer


def needle_document(
    seed: int,
    index: int,
    tokens: int,
    count: Count,
    split: str = "train",
    most_questions: int = MOST_QUESTIONS,
) -> Document:
    """Document ``index`` of the endless sequence of ``seed``.

    Args:
        tokens: that the document may have; most have a few less, and those of needles alone up to a third.
        count: tokens of a text.
        split: in which default text the needles stand, and a part of the randomness; ``held_out`` has the
            wording ``HELD_OUT_WORDING``.
        most_questions: about needles in other text.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    rng = random.Random(f"needles/{split}/{seed}/{index}")
    wording = _weighted(rng, WORDINGS) if split == "train" else HELD_OUT_WORDING
    haystack = _weighted(rng, HAYSTACKS)
    kind = rng.choices(["number", "word"], [6, 1])[0]
    if haystack == "none":
        pieces = _rounds(rng, wording, kind, tokens, count)
    else:
        pieces = _hidden(rng, wording, kind, _Haystack(haystack, split, count), tokens, most_questions)
    return document_of(f"needles/{split}/{seed}/{index}", pieces)


def _rounds(rng: random.Random, wording: Wording, kind: str, tokens: int, count: Count) -> list[str]:
    """Needles without anything between them, all asked for, and then new ones: the densest recall there is."""
    size, pieces, left = rng.randint(1, MOST_NEEDLES), [], tokens
    while True:
        facts = _draw_facts(rng, wording, kind, size)
        more = [f"{fact.needle}\n" for fact in facts]
        for fact in rng.sample(facts, size):
            more += [fact.question, fact.answer, "\n"]
        left -= count("".join(more))
        if left >= 0:
            pieces += more
        elif pieces or size == 1:
            return pieces or more
        else:
            size, left = size // 2, tokens


def _hidden(
    rng: random.Random, wording: Wording, kind: str, haystack: _Haystack, tokens: int, most_questions: int
) -> list[str]:
    """Needles in other text, and questions about some of them at the end."""
    most = min(MOST_NEEDLES, max(1, tokens // 60))
    size = 1 if rng.random() < 0.3 else rng.randint(1, most)
    intro = wording.intro.format(kind=kind) if rng.random() < 0.7 else ""
    while True:
        facts, ending = _draw_facts(rng, wording, kind, size), ["\n"]
        for fact in rng.sample(facts, rng.randint(1, min(size, max(1, tokens // 60), most_questions))):
            ending += [fact.question, fact.answer, ".\n"]
        used = haystack.count(intro + "".join(ending)) + sum(
            haystack.count(fact.needle) + 1 for fact in facts
        )
        if used <= tokens or (size == 1 and not intro):
            break
        size, intro = max(1, size // 2), ""
    joint, units = haystack.draw(rng, tokens - used)
    places = sorted((rng.randint(0, len(units)) for _ in facts), reverse=True)
    for place, fact in zip(places, facts):
        units.insert(place, fact.needle)
    return [intro, joint.join(units), *ending]


class _Haystack(NamedTuple):
    """What needles are hidden in: one line over and over, sentences of prose, lines of code."""

    kind: str
    split: str
    count: Count

    def draw(self, rng: random.Random, tokens: int) -> tuple[str, list[str]]:
        """(what joins them, units of about so many tokens together, rather fewer)"""
        if self.kind == "noise":
            prose = _prose(self.split)
            line = NOISE if rng.random() < 0.5 else " ".join(rng.choices(prose, k=rng.randint(1, 4)))[:400]
            return "\n", [line] * max(0, tokens // (self.count(line) + 1))
        if self.kind == "prose":
            joint, units = " ", _prose(self.split)
        else:
            joint, units = "\n", default_document(rng.choice(_names(self.split, "stdlib/"))).text.split("\n")
        start = rng.randrange(len(units))
        units = units[start:] + units[:start]
        kept, begin, size = [], 0, 8  # eight at a time, and at the end one by one
        while begin < len(units):
            cost = self.count(joint.join(units[begin : begin + size])) + 1
            if cost <= tokens:
                kept += units[begin : begin + size]
                begin, tokens = begin + size, tokens - cost
            elif size == 1:
                break
            else:
                size = 1
        return joint, kept


def _draw_facts(rng, wording: Wording, kind: str, size: int) -> list[_Fact]:
    """``size`` facts of which no two share a key or a value."""
    vocabulary = key_words()
    words = rng.choices([1, 2], [1, 3])[0]
    digits = 7 if rng.random() < 0.7 else rng.randint(1, 6)
    facts: dict[str, _Fact] = {}
    values: set[str] = set()
    while len(facts) < size:
        key = wording.joint.join(rng.choice(vocabulary) for _ in range(words))
        value = _draw_value(rng, kind, digits if size <= 9 else max(2, digits))
        if key in facts or value in values:
            continue
        values.add(value)
        facts[key] = _Fact(
            wording.needle.format(kind=kind, key=key, value=value),
            wording.question.format(kind=kind, key=key),
            Answer(f" {value}"),
        )
    return list(facts.values())


def _draw_value(rng, kind: str, digits: int) -> str:
    if kind == "word":
        return rng.choice(key_words())
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def _weighted(rng, weights: dict):
    return rng.choices(list(weights), weights=list(weights.values()))[0]


@lru_cache
def key_words() -> tuple[str, ...]:
    """What keys are made of: words of the default text that no needle task uses."""
    taken = {*ADJECTIVES, *NOUNS}
    found: set[str] = set()
    for name in default_names("train"):
        found.update(re.findall(r"\b[a-z]{3,9}\b", default_document(name).text))
    return tuple(sorted(found - taken))


@lru_cache
def _prose(split: str) -> list[str]:
    """The sentences of Python's documentation, in order."""
    text = " ".join(default_document(name).text for name in _names(split, "topics/"))
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(text.split()))


@lru_cache
def _names(split: str, prefix: str) -> list[str]:
    return [name for name in default_names(split) if name.startswith(prefix)]
