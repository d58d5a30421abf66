"""What the room of data hands around: documents, rows that are left out, errors about data, and small helpers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_HASHED_WHOLE, _STRETCH = 1 << 24, 1 << 16  # bytes


class DataError(ValueError):
    """Something about the data that only its owner can put right, in one sentence."""


class MissingPackage(DataError):
    """The data need a package that is not installed."""


class Document(NamedTuple):
    """One text with a name that identifies it: the same text under the same name, wherever it is read.

    ``answers`` are the places in it that only the rest of the document tells, as (first character, the one behind
    the last), in order; None: the source does not mark any.
    """

    name: str
    text: str
    answers: tuple[tuple[int, int], ...] | None = None


class Answer(str):
    """A piece of a document that is an answer."""

    __slots__ = ()


def document_of(name: str, pieces: Iterable[str]) -> Document:
    """The document that these pieces are, one behind the other; those of class :class:`Answer` are marked."""
    pieces, answers, place = list(pieces), [], 0
    for piece in pieces:
        if isinstance(piece, Answer):
            answers.append((place, place + len(piece)))
        place += len(piece)
    return Document(name, "".join(pieces), tuple(answers))


class BadRow(NamedTuple):
    """A row that is left out; ``describe`` says where it stands and why."""

    describe: Callable[[], str]
    reason: str = "it cannot be read"


def stable_hash(name: str) -> int:
    """An unsigned 64-bit number that depends on ``name`` alone: what splits and keys are made of."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def is_held_out(key: int, first: bool, fraction: float) -> bool:
    """Whether a user's document or row is measured on and not trained on.

    Args:
        key: a :func:`stable_hash` that identifies it.
        first: whether it is the first of its source, which always trains, so that one is enough.
        fraction: of all that is held out.
    """
    return not first and key < fraction * 2**64


def content_of(path: Path) -> str:
    """A file's size and a hash of its content: of all of it up to 16 MiB, beyond that of 64 stretches of it."""
    size, found = path.stat().st_size, hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            found.update(file.read())
        else:
            for number in range(64):
                file.seek((size - _STRETCH) * number // 63)
                found.update(file.read(_STRETCH))
    return f"{size} bytes, {found.hexdigest()}"


def contents_of(paths: Sequence[Path]) -> dict[str, str]:
    """What :func:`content_of` says of each file, by name; of more than 100 files, one hash of all."""
    each: dict[str, str] = {}
    for path in paths:
        name = path.name if path.name not in each else f"{path.name} ({len(each)})"
        each[name] = content_of(path)
    return each if len(each) <= 100 else {f"one of {len(each)} files": f"{stable_hash(repr(each)):016x}"}


def cut_middle(ids: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most ``limit`` tokens: the first and the last half, since the question stands at one end of a prompt
    or the other."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return [*ids[:head], *ids[len(ids) - (limit - head) :]]
