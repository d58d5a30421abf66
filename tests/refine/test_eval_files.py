"""Question answering and LongBench from files: which rows count, their scores, what is wrong with the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from refine.data.document import cut_middle
from refine.evaluation.metrics import rouge_l, token_f1
from refine.evaluation.tasks.longbench import LEFT_OUT, LONGBENCH_TASKS, longbench_items
from refine.evaluation.tasks.qa import qa_items
from refine.evaluation.tasks.rows import BadRows, Columns
from refine.prepare import packaged_model

ALL = tuple(LONGBENCH_TASKS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.fixture(scope="module")
def shared_data() -> Path:
    root = Path(__file__).resolve().parents[2]
    named = os.environ.get("REFINE_DATA_DIR")
    for folder in ([Path(named)] if named else []) + [
        root / "shared" / "data",
        root.parent / "shared" / "data",
    ]:
        if (folder / "longbench").is_dir() and (folder / "ruler_qa").is_dir():
            return folder
    pytest.skip("no copies of RULER QA and LongBench here: set REFINE_DATA_DIR to their folder")


def write(path: Path, rows: list) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_rows_of_two_files_by_task_and_length(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    first = {"prompt": ["Who? Answer:", "Where?"], "answer": [["Ann"], ["here", "there"]]}
    pyarrow.parquet.write_table(
        pyarrow.table(first | {"task": ["ruler_squadqa"] * 2, "max_seq_length": [4096, 8192]}),
        tmp_path / "a.parquet",
    )
    write(tmp_path / "my_questions_8192.jsonl", [{"prompt": "When?", "answer": "now | then"}])
    bad = BadRows()
    items = qa_items([str(tmp_path)], Columns(), tokenizer, bad=bad)
    assert [(item.task, item.length) for item in items] == [
        ("ruler_squadqa", 4096), ("ruler_squadqa", 8192), ("my_questions", None)
    ]  # fmt: skip
    assert len({item.key for item in items}) == 3 and not bad.count
    assert items[0].make().ids.tolist() == tokenizer("Who? Answer:")["input_ids"]
    assert items[1].make().references == ("here", "there")
    assert items[2].make().references == ("now | then",)  # one answer, bar and all
    assert items[1].score("over THERE", ("here", "there")) == 1.0
    assert items[0].max_new_tokens == 32
    only = qa_items([str(tmp_path)], Columns(), tokenizer, bad=bad, tasks=["ruler_squadqa"], samples=1)
    assert [item.key for item in only] == [items[0].key, items[1].key]  # one of each length


def test_bad_rows_are_named_and_the_rest_is_kept(tmp_path, tokenizer):
    good = {"prompt": "Who?", "answers": ["Ann"], "task": "qasper"}
    path = write(
        tmp_path / "rows.jsonl",
        [
            good,
            "{torn",
            good | {"answers": []},
            good | {"answers": ["  ", None]},
            good | {"prompt": 7},
            good | {"task": "sudoku"},
            "[1, 2]",
            good,
        ],
    )
    bad = BadRows()
    items = longbench_items([path], Columns(), tokenizer, bad=bad, tasks=ALL)
    assert [item.source for item in items] == ["row 1 of rows.jsonl", "row 8 of rows.jsonl"]
    assert bad.count == 6
    assert bad.describe() == [
        "row 2 of rows.jsonl is left out: it is not a JSON object",
        "row 3 of rows.jsonl is left out: no answer in column 'answers'",
        "row 4 of rows.jsonl is left out: no answer in column 'answers'",
        "row 5 of rows.jsonl is left out: no prompt in column 'prompt'",
        "row 6 of rows.jsonl is left out: there is no LongBench task 'sudoku'",
        "1 more rows are left out",
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"question": "Who?", "answers": ["Ann"]}],
            Columns(),
            "has no column 'prompt'; it has answers, question",
        ),
        ([{"prompt": "Who?", "label": "Ann"}], Columns(), "has no column 'answers'; it has label, prompt"),
        ([{"prompt": "Who?", "label": "Ann"}], Columns(answer="lable"), "has no column 'lable'"),
        (
            [{"prompt": "Who?", "answers": []}],
            Columns(),
            "no row of qasper to evaluate on .* 1 bad rows, the first",
        ),
        ([], Columns(), "no row of qasper to evaluate on"),
        (["{"], Columns(), "no row of .* can be read"),
    ],
)
def test_files_without_anything_say_why(rows, columns, message, tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        longbench_items([path], columns, tokenizer, bad=BadRows(), tasks=["qasper"])


def test_paths_that_cannot_be_read(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none.jsonl", "longbench_files: there is no file '.*none.jsonl'"),
        ("empty", "longbench_files: the folder '.*empty' holds no file of rows"),
        ("rows.pdf", "longbench_files takes .parquet, .jsonl, .json, .csv files, got '.*rows.pdf'"),
        ("torn.parquet", "torn.parquet is not a whole Parquet file"),
    ):
        if "." in name and "none" not in name:
            (tmp_path / name).write_bytes(b"PAR1 not really")
        with pytest.raises(ValueError, match=message):
            longbench_items([str(tmp_path / name)], Columns(), tokenizer, bad=BadRows(), tasks=ALL)


def test_scores_of_every_longbench_task(tmp_path, tokenizer):
    pytest.importorskip("rouge")
    rows = [{"prompt": f"{task}?", "answers": ["City"], "task": task} for task in ALL]
    path = write(tmp_path / "rows.jsonl", rows)
    items = {i.task: i for i in longbench_items([path], Columns(), tokenizer, bad=BadRows(), tasks=ALL)}
    assert len(items) == 14 and set(LEFT_OUT) < set(ALL)
    second_line = "\nno\nCity"
    for task in ALL:
        item = items[f"longbench_{task}"]
        assert item.score("City", ("City",)) == pytest.approx(1.0, abs=2e-8)
        first_line_alone = task in ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
        assert (item.score(second_line, ("City",)) < 0.4) == first_line_alone, task
        expected = 1.0 if first_line_alone else 0.4
        assert item.score("City\nState, of all", ("City",)) == pytest.approx(expected, abs=2e-8)
    assert items["longbench_qasper"].score("a b c", ("x", "b c")) == token_f1("a b c", ["b c"])
    assert items["longbench_qmsum"].score("a b\nc", ("x", "b c")) == rouge_l("a b c", ["b c"])


def test_a_rows_own_classes_and_lengths_go_first(tmp_path, tokenizer):
    row = {"prompt": "?", "answers": ["X1"], "task": "trec", "all_classes": ["X1", "X2"], "max_gen_tokens": 7}
    path = write(tmp_path / "rows.jsonl", [row, {"prompt": "?", "answers": ["City"], "task": "trec"}])
    own, usual = longbench_items([path], Columns(), tokenizer, bad=BadRows(), tasks=["trec"])
    assert own.max_new_tokens == 7 and usual.max_new_tokens == 64
    assert own.score("X1 X2 City", ("X1",)) == 0.5 and usual.score("X1 X2 City", ("City",)) == 1.0


def test_long_prompts_lose_their_middle(tmp_path, tokenizer):
    assert cut_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
    assert cut_middle(list(range(10)), 4) == [0, 1, 8, 9]
    assert cut_middle(list(range(10)), 10) == list(range(10))
    text = "Begin. " + "filler " * 200 + "Question?"
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": text, "answer": "x"}, {"prompt": "Who?", "answer": "x"}]
    )
    long, short = qa_items([path], Columns(), tokenizer, bad=BadRows(), max_prompt_length=30)
    prompt = long.make()
    assert prompt.cut and len(prompt.ids) == 30 and not short.make().cut
    decoded = tokenizer.decode(prompt.ids)
    assert decoded.startswith("Begin.") and decoded.endswith("Question?")


def test_the_files_of_ruler_and_longbench(shared_data, tokenizer):
    bad = BadRows()
    questions = qa_items([str(shared_data / "ruler_qa")], Columns(), tokenizer, bad=bad, samples=2)
    assert {(item.task, item.length) for item in questions} == {
        (task, length) for task in ("ruler_squadqa", "ruler_hotpotqa") for length in (4096, 8192)
    }
    items = longbench_items([str(shared_data / "longbench")], Columns(), tokenizer, bad=bad, tasks=ALL)
    assert not bad.count and {item.task for item in items} == {f"longbench_{task}" for task in ALL}
    for item in questions + items[::300]:
        prompt = item.make()
        found = item.score(prompt.references[0], prompt.references)
        assert found == pytest.approx(1.0, abs=1e-6), item.source  # `rouge` divides by sums plus 1e-8
    rows = {item.task: item.max_new_tokens for item in items}
    assert rows == {f"longbench_{name}": task.new_tokens for name, task in LONGBENCH_TASKS.items()}


def test_training_prompts_are_written_as_the_test_files_are(shared_data):
    """Take a prompt of the public file apart and write it again with the training's own template."""
    import re

    parquet = pytest.importorskip("pyarrow.parquet")
    from refine.data.pairs import _qa_prompt

    for path in sorted((shared_data / "ruler_qa").glob("*.parquet")):
        for row in parquet.read_table(path).slice(0, 5).to_pylist():
            body, _, question = row["prompt"].rpartition("\n\nQuestion: ")
            context = body[body.index("Document 1:\n") : body.rindex("\n\nAnswer the question")]
            passages = re.split(r"(?:\n\n)?Document \d+:\n", context)[1:]
            assert _qa_prompt(question.removesuffix("\nAnswer:"), passages) == row["prompt"]
