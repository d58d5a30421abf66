"""The default corpus: real text that every Python installation carries; a first run needs no download.

It is Python's own documentation (``pydoc_data.topics``) and the sources of the standard library. This module
knows where they lie, which files are worth reading and which documents are held out; it knows nothing of
tokens. A document's name is the same on every machine, and its split hangs on the name alone: a model trained
under one Python version is never tested, under another, on a document that it has seen.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from refine.data.document import Document, stable_hash

SPLITS = ("train", "held_out")

_HELD_OUT_FRACTION = 0.1
_SHORTEST_SOURCE = 4_000  # bytes: shorter files have nothing to remember over a long distance
_SHORTEST_TOPICS = 8_000  # characters: shorter topics are joined until they are this long
_FOLDERS_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),  # not the standard library's text
    *("test", "tests", "idle_test", "turtledemo", "__phello__"),  # cases and demonstrations
    *("encodings", "pydoc_data"),  # tables, and the topics that are documents of their own
}
_FILES_LEFT_OUT = {
    *("this.py", "antigravity.py", "entities.py", "_casefix.py", "stringprep.py"),  # riddles and tables
    *("sitecustomize.py", "usercustomize.py"),  # a machine's own
}


def default_documents(split: str) -> Iterator[Document]:
    """The documents of ``split``, by name, read one by one; "held_out" is about a tenth of all."""
    for name in default_names(split):
        yield default_document(name)


@lru_cache
def default_names(split: str) -> tuple[str, ...]:
    """The names of the documents of ``split``, sorted."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    sources = (name for name in _source_paths() if _split_of(name) == split)
    topics = (name for name, (own_split, _) in _topic_documents().items() if own_split == split)
    return tuple(sorted([*sources, *topics]))


def default_document(name: str) -> Document:
    """The document of that name, read now."""
    if name.startswith("topics/"):
        return Document(name, _topic_documents()[name][1])
    return Document(name, _source_paths()[name].read_text(encoding="utf-8"))


def _split_of(name: str) -> str:
    return "held_out" if stable_hash(name) < _HELD_OUT_FRACTION * 2**64 else "train"


@lru_cache
def _source_paths() -> dict[str, Path]:
    """Name -> file of every source of the standard library that is worth reading."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _FOLDERS_LEFT_OUT and name[:7] != "config-"
        ]
        for file in files:
            if not file.endswith(".py") or file in _FILES_LEFT_OUT or file.startswith("_sysconfigdata"):
                continue
            path = Path(folder, file)
            if path.stat().st_size < _SHORTEST_SOURCE:
                continue
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            found[f"stdlib/{path.relative_to(root).as_posix()}"] = path
    return found


@lru_cache
def _topic_documents() -> dict[str, tuple[str, str]]:
    """Name -> (split, text). A split is drawn for each topic, then the short topics of a split are joined."""
    from pydoc_data.topics import topics

    documents = {}
    topics = _without_repeats(topics)
    for split in SPLITS:
        own = {key: text for key, text in sorted(topics.items()) if _split_of(f"topics/{key}") == split}
        joined: list[str] = []
        for key, text in own.items():
            if len(text) >= _SHORTEST_TOPICS:
                documents[f"topics/{key}"] = (split, text)
                continue
            joined.append(key)
            if sum(len(own[other]) for other in joined) >= _SHORTEST_TOPICS:
                documents[f"topics/{joined[0]}..{key}"] = (split, "\n\n".join(own[other] for other in joined))
                joined = []
        if joined:
            documents[f"topics/{joined[0]}.."] = (split, "\n\n".join(own[other] for other in joined))
    return documents


def _without_repeats(topics: dict[str, str]) -> dict[str, str]:
    """Topics without those that a longer one contains ("for" is a part of "compound"): a held-out topic
    must not stand inside a training document."""

    def lines_of(text: str) -> set[str]:
        return {line.strip() for line in text.splitlines() if len(line.strip()) > 20}

    kept: dict[str, set[str]] = {}
    for key in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        lines = lines_of(topics[key])
        if all(len(lines & other) <= 0.2 * len(lines) for other in kept.values()):
            kept[key] = lines
    return {key: topics[key] for key in kept}
