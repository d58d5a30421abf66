"""Odd folders, models, environments and files: one sentence that is true, and nothing half made."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

import refine.eval as evaluation
import refine.train as training
from refine.evaluation.predictions import Predictions, PredictionsError
from refine.files import why
from refine.prepare import packaged_model
from refine.settings import SettingsError
from refine.training.parallel import join_world
from tests.refine.runs import run

COPYING = ["--tasks", "copying", "--samples", "2"]


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(packaged_model(), tmp_path / "model")


def one_sentence(capsys) -> str:
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(("refine.train: ", "refine.eval: ")), said
    return said[0]


def train_from(model, text_file, tmp_path) -> int:
    changes = {"model_type": None, "config_overrides": None, "model_name_or_path": model}
    return run(tmp_path / "run", text_file, max_steps=1, **changes)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("a_file", "is a file"),
        ("a_file/run", "a part of the path is a file"),
        ("link_to_nothing", "is a link to nothing"),
        ("x" * 300, "the name is too long"),
    ],
)
def test_places_where_no_run_can_be(tmp_path, text_file, place, message, capsys):
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "link_to_nothing").symlink_to(tmp_path / "nothing")
    assert run(tmp_path / place, text_file, max_steps=1) == 2
    assert message in one_sentence(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_file", "link_to_nothing"]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "x"), OSError(30, "Read-only", "x")]
)
def test_a_folder_that_may_not_be_written_is_told(tmp_path, text_file, error, monkeypatch, capsys):
    def mkdir(*_, **__):
        raise error

    monkeypatch.setattr("refine.training.run_folder.Path.mkdir", mkdir)
    assert run(tmp_path / "run", text_file, max_steps=1) == 2
    monkeypatch.undo()
    assert ("no permission: x" if error.errno == 13 else "the file system is read-only: x") in one_sentence(
        capsys
    )


def test_errors_of_files_in_words():
    assert why(OSError(28, "No space left on device", "a/b")) == "the disk is full: a/b"
    assert why(RuntimeError("Error: I/O error: No space left on device (os error 28)")) == "the disk is full"
    assert "cut short" in why(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 13504 vs 13396")
    )
    assert why(ValueError("first\nsecond")) == "first"


# --- Models


def test_a_model_of_pickled_weights_is_refused(model, text_file, tmp_path, capsys):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert train_from(model, text_file, tmp_path) == 2
    assert "model" in one_sentence(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_torn_configuration_is_not_called_a_missing_model(model, text_file, tmp_path, text, capsys):
    (model / "config.json").write_text(text)
    assert train_from(model, text_file, tmp_path) == 2
    said = one_sentence(capsys)
    assert "config.json" in said and "neither a local folder" not in said


def test_torn_weights_are_one_sentence(model, text_file, tmp_path, capsys):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert train_from(model, text_file, tmp_path) == 2
    assert "model" in one_sentence(capsys)
    assert evaluation.main(["--model", str(model), *COPYING]) == 2
    one_sentence(capsys)


def test_files_that_may_not_be_read_are_told_as_such(model, text_file, tmp_path, monkeypatch, capsys):
    from pathlib import Path

    original = Path.open

    def open_(path, *arguments, **given):
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **given)

    monkeypatch.setattr(Path, "open", open_)
    assert train_from(model, text_file, tmp_path) == 2
    monkeypatch.undo()
    assert "no permission" in one_sentence(capsys)


def test_a_head_too_large_for_the_kernels_is_told_before_anything_is_written(tmp_path, text_file, capsys):
    sizes = "hidden_size=257,num_hidden_layers=1,num_heads=1,intermediate_size=16"
    code = run(tmp_path / "run", text_file, max_steps=1, config_overrides=sizes, eval_samples=1)
    said = one_sentence(capsys)
    assert code == 2 and "256" in said and not (tmp_path / "run").exists(), said


def test_no_code_beside_a_tokenizer_is_run_and_nobody_is_asked(
    model, text_file, tmp_path, monkeypatch, capsys
):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on stdin"))
    code = train_from(model, text_file, tmp_path)
    assert code in (0, 2) and not (tmp_path / "ran").exists()
    if code == 2:
        assert "tokenizer" in one_sentence(capsys)


# --- The environment


@pytest.mark.parametrize("value", ["", "cuda9"])
def test_a_backend_that_there_is_not(tmp_path, text_file, value, monkeypatch, capsys):
    monkeypatch.setenv("REFINE_KERNELS_BACKEND", value)
    assert run(tmp_path / "run", text_file) == 2
    assert "REFINE_KERNELS_BACKEND must be one of triton, torch, reference" in one_sentence(capsys)
    assert evaluation.main(COPYING) == 2
    assert "REFINE_KERNELS_BACKEND" in one_sentence(capsys)


def test_a_world_of_no_number(monkeypatch):
    import torch

    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(
        ValueError, match="the environment variable WORLD_SIZE must be a whole number, it is 'x'"
    ):
        join_world("ddp", torch.device("cpu"))


def test_without_matplotlib_it_says_that_there_is_no_picture(tmp_path, text_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path / "run", text_file, max_steps=2) == 0
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().out


def test_a_reward_of_its_own_is_printed_before_its_import(tmp_path, text_file, capsys):
    assert run(tmp_path / "run", text_file, reward="os:system") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "reward os:system: importing os, code from outside this package"


# --- Evaluations


def test_foreign_results_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    assert evaluation.main([*COPYING, "--output_dir", str(tmp_path)]) == 2
    assert "has a results.json that no evaluation of ours wrote" in one_sentence(capsys)
    assert (tmp_path / "results.json").read_text() == '{"mine": 1}'


def answered(folder, identity, lines: list[str], **given) -> Predictions:
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(identity))
    (folder / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))
    return Predictions(folder, {"a": 1}, resume=True, **given)


WHOLE = dict.fromkeys(("task", "length", "score", "cut", "trained", "prompt_tokens"), 0)
WHOLE |= {"prediction": "", "references": [], "depths": None}


def test_predictions_that_are_none_are_one_sentence(tmp_path):
    with pytest.raises(PredictionsError, match=r"no readable evaluation\.json"):
        answered(tmp_path, [1], [])
    lines = [json.dumps({"key": key} | WHOLE) for key in "abc"]
    with pytest.raises(PredictionsError, match=r"line 2 of .* is broken"):
        answered(tmp_path, {"a": 1}, [lines[0], '{"key": "b"}', *lines[1:]])
    predictions = answered(tmp_path, {"a": 1}, lines)
    with pytest.raises(PredictionsError, match="is in use by process"):
        Predictions(tmp_path, {"a": 1}, resume=True)
    assert list(predictions.lines) == ["a", "b", "c"]

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    file, predictions._file = predictions._file, Full()
    with pytest.raises(
        PredictionsError, match="the disk is full; the answers in it stay, go on with --resume"
    ):
        predictions.add([{"key": "d"} | WHOLE])
    predictions._file = file
    predictions.close()


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (evaluation.Terminated, 143)])
def test_a_stopped_evaluation_says_how_to_go_on(stop, code, monkeypatch, capsys):
    def load(*_):
        raise stop

    monkeypatch.setattr(evaluation, "load_model_and_tokenizer", load)
    assert evaluation.main(COPYING) == code
    assert "go on with --resume" in one_sentence(capsys)


def test_two_words_for_one_setting():
    with pytest.raises(SettingsError, match="model_name_or_path is given twice"):
        from refine.settings import read_mapping
        from refine.training.settings import TrainSettings

        read_mapping(TrainSettings, {"model": "a", "model_name_or_path": "b"})


def test_the_default_job_is_what_help_shows(capsys):
    with pytest.raises(SystemExit):
        training.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 16384; 2048 where no model is named)" in shown
