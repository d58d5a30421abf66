"""The one reader of files of rows (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, also packed), in units.

A unit gives its rows in an order that never changes, each with its place in the file; a row that cannot be read is
a note on why. Nothing is read whole. Plain ``.jsonl`` and ``.parquet`` files have more units the larger they are,
which can be opened at will; other files are one unit, read from the beginning on. What a row is good for is not
known here.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from refine.data.document import BadRow, DataError, MissingPackage
from refine.data.packed import INSTALL, encoding_of, is_packed, kind_of, open_bytes, open_text

logger = logging.getLogger(__name__)

STRETCH = 1 << 18  # bytes of a .jsonl or .txt file that are one unit
ROW_KINDS = (".parquet", ".jsonl", ".json", ".csv")
_BATCH = 16  # rows of a Parquet file that are read together

Row = dict[str, Any] | BadRow


class _FileOfRows:
    """What files of rows share: a sample of them."""

    units: int

    def rows(
        self, unit: int, start: int = 0, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Row]]:
        """(place, row) of a unit from row ``start`` on; ``columns`` are a hint of what is needed."""
        raise NotImplementedError

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


class JsonLines(_FileOfRows):
    """A ``.jsonl`` file in units of 256 KiB: a row belongs to the unit in which its line begins.

    Blank lines are no rows. A row's place is the byte at which its line begins, as ``@123``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.units = -(-path.stat().st_size // STRETCH)

    def rows(
        self, unit: int, start: int = 0, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Row]]:
        for offset, line in itertools.islice(self._lines(unit), start, None):
            yield f"@{offset}", self._parse(offset, line)

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
        row = _json_object(line)
        return row if isinstance(row, dict) else _bad(lambda: self.where(f"@{offset}"), row)


def _json_object(line: bytes | str) -> dict[str, Any] | str:
    """A line's object, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({getattr(error, 'msg', error)})"
    return row if isinstance(row, dict) else "not a JSON object"


def _bad(where: Callable[[], str], fault: str) -> BadRow:
    return BadRow(lambda: f"{where()}: {fault}", "it is not a JSON object" if "JSON" in fault else fault)


class Streamed(_FileOfRows):
    """A file that is read from the beginning on: one unit. A row's place is its number, as ``#123``.

    Args:
        path: of the file.
        read: gives its rows in order, or what is wrong with one.
    """

    units = 1

    def __init__(self, path: Path, read: Callable[[Path], Iterator[Any]]):
        self.path, self._read = path, read

    def rows(
        self, unit: int, start: int = 0, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Row]]:
        for number, row in itertools.islice(enumerate(self._until_it_breaks()), start, None):
            place = f"#{number}"
            if isinstance(row, str):
                yield place, _bad(lambda place=place: self.where(place), row)
            else:
                yield place, row

    def where(self, place: str) -> str:
        """A row's place, for people."""
        return f"{self.path}, row {int(place[1:]) + 1}"

    def _until_it_breaks(self) -> Iterator[Any]:
        try:
            yield from self._read(self.path)
        except MissingPackage:
            raise
        except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:  # cut short, or damaged
            fault = f"what follows cannot be read ({first_line(error)})"
            logger.warning("%s: %s", self.path, fault)
            yield fault


def _read_json_lines(path: Path, encoding: str) -> Iterator[Any]:
    if encoding != "utf-8":
        with open_text(path, encoding) as text:
            yield from (_json_object(line) for line in text if line.strip())
        return
    with open_bytes(path) as file:
        yield from (_json_object(line) for line in file if line.strip())


def _read_json(path: Path, prefix: str) -> Iterator[Any]:
    """The items of a list (prefix ``item``), or values one behind the other (prefix empty)."""
    try:
        import ijson
    except ImportError as error:
        raise MissingPackage(f"reading {path} needs the extra 'data' ({INSTALL})") from error
    with open_bytes(path) as file:
        marked = file.read(3) == codecs.BOM_UTF8
    with open_bytes(path) as file:
        file.read(3 if marked else 0)
        try:
            for row in ijson.items(file, prefix, use_float=True, multiple_values=True):
                row = {"text": row} if isinstance(row, str) else row
                yield row if isinstance(row, dict) else "not a JSON object"
        except ijson.JSONError as error:
            raise ValueError(first_line(error)) from error


def _read_csv(path: Path, encoding: str) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # a document may be longer than the 128 KiB that are the default
    with open_text(path, encoding, newline="") as text:
        reader = csv.DictReader(text)
        for row in reader:
            surplus = row.pop(None, None)
            if surplus is not None:
                yield f"more fields than the header has columns ({len(row)})"
            elif any(isinstance(value, str) and not _can_be_encoded(value) for value in row.values()):
                yield "not UTF-8"
            else:
                yield row


def _check_csv(path: Path, encoding: str) -> None:
    with open_text(path, encoding, newline="") as text:
        header = next(csv.reader([text.readline(1 << 20)]), [])
    for other, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and other in header[0]:
            raise DataError(f"{path} is separated by {name}; a .csv file is read with commas")


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_json(path: Path, encoding: str) -> _FileOfRows:
    """A list of rows, rows one a line, or rows one behind the other."""
    with open_text(path, encoding) as text:
        begin = text.read(4096).lstrip()
    with open_text(path, encoding) as text:
        first = next((line for line in iter(lambda: text.readline(1 << 24), "") if line.strip()), "")
    if not begin.startswith("[") and isinstance(_json_object(first), dict):
        return _open_json_lines(path, encoding)
    if encoding != "utf-8":
        raise DataError(f"{path} is {encoding.upper()}; a .json file has to be UTF-8")
    return Streamed(path, partial(_read_json, prefix="item" if begin.startswith("[") else ""))


def _open_json_lines(path: Path, encoding: str) -> _FileOfRows:
    if encoding == "utf-8" and not is_packed(path):
        return JsonLines(path)
    return Streamed(path, partial(_read_json_lines, encoding=encoding))


class Parquet:
    """A ``.parquet`` file: a unit is a row group, read page by page. A row's place is its number, as ``#123``. A
    packed one is unpacked into a temporary file first."""

    def __init__(self, path: Path):
        self.path = path
        self._unpacked = self._unpack() if is_packed(path) else None
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

    def _unpack(self) -> Any:
        target = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the reader)
        try:
            with open_bytes(self.path) as file:
                shutil.copyfileobj(file, target)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path} cannot be unpacked: {first_line(error)}") from error
        return target

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingPackage(f"reading {self.path} needs the extra 'data' ({INSTALL})") from error
        try:
            with pyarrow.parquet.ParquetFile(self._unpacked or self.path) as file:
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


def is_file_of_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return kind_of(path) in ROW_KINDS


def open_rows(path: Path) -> _FileOfRows | Parquet:
    """The file's reader, by its suffix.

    Raises:
        DataError: it cannot be read, or is of another kind.
    """
    kind = kind_of(path)
    if kind not in ROW_KINDS:
        raise DataError(
            f"rows are read from {', '.join(ROW_KINDS)} files (also .gz or .zst), got {str(path)!r}"
        )
    try:
        if kind == ".parquet":
            return Parquet(path)
        encoding = encoding_of(path)
        if kind == ".csv":
            _check_csv(path, encoding)
            return Streamed(path, partial(_read_csv, encoding=encoding))
        return _open_json_lines(path, encoding) if kind == ".jsonl" else _open_json(path, encoding)
    except (OSError, EOFError, zlib.error) as error:
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
    words = re.split(r"[^a-z0-9]+", path.name.lower())
    found = {_SPLITS[word] for word in words if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def first_line(error: BaseException) -> str:
    """An error's message, in one line."""
    return next(iter(str(error).strip().splitlines()), "no reason given")
