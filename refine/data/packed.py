"""Files as people have them: what kind they are, unpacked where they are packed, and how their text is encoded."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from refine.data.document import DataError, MissingPackage

INSTALL = "pip install 'refine-fast-weights[data]'"
PACKED = (".gz", ".zst")
_LOOKED_AT = 1 << 24  # bytes of a file in which its encoding is looked for
_MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, in lower case: ``.jsonl`` of ``rows.jsonl.gz``."""
    return Path(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.suffix.lower() in PACKED


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked, to be read from the beginning on.

    Raises:
        MissingPackage: Zstandard needs pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(path) as file:
            yield file
    elif suffix == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise MissingPackage(f"reading {path} needs the extra 'data' ({INSTALL})") from error
        with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


@contextmanager
def open_text(path: Path, encoding: str, newline: str | None = None) -> Iterator[TextIO]:
    """A file's text, unpacked. Bytes that are not UTF-8 become lone surrogates, which no tokenizer takes."""
    if encoding == "utf-8":
        how = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    else:
        how = {"encoding": encoding}
    with open_bytes(path) as file, io.TextIOWrapper(file, newline=newline, **how) as text:
        yield text


def encoding_of(path: Path) -> str:
    """``utf-8``, or what a byte order mark says: ``utf-16`` or ``utf-32``.

    Looks at the first 16 MiB, unpacked.

    Raises:
        DataError: it is binary, or text in another encoding.
    """
    with open_bytes(path) as file:
        data = file.read(_LOOKED_AT)
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    if b"\0" in data[:4096]:
        raise DataError(f"{path} is not text, or UTF-16 without a byte order mark: save it as UTF-8")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < _LOOKED_AT)
    except UnicodeDecodeError as error:
        beyond_ascii = [line for line in data.splitlines() if not line.isascii()]
        wrong = sum(not _is_utf8(line) for line in beyond_ascii)
        if 2 * wrong > len(beyond_ascii):  # a single bad line is left out where it stands
            raise DataError(
                f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}; Latin-1?): convert it, "
                "as in iconv -f LATIN1 -t UTF-8 OLD > NEW"
            ) from None
    return "utf-8"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
