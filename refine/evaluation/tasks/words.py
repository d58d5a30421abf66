"""The words of the needles: adjective-noun, from the package ``wonderwords`` where it is installed, as RULER
draws them, else from lists of this package.

A name like ``brave-lantern`` is a key; two needles never share one, so there are far more names than a long
prompt has needles.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from refine.data.needle_words import ADJECTIVES, NOUNS


class Words(NamedTuple):
    """Where names come from."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    source: str
    verbs: tuple[str, ...] = ()  # for lists of words; in no name

    def draw(self, rng) -> str:
        """One name: every pair of an adjective and a noun is equally likely."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"


@lru_cache
def find_words() -> Words:
    """The words of this installation."""
    package = importlib.util.find_spec("wonderwords")
    if package is not None and package.origin:
        folder = Path(package.origin).parent / "assets"
        try:
            kinds = ("adjective", "noun", "verb")
            adjectives, nouns, verbs = (_lines(folder / f"{kind}list.txt") for kind in kinds)
            if adjectives and nouns:
                return Words(adjectives, nouns, "the package wonderwords", verbs)
        except OSError:  # another layout of the package
            pass
    return Words(tuple(ADJECTIVES), tuple(NOUNS), "the lists of this package")


def _lines(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(sorted({line.strip() for line in lines if line.strip()}))
