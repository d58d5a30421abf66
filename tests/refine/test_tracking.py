"""What a run leaves to look at survives crashes and resumes."""

from __future__ import annotations

import json
import sys

import pytest

from refine.settings import SettingsError
from refine.training.plots import draw_plots
from refine.training.tracking import Tracker, check_reporters, read_metrics


def tracker(folder, step=0, report_to=()):
    return Tracker(folder, list(report_to), None, {}, step)


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    first = tracker(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": step / 2})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    second = tracker(tmp_path, step=3)
    second.log(4, {"loss": 9.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 9.0),
    ]


def test_what_is_not_finite_is_null(tmp_path):
    log = tracker(tmp_path)
    log.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "reward": 0.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "reward": 0.5}


def test_reporters_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="report_to tensorboard needs its package"):
        check_reporters(["tensorboard"])


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    log = tracker(tmp_path, report_to=["tensorboard"])
    log.log(1, {"loss": 1.0})
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_plots_show_what_there_is(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    log = tracker(tmp_path)
    log.log(0, {"eval_loss": 2.0})
    for step in range(1, 12):
        log.log(step, {"ntp_loss": 3.0 / step, "skipped": 0})
    log.log(12, {"ntp_loss": float("nan")})
    log.close()
    assert [path.name for path in draw_plots(tmp_path)] == ["loss.png"]
    log = tracker(tmp_path, 12)
    for step in (13, 14, 15):
        log.log(step, {"eval_cosine_by_sequence": [0.1 * step, 0.2, float("nan") if step == 14 else 0.3]})
    log.close()
    assert [path.name for path in draw_plots(tmp_path)] == ["loss.png", "held_out_reward.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        draw_plots(tmp_path)


def test_the_project_of_wandb_can_be_chosen(tmp_path, monkeypatch):
    chosen = []
    fake = type(sys)("wandb")
    fake.init = lambda project, **_: chosen.append(project)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tracker(tmp_path, report_to=["wandb"]).close()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tracker(tmp_path, report_to=["wandb"]).close()
    assert chosen == ["refine", "mine"]
