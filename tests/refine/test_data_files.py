"""Files as people have them: every kind, packed and not, in several encodings, and folders with other files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import random
import tracemalloc
from pathlib import Path

import pytest

from refine.data import sources
from refine.data.document import BadRow, DataError
from refine.data.rows import all_rows
from refine.data.sources import open_source
from refine.data.stream import DataConfig, held_out_stream, training_stream
from refine.prepare import packaged_model

TEXTS = [f'Text {i}: "größer", and\nmore, 日本 {"word " * (i % 7)}' for i in range(20)]


def content(kind: str, texts: list[str] = TEXTS) -> bytes:
    """A file of this kind with these texts."""
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind == "csv":
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=7)
        return buffer.getvalue()
    return "\n".join(texts).encode()


def pack(data: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(data)
    if packing == ".zst":
        return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)
    return data


def texts_of(path: Path, **options) -> list[str]:
    source = open_source(str(path), **options)
    return [document.text for unit in range(source.units) for document in source.rows(unit, 0)]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "json", "csv", "parquet"])
def test_every_kind_gives_its_texts(kind, packing, tmp_path):
    if kind == "json":
        pytest.importorskip("ijson")
    path = tmp_path / f"mine.{kind}{packing}"
    path.write_bytes(pack(content(kind), packing))
    found = texts_of(path)
    assert found == (["\n".join(TEXTS)] if kind in ("txt", "md") else TEXTS)
    source = open_source(str(path))
    for unit in range(source.units):
        rows = list(source.rows(unit, 0))
        assert list(source.rows(unit, 3)) == rows[3:]
    if kind not in ("txt", "md"):
        assert [row["text"] for row in all_rows(path)] == TEXTS


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n{"text": "b"}\n', '{\n "text": "a"\n}\n{"text":\n "b"}', '["a", "b"]']
)
def test_other_json(text, tmp_path):
    pytest.importorskip("ijson")
    (tmp_path / "a.json").write_text(text)
    assert texts_of(tmp_path / "a.json") == ["a", "b"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_understood(kind, encoding, tmp_path):
    path = tmp_path / f"mine.{kind}"
    path.write_bytes(content(kind).decode().encode(encoding))
    assert "".join(texts_of(path)) == ("\n" if kind == "txt" else "").join(TEXTS)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "md.gz"])
def test_other_encodings_are_refused_by_name(kind, tmp_path):
    path = tmp_path / f"mine.{kind}"
    data = content(kind.removesuffix(".gz"), ["größer", "Übung"] * 3).decode()
    data = data.replace("\\u00f6", "ö").encode("latin-1")
    path.write_bytes(pack(data, ".gz" if kind.endswith(".gz") else ""))
    with pytest.raises(
        DataError, match=rf"mine.{kind} is not UTF-8 \(byte \d+ is 0xf6; Latin-1\?\): convert it"
    ):
        texts_of(path)
    path.write_bytes(pack("text".encode("utf-16-le"), ".gz" if kind.endswith(".gz") else ""))
    with pytest.raises(DataError, match="UTF-16 without a byte order mark"):
        texts_of(path)


def test_a_single_bad_row_costs_itself_alone(tmp_path):
    good = content("csv").decode().splitlines(keepends=True)
    (tmp_path / "a.csv").write_bytes("".join(good).encode() + b"9,gr\xf6n\r\n9,too,many\r\n10,fine\r\n")
    source = open_source(str(tmp_path / "a.csv"))
    rows = list(source.rows(0, 0))
    assert [row.text for row in rows if not isinstance(row, BadRow)] == [*TEXTS, "fine"]
    told = [row.describe() for row in rows if isinstance(row, BadRow)]
    assert told[0].endswith("a.csv, row 21: not UTF-8") and "row 22: more fields than the header" in told[1]


def test_a_csv_of_semicolons_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id;text\n1;a\n")
    with pytest.raises(DataError, match="separated by semicolons"):
        texts_of(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt.gz", "json", "csv.zst"])
def test_what_is_cut_short_is_told(kind, tmp_path, caplog):
    path, packing = tmp_path / f"mine.{kind}", "." + kind.partition(".")[2] if "." in kind else ""
    if kind == "json":
        pytest.importorskip("ijson")
    rng = random.Random(0)
    texts = [f"{i} {rng.getrandbits(4000)}" for i in range(400)]
    data = pack(content(kind.partition(".")[0], texts), packing)
    path.write_bytes(data[: len(data) // 2])
    try:
        source = open_source(str(path))
        rows = list(source.rows(0, 0))
    except DataError as error:
        assert "cannot be read" in str(error)
    else:
        assert isinstance(rows[-1], BadRow) and len(rows) <= 300
        assert "what follows cannot be read" in caplog.text


def test_a_folder_names_what_it_leaves_out(tmp_path, caplog):
    sources._warn_once.cache_clear()
    for name, data in {
        "a.txt": b"a", "deep/b.csv.gz": pack(content("csv"), ".gz"), "c.md": b"c", ".git/d.txt": b"d",
        "e.pdf": b"e", "empty.txt": b"", "README.md": b"about", "latin.txt": "größer".encode("latin-1"),
        "info.json": b'[{"n": 1}]',
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert texts_of(tmp_path) == ["a", "c", *TEXTS]
        texts_of(tmp_path)
    (told,) = [record.message for record in caplog.records]
    assert "6 files of" in told
    for part in (
        ".git/d.txt: hidden", "e.pdf: of no kind that is read", "empty.txt: empty", "README.md: about the data",
        "latin.txt is not UTF-8", "info.json: no column of",
    ):  # fmt: skip
        assert part in told
    only = tmp_path / "only"
    only.mkdir()
    (only / "e.pdf").write_text("e")
    with pytest.raises(
        DataError, match=r"without a data file in it; .* left out: e.pdf: of no kind that is read"
    ):
        texts_of(only)


@pytest.mark.parametrize("kind", ["csv", "jsonl.zst", "json"])
def test_resuming_gives_the_same_windows(kind, tmp_path):
    from transformers import AutoTokenizer

    if kind == "json":
        pytest.importorskip("ijson")
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    path = tmp_path / f"mine.{kind}"
    texts = [f"Story {i}. " + f"word{i} " * 80 for i in range(40)]
    path.write_bytes(pack(content(kind.partition(".")[0], texts), ".zst" if "zst" in kind else ""))
    config = DataConfig(dataset_name_or_path=str(path), max_length=64, min_length=16, shuffle_buffer=8)
    stream = training_stream(config, tokenizer)
    batches = stream.batches(2)
    for _ in range(13):
        next(batches)
    state = json.loads(json.dumps(stream.state_dict()))
    ahead = [next(batches).keys.tolist() for _ in range(30)]
    again = training_stream(config, tokenizer)
    again.load_state_dict(state)
    batches = again.batches(2)
    assert [next(batches).keys.tolist() for _ in range(30)] == ahead
    held_out = {key for batch in held_out_stream(config, tokenizer).batches(1) for key in batch.keys.tolist()}
    assert held_out and not held_out & {key for keys in ahead for key in keys}
    path.write_bytes(
        pack(content(kind.partition(".")[0], [*texts[:-1], "x"]), ".zst" if "zst" in kind else "")
    )
    with pytest.raises(DataError, match="has changed since"):
        training_stream(config, tokenizer).load_state_dict(state)


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl.gz", "txt.gz"])
def test_memory_does_not_grow_with_the_file(kind, tmp_path):
    if kind == "json":
        pytest.importorskip("ijson")
    path = tmp_path / f"mine.{kind}"
    data = content(kind.partition(".")[0], ["a word and another one " * 40] * 20_000)
    path.write_bytes(pack(data, ".gz") if kind.endswith("gz") else data)
    assert len(data) > 18e6
    del data
    source = open_source(str(path))
    tracemalloc.start()
    try:
        count = sum(len(document.text) for document in source.rows(0, 0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count > 18e6 and peak < 5e6
