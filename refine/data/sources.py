"""Where documents come from: the default text, generated recall, local files, a Hugging Face dataset.

A source is a list of units that can be opened at will (a document, a row group, a stretch of a file), and a
unit gives its rows in an order that never changes. A row is a document, or a note on why it cannot be read.
Nothing is read whole: the larger a file, the more units. Opening a source finds its text column, and says in
one sentence what is wrong with it. Nothing is known here of tokens, of splits or of the order of the units.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from refine.data.default_text import default_document, default_names
from refine.data.document import BadRow, DataError, Document, MissingPackage
from refine.data.needles import Count, needle_document
from refine.data.packed import INSTALL, encoding_of, is_packed, kind_of, open_text
from refine.data.recall_documents import recall_document
from refine.data.rows import ROW_KINDS, STRETCH, first_line, open_rows
from refine.plugins import find_function

logger = logging.getLogger(__name__)

KINDS = (*ROW_KINDS, ".txt", ".md")
_NAMED = 100  # files that a sentence names
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
    answers_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
) -> Source:
    """The local file, the folder (with its subfolders), the function (``module:function``) or the hub dataset that
    ``value`` names."""
    path, columns = Path(value).expanduser(), Columns(text_column, answers_column)
    allowed = f"{', '.join(KINDS)} (also .gz or .zst)"
    if path.is_dir():
        return _open_folder(path, value, setting, columns, allowed)
    if path.exists():
        if kind_of(path) not in KINDS:
            raise DataError(
                f"{setting} is {value!r}, a file of an unknown kind; allowed: {allowed}, or a folder of these"
            )
        if not path.stat().st_size:
            raise DataError(f"{setting} is {value!r}, an empty file")
        return _open_file(path, path.name, columns)
    if (
        kind_of(path) in KINDS
        or is_packed(path)
        or value[:1] in "./~"
        or value[-1:] == "/"
        or value.count("/") > 1
    ):
        raise DataError(f"{setting} is {value!r}, but there is no such file or folder")
    if ":" in value:
        return FunctionText(value, setting, columns)
    return HubDataset(value, setting, columns, dataset_config, dataset_split)


def _open_folder(folder: Path, value: str, setting: str, columns: Columns, allowed: str) -> Source:
    """Every file in a folder that can be read; the others are named with the reason, once."""
    sources: list[Source] = []
    left_out: dict[str, list[str]] = {}  # reason -> files
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file():
            continue
        if reason := _why_left_out(file, name):
            left_out.setdefault(reason, []).append(name)
            continue
        try:
            sources.append(_open_file(file, name, columns))
        except MissingPackage:
            raise
        except DataError as error:
            left_out.setdefault(str(error), []).append(name)
    told = "; ".join(f"{_listed(names)}: {reason}" for reason, names in left_out.items())
    if not sources:
        found = f"; left out: {told}" if told else ""
        raise DataError(
            f"{setting} is {value!r}, a folder without a data file in it; allowed: {allowed}{found}"
        )
    if told:
        _warn_once(f"{sum(map(len, left_out.values()))} files of {folder} are left out: {told}")
    return Folder(value, sources)


def _why_left_out(file: Path, name: str) -> str | None:
    """Why a file of a folder is no data, as far as its name and size tell."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if kind_of(file) not in KINDS:
        return "of no kind that is read"
    if file.stem.lower() == "readme":
        return "about the data"
    return None if file.stat().st_size else "empty"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@cache
def _warn_once(sentence: str) -> None:
    logger.warning(sentence)


def _open_file(path: Path, name: str, columns: Columns) -> Source:
    """The source that a local file is."""
    try:
        return _opened(path, name, columns)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _opened(path: Path, name: str, columns: Columns) -> Source:
    if kind_of(path) in ROW_KINDS:
        return Table(open_rows(path), name, columns)
    if columns.answers is not None:
        raise DataError(f"answers_column is {columns.answers!r}, but {path} is plain text and has no columns")
    encoding = encoding_of(path)
    if encoding == "utf-8" and not is_packed(path):
        return TextFile(path, name)
    return StreamedText(path, name, encoding)


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


class NeedleText:
    """Documents of needles of up to ``tokens`` tokens, one a unit: endless in training, 64 held out."""

    def __init__(self, seed: int, split: str, tokens: int, count: Count):
        self.name, self.files = "the needle documents", []
        self.units = None if split == "train" else _HELD_OUT_RECALL
        self._seed, self._split, self._tokens, self._count = seed, split, tokens, count

    def rows(self, unit: int, start: int) -> Iterator[Document]:
        if start == 0:
            yield needle_document(self._seed, unit, self._tokens, self._count, self._split)


class FunctionText:
    """Texts of the user's own: what ``module:function`` returns, one a unit.

    The function takes no argument and returns a sequence (``len`` and indexing, so a list, a ``datasets.Dataset``
    or a class that reads on demand) of texts or of rows with columns, the same at every call.
    """

    def __init__(self, value: str, setting: str, columns: Columns):
        self.name, self.files = value, []
        try:
            self._texts = find_function(setting, value, {})()
            self.units = len(self._texts)
            rows = [self._row(number) for number in range(min(self.units, _SAMPLE))]
        except Exception as error:  # the user's own code: whatever it raises is about this setting
            raise DataError(
                f"{setting} {value!r} must return a sequence of texts or rows: {first_line(error)}"
            ) from error
        if not rows:
            raise DataError(f"{setting} {value!r} returned no text")
        self._reader = _RowReader(columns, rows, value, value)

    def _row(self, number: int) -> dict[str, Any]:
        row = self._texts[number]
        return {"text": row} if isinstance(row, str) else dict(row)

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        if start == 0:
            yield self._reader.read(self._row(unit), f"#{unit}", lambda: f"{self.name}, text {unit}")


class TextFile:
    """A plain text in UTF-8, in stretches of 256 KiB that end at a line's end: each is a unit and a document."""

    def __init__(self, path: Path, name: str):
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


class StreamedText:
    """A text that is packed, or in UTF-16 or UTF-32: one unit, read from the beginning on; documents as of a plain
    text, of 256 K characters."""

    units = 1

    def __init__(self, path: Path, name: str, encoding: str):
        self._path, self.name, self.files, self._encoding = path, name, [path], encoding

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        yield from itertools.islice(self._stretches(), start, None)

    def _stretches(self) -> Iterator[Document | BadRow]:
        try:
            with open_text(self._path, self._encoding) as file:
                for number in itertools.count():
                    if not (text := file.read(STRETCH)):
                        return
                    if not text.endswith("\n"):
                        text += file.readline(4096)
                    yield Document(f"{self.name}#{number}", text)
        except (OSError, EOFError, zlib.error, ValueError) as error:  # cut short, or damaged
            fault = f"{self._path}: what follows cannot be read ({first_line(error)})"
            logger.warning(fault)
            yield BadRow(lambda: fault)


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


class Columns(NamedTuple):
    """Which columns of a table are read."""

    text: str | None = None  # None: found
    answers: str | None = None  # None: answers are not marked


class _RowReader:
    """From a row to its document. ``rows`` are a sample, ``where`` is what they are of, for people."""

    def __init__(self, columns: Columns, rows: list[dict], name: str, where: str):
        self._name, self._text, self._answers = (
            name,
            _choose_column(columns.text, rows, where),
            columns.answers,
        )
        if self._answers is not None:
            _check_column("answers_column", self._answers, rows, where)
        self.columns = [self._text] if self._answers is None else [self._text, self._answers]

    def read(self, row: dict, place: str, where: Callable[[], str]) -> Document | BadRow:
        text = row.get(self._text)
        try:
            if not isinstance(text, str):
                raise ValueError(f"no text in column {self._text!r}")
            answers = None if self._answers is None else find_answers(text, row.get(self._answers))
        except ValueError as error:
            fault = str(error)
            return BadRow(lambda: f"{where()}: {fault}", fault)
        return Document(f"{self._name}{place}", text, answers)


class Table:
    """The text of a file of rows, and its answers where they are marked."""

    def __init__(self, file: Any, name: str, columns: Columns):
        self._file, self.name, self.units = file, name, file.units
        self.files = [file.path]
        rows, fault = file.sample(_SAMPLE)
        if not rows:
            reason = (
                f"no row can be read; the first: {fault.describe()}" if fault else "there is no row in it"
            )
            raise DataError(f"nothing to read in {file.path}: {reason}")
        self._reader = _RowReader(columns, rows, name, str(file.path))

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        for place, row in self._file.rows(unit, start, self._reader.columns):
            if isinstance(row, BadRow):
                yield row
            else:
                yield self._reader.read(row, place, lambda place=place: self._file.where(place))


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
        self, name: str, setting: str, columns: Columns, dataset_config: str | None, dataset_split: str
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
        self._reader = _RowReader(columns, sample, name, f"the dataset {name!r}")

    def rows(self, unit: int, start: int) -> Iterator[Document | BadRow]:
        for number, row in enumerate(self._rows.skip(start), start):
            yield self._reader.read(row, f"#{number}", lambda number=number: f"{self.name}, row {number}")


def find_answers(text: str, marked: Any) -> tuple[tuple[int, int], ...]:
    """Where the answers stand in a text.

    Args:
        marked: a list of answers, or one; each a text, of which the last place in the document is meant, or
            ``[first, behind]``: its first character and the one behind its last.

    Raises:
        ValueError: an answer does not stand in the text, or is no text and no range of characters.
    """
    marked = [] if marked is None else [marked] if isinstance(marked, str) else list(marked)
    found = []
    for answer in marked:
        if isinstance(answer, str):
            first = text.rfind(answer) if answer else -1
            if first < 0:
                raise ValueError(f"the answer {short(answer)} does not stand in the text")
            found.append((first, first + len(answer)))
            continue
        ends = list(answer) if isinstance(answer, list | tuple) else []
        if (
            len(ends) != 2
            or not all(isinstance(end, int) for end in ends)
            or not 0 <= ends[0] < ends[1] <= len(text)
        ):
            raise ValueError(
                f"an answer is a text or [first, behind] within the {len(text)} characters of the document, "
                f"got {short(answer)}"
            )
        found.append((ends[0], ends[1]))
    return tuple(sorted(found))


def short(value: Any) -> str:
    """A value as it is shown in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def _check_column(setting: str, requested: str, rows: list[dict], where: str) -> None:
    there = sorted({column for row in rows for column in row})
    if requested not in there:
        raise DataError(
            f"{setting} is {requested!r}, a column that {where} does not have; those there: "
            f"{', '.join(there) or 'none'}"
        )


def _choose_column(requested: str | None, rows: list[dict], where: str) -> str:
    """The column that was asked for; else "text", or the one with the longest text in these rows."""
    if requested is not None:
        _check_column("text_column", requested, rows, where)
        return requested
    there = sorted({column for row in rows for column in row})
    lengths = {
        column: sum(len(row[column]) for row in rows if isinstance(row.get(column), str))
        for column in there
        if any(isinstance(row.get(column), str) for row in rows)
    }
    if not lengths:
        raise DataError(f"no column of {where} holds text; those there: {', '.join(there) or 'none'}")
    return "text" if "text" in lengths else max(lengths, key=lengths.__getitem__)
