"""Whole runs of a very small model: what they write, how they stop, and that a resumed run is the same run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

import refine
import refine.train as training
from refine.training import checkpoint, phases
from refine.training.tracking import read_metrics

SMALL = {
    "model_type": "delta_net",
    "config_overrides": "hidden_size=16,num_hidden_layers=2,num_heads=2,intermediate_size=24",
    "max_length": 200,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "eval_samples": 2,
    "save_steps": 2,
    "save_total_limit": "none",
    "sample_steps": 2,
    "shuffle_buffer": 8,
}


def command_line(output_dir, data, **changes) -> list[str]:
    settings = SMALL | {"output_dir": output_dir, "dataset_name_or_path": data} | changes
    return [
        part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))
    ]


def run(output_dir, data, **changes) -> int:
    return training.main(command_line(output_dir, data, **changes))


def weights(folder) -> dict[str, torch.Tensor]:
    return refine.load_model(folder).state_dict()


@pytest.mark.parametrize("phase", ["mid", "sft"])
def test_a_run_writes_everything(tmp_path, text_file, phase, capsys):
    assert run(tmp_path, text_file, phase=phase, gradient_accumulation_steps=2, seed=3) == 0
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    steps = [line["step"] for line in metrics if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [0, 6]
    assert metrics[-1]["eval_loss"] < metrics[0]["eval_loss"]
    assert ("reward" in metrics[1]) == (phase == "mid")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 3
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [f"checkpoint-{i}" for i in (2, 4, 6)]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert (tmp_path / "reward.png").exists() == (phase == "mid")
    samples = sorted(p.name for p in (tmp_path / "samples").glob("*.txt")) if phase == "mid" else []
    if phase == "mid":
        assert samples == ["step-000002.txt", "step-000004.txt", "step-000006.txt"]
        assert "truth   :" in (tmp_path / "samples" / samples[0]).read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    AutoTokenizer.from_pretrained(tmp_path / "final")
    printed = capsys.readouterr().out
    assert "next-token loss" in printed and "before" in printed


@pytest.mark.parametrize("changes", [{}, {"num_mini_batches": 2}, {"phase": "sft"}])
@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_same_run(tmp_path, text_file, changes):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, text_file, **changes) == 0
    assert run(parts, text_file, **changes, max_steps=6, save_steps=2) == 0
    for late in ("checkpoint-6", "final"):
        for path in sorted((parts / late).iterdir()):
            path.unlink()
        (parts / late).rmdir()
    assert run(parts, text_file, **changes, resume_from_checkpoint="auto") == 0
    for name, value in weights(whole / "final").items():
        assert torch.equal(weights(parts / "final")[name], value), name
    keep = ("step", "loss", "grad_norm", "total_tokens", "eval_loss")
    lines = [
        [{k: line[k] for k in keep if k in line} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, parts)
    ]
    assert lines[0] == lines[1]


def test_the_same_seed_gives_the_same_run(tmp_path, text_file):
    for name in ("a", "b"):
        assert run(tmp_path / name, text_file, max_steps=3, eval_samples=0) == 0
    first, second = weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_broken_checkpoint_is_passed_over(tmp_path, text_file, capsys):
    assert run(tmp_path, text_file, max_steps=4) == 0
    state = tmp_path / "checkpoint-4" / checkpoint.TRAINING_STATE
    state.write_bytes(state.read_bytes()[:100])
    assert run(tmp_path, text_file, max_steps=5, resume_from_checkpoint="auto") == 0
    printed = capsys.readouterr().out
    assert "passing over a broken checkpoint" in printed
    assert "going on from" in printed and "after update 2" in printed


def test_off_policy_updates_share_their_rollouts(tmp_path, text_file):
    assert run(tmp_path, text_file, num_mini_batches=3, max_steps=5, learning_rate=0.05) == 0
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 5
    assert lines[0]["clip_fraction"] == 0  # the first update is by the policy that sampled
    assert any(line["clip_fraction"] > 0 for line in lines[1:3])


def test_a_signal_saves_and_says_how_to_go_on(tmp_path, text_file):
    command = [sys.executable, "-m", "refine.train"]
    command += command_line(tmp_path, text_file, max_steps=100000, eval_samples=0, save_steps=0)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not read_metrics(tmp_path / "metrics.jsonl") and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "--resume_from_checkpoint auto" in printed
    [saved] = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.load_training_state(saved)["counters"]["step"] == int(saved.name.split("-")[1])


def test_signals_outside_the_main_thread_are_left_alone():
    seen = []

    def use():
        with training.stop_requests() as stop:
            seen.append(list(stop))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [[]]


def test_non_finite_updates_are_skipped_counted_and_stop_the_run(tmp_path, text_file, monkeypatch, capsys):
    original = phases.Phase._refine
    poisoned = {2, 4, 5, 6}

    def refine(phase, batch, step, *given):
        output = original(phase, batch, step, *given)
        if step + 1 in poisoned:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(phases.Phase, "_refine", refine)
    assert run(tmp_path, text_file, max_skipped_updates=3, max_steps=20, eval_samples=0) == 1
    assert "3 updates in a row had a non-finite loss" in capsys.readouterr().err
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 0, 1, 1, 1]
    assert lines[-1]["skipped_updates"] == 4 and lines[1]["loss"] is None
    saved = weights(tmp_path / "checkpoint-4")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, text_file, monkeypatch, capsys):
    save, calls = torch.save, []

    def full_disk(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*arguments, **keywords)

    monkeypatch.setattr(torch, "save", full_disk)
    assert run(tmp_path, text_file) == 2
    assert "could not be written" in capsys.readouterr().err
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob("*.partial"))
    checkpoint.load_training_state(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name_or_path": "no/such.jsonl"}, "no/such.jsonl"),
        ({"text_column": "body"}, "text_column"),
        ({"max_length": 8000, "min_length": 7000}, "min_length"),
        ({"model_type": None, "config_overrides": None, "model_name_or_path": "no/model"}, "no/model"),
        ({"model_type": "rnn"}, "model_type must be one of"),
        ({"config_overrides": "vocab_size=100"}, "tokenizer has "),
        ({"config_overrides": "hidden_size=30,num_heads=4"}, "multiple of num_heads"),
        ({"tokenizer_name_or_path": "no/tokenizer"}, "no/tokenizer"),
        ({"device": "warp"}, "device 'warp'"),
        ({"resume_from_checkpoint": "no/folder"}, "no/folder"),
        ({"report_to": "wandb"}, "report_to wandb needs its package"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(
    tmp_path, text_file, changes, message, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no reporter is installed
    folder = tmp_path / "run"
    assert run(folder, changes.pop("dataset_name_or_path", text_file), **changes) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1, printed
    assert not folder.exists()


def test_a_folder_with_files_is_left_alone(tmp_path, text_file, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(tmp_path, text_file) == 2
    assert "is not empty: give --overwrite_output_dir" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert run(tmp_path, text_file, max_steps=1, overwrite_output_dir=True, eval_samples=0) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unreadable_setting_does_not_touch_an_existing_run(tmp_path, text_file):
    assert run(tmp_path, text_file, max_steps=2) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("[!.]*")}
    assert run(tmp_path, "no/such.jsonl", overwrite_output_dir=True) == 2
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("[!.]*")} == before
