"""The one reader of ``.jsonl`` and ``.parquet`` files: their rows, in units that can be opened at will.

A unit gives its rows in an order that never changes, each with its place in the file; a row that cannot be read is
a note on why. Nothing is read whole: the larger a file, the more units. What a row is good for is not known here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refine.data.document import BadRow, DataError

STRETCH = 1 << 18  # bytes of a .jsonl or .txt file that are one unit
INSTALL = "pip install 'refine-fast-weights[data]'"
_BATCH = 16  # rows of a Parquet file that are read together

Row = dict[str, Any] | BadRow


class JsonLines:
    """A ``.jsonl`` file in units of 256 KiB: a row belongs to the unit in which its line begins.

    Blank lines are no rows. A row's place is the byte at which its line begins, as ``@123``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.units = -(-path.stat().st_size // STRETCH)

    def rows(
        self, unit: int, start: int = 0, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Row]]:
        """(place, row) of a unit from row ``start`` on; ``columns`` are a hint of what is needed."""
        for offset, line in itertools.islice(self._lines(unit), start, None):
            yield f"@{offset}", self._parse(offset, line)

    def sample(self, count: int) -> tuple[list[dict[str, Any]], BadRow | None]:
        """The first ``count`` rows that can be read, and the first that cannot."""
        rows: list[dict[str, Any]] = []
        fault = None
        for _, row in itertools.chain.from_iterable(map(self.rows, range(self.units))):
            if isinstance(row, BadRow):
                fault = fault or row
            else:
                rows.append(row)
            if len(rows) == count:
                break
        return rows, fault

    def where(self, place: str) -> str:
        """A row's place, for people."""
        offset = int(place[1:])
        with self.path.open("rb") as file:
            blocks = iter(lambda: file.read(min(1 << 20, offset - file.tell())), b"")
            number = 1 + sum(block.count(b"\n") for block in blocks)
        return f"{self.path}, line {number}"

    def _lines(self, unit: int) -> Iterator[tuple[int, bytes]]:
        """(where it begins, line) of every line of the unit that is not blank."""
        with self.path.open("rb") as file:
            if unit:
                file.seek(unit * STRETCH - 1)
                file.readline()
            while (offset := file.tell()) < (unit + 1) * STRETCH and (line := file.readline()):
                if line.strip():
                    yield offset, line

    def _parse(self, offset: int, line: bytes) -> Row:
        try:
            row = json.loads(line)
            fault = None if isinstance(row, dict) else "not a JSON object"
        except (ValueError, RecursionError) as error:
            fault = f"not JSON ({getattr(error, 'msg', error)})"
        if fault is None:
            return row
        return BadRow(lambda: f"{self.where(f'@{offset}')}: {fault}", "it is not a JSON object")


class Parquet:
    """A ``.parquet`` file: a unit is a row group, read page by page. A row's place is its number, as ``#123``."""

    def __init__(self, path: Path):
        self.path = path
        with self._opened() as file:
            self.units = file.metadata.num_row_groups
            sizes = (file.metadata.row_group(unit).num_rows for unit in range(self.units))
            self._first_row = list(itertools.accumulate(sizes, initial=0))

    def rows(
        self, unit: int, start: int = 0, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Row]]:
        """(place, row) of a unit from row ``start`` on, with these columns or all."""
        with self._opened() as file:
            batches = file.iter_batches(
                _BATCH, row_groups=[unit], columns=None if columns is None else list(columns)
            )
            rows = (row for batch in batches for row in self._rows_of(batch))
            for number, row in itertools.islice(enumerate(rows, self._first_row[unit]), start, None):
                place = f"#{number}"
                if isinstance(row, str):
                    fault = f"column {row!r} is not UTF-8"
                    where = self.where(place)
                    yield place, BadRow(lambda where=where, fault=fault: f"{where}: {fault}", fault)
                else:
                    yield place, row

    def sample(self, count: int) -> tuple[list[dict[str, Any]], BadRow | None]:
        """The first ``count`` rows, with the values of text columns alone."""
        if not self._first_row[-1]:
            return [], None
        with self._opened() as file:
            columns = {column.name: None for column in file.schema_arrow}
            of_text = [column.name for column in file.schema_arrow if "string" in str(column.type)]
            batch = next(file.iter_batches(count, columns=of_text)) if of_text else None
            rows = [row for row in self._rows_of(batch) if isinstance(row, dict)] if batch else []
            return [columns | row for row in rows] or [columns], None

    def where(self, place: str) -> str:
        """A row's place, for people."""
        return f"{self.path.name}, row {place[1:]}"

    @staticmethod
    def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
        """A batch's rows; of one that cannot be decoded, the column's name."""
        try:
            yield from batch.to_pylist()
            return
        except UnicodeDecodeError:
            pass
        for number in range(batch.num_rows):
            row: dict[str, Any] | str = {}
            for name, column in zip(batch.schema.names, batch.columns):
                try:
                    row[name] = column[number].as_py()
                except UnicodeDecodeError:
                    row = name
                    break
            yield row

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"reading {self.path} needs the extra 'data' ({INSTALL})") from error
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path} is not a whole Parquet file, perhaps cut short: {first_line(error)}"
            ) from error


_SPLITS = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("test", "validation", "valid", "dev", "eval"), "test"),
}
KINDS = {".parquet": Parquet, ".jsonl": JsonLines}


def open_rows(path: Path) -> JsonLines | Parquet:
    """The file's reader, by its suffix.

    Raises:
        DataError: it cannot be read, or is of another kind.
    """
    if path.suffix.lower() not in KINDS:
        raise DataError(f"rows are read from {' and '.join(KINDS)} files, got {str(path)!r}")
    try:
        return KINDS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def all_rows(path: Path) -> Iterator[Row]:
    """Every row of a file, in order."""
    file = open_rows(path)
    try:
        for unit in range(file.units):
            yield from (row for _, row in file.rows(unit))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def split_of(path: Path) -> str | None:
    """``train`` or ``test`` where a file's name says so, as ``qa_4096_1600_train.parquet`` does; else None."""
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    found = {_SPLITS[word] for word in words if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def first_line(error: BaseException) -> str:
    """An error's message, in one line."""
    return next(iter(str(error).strip().splitlines()), "no reason given")
