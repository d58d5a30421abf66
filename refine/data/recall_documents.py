"""Generated documents of long-range recall: facts scattered in real text, and asked again much later.

A fast-weight model remembers its context in its state alone, and ordinary documents hardly teach it to. These
do: what they ask can be answered only from a line that stood up to thousands of tokens before. Five formats,
from dense to sparse: ``lists`` (words without any order that come a second time), ``pairs`` (rounds of key and
value, asked again in other orders), ``copies`` (passages that return word for word), ``names`` (``red_fox = 48``)
and ``facts`` (sentences), both amid code or prose. ``lists`` are what a small model learns to recall from: their
words are of the whole vocabulary, and nothing but the first reading tells the second.

``recall_document`` makes training text. ``recall_items`` makes the test: a document up to a question, the
answer, and what guessing would score. Everything follows from the seed, the index, the split and the default
text of this Python; no tokenizer and no model is known here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from refine.data.default_text import SPLITS, default_document, default_names
from refine.data.document import Answer, Document, document_of

FORMATS = ("lists", "pairs", "copies", "names", "facts")
QUESTION_FORMATS = ("lists", "pairs", "names", "facts")  # those of which recall_items can ask
VALUE_KINDS = ("word", "digit", "number")

ADJECTIVES = (  # noqa: SIM905
    "big small old new red blue green black white dark light cold warm dry wet fast slow soft hard "
    "loud quiet tall short long wide round flat sharp sweet happy sad calm wild rich poor kind"
).split()
NOUNS = (  # noqa: SIM905
    "fox bear wolf lion cat dog horse bird fish duck tree river lake hill stone road bridge house "
    "door window table chair lamp book letter coin ring crown sword ship boat train wheel clock bell "
    "drum garden field forest island king queen child friend"
).split()
WORDS = (  # noqa: SIM905
    "apple lemon bread milk salt sugar rice corn onion honey gold silver iron glass paper wool silk "
    "wood clay sand north south east west spring summer autumn winter rain snow wind storm fire "
    "smoke earth moon star sun cloud dawn"
).split()

_WEIGHTS = {"lists": 4.0, "pairs": 2.0, "copies": 1.0, "names": 1.0, "facts": 1.0}  # how often each is drawn


class RecallItem(NamedTuple):
    """One question: a model that has read ``prompt`` and recalls goes on with ``answer`` (which begins with a
    space)."""

    prompt: str
    answer: str
    format: str
    chance: float  # what guessing among the values that stand in the document scores
    distance: int  # characters between the fact, which stands in the prompt once, and the question


class _Fact(NamedTuple):
    statement: str
    question: str  # ends where the answer begins
    answer: str
    closing: str

    def asked(self) -> tuple[str, ...]:
        return self.question, Answer(self.answer), self.closing


def recall_document(seed: int, index: int, target_chars: int = 5_000, split: str = "train") -> Document:
    """Document ``index`` of the endless sequence of ``seed``: about ``target_chars`` characters, in a format
    drawn for it. ``split`` says in which default text the facts stand, and is a part of the randomness."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    rng = random.Random(f"recall/{split}/{seed}/{index}")
    format = rng.choices(FORMATS, weights=[_WEIGHTS[name] for name in FORMATS])[0]
    if format == "copies":
        pieces = [_copies(rng, target_chars, split)]
    else:
        pieces, facts = _body(rng, format, rng.choice(VALUE_KINDS), target_chars, split)
        for fact in facts[:24]:
            pieces += fact.asked()
    return document_of(f"recall/{split}/{seed}/{index}", pieces)


def recall_items(
    seed: int,
    count: int,
    target_chars: int = 5_000,
    *,
    split: str = "held_out",
    formats: tuple[str, ...] = QUESTION_FORMATS,
    value_kind: str = "word",
) -> Iterator[RecallItem]:
    """``count`` questions, the formats in turn. A prompt states its fact once, early, and asks for it at
    its end alone.

    Score an item as right when the model's greedy continuation begins with ``answer``. ``item.chance`` is
    what a model scores that knows which values the document holds, but not which of them is asked for; a
    model that does not even know these scores less.
    """
    for index in range(count):
        rng = random.Random(f"recall-items/{split}/{seed}/{index}")
        format = formats[index % len(formats)]
        pieces, facts = _body(rng, format, value_kind, target_chars, split)
        body = "".join(pieces)
        answers = [fact.answer for fact in facts]
        yield RecallItem(
            prompt=body + facts[0].question,
            answer=facts[0].answer,
            format=format,
            chance=1 / len(facts[0].statement.split()) if format == "lists" else _chance(answers),
            distance=len(body) - body.index(facts[0].statement) - len(facts[0].statement),
        )


def _chance(answers: list[str]) -> float:
    """What always giving the most frequent value scores."""
    return max(map(answers.count, answers)) / len(answers)


def _body(
    rng: random.Random, format: str, value_kind: str, target_chars: int, split: str
) -> tuple[list[str], list[_Fact]]:
    """The pieces of a text up to its final questions, and all its facts in the order in which they are asked there.
    The first of these was not asked in the text."""
    if format == "lists":
        return _lists(rng, target_chars, split)
    if format == "pairs":
        return _pairs(rng, value_kind, target_chars)
    density = 160 if format == "names" else 200  # characters a fact, at the most
    most = 8 if value_kind == "digit" else 32
    facts = _draw_facts(rng, format, value_kind, rng.randint(4, max(4, min(most, target_chars // density))))
    first = rng.choice(facts[: len(facts) // 2])  # asked for over a long distance
    order = [first, *rng.sample([fact for fact in facts if fact is not first], len(facts) - 1)]
    known_early = order[len(order) // 2 :]

    spoken = sum(len("".join((fact.statement, *fact.asked()))) for fact in facts)
    pieces = _passages(rng, max(400, target_chars - spoken * 3 // 2), 3 * len(facts), split)
    late = len(pieces) * 4 // 5  # no fact after this
    places = sorted(rng.randrange(late) for _ in facts)
    told: list[_Fact] = []
    parts = []
    for place, piece in enumerate(pieces):
        parts.append(piece)
        while len(told) < len(facts) and places[len(told)] == place:
            parts.append(facts[len(told)].statement)
            told.append(facts[len(told)])
        known = [fact for fact in told[:-1] if fact in known_early]
        if known and rng.random() < 0.3:
            parts += rng.choice(known).asked()
    return [*parts, "\n"], order


def _lists(rng: random.Random, target_chars: int, split: str) -> tuple[list[str], list[_Fact]]:
    """Lines of words drawn from a default document, each line twice; one stands once, early, and the question
    is how it goes on."""
    vocabulary = sorted(set(re.findall(r"[A-Za-z]{3,9}", _filler(rng.choice(default_names(split))))))
    size = rng.randint(8, 32)
    words = rng.sample(vocabulary, min(size, len(vocabulary)))
    line = " ".join(words) + "\n"
    cut = rng.randint(2, len(words) - 2)
    question, closing = " ".join(words[:cut]), "".join(f" {word}" for word in words[cut + 1 :]) + "\n"
    parts = [line]
    while sum(map(len, parts)) + len(line) < target_chars:
        parts.append((" ".join(rng.choices(vocabulary, k=size)) + "\n") * 2)
    place = rng.randrange(1 + len(parts) // 3)
    parts[0], parts[place] = parts[place], parts[0]
    fact = _Fact(statement=line, question=question, answer=f" {words[cut]}", closing=closing)
    return parts, [fact]


def _pairs(rng: random.Random, value_kind: str, target_chars: int) -> tuple[list[str], list[_Fact]]:
    """Rounds of new pairs, each followed by questions about old and new ones: nothing but recall, the
    format that teaches it first."""
    size = rng.randint(4, 16)
    facts = _draw_facts(rng, "pairs", value_kind, max(size, target_chars // 60))
    unasked = rng.sample(facts[:size], size // 4)
    parts = []
    written = 0
    told: list[_Fact] = []
    while len(told) < len(facts) and written < target_chars * 4 // 5:
        new = facts[len(told) : len(told) + size]
        told += new
        recent = [fact for fact in told[-3 * size :] if fact not in unasked]
        asked = rng.sample(recent, min(len(recent), 2 * size))
        parts += [*(fact.statement for fact in new), "\n"]
        parts += [*(piece for fact in asked for piece in fact.asked()), "\n"]
        written = sum(map(len, parts))
    others = [fact for fact in told if fact not in unasked]
    return parts, unasked + rng.sample(others, len(others))


def _draw_facts(rng: random.Random, format: str, value_kind: str, count: int) -> list[_Fact]:
    """``count`` facts with keys that all differ, and values too while there are enough, in one wording for
    the whole document."""
    if rng.random() < 0.5 or count > len(NOUNS):
        keys = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], count)
    else:
        keys = rng.sample(NOUNS, count)
    pools = {"word": WORDS, "digit": list("123456789"), "number": [str(number) for number in range(10, 1000)]}
    pool = pools[value_kind]
    values = rng.sample(pool, count) if count <= len(pool) else rng.choices(pool, k=count)

    if format == "pairs":
        sign = rng.choice([":", " =", " is", " ->"])
        return [
            _Fact(f"{key}{sign} {value}\n", f"{key}{sign}", f" {value}", "\n")
            for key, value in zip(keys, values)
        ]
    if format == "names":
        names = [key.replace(" ", "_") for key in keys]
        before, sign, after = rng.choice([("assert ", " ==", ""), ("print(", " ==", ")"), ("", " =", "")])
        return [
            _Fact(f"{name} = {value}\n", f"{before}{name}{sign}", f" {value}", f"{after}\n")
            for name, value in zip(names, values)
        ]
    thing = rng.choice(["code", "sign", "secret", "price", "gift"])
    before, after = rng.choice([("The", " is"), ("Again, the", " is"), ("What is the", "? It is")])
    return [
        _Fact(f"The {of_key} is {value}.\n", f"{before} {of_key}{after}", f" {value}", ".\n")
        for of_key, value in zip((f"{thing} of the {key}" for key in keys), values)
    ]


def _copies(rng: random.Random, target_chars: int, split: str) -> str:
    """Passages of real text, or lists of words, that come back word for word in other orders."""
    size = rng.choice([120, 250, 500])
    count = rng.randint(2, max(2, min(8, target_chars // (3 * size))))
    if rng.random() < 0.4:
        words = ADJECTIVES + NOUNS + WORDS
        passages = [" ".join(rng.choices(words, k=size // 6)) + "\n" for _ in range(count)]
    else:
        passages = [piece for piece in _passages(rng, count * size, count, split) if piece]
    text = "".join(passages)
    while len(text) < target_chars:
        text += "".join(rng.sample(passages, len(passages)))
    return text[: text.rfind("\n", 0, target_chars) + 1] or text


def _passages(rng: random.Random, chars: int, count: int, split: str) -> list[str]:
    """A stretch of ``chars`` characters of one default document, cut at line ends into ``count`` pieces."""
    text = _filler(rng.choice(default_names(split)))
    start = text.find("\n", rng.randrange(max(1, len(text) - chars))) + 1
    pieces = []
    for _ in range(count):
        wanted = start + chars // count
        end = text.find("\n", wanted, wanted + 200) + 1 or wanted  # a line without an end is cut
        pieces.append(text[start:end])
        start = min(end, len(text))
    return pieces


@lru_cache(maxsize=32)
def _filler(name: str) -> str:
    return default_document(name).text
