"""Where documents come from: the default text, generated recall, local files, a Hugging Face dataset.

A source is a list of units that can be opened at will (a document, a row group, a stretch of a file), and a
unit gives its rows in an order that never changes. A row is a document, or a note on why it cannot be read.
Nothing is read whole: the larger a file, the more units. Opening a source finds its text column, and says in
one sentence what is wrong with it. Nothing is known here of tokens, of splits or of the order of the units.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from refine.data.default_text import default_document, default_names
from refine.data.document import BadRow, DataError, Document
from refine.data.recall_documents import recall_document
from refine.data.rows import INSTALL, STRETCH, JsonLines, Parquet, first_line

_SAMPLE = 16  # rows that are looked at to find the text column
_HELD_OUT_RECALL = 64


class Source(Protocol):
    """Rows in units, the same at every reading."""

    name: str
    units: int | None  # None: endless
    files: list[Path]  # what it reads; none where it is generated or far away

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        """The rows of a unit from number ``start`` on."""
        ...


def open_source(
    value: str,
    *,
    setting: str = "dataset_name_or_path",
    text_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
) -> Source:
    """The local file, the folder (with its subfolders) or the hub dataset that ``value`` names."""
    path = Path(value).expanduser()
    allowed = ", ".join(_FILES)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("[!.]*")) if file.suffix.lower() in _FILES]
        files = [file for file in files if file.is_file() and file.stat().st_size]
        if not files:
            raise DataError(f"{setting} is {value!r}, a folder without a data file in it; allowed: {allowed}")
        names = [file.relative_to(path).as_posix() for file in files]
        return Folder(value, [_open_file(file, name, text_column) for file, name in zip(files, names)])
    suffix = path.suffix.lower()
    if path.exists():
        if suffix not in _FILES:
            raise DataError(
                f"{setting} is {value!r}, a file of an unknown kind; allowed: {allowed}, or a folder of these"
            )
        if not path.stat().st_size:
            raise DataError(f"{setting} is {value!r}, an empty file")
        return _open_file(path, path.name, text_column)
    if suffix in {*_FILES, ".json", ".csv", ".gz", ".zst"} or value[:1] in "./~" or value.count("/") > 1:
        raise DataError(f"{setting} is {value!r}, but there is no such file or folder")
    return HubDataset(value, setting, text_column, dataset_config, dataset_split)


class DefaultText:
    """The default corpus: a unit is a document."""

    def __init__(self, split: str):
        self.name, self.files = "the default text", []
        self._names = default_names(split)
        self.units = len(self._names)

    def rows(self, unit: int, start: int) -> Iterator[Document]:
        if start == 0:
            yield default_document(self._names[unit])


class RecallText:
    """Recall documents of about ``target_chars`` characters, one a unit: endless in training, 64 held out."""

    def __init__(self, seed: int, split: str, target_chars: int):
        self.name, self.files = "the recall documents", []
        self.units = None if split == "train" else _HELD_OUT_RECALL
        self._seed, self._split, self._target_chars = seed, split, target_chars

    def rows(self, unit: int, start: int) -> Iterator[Document]:
        if start == 0:
            yield recall_document(self._seed, unit, self._target_chars, self._split)


class TextFile:
    """A ``.txt`` file, in stretches of 256 KiB that end at a line's end: each is a unit and a document."""

    def __init__(self, path: Path, name: str, text_column: str | None):
        del text_column  # plain text has none
        self._path, self.name, self.files = path, name, [path]
        self.units = -(-path.stat().st_size // STRETCH)

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        if start:
            return
        with self._path.open("rb") as file:
            begin, end = _boundary(file, unit * STRETCH), _boundary(file, (unit + 1) * STRETCH)
            file.seek(begin)
            data = file.read(end - begin)
        if not data:  # the last line begins in the stretch before
            return
        try:
            text = data.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError as error:
            place = begin + error.start
            yield BadRow(lambda: f"{self._path}, byte {place}: not UTF-8")
        else:
            yield Document(f"{self.name}@{begin}", text)


def _boundary(file: BinaryIO, place: int) -> int:
    """Where the first line begins at ``place`` or soon after it; in a longer line, the first character."""
    if place == 0:
        return 0
    file.seek(place - 1)
    before, ahead = file.read(1), file.read(4096)
    if before == b"\n":
        return place
    line_end = ahead.find(b"\n")
    if line_end >= 0:
        return place + line_end + 1
    inside = (number for number, byte in enumerate(ahead) if byte & 0xC0 != 0x80)  # not amid a character
    return place + next(inside, 0)


class Table:
    """One column of a file of rows."""

    def __init__(self, file: JsonLines | Parquet, name: str, text_column: str | None):
        self._file, self.name, self.units = file, name, file.units
        self.files = [file.path]
        rows, fault = file.sample(_SAMPLE)
        if not rows:
            reason = (
                f"no row can be read; the first: {fault.describe()}" if fault else "there is no row in it"
            )
            raise DataError(f"nothing to read in {file.path}: {reason}")
        self._column = _choose_column(text_column, rows, str(file.path))

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        for place, row in self._file.rows(unit, start, [self._column]):
            if isinstance(row, BadRow):
                yield row
            elif isinstance(row.get(self._column), str):
                yield Document(f"{self.name}{place}", row[self._column])
            else:
                fault = f"no text in column {self._column!r}"
                yield BadRow(lambda place=place, fault=fault: f"{self._file.where(place)}: {fault}", fault)


class Folder:
    """Several files one after the other."""

    def __init__(self, name: str, files: list[Source]):
        self.name = name
        self._files = files
        self.files = [path for file in files for path in file.files]
        self._first_unit = list(itertools.accumulate((file.units for file in files), initial=0))
        self.units = self._first_unit[-1]

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        number = bisect_right(self._first_unit, unit) - 1
        return self._files[number].rows(unit - self._first_unit[number], start)


class HubDataset:
    """A dataset of the Hugging Face hub, streamed: one unit, resumed by skipping rows."""

    units = 1

    def __init__(
        self, name: str, setting: str, text_column: str | None, dataset_config: str | None, dataset_split: str
    ):
        self.name, self.files = name, []
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{setting} is {name!r}: no such local path, and Hugging Face datasets need the extra 'data' "
                f"({INSTALL})"
            ) from error
        try:
            self._rows = datasets.load_dataset(name, dataset_config, split=dataset_split, streaming=True)
            sample = list(self._rows.take(_SAMPLE))
        except Exception as error:  # the library raises errors of every kind
            raise DataError(
                f"{setting} is {name!r}: no such local path, and no dataset of that name can be loaded "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        if not sample:
            raise DataError(f"dataset_split is {dataset_split!r}, which has no row in the dataset {name!r}")
        self._column = _choose_column(text_column, sample, f"the dataset {name!r}")

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        values = (row.get(self._column) for row in self._rows.skip(start))
        yield from _texts(values, start, self.name, self._column)


def _texts(values: Iterator[Any], first: int, name: str, column: str) -> Iterator[Document | BadRow]:
    for number, value in enumerate(values, first):
        if isinstance(value, str):
            yield Document(f"{name}#{number}", value)
        else:
            yield BadRow(lambda number=number: f"{name}, row {number}: no text in column {column!r}")


def _choose_column(requested: str | None, rows: list[dict], where: str) -> str:
    """The column that was asked for; else "text", or the one with the longest text in these rows."""
    there = sorted({column for row in rows for column in row})
    if requested is not None:
        if requested not in there:
            raise DataError(
                f"text_column is {requested!r}, a column that {where} does not have; those there: "
                f"{', '.join(there) or 'none'}"
            )
        return requested
    lengths = {
        column: sum(len(row[column]) for row in rows if isinstance(row.get(column), str))
        for column in there
        if any(isinstance(row.get(column), str) for row in rows)
    }
    if not lengths:
        raise DataError(f"no column of {where} holds text; those there: {', '.join(there) or 'none'}")
    return "text" if "text" in lengths else max(lengths, key=lengths.__getitem__)


_FILES: dict[str, Callable[[Path, str, str | None], Source]] = {
    ".parquet": lambda path, name, column: Table(Parquet(path), name, column),
    ".jsonl": lambda path, name, column: Table(JsonLines(path), name, column),
    ".txt": TextFile,
}


def _open_file(path: Path, name: str, text_column: str | None) -> Source:
    try:
        return _FILES[path.suffix.lower()](path, name, text_column)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
