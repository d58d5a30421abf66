"""Evaluation from the command line: needles, training on the prompts, going on after a crash."""

from __future__ import annotations

import json

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
