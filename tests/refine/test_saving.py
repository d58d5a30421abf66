"""A run that ends, however it ends, has saved; and no checkpoint is of a broken model."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import types

import pytest
import torch
from safetensors import SafetensorError

import refine.eval as evaluation
import refine.train as training
from refine.finite import first_not_finite
from refine.signals import Terminated
from refine.training import checkpoint, phases, run_folder, tracking
from refine.training.tracking import Tracker, read_metrics
from tests.refine.runs import checkpoints, run, spoil_weights, steps, weights, write_text

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder, text_file, max_steps=2) == 0
    return folder


def at_update(number: int, act):
    """In the place of the REFINE loss: ``act`` before the loss of an update (from 1) is computed."""
    original = phases.Phase._refine

    def refine(phase, batch, step, *given):
        if step + 1 == number:
            act(phase.model)
        return original(phase, batch, step, *given)

    return refine


def whole(folder) -> bool:
    """Whether a checkpoint can be gone on from, with finite weights."""
    checkpoint.load_training_state(folder)
    return first_not_finite(weights(folder)) is None


# --- Saved, however it ends


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
@pytest.mark.parametrize("save_steps", [0, 4])
def test_a_signal_in_the_closing_evaluation_loses_nothing(
    tmp_path, text_file, stop, save_steps, monkeypatch, capsys
):
    original, calls = training.held_out_by_document, []

    def evaluate(*arguments, **given):
        calls.append(1)
        if len(calls) == 2:
            raise stop
        return original(*arguments, **given)

    monkeypatch.setattr(training, "held_out_by_document", evaluate)
    code = run(tmp_path, text_file, max_steps=6, save_steps=save_steps, eval_samples=2)
    assert code == (130 if stop is KeyboardInterrupt else 143)
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "the last checkpoint is" in said and "checkpoint-6" in said
    assert whole(tmp_path / "checkpoint-6")
    assert run(tmp_path, text_file, max_steps=6, eval_samples=2, resume_from_checkpoint="auto") == 0
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_signal_while_loading_is_one_sentence(tmp_path, text_file, monkeypatch, capsys):
    def load(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_model_and_tokenizer", load)
    assert run(tmp_path / "run", text_file) == 130
    assert (
        capsys.readouterr().err.strip() == "refine.train: stopped by SIGINT"
        and not (tmp_path / "run").exists()
    )


def test_sigterm_outside_of_the_loop_is_an_exception():
    with pytest.raises(Terminated), training.terminations():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_stops_at_once(tmp_path, text_file, monkeypatch, capsys):
    def twice(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(phases.Phase, "_refine", at_update(4, twice))
    assert run(tmp_path, text_file, max_steps=6) == 143
    assert "stopped by SIGTERM; the last checkpoint is" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoints(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("reward 'x:y' returned NaN"), 1),
        (OSError(5, "Input/output error"), 2),
        (MemoryError("4 GB"), 1),
    ],
)
def test_an_error_amid_a_run_saves_the_last_whole_update(
    tmp_path, text_file, error, code, monkeypatch, capsys
):
    def fail(*_):
        raise error

    monkeypatch.setattr(phases.Phase, "_refine", at_update(4, fail))
    assert run(tmp_path, text_file, max_steps=6, save_steps=50) == code
    said = capsys.readouterr().err
    assert "checkpoint-3" in said.splitlines()[-1] and "Traceback" not in said
    assert whole(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    assert run(tmp_path, text_file, max_steps=6, save_steps=50, resume_from_checkpoint="auto") == 0
    assert run(tmp_path / "straight", text_file, max_steps=6, save_steps=50) == 0
    ours, straight = weights(tmp_path / "final"), weights(tmp_path / "straight" / "final")
    assert all(torch.equal(value, straight[name]) for name, value in ours.items()), "bit for bit"


def test_an_unknown_error_is_told_in_full_after_the_save(tmp_path, text_file, monkeypatch):
    def fail(*_):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(phases.Phase, "_refine", at_update(4, fail))
    with pytest.raises(TypeError, match="a fault of ours"):
        run(tmp_path, text_file, max_steps=6, save_steps=50)
    assert whole(tmp_path / "checkpoint-3")


def test_data_that_goes_away_is_one_sentence_after_the_save(tmp_path, monkeypatch, capsys):
    data = write_text(tmp_path / "text.jsonl")
    monkeypatch.setattr(phases.Phase, "_refine", at_update(3, lambda *_: data.unlink(missing_ok=True)))
    assert run(tmp_path / "run", data, max_steps=40, save_steps=50) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "text.jsonl" in said[0] and "the last checkpoint is" in said[0]
    (saved,) = checkpoints(tmp_path / "run")
    assert whole(tmp_path / "run" / saved)


# --- What is not worth a run


def test_samples_that_cannot_be_written_warn_once(tmp_path, text_file, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "write_samples", full)
    assert run(tmp_path, text_file, sample_steps=1) == 0
    said = capsys.readouterr().err
    assert said.count("samples: not written (the disk is full); the run goes on") == 1


def test_metrics_wait_for_room_on_the_disk(tmp_path, capsys):
    tracker = Tracker(tmp_path, [], None, {}, 0)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    file, tracker._file = tracker._file, Full()
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 2.0})
    assert capsys.readouterr().err.count("the disk is full") == 1 and steps(tmp_path) == []
    tracker._file = file
    tracker.log(3, {"loss": 3.0})
    tracker.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_pictures_and_clocks_do_not_end_a_run(tmp_path, text_file, monkeypatch, capsys):
    def draw(folder):
        raise ValueError("'module://nowhere' is not a valid value for backend")

    monkeypatch.setattr(training, "draw_plots", draw)
    monkeypatch.setattr(training.time, "perf_counter", lambda: 7.0)
    assert run(tmp_path, text_file, max_steps=1) == 0
    assert "no pictures: ValueError" in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["tokens_per_second"] > 0


def test_a_notebooks_backend_is_not_asked_for(monkeypatch):
    pytest.importorskip("matplotlib")
    from refine.pictures import import_pyplot

    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    assert import_pyplot().get_backend().lower() == "agg"
    assert os.environ["MPLBACKEND"] == "module://no_such_backend"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(27, "File too large"), None]
)
def test_a_full_disk_says_so_and_what_was_written_before(tmp_path, text_file, error, monkeypatch, capsys):
    from transformers import PreTrainedModel

    error = error or SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    save, calls = PreTrainedModel.save_pretrained, []

    def full(model, folder, **given):
        calls.append(1)
        if len(calls) > 1:
            raise error
        save(model, folder, **given)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert run(tmp_path, text_file) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("a file may not grow" if error.args[0] == 27 else "the disk is full") in said
    assert "written before: checkpoint-2" in said
    assert checkpoints(tmp_path) == ["checkpoint-2"] and whole(tmp_path / "checkpoint-2")


# --- No checkpoint of a broken model


def _spoil(model, *_):
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")


def test_a_model_with_nan_is_never_saved_and_pushes_no_checkpoint_out(
    tmp_path, text_file, monkeypatch, capsys
):
    monkeypatch.setattr(phases.Phase, "_refine", at_update(4, _spoil))
    assert run(tmp_path, text_file, max_steps=20, save_steps=2, save_total_limit=1) == 1
    said = capsys.readouterr().err
    assert "is not finite" in said and "it is not saved" in said and "checkpoint-2" in said
    assert checkpoints(tmp_path) == ["checkpoint-2"] and whole(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    assert run(tmp_path, text_file, max_steps=4, resume_from_checkpoint="auto") == 0


@pytest.mark.parametrize("changes", [{"learning_rate": 1e30, "max_grad_norm": 1}, {"weight_decay": 1e38}])
def test_rates_that_ruin_the_model_end_the_run_with_a_reason(tmp_path, text_file, changes, capsys):
    """The weights stay finite, numbers near the largest; every later update is skipped."""
    assert run(tmp_path, text_file, max_steps=30, save_steps=1, **changes) == 1
    assert "too large?" in capsys.readouterr().err
    assert not (tmp_path / "final").exists()


def test_an_update_that_ruins_the_model_pushes_no_good_checkpoint_out(
    tmp_path, text_file, monkeypatch, capsys
):
    """Finite weights, but nothing finite comes of them: known with the next update only."""

    def ruin(model, *_):
        with torch.no_grad():
            model.lm_head.weight.fill_(3e38)

    monkeypatch.setattr(phases.Phase, "_refine", at_update(4, ruin))
    assert run(tmp_path, text_file, max_steps=20, save_steps=1, save_total_limit=1) == 1
    assert "checkpoint-3" in checkpoints(tmp_path) and whole(tmp_path / "checkpoint-3")
    assert "checkpoint-3" in capsys.readouterr().err


def test_while_updates_are_skipped_nothing_is_rotated_out(tmp_path, text_file, monkeypatch, capsys):
    original = phases.Phase._refine

    def refine(phase, batch, step, *given):
        output = original(phase, batch, step, *given)
        if step >= 4:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(phases.Phase, "_refine", refine)
    assert run(tmp_path, text_file, max_steps=20, save_total_limit=1, max_skipped_updates=5) == 1
    assert "5 updates in a row had a non-finite loss" in capsys.readouterr().err
    assert checkpoints(tmp_path) == [f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)]
    assert all(whole(tmp_path / name) for name in checkpoints(tmp_path))


def test_a_rotation_that_a_kill_came_before_is_made_by_the_next_run(tmp_path, text_file, monkeypatch):
    settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2}
    with monkeypatch.context() as change:
        change.setattr(run_folder.RunFolder, "rotate", lambda *_: None)
        assert run(tmp_path, text_file, **settings) == 0
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert run(tmp_path, text_file, **settings, resume_from_checkpoint="auto") == 0
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_that_was_whole_when_the_kill_came_is_rotated_like_the_others(
    tmp_path, text_file, monkeypatch
):
    class Killed(BaseException):
        pass

    original = checkpoint.save_folder

    def save_and_die(*given, **named):
        original(*given, **named)
        raise Killed

    settings = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "resume_from_checkpoint": "auto"}
    with monkeypatch.context() as change:
        change.setattr(checkpoint, "save_folder", save_and_die)
        with pytest.raises(Killed):
            run(tmp_path, text_file, **settings)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert run(tmp_path, text_file, **settings) == 0
    assert checkpoints(tmp_path) == ["checkpoint-6"]


def test_a_model_with_nan_is_told_at_load(finished, text_file, tmp_path, capsys):
    broken = shutil.copytree(finished / "final", tmp_path / "broken")
    spoil_weights(broken)
    changes = {"model_type": None, "config_overrides": None, "model_name_or_path": broken}
    assert run(tmp_path / "run", text_file, **changes) == 2
    assert "the weights are not finite" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert evaluation.main(["--model", str(broken), "--tasks", "copying"]) == 2
    assert "the weights are not finite" in capsys.readouterr().err


# --- Bad rows of every kind


def test_half_an_emoji_costs_one_row(tmp_path, caplog):
    path = write_text(tmp_path / "text.jsonl")
    rows = path.read_text().splitlines()
    rows.insert(3, '{"text": "half an emoji \\ud83d ' + "and more " * 200 + '"}')
    path.write_text("\n".join(rows))
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "run", path, max_steps=12, save_steps=50) == 0
    assert "the tokenizer refuses it" in caplog.text
    pairs = tmp_path / "pairs.jsonl"
    prompt = "The grass is green and the sky is blue. " * 40
    rows = [json.dumps({"prompt": f"{i} {prompt}", "answer": "yes"}) for i in range(6)]
    rows[2] = rows[2].replace('"yes"', '"\\ud83d"')
    pairs.write_text("\n".join(rows))
    caplog.clear()
    assert run(tmp_path / "post", pairs, max_steps=2, phase="post") == 0
    assert "row 3 of" in caplog.text and "the tokenizer refuses it" in caplog.text


def test_invalid_utf8_in_parquet_costs_one_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    from refine.data.document import BadRow
    from refine.data.sources import open_source

    good = [f"text {i}".encode() for i in range(20)]
    good[5] = good[17] = b"broken \xff\xfe"
    column = pyarrow.array(good, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    rows = list(open_source(str(tmp_path / "a.parquet")).rows(0, 0))
    bad = [row.describe() for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 20 and bad == [f"a.parquet, row {i}: column 'text' is not UTF-8" for i in (5, 17)]


# --- Rewards of the user's own


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("pathlib:Path", "called so, it raised TypeError|must return one number per rollout"),
        ("math:pi", "must be a function"),
        ("own_reward:none", "a tensor of shape .3,. for 3; got NoneType"),
        ("own_reward:number", "got float"),
        ("own_reward:listed", "got list"),
        ("own_reward:scalar", r"got a tensor \(\)"),
        ("own_reward:not_finite", "must return finite numbers"),
        ("own_reward:few", "raised TypeError"),
    ],
)
def test_a_reward_that_misbehaves_is_told_before_anything_is_written(
    tmp_path, text_file, reward, message, monkeypatch, capsys
):
    module = types.ModuleType("own_reward")
    module.none = lambda *_: None
    module.number = lambda *_: 1.0
    module.listed = lambda ids, *_: [0.0] * len(ids)
    module.scalar = lambda ids, *_: torch.zeros(())
    module.not_finite = lambda ids, *_: torch.full((len(ids),), float("nan"))
    module.few = lambda ids: torch.zeros(len(ids))
    monkeypatch.setitem(sys.modules, "own_reward", module)
    assert run(tmp_path / "run", text_file, reward=reward) == 2
    import re

    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, said[-1]) and "reward" in said[-1] and said[0].startswith("reward ")
    assert len(said) == 2 and not (tmp_path / "run").exists()


def test_a_reward_that_changes_its_inputs_changes_nothing(tmp_path, text_file, monkeypatch):
    module = types.ModuleType("own_reward")

    def in_place(predicted_ids, true_ids, predicted_hidden, true_hidden):
        reward = (predicted_hidden * true_hidden).sum((1, 2))
        for x in (predicted_ids, true_ids, predicted_hidden, true_hidden):
            x.zero_()
        return reward

    module.in_place = in_place
    monkeypatch.setitem(sys.modules, "own_reward", module)
    assert run(tmp_path, text_file, max_steps=2, reward="own_reward:in_place") == 0


def test_torn_lines_at_the_end_are_no_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    assert tracking.split_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1}], [])


def test_a_signal_with_the_last_update_saves_and_leaves_the_evaluation_for_later(
    tmp_path, text_file, monkeypatch, capsys
):
    monkeypatch.setattr(phases.Phase, "_refine", at_update(6, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    small = {"max_steps": 6, "save_steps": 0, "eval_samples": 2, "gradient_accumulation_steps": 1}
    assert run(tmp_path, text_file, **small) == 0
    assert "stopped by SIGTERM after update 6" in capsys.readouterr().out
    assert whole(tmp_path / "checkpoint-6") and not (tmp_path / "final").exists()
    monkeypatch.undo()
    assert run(tmp_path, text_file, **small, resume_from_checkpoint="auto") == 0
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 6]
