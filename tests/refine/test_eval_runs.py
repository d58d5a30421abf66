"""Evaluation from the command line: needles, training on the prompts, going on after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from refine import eval as evaluation

NEEDLES = ["--tasks", "niah_single_1", "--lengths", "400", "--samples", "3", "--batch_size", "2"]


def predictions(folder) -> list[dict]:
    """The lines of predictions.jsonl."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ttt", ["none", "sft", "refine"])
def test_every_sample_is_scored_and_a_torn_run_goes_on(tmp_path, ttt):
    """The last partial batch too; what was written before a crash is neither lost nor doubled."""
    arguments = [*NEEDLES, "--ttt", ttt, "--ttt_batch_size", "2", "--learning_rate", "1e-3"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        assert evaluation.main([*arguments, "--output_dir", str(folder)]) == 0
    lines = (torn / "predictions.jsonl").read_text().splitlines(keepends=True)
    (torn / "predictions.jsonl").write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    (torn / "results.json").unlink()
    assert evaluation.main([*arguments, "--output_dir", str(torn), "--resume"]) == 0
    assert predictions(torn) == predictions(whole)
    results = [json.loads((folder / "results.json").read_text())["results"] for folder in (whole, torn)]
    assert results[0] == results[1]
    assert (torn / "niah.png").stat().st_size > 1000


def test_a_length_that_cannot_be_is_one_sentence(tmp_path, capsys):
    arguments = ["--tasks", "niah_single_1", "--lengths", "40", "--output_dir", str(tmp_path / "out")]
    assert evaluation.main(arguments) == 2
    assert "length 40 is too short for niah_single_1: the least is" in capsys.readouterr().err


def test_all_needle_tasks_and_files_of_questions(tmp_path):
    """Every task in one evaluation of the tiny model: a score each, a table, bad rows counted."""
    questions, documents = tmp_path / "ruler_squadqa_512.jsonl", tmp_path / "longbench.jsonl"
    rows = [
        {
            "prompt": f"The key of house {i} is {i}.\nQuestion: the key of house {i}?\nAnswer:",
            "answer": [str(i)],
        }
        for i in range(3)
    ]
    questions.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "Who?", "answer": []}]))
    tasks = ("narrativeqa", "trec", "lcc", "samsum")
    lines = [
        {"prompt": f"Text {task}. Answer:", "answers": ["Type: a"], "task": task, "all_classes": ["a", "b"]}
        for task in tasks
    ]
    documents.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--tasks", "niah", "ruler_squadqa", *(f"longbench_{task}" for task in tasks)]
    arguments += ["--lengths", "600", "--samples", "1", "--output_dir", str(tmp_path / "out")]
    arguments += ["--ruler_qa_files", str(questions), "--longbench_files", str(documents)]
    assert evaluation.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    names = {score["task"] for score in found["scores"]}
    assert {
        "niah_single_1",
        "niah_multikey_3",
        "niah_multiquery",
        "niah_multivalue",
        "ruler_squadqa",
    } <= names
    assert {f"longbench_{task}" for task in tasks} <= names
    assert len(predictions(tmp_path / "out")) == 8 + 1 + len(tasks)


@pytest.mark.slow
@pytest.mark.parametrize("ttt", ["none", "refine"])
def test_kill_9_then_resume(tmp_path, ttt):
    """Killed at several moments while it answers; in the end every sample stands there once, as without."""
    arguments = ["--tasks", "niah_single_1", "--lengths", "500", "--samples", "12", "--batch_size", "2"]
    arguments += ["--ttt", ttt, "--ttt_batch_size", "2", "--learning_rate", "1e-3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert evaluation.main([*arguments, "--output_dir", str(whole)]) == 0
    command = [sys.executable, "-m", "tests", "refine.eval", *arguments, "--output_dir", str(killed)]
    kills = 0
    for seen in (1, 4, 9):
        resume = ["--resume"] if (killed / "predictions.jsonl").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            path = killed / "predictions.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") >= seen:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    if not (killed / "results.json").exists():
        assert evaluation.main([*arguments, "--output_dir", str(killed), "--resume"]) == 0
    assert predictions(killed) == predictions(whole)
    results = [json.loads((folder / "results.json").read_text())["results"] for folder in (whole, killed)]
    assert results[0] == results[1]
