"""The way from a source of text to batches: what is read, in which order, resumed where, refused why."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from refine.data.default_text import default_documents, default_names
from refine.data.document import DataError, stable_hash
from refine.data.recall_documents import QUESTION_FORMATS, VALUE_KINDS, recall_document, recall_items
from refine.data.sources import BadRow, open_source
from refine.data.stream import DataConfig, held_out_stream, training_stream
from refine.data.tokenizer import train_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "refine" / "assets" / "tiny-delta-net"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS)


def story(number: int, words: int = 300) -> str:
    """A text that no other number gives."""
    return f"Story {number}.\n" + " ".join(f"word{(number * 7 + i * i) % 1000}" for i in range(words)) + "\n"


@pytest.fixture
def jsonl(tmp_path) -> Path:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(60)))
    return path


def config(path: object = None, **settings) -> DataConfig:
    settings = {"max_length": 128, "min_length": 16, "shuffle_buffer": 16} | settings
    return DataConfig(dataset_name_or_path=None if path is None else str(path), **settings)


def take(stream, count: int) -> list[int]:
    return [example.key for example in itertools.islice(stream.examples(), count)]


def one_epoch(path: object, tokenizer, **settings) -> list:
    """Every training window of the source, once."""
    stream = training_stream(config(path, **settings), tokenizer)
    seen: dict[int, object] = {}
    for example in stream.examples():
        if example.key in seen:
            return list(seen.values())
        seen[example.key] = example


# --- The default text


def test_default_text_is_long_documents_split_by_name():
    train, held_out = set(default_names("train")), set(default_names("held_out"))
    assert not train & held_out
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.2
    assert list(default_names("train")) == sorted(train)
    lengths = [len(document.text) for document in default_documents("held_out")]
    assert sum(lengths) > 500_000 and sorted(lengths)[len(lengths) // 10] > 3_000
    assert not any(
        "/test/" in name or "this.py" in name or "site-packages" in name for name in train | held_out
    )
    with pytest.raises(ValueError, match="split is 'test'; allowed: train, held_out"):
        default_names("test")


def test_split_hangs_on_the_name_alone():
    """These were drawn once and for all: another split would put training text into the tiny model's test."""
    assert stable_hash("stdlib/argparse.py") == 0xC77E7AA1D22451EC
    assert "stdlib/argparse.py" in default_names("train")
    assert "stdlib/inspect.py" in default_names("held_out")


def test_no_held_out_topic_stands_in_the_training_text():
    train = {
        line.strip() for d in default_documents("train") if d.name[0] == "t" for line in d.text.split("\n")
    }
    for document in default_documents("held_out"):
        if document.name.startswith("topics/"):
            lines = [line.strip() for line in document.text.split("\n") if len(line.strip()) > 20]
            assert sum(line in train for line in lines) < 0.25 * len(lines), document.name


# --- Recall documents


def test_recall_documents_follow_from_seed_and_index():
    documents = [recall_document(3, index, 4_000) for index in range(40)]
    assert documents == [recall_document(3, index, 4_000) for index in range(40)]
    assert len({document.text for document in documents}) == 40
    assert documents[0].text != recall_document(4, 0, 4_000).text
    assert all(2_000 < len(document.text) < 8_000 for document in documents)


@pytest.mark.parametrize("value_kind", VALUE_KINDS)
def test_recall_items_are_answerable_from_their_document_alone(value_kind, tokenizer):
    items = list(recall_items(0, 60, 4_000, value_kind=value_kind))
    assert [item.format for item in items[: len(QUESTION_FORMATS)]] == list(QUESTION_FORMATS)
    for item in items:
        question = item.prompt.rsplit("\n", 1)[1]
        if item.format == "lists":
            told = [line for line in item.prompt.split("\n")[:-1] if line.startswith(question)]
            assert len(told) == 1 and f"{told[0]} ".startswith(f"{question}{item.answer} ")
            continue
        key = question.removeprefix("assert ").removeprefix("print(").split(" of the ")[-1]
        key = key.removesuffix("? It is").removesuffix(" ==")
        for sign in (" =", ":", " ->", " is"):
            key = key.removesuffix(sign)
        lines = item.prompt.split("\n")[:-1]
        stating = [line for line in lines if key in line and item.answer in line.replace("'", "")]
        told = [line for line in stating if line.rstrip(".").endswith(item.answer)]
        assert any(line.split(" of the ")[-1].startswith(key) for line in told), (key, item.answer)
        assert 0 < item.chance <= 0.5 and item.distance > 0
        whole = tokenizer(item.prompt + item.answer)["input_ids"]
        assert whole == tokenizer(item.prompt)["input_ids"] + tokenizer(item.answer)["input_ids"]
    assert sum(item.distance for item in items) / len(items) > 1_500
    assert items == list(recall_items(0, 60, 4_000, value_kind=value_kind))


def test_recall_items_ask_once():
    for item in recall_items(1, 60, 4_000):
        *lines, question = item.prompt.split("\n")
        like_the_statement = (
            item.format in ("lists", "pairs") or question.startswith("The ") or question.endswith(" =")
        )
        assert sum(line.startswith(question) for line in lines) == like_the_statement, question


# --- The tokenizer


def test_tokenizer_round_trip_is_exact(tokenizer):
    texts = [
        "",
        " ",
        "\r\n\t x  y\n\n\n",
        "a = 1_234.5\n",
        "日本語 ÿ\x00 🙂 e\u0301",
        "  lead",
        "it's 'quoted'",
    ]
    texts += [document.text for document in itertools.islice(default_documents("held_out"), 6)]
    texts += [recall_document(9, index).text for index in range(6)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_one_special_token_and_groups_of_digits(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    for text, pieces in (
        ("is 482.", ["is", "Ġ", "482", "."]),
        ("x 0071234 5", ["x", "Ġ", "007", "123", "4", "Ġ", "5"]),
        ("v12", ["v", "12"]),
    ):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces
    groups = [f"{number:0{digits}}" for digits in (1, 2, 3) for number in range(10**digits)]
    assert all(len(tokenizer(group)["input_ids"]) == 1 for group in groups)
    text = next(default_documents("held_out")).text
    assert len(text) / len(tokenizer(text)["input_ids"]) > 3


def test_training_a_tokenizer(monkeypatch):
    texts = ["def red_fox(): return 482\n" * 40]
    monkeypatch.setattr("refine.data.tokenizer._training_text", lambda: iter(texts))
    small = train_tokenizer(1400)
    assert len(small) <= 1400 and small.decode(small(texts[0])["input_ids"]) == texts[0]
    assert small.backend_tokenizer.to_str() == train_tokenizer(1400).backend_tokenizer.to_str()
    with pytest.raises(ValueError, match="vocab_size is 1356; allowed: 1357 or more"):
        train_tokenizer(1356)


# --- Windows and batches


def test_windows_are_consecutive_and_whole(tmp_path, tokenizer):
    text = story(1, 500)
    (tmp_path / "one.txt").write_text(text)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    examples = one_epoch(tmp_path / "one.txt", tokenizer, shuffle_buffer=1)
    assert [len(example.input_ids) for example in examples[:-1]] == [128] * (len(examples) - 1)
    joined = [token for example in examples for token in example.input_ids.tolist()]
    assert joined == ids[: len(joined)] and len(ids) - len(joined) < 16


def test_batches_are_padded_on_the_right(jsonl, tokenizer):
    tokenizer_pad = tokenizer.pad_token_id
    for batch in itertools.islice(training_stream(config(jsonl), tokenizer).batches(3), 20):
        assert batch.input_ids.shape == batch.attention_mask.shape == (3, batch.input_ids.shape[1])
        assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.keys.dtype == torch.int64
        lengths = batch.attention_mask.sum(1)
        assert lengths.max() == batch.input_ids.shape[1] <= 128 and lengths.min() >= 16
        steps = torch.arange(batch.input_ids.shape[1])
        assert torch.equal(batch.attention_mask, (steps < lengths[:, None]).long())
        assert (batch.input_ids[batch.attention_mask == 0] == tokenizer_pad).all()


def test_short_documents_are_skipped_and_counted(tmp_path, tokenizer):
    path = tmp_path / "mixed.jsonl"
    texts = [story(0), "too short", story(1), "short too", story(2)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stream = training_stream(config(path, eval_fraction=0, shuffle_buffer=1), tokenizer)
    take(stream, 60)
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    assert stream.counts.short_documents == 2 and stream.counts.documents == 3
    assert stream.counts.windows == sum(
        length // 128 + (length % 128 >= 16) for length in lengths if length >= 16
    )
    assert stream.counts.short_windows == sum(0 < length % 128 < 16 for length in lengths if length >= 16)


def test_same_seed_same_order_and_another_seed_another(jsonl, tokenizer):
    first, again, other = (take(training_stream(config(jsonl, seed=s), tokenizer), 200) for s in (1, 1, 2))
    assert first == again and first != other
    epoch = len(one_epoch(jsonl, tokenizer, seed=1))
    assert epoch > 64, "the test needs several blocks an epoch"
    keys = take(training_stream(config(jsonl, seed=1, shuffle_buffer=1000), tokenizer), 2 * epoch)
    assert len(set(keys)) == epoch and keys[:epoch] != keys[epoch:]


def test_keys_do_not_depend_on_order_or_folder(jsonl, tmp_path, tokenizer):
    elsewhere = tmp_path / "elsewhere" / jsonl.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(jsonl.read_bytes())
    here = {example.key: example.input_ids.tolist() for example in one_epoch(jsonl, tokenizer, seed=1)}
    there = {example.key: example.input_ids.tolist() for example in one_epoch(elsewhere, tokenizer, seed=2)}
    assert here == there


@pytest.mark.parametrize("name", [None, "default+recall", "jsonl"])
@pytest.mark.parametrize("batches", [0, 1, 7, 40])
def test_resuming_gives_the_same_batches(name, batches, jsonl, tokenizer):
    settings = config(jsonl if name == "jsonl" else name, recall_weight=0.3)
    stream = training_stream(settings, tokenizer)
    reader = stream.batches(3)
    for _ in range(batches):
        next(reader)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [next(reader) for _ in range(20)]
    resumed = training_stream(settings, tokenizer)
    resumed.load_state_dict(state)
    for one, other in zip(expected, resumed.batches(3)):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.input_ids, other.input_ids)
    assert resumed.state_dict() == stream.state_dict()
    assert resumed.counts == stream.counts


def test_resuming_with_other_settings_is_refused(jsonl, tokenizer):
    state = training_stream(config(jsonl), tokenizer).state_dict()
    with pytest.raises(
        DataError, match="max_length is 64, but the position to resume from was saved with 128"
    ):
        training_stream(config(jsonl, max_length=64), tokenizer).load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_sequence(world_size, jsonl, tokenizer):
    alone = take(training_stream(config(jsonl), tokenizer), 60)
    ranks = [
        training_stream(config(jsonl), tokenizer, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [take(stream, 60 // world_size) for stream in ranks]
    assert [key for together in zip(*shares) for key in together] == alone

    states = [stream.state_dict() for stream in ranks]
    following = take(training_stream(config(jsonl), tokenizer), 66)[60:]
    for state in states:  # any rank's position serves any number of ranks
        resumed = training_stream(config(jsonl), tokenizer)
        resumed.load_state_dict(state)
        assert take(resumed, 6) == following


def test_ranks_get_the_same_number_of_held_out_batches(jsonl, tokenizer):
    settings = config(jsonl, eval_fraction=0.2)
    alone = [key for batch in held_out_stream(settings, tokenizer).batches(2) for key in batch.keys.tolist()]
    assert len(alone) % 2 == 1 or len(alone) % 4, "the test needs a rest"
    shares = [list(held_out_stream(settings, tokenizer, rank=r, world_size=4).batches(2)) for r in range(4)]
    assert len({len(share) for share in shares}) == 1
    assert [batch.keys.shape for batch in shares[0]] == [batch.keys.shape for batch in shares[3]]
    assert {key for share in shares for batch in share for key in batch.keys.tolist()} == set(alone)


# --- What is held out


def test_held_out_documents_never_train(jsonl, tokenizer):
    settings = config(jsonl, eval_fraction=0.2)
    held_out = held_out_stream(settings, tokenizer)
    first, again = ([key for batch in held_out.batches(4) for key in batch.keys.tolist()] for _ in range(2))
    assert first == again and len(set(first)) == len(first), "once through, the same every time"
    assert held_out_stream(config(jsonl, eval_fraction=0.2, seed=5), tokenizer).batches(4) is not None
    train = {example.key for example in one_epoch(jsonl, tokenizer, eval_fraction=0.2)}
    everything = {example.key for example in one_epoch(jsonl, tokenizer, eval_fraction=0)}
    assert train.isdisjoint(first) and train | set(first) == everything


def test_default_text_and_mixture_hold_out_the_same_documents(tokenizer):
    held_out = [held_out_stream(config(name, max_length=512), tokenizer) for name in (None, "default+recall")]
    assert take(held_out[0], 40) == take(held_out[1], 40)
    assert len(take(held_out_stream(config("recall", max_length=512), tokenizer), 1000)) >= 64


def test_a_given_evaluation_source_leaves_all_documents_to_training(jsonl, tmp_path, tokenizer):
    other = tmp_path / "other.txt"
    other.write_text(story(99))
    settings = config(jsonl, eval_dataset_name_or_path=str(other))
    stream = training_stream(settings, tokenizer)
    assert len(set(take(stream, 2000))) == len(one_epoch(jsonl, tokenizer, eval_fraction=0))
    held_out = take(held_out_stream(settings, tokenizer), 1000)
    assert sorted(held_out) == sorted(example.key for example in one_epoch(other, tokenizer))


def test_one_document_is_enough_to_train_and_nothing_is_held_out(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text(story(1))
    settings = config(tmp_path / "one.txt", eval_fraction=0.9)
    assert take(training_stream(settings, tokenizer), 5)
    assert held_out_stream(settings, tokenizer) is None
    assert held_out_stream(config(tmp_path / "one.txt", eval_fraction=0), tokenizer) is None


def test_mixture_has_the_recall_documents_it_was_asked_for(tokenizer):
    settings = config("default+recall", recall_weight=0.25, max_length=512, shuffle_buffer=1)
    recall = set(take(training_stream(config("recall", max_length=512, shuffle_buffer=1), tokenizer), 100))
    keys = take(training_stream(settings, tokenizer), 80)
    assert sum(key in recall for key in keys) == 20


def test_recall_documents_fit_their_window(tokenizer):
    stream = training_stream(config("recall", max_length=1024), tokenizer)
    take(stream, 64)
    assert stream.counts.windows < 1.3 * stream.counts.documents


# --- Files


def rows_of(source) -> list:
    return [row for unit in range(source.units) for row in source.rows(unit, 0)]


def test_large_files_are_read_in_units_that_lose_nothing(tmp_path):
    lines = ["é" * (i % 700) + f" {i}\n" for i in range(3000)]
    (tmp_path / "big.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "big.jsonl").write_text("".join(json.dumps({"text": line}) + "\n\n" for line in lines))
    (tmp_path / "line.txt").write_text("日本語é" * 90_000, encoding="utf-8")
    text, rows, line = (open_source(str(tmp_path / name)) for name in ("big.txt", "big.jsonl", "line.txt"))
    assert text.units > 2 and rows.units > 2 and line.units > 2
    assert "".join(document.text for document in rows_of(text)) == "".join(lines)
    assert all(document.text.endswith("\n") for document in rows_of(text))
    assert [document.text for document in rows_of(rows)] == lines
    assert "".join(document.text for document in rows_of(line)) == "日本語é" * 90_000
    assert len({document.name for document in rows_of(rows)}) == len(lines)
    assert list(rows.rows(1, 5)) == list(rows.rows(1, 0))[5:]


def test_a_folder_is_all_its_files(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text(story(1))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": story(2)}) + "\n")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "empty.txt").write_text("")
    documents = rows_of(open_source(str(tmp_path)))
    assert [document.name for document in documents] == ["b.jsonl@0", "deep/a.txt@0"]
    assert [document.text for document in documents] == [story(2), story(1)]


@pytest.mark.parametrize(
    ("rows", "requested", "expected"),
    [
        ([{"text": "a", "long": "bbbb"}], None, "a"),
        ([{"id": 1, "content": "c"}], None, "c"),
        ([{"title": "t", "body": "bbbb"}, {"title": "tt", "body": None}], None, "bbbb"),
        ([{"text": "a", "long": "bbbb"}], "long", "bbbb"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_text_column_is_found_or_named(kind, rows, requested, expected, tmp_path):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(open_source(str(path), text_column=requested))[0].text == expected


def test_parquet_is_read_by_row_groups(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "stories.parquet"
    texts = [story(i, 100) for i in range(50)]
    texts[30] = None
    parquet.write_table(pyarrow.table({"text": texts, "id": list(range(50))}), path, row_group_size=20)
    source = open_source(str(path))
    assert source.units == 3
    rows = rows_of(source)
    assert [row.name for row in rows if not isinstance(row, BadRow)][-1] == "stories.parquet#49"
    assert rows[30].describe() == "stories.parquet, row 30: no text in column 'text'"
    assert next(source.rows(1, 15)).name == "stories.parquet#35"
    stream = training_stream(config(path, eval_fraction=0), tokenizer)
    take(stream, 1000)
    assert stream.counts.documents == 49 and stream.counts.bad_rows == 1

    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="is not a whole Parquet file, perhaps cut short"):
        training_stream(config(path), tokenizer)


def test_hub_datasets_are_streamed(jsonl, monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset

    def local(name, configuration, *, split, streaming):
        assert (name, configuration, split, streaming) == ("someone/stories", "small", "train", True)
        return load("json", data_files=str(jsonl), split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    settings = config("someone/stories", dataset_config="small")
    stream = training_stream(settings, tokenizer)
    before, state, after = take(stream, 50), stream.state_dict(), take(stream, 50)
    resumed = training_stream(settings, tokenizer)
    resumed.load_state_dict(state)
    assert take(resumed, 50) == after and not set(before) & set(after)


# --- Bad input: one sentence, before any training


def test_a_bad_row_is_left_out_counted_and_reported(jsonl, caplog, tokenizer):
    lines = jsonl.read_text().splitlines()
    lines[3] = '{"text": "cut off'
    lines[5] = '{"text": 5}'
    jsonl.write_text("\n".join(lines))
    stream = training_stream(config(jsonl, eval_fraction=0), tokenizer)
    take(stream, 2000)
    assert stream.counts.bad_rows == 2 and stream.counts.documents == 58
    assert any("stories.jsonl, line 4: not JSON" in record.message for record in caplog.records)


def bad_sources(folder: Path) -> dict[str, tuple[object, dict, str]]:
    def file(name: str, content: str) -> Path:
        (folder / name).write_text(content)
        return folder / name

    (folder / "nothing").mkdir()
    row = json.dumps({"title": "a", "body": story(0)}) + "\n"
    return {
        "missing": (folder / "no.jsonl", {}, "no.jsonl', but there is no such file or folder"),
        "missing folder": (folder / "no" / "such", {}, "there is no such file or folder"),
        "empty": (file("empty.txt", ""), {}, "empty.txt', an empty file"),
        "blank": (file("blank.jsonl", "\n\n"), {}, "blank.jsonl: there is no row in it"),
        "extension": (
            file("a.pdf", "x"),
            {},
            "a.pdf', a file of an unknown kind; allowed: .parquet, .jsonl, .json, .csv, .txt, .md",
        ),
        "empty folder": (folder / "nothing", {}, "a folder without a data file in it; allowed: .parquet"),
        "column": (
            file("column.jsonl", row),
            {"text_column": "texts"},
            "text_column is 'texts', a column that .*column.jsonl does not have; those there: body, title",
        ),
        "no text": (file("numbers.jsonl", '{"id": 1}\n'), {}, "no column of .* holds text; those there: id"),
        "all bad": (
            file("bad.jsonl", "{\n[1]\n"),
            {},
            "no row can be read; the first: .*bad.jsonl, line 1: not JSON",
        ),
        "wrong column": (
            file("wrong.jsonl", '{"id": 1, "text": "a"}\n' * 3),
            {"text_column": "id"},
            "none of the 3 rows of wrong.jsonl holds a text",
        ),
        "not a text": (
            file("not.parquet", "PAR1 but no more"),
            {},
            "not.parquet is not a whole Parquet file",
        ),
        "short": (
            file("short.jsonl", '{"text": "one two"}\n{"text": "a"}\n'),
            {"min_length": 100},
            "the longest of 2 has 3 tokens, and min_length is 100",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("missing", "missing folder", "empty", "blank", "extension", "empty folder", "column", "no text"),
        *("all bad", "wrong column", "not a text", "short"),
    ],
)
def test_bad_sources_are_refused_in_one_sentence(case, tmp_path, tokenizer):
    if case == "not a text":
        pytest.importorskip("pyarrow")
    path, settings, expected = bad_sources(tmp_path)[case]
    with pytest.raises(DataError, match=expected) as refusal:
        training_stream(config(path, **settings), tokenizer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("max_length", 1, "2 or more"),
        ("min_length", 500, "1 to 128, which is max_length"),
        ("min_length", 0, "1 to 128"),
        ("shuffle_buffer", 0, "1 .* or more"),
        ("eval_fraction", 1.0, "from 0 .* to below 1"),
        ("recall_weight", 1, "above 0 and below 1"),
    ],
)
def test_bad_settings_are_refused(setting, value, allowed):
    with pytest.raises(DataError, match=f"{setting} is {value}; allowed: {allowed}"):
        config(**{setting: value})


@pytest.mark.parametrize(("package", "name"), [("datasets", "someone/stories"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_with_its_extra(package, name, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_text("x")
    with pytest.raises(DataError, match=r"extra 'data' \(pip install 'refine-fast-weights\[data\]'\)"):
        training_stream(config(name), tokenizer)


def test_an_unknown_hub_name_is_refused(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets")

    def absent(name, *_, **__):
        raise FileNotFoundError(f"Couldn't find {name}\non the hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        DataError, match=r"dataset_name_or_path is 'no-such-data': no such local path, .*FileNotFound"
    ):
        training_stream(config("no-such-data"), tokenizer)


def test_a_tokenizer_must_be_able_to_pad(tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="neither a pad_token nor an eos_token"):
        training_stream(config(), bare)
    bare.eos_token = "<|endoftext|>"
    assert training_stream(config(), bare).pad_id == 0
