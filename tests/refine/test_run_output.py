"""What a run shows and leaves to look at: true counts, samples with what happened in them, a report."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import refine.train as training
from refine.method import RefineConfig, refine_step
from refine.models import new_model
from refine.prepare import load_model_and_tokenizer
from refine.terminal import terminal
from refine.training import samples
from refine.training.run_folder import MARK
from refine.training.samples import describe_document, token_texts, write_document
from refine.training.settings import parse_settings
from refine.training.tracking import read_metrics
from tests.refine.runs import arguments, run, write_text


@pytest.fixture(scope="module")
def tokenizer():
    return load_model_and_tokenizer(parse_settings([]))[1]


@pytest.mark.with_report
def test_a_run_says_what_is_true_and_leaves_what_happened(tmp_path, text_file, capsys):
    changes = {"sample_steps": 6, "eval_samples": 3, "max_steps": 12}
    assert run(tmp_path / "run", text_file, learning_rate=1e-12, **changes) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed
    assert re.search(r"^  model +a new delta_net, [\d,]+ parameters, cpu$", printed, re.M)
    assert re.search(r"sequences of at most 200 tokens, 2 an update; 3 held out", printed)
    assert re.search(r"^10 updates took 0:\d\d: about 0:\d\d for the other 2", printed, re.M)
    assert "12 updates, 24 sequences, " in printed, "not those that were read ahead for shuffling"
    assert not re.search(r"[+-]0\.0+\b", printed)
    assert re.search(rf"^report +{re.escape(str(tmp_path / 'run' / 'report.html'))}$", printed, re.M)

    folder = tmp_path / "run"
    names = sorted(path.name for path in (folder / "samples").glob("*.json"))
    assert names == ["held-out-000000.json", "held-out-000012.json"] + [
        f"step-{step:06d}.json" for step in (6, 12)
    ]
    about = json.loads((folder / "environment.json").read_text())
    assert about["parameters"] > 0 and about["versions"]["torch"] and about["machine"]["device"] == "cpu"
    lines = read_metrics(folder / "metrics.jsonl")
    for line in (lines[0], lines[-1]):
        assert line["eval_loss_low"] <= line["eval_loss"] <= line["eval_loss_high"]
    assert all(line["chosen_entropy"] > 0 for line in lines if "loss" in line)
    page = (folder / "report.html").read_text()
    assert f'<data value="{lines[-1]["eval_loss"]}">{lines[-1]["eval_loss"]:.4f}</data>' in page
    assert "held out, before training" in page and "trained on at update 12" in page


def test_a_row_that_is_left_out_is_named_once(tmp_path, caplog):
    rows = write_text(tmp_path / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text('{"text": 5}\n' + rows + '\n{"text": 6}\n')
    assert run(tmp_path / "run", tmp_path / "text.jsonl", eval_samples=2, max_steps=1, save_steps=0) == 0
    said = [record.message for record in caplog.records if "is left out" in record.message]
    assert len(said) == 1 and "line 1: no text" in said[0]


@pytest.mark.with_report
def test_a_report_that_fails_ends_no_run(tmp_path, text_file, monkeypatch, capsys):
    def fail(folders, output_file):
        raise ZeroDivisionError("of a chart")

    monkeypatch.setattr(training, "write_report", fail)
    monkeypatch.setattr(training, "draw_plots", lambda folder: [])
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / MARK).write_text('{"checkpoints": []}')  # of an earlier run
    earlier = [
        folder / name for name in ("report.html", "samples/step-000003.json", "samples/held-out-000000.json")
    ]
    for path in earlier:
        path.write_text("of the earlier run")
    assert run(folder, text_file, max_steps=1, save_steps=0, overwrite_output_dir=True) == 0
    assert "no report: ZeroDivisionError: of a chart" in capsys.readouterr().out
    assert (folder / "final").is_dir() and not any(path.exists() for path in earlier)


def test_other_ranks_are_silent(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setattr(training, "draw_plots", lambda folder: [])
    monkeypatch.setattr(type(terminal), "open", lambda self, shown=True: setattr(self, "shown", False))
    assert training.main(arguments(tmp_path / "run", text_file, max_steps=2)) == 0
    assert capsys.readouterr().out == ""


def step_of(count: int = 90):
    """A step over two documents, padded on the left, and the first of them."""
    torch.manual_seed(1)
    model = new_model(
        "delta_net", hidden_size=16, num_hidden_layers=1, num_heads=2, intermediate_size=24, vocab_size=300
    )
    ids, mask = torch.randint(300, (2, count)), torch.ones(2, count, dtype=torch.int64)
    mask[0, :7] = 0
    config = RefineConfig(num_chunks=2, rollout_length=4, num_rollouts=3)
    with torch.no_grad():
        return ids[0, 7:].tolist(), refine_step(model, ids, config, attention_mask=mask)


class _Numbers:
    """Tokens are their numbers."""

    def decode(self, ids):
        return "".join(f" {token}" for token in ids)


def test_a_document_holds_what_the_step_found(monkeypatch):
    ids, output = step_of()
    found = describe_document(ids, output, _Numbers(), left=7)
    (stretch,) = found["stretches"]
    assert stretch["tokens"] == [f" {token}" for token in ids] and stretch["entropy"][0] is None
    entropy = output.entropy[0, 7:].tolist()
    np.testing.assert_allclose(stretch["entropy"][1:], entropy[:-1], atol=1e-3)
    assert found["mean_entropy"] == pytest.approx(np.mean(entropy[:-1]), abs=1e-3)
    assert len(found["rollouts"]) == 6
    for rollout in found["rollouts"]:
        p = rollout["position"]
        j = output.positions[0].tolist().index(p)
        assert rollout["entropy"] == pytest.approx(entropy[p - 1], abs=1e-3)
        assert rollout["percentile"] == pytest.approx(
            100 * np.mean(np.array(entropy[:-1]) < entropy[p - 1]), abs=0.1
        )
        assert rollout["truth"] == [f" {token}" for token in ids[p : p + 4]]
        assert rollout["match"] == [a == b for a, b in zip(rollout["tokens"], rollout["truth"])]
        assert np.mean(rollout["similarity"]) == pytest.approx(rollout["cosine"], abs=1e-3)
        assert any(rollout["reward"] == pytest.approx(x, abs=1e-4) for x in output.rewards[0, j].tolist())
    torch.testing.assert_close(output.similarity.mean(-1), output.cosine)
    monkeypatch.setattr(samples, "LONGEST", 40)
    cut = describe_document(ids, output, _Numbers(), left=7)["stretches"]
    kept = {place for s in cut for place in range(s["first"], s["first"] + len(s["tokens"]))}
    assert len(kept) <= 40 and {p + d for p in output.positions[0].tolist() for d in (-5, 0, 5)} <= kept


def test_samples_stay_few_and_keep_the_first_and_the_last(tmp_path):
    for step in range(10, 400, 10):
        write_document(tmp_path, "step", step, {})
    steps = sorted(int(path.stem[5:]) for path in tmp_path.glob("step-*.json"))
    assert len(steps) == samples.KEPT and (steps[0], steps[-1]) == (10, 390)
    gaps = np.diff(steps)[:-1]  # the last is as long as the time since
    assert max(gaps) <= 2 * min(gaps), "spread over the run"


@pytest.mark.parametrize("text", ["A naïve 🙂🙃 text\n\twith 漢字.", "plain words"])
def test_the_texts_of_tokens_make_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == text
