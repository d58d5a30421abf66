"""Going on: with every file as it was written, with the same data, and with settings that are told."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import yaml

from refine.training import checkpoint
from refine.training.resume import FIXED
from refine.training.tracking import Tracker, read_metrics
from tests.refine.runs import checkpoints, run, same_weights, spoil_weights, steps, write_text

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file, one_thread):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder, text_file, eval_samples=2) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def go_on(folder, data, **changes) -> int:
    return run(folder, data, resume_from_checkpoint="auto", **{"eval_samples": 2} | changes)


# --- Settings that differ


def test_changed_rates_are_applied_and_told(copy, text_file, capsys):
    changes = {"learning_rate": 1e-5, "weight_decay": 0.5, "adam_beta1": 0.1, "max_steps": 6}
    assert go_on(copy, text_file, **changes) == 0
    said = capsys.readouterr().out
    assert "settings changed since then:" in said and "learning_rate 0.01 -> 1e-05" in said
    state = torch.load(copy / "checkpoint-6" / checkpoint.TRAINING_STATE, weights_only=True)
    group = state["optimizer"]["groups"][0]
    assert (group["lr"], group["betas"][0], group["weight_decay"]) == (1e-5, 0.1, 0.5)
    assert yaml.safe_load((copy / "config.yaml").read_text())["learning_rate"] == 1e-5
    assert [line["learning_rate"] for line in read_metrics(copy / "metrics.jsonl") if "loss" in line][4:] == [
        1e-5
    ] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gated_deltanet"},
            "model_type is 'gated_deltanet', but .* was made with 'delta_net'",
        ),
        ({"config_overrides": "hidden_size=32,num_heads=2"}, "config_overrides is"),
        ({"seed": 3}, "seed is 3, but .* was made with 0, and a run keeps it"),
        ({"phase": "post"}, "phase is post, but .* was made in phase mid, which reads other data"),
        ({"shuffle_buffer": 4}, "shuffle_buffer is 4, but the position to resume from was saved with 8"),
        ({"max_length": 190}, "max_length is 190, but the position"),
        ({"mimetic_init": "true"}, "mimetic_init is True, but"),
    ],
)
def test_what_a_run_keeps_is_refused(copy, text_file, changes, message, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("[!.]*")}
    assert go_on(copy, text_file, max_steps=6, **changes) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    import re

    assert re.search(message, said), said
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("[!.]*")} == before


def test_the_table_of_settings_is_in_the_docs():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert all(f"`{name}`" in text for name in FIXED)


def test_a_checkpoint_of_an_earlier_version_goes_on(copy, finished, text_file):
    """Without the mark, checksums, settings, and what else this version notes."""
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(copy / name)
    (copy / ".refine-run.json").unlink()
    folder = copy / "checkpoint-2"
    (folder / checkpoint.CHECKSUMS).unlink()
    state = torch.load(folder / checkpoint.TRAINING_STATE, weights_only=True)
    del state["settings"], state["data"]["settings"]["content of the dataset"]
    for group in state["optimizer"]["groups"]:
        del group["names"]
    torch.save(state, folder / checkpoint.TRAINING_STATE)
    assert go_on(copy, text_file) == 0
    assert same_weights(copy / "final", finished / "final") and steps(copy) == steps(finished)


# --- Broken in any file: the checkpoint before, named


BREAKING = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
    "one bit": lambda path: path.write_bytes(_flipped(path.read_bytes())),
}


def _flipped(data: bytes) -> bytes:
    place = 2 * len(data) // 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("how", BREAKING)
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "training_state.pt"],
)
def test_a_checkpoint_broken_in_any_file_is_passed_over(finished, tmp_path, name, how, capsys):
    for step in (2, 4):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    BREAKING[how](tmp_path / "checkpoint-4" / name)
    folder, state = checkpoint.find_resume(tmp_path, "auto")
    assert folder.name == "checkpoint-2" and state["counters"]["step"] == 2
    said = capsys.readouterr().out
    assert "passing over a broken checkpoint" in said and name in said


@pytest.mark.parametrize(
    "part", ["schedule", "data", "counters", "random", "short random", "text counters", "NaN"]
)
def test_a_state_without_its_parts_is_passed_over(finished, tmp_path, part, capsys):
    """Also where no checksums tell (a checkpoint of an earlier version)."""
    for step in (2, 4):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    folder = tmp_path / "checkpoint-4"
    (folder / checkpoint.CHECKSUMS).unlink()
    state = torch.load(folder / checkpoint.TRAINING_STATE, weights_only=True)
    if part == "short random":
        state["random"]["torch"] = state["random"]["torch"][:10]
    elif part == "text counters":
        state["counters"]["step"] = "four"
    elif part == "NaN":
        spoil_weights(folder)
    else:
        del state[part]
    torch.save(state, folder / checkpoint.TRAINING_STATE)
    assert checkpoint.find_resume(tmp_path, "auto")[0].name == "checkpoint-2"
    assert "checkpoint-4" in capsys.readouterr().out


def test_a_passed_over_checkpoint_is_moved_aside(copy, finished, text_file):
    BREAKING["cut"](copy / "checkpoint-4" / "config.json")
    assert go_on(copy, text_file) == 0
    assert (copy / "aside-1" / "checkpoint-4").is_dir()
    assert same_weights(copy / "final", finished / "final") and steps(copy) == steps(finished)


# --- The optimizer's state belongs to the model


def _names_changed(state):
    first = next(iter(state["state"]))
    state["state"]["other.weight"] = state["state"].pop(first)


def _shapes_changed(state):
    for values in state["state"].values():
        values["exp_avg"] = torch.zeros(3, 5)


def _not_finite(state):
    next(iter(state["state"].values()))["exp_avg"].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_names_changed, "the model has no parameter 'other.weight'"),
        (_shapes_changed, r"has shape \(3, 5\), the parameter"),
        (lambda state: state["state"].clear(), "it is empty after 4 updates"),
        (_not_finite, "exp_avg of .* is not finite"),
    ],
)
def test_an_optimizer_of_another_model_is_refused(copy, text_file, change, message, capsys):
    folder = copy / "checkpoint-4"
    (folder / checkpoint.CHECKSUMS).unlink()
    state = torch.load(folder / checkpoint.TRAINING_STATE, weights_only=True)
    change(state["optimizer"])
    torch.save(state, folder / checkpoint.TRAINING_STATE)
    assert go_on(copy, text_file, max_steps=6) == 2
    import re

    assert re.search(f"optimizer's state in .* does not fit the model: .*{message}", capsys.readouterr().err)


# --- The data is the data


def test_data_that_changed_is_refused(copy, text_file, tmp_path, capsys):
    other = write_text(tmp_path / text_file.name, "xylophone", rows=25)
    assert go_on(copy, other, max_steps=6) == 2
    assert "text.jsonl has changed since the position to resume from was saved" in capsys.readouterr().err
    moved = tmp_path / "moved" / text_file.name
    moved.parent.mkdir()
    shutil.copy2(text_file, moved)
    assert go_on(copy, moved, max_steps=6) == 0, "the same content elsewhere is the same data"


@pytest.mark.parametrize("places", [[[0, -1, 0, 0]], [[0, 5, 0, 0]], [["x", 0, 0, 0]], []])
def test_a_position_that_cannot_be_is_refused(copy, text_file, places, capsys):
    folder = copy / "checkpoint-4"
    (folder / checkpoint.CHECKSUMS).unlink()
    state = torch.load(folder / checkpoint.TRAINING_STATE, weights_only=True)
    state["data"]["places"] = places
    torch.save(state, folder / checkpoint.TRAINING_STATE)
    assert go_on(copy, text_file, max_steps=6) == 2
    assert "the data's position in" in capsys.readouterr().err


# --- metrics.jsonl: no line doubled or lost


def test_a_closing_evaluation_made_again_stands_there_once(copy, finished, text_file):
    """Killed between the closing evaluation and the final model."""
    shutil.rmtree(copy / "final")
    assert go_on(copy, text_file) == 0
    assert steps(copy) == steps(finished) == [0, 1, 2, 3, 4, 4]
    lines = [
        [line.get(key) for key in ("loss", "eval_loss")] for line in read_metrics(copy / "metrics.jsonl")
    ]
    assert lines == [
        [line.get(k) for k in ("loss", "eval_loss")] for line in read_metrics(finished / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "odd", [b"", b"garbage", b"\xff\xfe", b"5", b"{}", b'{"step": "x"}', b"[" * 100_000, b'{"step": true}']
)
def test_a_broken_line_costs_no_other(tmp_path, odd, capsys):
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(7)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], odd, *lines[2:], b'{"step": 7, "lo']))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))
    tracker = Tracker(tmp_path, [], None, {}, 5)
    tracker.log(6, {"loss": 2.0})
    tracker.close()
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    broken = tmp_path / "metrics.jsonl.broken"
    assert broken.read_bytes() == odd + b"\n" if odd else not broken.exists()


def test_unreadable_folders_are_one_sentence(copy, text_file, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (copy / "checkpoint-4" / "config.json").chmod(0)
    assert go_on(copy, text_file, max_steps=6) == 0
    assert "passing over a broken checkpoint" in capsys.readouterr().out
    assert checkpoints(copy)
