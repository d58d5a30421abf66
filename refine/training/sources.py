"""Where documents come from: the default text, generated recall, local files, a Hugging Face dataset.

A source is a list of units that can be opened at will (a document, a row group, a stretch of a file), and a unit
gives its rows in an order that never changes. A row is a document, or a note on why it could not be read. Nothing
is read whole: the larger a file, the more units. Opening a source finds its text column and says in one sentence
what is wrong with it. Nothing is known here of tokens, of splits or of the order in which units are visited.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from refine.training.default_text import Document, default_document, default_names
from refine.training.recall import recall_document

_STRETCH = 1 << 18  # bytes of a .jsonl or .txt file that are one unit; of a .txt file, also one document
_SAMPLE = 16  # rows that are looked at to find the text column
_HELD_OUT_RECALL = 64  # documents: in training, recall is endless
_INSTALL = "pip install 'refine-fast-weights[data]'"


class DataError(ValueError):
    """Something about the data that only its owner can put right, in one sentence."""


class BadRow(NamedTuple):
    describe: Callable[[], str]


class Source(Protocol):
    name: str
    units: int | None  # None: endless

    def documents(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        """The rows of a unit from number ``start`` on."""
        ...


class DefaultText:
    def __init__(self, split: str):
        self.name = "the default text"
        self._names = default_names(split)
        self.units = len(self._names)

    def documents(self, unit: int, start: int) -> Iterator[Document]:
        if start == 0:
            yield default_document(self._names[unit])


class RecallText:
    def __init__(self, seed: int, split: str, target_chars: int):
        self.name = "recall"
        self.units = None if split == "train" else _HELD_OUT_RECALL
        self._arguments = seed, split, target_chars

    def documents(self, unit: int, start: int) -> Iterator[Document]:
        seed, split, target_chars = self._arguments
        if start == 0:
            yield recall_document(seed, unit, target_chars, split)


class TextFile:
    """A ``.txt`` file, in stretches of 256 KiB that end at a line's end; each stretch is a document."""

    def __init__(self, path: Path, name: str, requested: str | None):
        if requested is not None:
            raise DataError(f"text_column is {requested!r}, but {path} is plain text and has no columns")
        self._path, self.name = path, name
        self.units = -(-path.stat().st_size // _STRETCH)

    def documents(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        if start:
            return
        with self._path.open("rb") as file:
            begin, end = self._boundary(file, unit * _STRETCH), self._boundary(file, (unit + 1) * _STRETCH)
            file.seek(begin)
            data = file.read(end - begin)
        try:
            text = data.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError as error:
            place = begin + error.start
            yield BadRow(lambda: f"{self._path}, byte {place}: not UTF-8")
        else:
            yield Document(f"{self.name}@{begin}", text)

    @staticmethod
    def _boundary(file: Any, place: int) -> int:
        """The first line that begins at ``place`` or soon after it, else the first character."""
        if place == 0:
            return 0
        file.seek(place - 1)
        ahead = file.read(4096)
        line_end = ahead.find(b"\n")
        if line_end >= 0:
            return place + line_end
        rest = ahead[1:]
        inside = next(
            (i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest)
        )  # a character's middle
        return place + inside


class JsonLines:
    """A ``.jsonl`` file: a row belongs to the 256 KiB stretch in which its line begins."""

    def __init__(self, path: Path, name: str, requested: str | None):
        self._path, self.name = path, name
        self.units = -(-path.stat().st_size // _STRETCH)
        rows, first_fault = [], None
        for line in itertools.chain.from_iterable(map(self._lines, range(self.units))):
            row = self._parse(*line)
            if isinstance(row, dict):
                rows.append(row)
            else:
                first_fault = first_fault or row
            if len(rows) == _SAMPLE:
                break
        if not rows:
            reason = (
                f"no row could be read; the first: {first_fault.describe()}" if first_fault else "it is empty"
            )
            raise DataError(f"nothing to read in {path}: {reason}")
        self._column = _choose_column(requested, rows, str(path))

    def documents(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        for offset, line in itertools.islice(self._lines(unit), start, None):
            row = self._parse(offset, line)
            if isinstance(row, BadRow):
                yield row
            elif isinstance(row.get(self._column), str):
                yield Document(f"{self.name}@{offset}", row[self._column])
            else:
                yield self._fault(offset, f"no text in column {self._column!r}")

    def _lines(self, unit: int) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            if unit:
                file.seek(unit * _STRETCH - 1)
                file.readline()
            while (offset := file.tell()) < (unit + 1) * _STRETCH and (line := file.readline()):
                if line.strip():
                    yield offset, line

    def _parse(self, offset: int, line: bytes) -> dict | BadRow:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return self._fault(offset, f"not JSON ({error})")
        return row if isinstance(row, dict) else self._fault(offset, "not a JSON object")

    def _fault(self, offset: int, reason: str) -> BadRow:
        return BadRow(lambda: f"{self._path}, line {self._line_number(offset)}: {reason}")

    def _line_number(self, offset: int) -> int:
        with self._path.open("rb") as file:
            blocks = iter(lambda: file.read(min(1 << 20, offset - file.tell())), b"")
            return 1 + sum(block.count(b"\n") for block in blocks)


class Parquet:
    """A ``.parquet`` file: a unit is a row group, read page by page."""

    def __init__(self, path: Path, name: str, requested: str | None):
        self._path, self.name = path, name
        with self._opened() as file:
            import pyarrow.types as types

            self.units = file.metadata.num_row_groups
            sizes = (file.metadata.row_group(unit).num_rows for unit in range(self.units))
            self._first_row = list(itertools.accumulate(sizes, initial=0))
            if not self._first_row[-1]:
                raise DataError(f"nothing to read in {path}: it has no rows")
            of_text = [
                f.name for f in file.schema_arrow if types.is_string(f.type) or types.is_large_string(f.type)
            ]
            sample = next(file.iter_batches(_SAMPLE, columns=of_text)).to_pylist() if of_text else []
            others = {f.name: None for f in file.schema_arrow}
        self._column = _choose_column(requested, [others | row for row in sample] or [others], str(path))

    def documents(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        number = self._first_row[unit] + start
        with self._opened() as file:
            batches = file.iter_batches(_SAMPLE, row_groups=[unit], columns=[self._column])
            values = (value for batch in batches for value in batch.column(0))
            for number, value in enumerate(itertools.islice(values, start, None), number):
                text = value.as_py()
                if isinstance(text, str):
                    yield Document(f"{self.name}#{number}", text)
                else:
                    yield BadRow(
                        lambda row=number: f"{self._path}, row {row}: no text in column {self._column!r}"
                    )

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"reading {self._path} needs the extra 'data': {_INSTALL}") from error
        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"{self._path} is not a whole Parquet file, perhaps cut short: {reason}"
            ) from error


class Files:
    """Several files one after the other."""

    def __init__(self, name: str, files: list[Source]):
        self.name = name
        self._files = files
        self._first_unit = list(itertools.accumulate((file.units or 0 for file in files), initial=0))
        self.units = self._first_unit[-1]

    def documents(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        number = bisect_right(self._first_unit, unit) - 1
        return self._files[number].documents(unit - self._first_unit[number], start)


class HubDataset:
    """A dataset of the Hugging Face hub, streamed: one unit, resumed by skipping rows."""

    units = 1

    def __init__(self, setting: str, config: DataConfig, name: str):
        try:
            import datasets
        except ImportError as error:
            reason = (
                f"{setting} is {name!r}, which is no local path; Hugging Face datasets need the extra 'data'"
            )
            raise DataError(f"{reason}: {_INSTALL}") from error
        self.name = name
        try:
            self._rows = datasets.load_dataset(
                name, config.dataset_config, split=config.dataset_split, streaming=True
            )
            sample = list(self._rows.take(_SAMPLE))
        except Exception as error:  # the library raises of every kind
            reason = str(error).strip().split("\n")[0]
            raise DataError(
                f"{setting} is {name!r}: no such local path, and no dataset of that name could be loaded "
                f"({type(error).__name__}: {reason})"
            ) from error
        if not sample:
            raise DataError(f"the dataset {name!r} has no rows in its split {config.dataset_split!r}")
        self._column = _choose_column(config.text_column, sample, f"the dataset {name!r}")

    def documents(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        for number, row in enumerate(self._rows.skip(start), start):
            if isinstance(row.get(self._column), str):
                yield Document(f"{self.name}#{number}", row[self._column])
            else:
                yield BadRow(lambda row=number: f"{self.name}, row {row}: no text in column {self._column!r}")


def _choose_column(requested: str | None, rows: list[dict], where: str) -> str:
    """The column that was asked for; else "text", the only one of text, or the one with the longest text."""
    lengths: dict[str, int] = {}
    for row in rows:
        for column, value in row.items():
            if isinstance(value, str):
                lengths[column] = lengths.get(column, 0) + len(value)
    there = ", ".join(sorted({column for row in rows for column in row})) or "none"
    if requested is not None:
        if not any(requested in row for row in rows):
            raise DataError(
                f"text_column is {requested!r}, but {where} has no such column; those there: {there}"
            )
        return requested
    if not lengths:
        raise DataError(f"no column of {where} holds text; those there: {there}")
    return "text" if "text" in lengths else max(sorted(lengths), key=lengths.__getitem__)


_READERS: dict[str, Callable[[Path, str, str | None], Source]] = {
    ".parquet": Parquet,
    ".jsonl": JsonLines,
    ".txt": TextFile,
}


def _open_source(setting: str, config: DataConfig) -> Source:
    """The local file or folder, or the hub dataset, that ``setting`` of ``config`` names."""
    value = getattr(config, setting)
    path = Path(value).expanduser()
    allowed = ", ".join(_READERS)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        files = [file for file in files if file.stat().st_size and not file.name.startswith(".")]
        if not files:
            raise DataError(f"{setting} is {value!r}, a folder without a data file in it; allowed: {allowed}")
        names = [file.relative_to(path).as_posix() for file in files]
        readers = [
            _READERS[file.suffix.lower()](file, name, config.text_column) for file, name in zip(files, names)
        ]
        return Files(str(value), readers)
    suffix = path.suffix.lower()
    if path.exists():
        if suffix not in _READERS:
            raise DataError(
                f"{setting} is {value!r}, a file of an unknown kind; allowed: {allowed}, or a folder"
            )
        if not path.stat().st_size:
            raise DataError(f"{setting} is {value!r}, an empty file")
        return _READERS[suffix](path, path.name, config.text_column)
    if suffix in {*_READERS, ".json", ".csv", ".gz", ".zst"} or value[:1] in "./~" or value.count("/") > 1:
        raise DataError(f"{setting} is {value!r}, but there is no such file or folder")
    return HubDataset(setting, config, value)
