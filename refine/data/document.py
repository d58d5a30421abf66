"""What the room of data hands around: documents, rows that are left out, errors about data, and small helpers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class DataError(ValueError):
    """Something about the data that only its owner can put right, in one sentence."""


class Document(NamedTuple):
    """One text with a name that identifies it: the same text under the same name, wherever it is read."""

    name: str
    text: str


class BadRow(NamedTuple):
    """A row that is left out; ``describe`` says where it stands and why."""

    describe: Callable[[], str]
    reason: str = "it cannot be read"


def stable_hash(name: str) -> int:
    """An unsigned 64-bit number that depends on ``name`` alone: what splits and keys are made of."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def cut_middle(ids: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most ``limit`` tokens: the first and the last half, since the question stands at one end of a prompt
    or the other."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return [*ids[:head], *ids[len(ids) - (limit - head) :]]
