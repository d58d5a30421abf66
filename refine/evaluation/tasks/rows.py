"""Prompts and references from files of rows that a user names: the good rows, and what is wrong
with the others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refine.data.document import BadRow
from refine.data.rows import ROW_KINDS, all_rows, is_file_of_rows, split_of

_ALLOWED = ", ".join(ROW_KINDS)
_ANSWER_COLUMNS = ("answers", "answer", "outputs")  # the first that a file has
_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Where files keep what; ``answer`` None: the first of answers, answer and outputs that is there."""

    prompt: str = "prompt"
    answer: str | None = None
    task: str = "task"


@dataclass(frozen=True)
class Row:
    """A good row.

    Attributes:
        key: unique among the rows of all files.
        source: the file's name and the row's number, for people.
        task: from its column, else the file's name without what follows the last underscore and digit.
        values: everything that the row holds.
    """

    key: str
    source: str
    task: str
    prompt: str
    references: tuple[str, ...]
    values: dict[str, Any]


@dataclass
class BadRows:
    """Rows that are left out: how many, and the reasons of the first few."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, source: str, reason: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self.reasons.append(f"{source} is left out: {reason}")

    def describe(self) -> list[str]:
        """One line a reason."""
        more = self.count - len(self.reasons)
        return self.reasons + ([f"{more} more rows are left out"] if more else [])


def read_rows(paths: Sequence[str], setting: str, columns: Columns, bad: BadRows) -> Iterator[Row]:
    """The good rows of files and folders, in the order given; the others are noted in ``bad``.

    Of a folder, files whose names say that they are to train on are passed over.

    Raises:
        ValueError: a file is not there, cannot be read, lacks a column, or is one to train on.
    """
    for number, path in enumerate(_files(paths, setting)):
        rows = list(all_rows(path))
        present = {name for row in rows if isinstance(row, dict) for name in row}
        if rows and not present:
            raise ValueError(f"{setting}: no row of {path} can be read")
        answer = columns.answer or next((name for name in _ANSWER_COLUMNS if name in present), "answers")
        for column in (columns.prompt, answer):
            if rows and column not in present:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(sorted(present))}")
        for i, values in enumerate(rows, 1):
            source = f"row {i} of {path.name}"
            if isinstance(values, BadRow):
                bad.add(source, values.reason)
                continue
            prompt, references = values.get(columns.prompt), _references(values.get(answer))
            if not isinstance(prompt, str) or not prompt.strip():
                bad.add(source, f"no prompt in column {columns.prompt!r}")
            elif not references:
                bad.add(source, f"no answer in column {answer!r}")
            else:
                task = values.get(columns.task)
                task = task if isinstance(task, str) and task else re.sub(r"_\d.*$", "", path.stem)
                yield Row(f"{number}:{i}", source, task, prompt, references, values)


def whole_number(value: Any) -> int | None:
    """A row's number of tokens, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return int(value) if value >= 1 else None


def _references(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str) and text.strip())


def _files(paths: Sequence[str], setting: str) -> list[Path]:
    found = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if is_file_of_rows(file))
            inside = [file for file in inside if split_of(file) != "train"]
            if not inside:
                raise ValueError(
                    f"{setting}: the folder {name!r} holds no file of rows ({_ALLOWED}) but those to train on"
                )
            found += inside
        elif not path.is_file():
            raise ValueError(f"{setting}: there is no file {name!r}")
        elif not is_file_of_rows(path):
            raise ValueError(f"{setting} takes {_ALLOWED} files, got {name!r}")
        elif split_of(path) == "train":
            raise ValueError(f"{setting}: {name!r} says that its rows are to train on; they are never scored")
        else:
            found.append(path)
    return found
