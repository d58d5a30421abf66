"""Every named row and figure of the paper, with the tiny model and two samples, through refine.reproduce."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from refine import reproduce
from refine.evaluation import lm_eval
from refine.evaluation.tasks.longbench import LEFT_OUT, LONGBENCH_TASKS
from refine.paper.rows import figures
from refine.prepare import packaged_model
from refine.reproduce import row_names
from tests.refine.runs import write_text

SMALL = [
    "max_steps=2", "gradient_accumulation_steps=1", "train.max_length=256", "eval.max_length=256", "positions=256",
    "max_prompt_length=256", "bf16=false", "gradient_checkpointing=false", "samples=2", "lengths=400",
    "batch_size=2", "ttt_batch_size=2", "mid.eval_samples=2", "mid.eval_steps=1", "sample_steps=1", "save_steps=0",
    "learning_rate=1e-4",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Text, pairs, questions and documents, all of them made up."""
    folder = tmp_path_factory.mktemp("inputs")
    long = "The grass is green and the sky is blue. " * 60
    (folder / "qa").mkdir()
    for task in ("ruler_squadqa", "ruler_hotpotqa"):
        for length in (4096, 8192, 16384):
            for split, count in (("train", 3), ("test", 2)):
                rows = [
                    {
                        "prompt": f"{long} Number {i}?",
                        "answer": [str(i)],
                        "task": task,
                        "max_seq_length": length,
                    }
                    for i in range(count)
                ]
                path = folder / "qa" / f"{task}_{length}_{count}_{split}.jsonl"
                path.write_text("\n".join(map(json.dumps, rows)))
    names = [name for name in LONGBENCH_TASKS if name not in LEFT_OUT]
    rows = [
        {"prompt": f"{long} What?", "answers": ["City"], "task": name, "max_gen_tokens": 4}
        for name in names for _ in range(2)
    ]  # fmt: skip
    (folder / "longbench.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text, validation = write_text(folder / "text.jsonl"), write_text(folder / "validation.jsonl", "bread", 4)
    return ["--text", str(text), "--validation", str(validation), "--qa_train", str(folder / "qa"),
            "--qa_test", str(folder / "qa"), "--longbench", str(folder / "longbench.jsonl"),
            "--model", str(packaged_model())]  # fmt: skip


def short_tasks(folder: Path) -> Path:
    """lm-eval's tasks by name, on four lines of made-up text."""
    rows = [
        {"text": "The sky is blue.", "a": "The sky is", "b": " blue", "choices": [" blue", " up"], "right": 0}
    ] * 4
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for task, measure in dict(lm_eval.MEASURES.values()).items():
        about = {
            "task": task, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "doc_to_text": "{{a}}", "doc_to_target": "{{b}}", "output_type": "loglikelihood",
            "metric_list": [{"metric": name} for own, name in lm_eval.MEASURES.values() if own == task],
        }  # fmt: skip
        if measure in ("acc_norm",) or task in ("piqa", "winogrande", "arc_easy"):
            about |= {
                "output_type": "multiple_choice",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{right}}",
            }
        if task == "wikitext":
            about |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        if measure == "contains":
            about |= {
                "output_type": "generate_until",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            }
            about |= {"metric_list": [{"metric": "exact_match"}]}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["ours", "paper"])
def test_every_row_and_figure(tmp_path, stages_in_this_process, inputs, monkeypatch, protocol, capsys):
    """All stages run; every number of ours stands under another name than the paper's model."""
    pytest.importorskip("rouge")
    pytest.importorskip("matplotlib")
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    measures = {name: (task, "exact_match" if found == "contains" else found)
                for name, (task, found) in lm_eval.MEASURES.items()}  # fmt: skip
    (tmp_path / "short").mkdir()
    small = [*SMALL, f"include_path={short_tasks(tmp_path / 'short')}"]
    monkeypatch.setattr(lm_eval, "MEASURES", measures)
    out = tmp_path / "out"
    names = ["table*", "ablation_*", "entropy_*", "figure*"]
    if protocol == "paper":  # the same stages by other settings; a family and a table of each kind
        names = ["table4_lact_refine_nested_refine_ttt_refine", "table5_lact_sft"]
    command = [*names, *inputs, "--output_dir", str(out), "--protocol", protocol, "--set", *small]
    assert reproduce.main(command) == 0, capsys.readouterr().err[-3000:]
    tables = json.loads((out / "tables.json").read_text())
    text = (out / "tables.md").read_text()
    for table, about in tables.items():
        for row in about["rows"].values():
            assert row["state"] == "done" and row["is_papers_model"] is False, (table, row["row"])
            if table == "3":  # needles of another length than the paper's fill no column
                assert not any(row["ours"])
            else:
                assert all(value is not None for value in row["ours"]), (table, row["row"])
    for line in text.splitlines():  # numbers of ours are in lines that say whose they are not
        if line.startswith("|") and not line.startswith(("| | ", "|---")):
            assert ", paper | " in line or line.startswith("| **not "), line
    assert "not the paper's model" in text and f"protocol {protocol}" in text and "lengths=400" in text
    if protocol == "ours":
        assert set(tables) == {"3", "4", "5", "6", "7", "5c", "5k", "E.1", "E.2"}
        done = sum(len(about["rows"]) for about in tables.values())
        assert done == len(row_names()) - 2
        for name in figures():
            record = json.loads((out / f"{name}.json").read_text())
            assert (
                record["data"] and record["is_papers_model"] is False and "not the paper's" in record["model"]
            )
            kind = "md" if name.startswith("table") else "png"
            assert (out / f"{name}.{kind}").stat().st_size > 200
        assert "not the paper's" in (out / "tableF1_lact.md").read_text()


@pytest.mark.slow
def test_equal_updates_tokens_and_time(tmp_path, stages_in_this_process, inputs, capsys):
    """Four arms of two seeds in one table, with differences; a second call runs nothing."""
    out = tmp_path / "out"
    small = [one for one in SMALL if not one.startswith(("max_steps", "lengths", "mid.eval"))]
    small += [
        "mid.max_steps=4",
        "mid.num_mini_batches=2",
        "tasks=niah_single_1",
        "lengths=400",
        "mid.eval_samples=0",
    ]
    numbers = {"tables": {"3": {"title": "Needles", "columns": {"S": ["niah_single_1"]}}}}
    (tmp_path / "numbers.yaml").write_text(yaml.safe_dump(numbers))
    command = ["table3_delta_net_refine", *inputs, "--output_dir", str(out), "--compare", "--seeds", "0,1"]
    command += ["--published", str(tmp_path / "numbers.yaml"), "--set", *small]
    assert reproduce.main(command) == 0, capsys.readouterr().err[-3000:]
    (record,) = json.loads((out / "compare.json").read_text())
    arms = record["arms"]
    assert list(arms) == [
        "REFINE", "SFT, equal updates", "SFT, equal tokens (one update per draw)", "SFT, equal time"
    ]  # fmt: skip
    updates = [[one["updates"] for one in arm["training"]] for arm in arms.values()]
    tokens = [[one["tokens"] for one in arm["training"]] for arm in arms.values()]
    assert updates[:3] == [[4, 4], [4, 4], [2, 2]] and tokens[0] == tokens[1] == tokens[2]
    seconds = [sum(one["seconds"] for one in arm["training"]) for arm in arms.values()]
    per_update = [one["seconds"] / 4 for one in arms["SFT, equal updates"]["training"]]
    assert updates[3] == [max(1, round(seconds[0] / 2 / (sum(per_update) / 2)))] * 2
    assert all(len(arm["values"]) == 2 and None not in arm["values"][0] for arm in arms.values())
    text = (out / "compare.md").read_text()
    assert "not the paper's model" in text and "| REFINE - SFT, equal time | - | - | - | " in text
    logs = {path: path.stat().st_mtime_ns for path in (out / "stages").glob("*.log")}
    assert reproduce.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "stages").glob("*.log")} == logs
