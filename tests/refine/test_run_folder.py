"""A run's folder: only what a run wrote is ever removed, one process owns it, and going on is always possible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from refine.files import LOCK, FolderInUse, owned
from refine.training import checkpoint
from refine.training.run_folder import MARK, RunFolder
from tests.refine.runs import arguments, checkpoints, run, same_weights, steps

FOREIGN = ("checkpoint-old", "checkpoint-thesis-2019", "final", "samples", "tensorboard", "my.partial")


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file, one_thread):
    """A run of 8 updates with all its checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder, text_file, max_steps=8) == 0
    assert checkpoints(folder) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def everything(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }


# --- Only what is ours is ever deleted


def test_overwriting_a_folder_without_our_mark_is_refused(tmp_path, text_file, capsys):
    for name in FOREIGN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").touch()
    for name in ("config.yaml", "metrics.jsonl", "loss.png"):
        (tmp_path / name).write_text("mine")
    before = everything(tmp_path)
    assert run(tmp_path, text_file, max_steps=1, overwrite_output_dir=True) == 2
    said = capsys.readouterr().err
    assert f"holds config.yaml, final, loss.png, metrics.jsonl, but no {MARK}" in said
    assert everything(tmp_path) == before


def test_overwriting_a_run_leaves_what_a_run_does_not_write(copy, text_file):
    """The attack on a folder that does carry the mark."""
    for name in FOREIGN:
        (copy / name).mkdir(exist_ok=True)
        (copy / name / "precious.txt").touch()
    (copy / "final" / "precious.txt").unlink()  # a model's folder with foreign files: see the next test
    (copy / "checkpoint-4" / "precious.txt").touch()
    (copy / "notes.txt").write_text("mine")
    (copy / "checkpoint-3").write_text("a file")
    outside = copy.parent / "outside"
    shutil.copytree(copy / "checkpoint-2", outside)
    (copy / "checkpoint-99").symlink_to(outside)
    assert run(copy, text_file, max_steps=1, save_steps=0, overwrite_output_dir=True) == 0
    left = {name for name in FOREIGN if name != "final" and (copy / name / "precious.txt").is_file()}
    assert left == set(FOREIGN) - {"final"}
    assert (copy / "notes.txt").read_text() == "mine" and (copy / "checkpoint-3").read_text() == "a file"
    assert (copy / "checkpoint-99").is_symlink() and (outside / "model.safetensors").is_file()
    assert list(copy.glob("checkpoint-4*/precious.txt")), "a foreign file in a checkpoint of ours stays"
    assert not (copy / "checkpoint-2").exists() and (copy / "checkpoint-1").is_dir()
    assert steps(copy) == [1]


@pytest.mark.parametrize("kind", ["link", "file", "foreign"])
def test_a_final_that_cannot_be_replaced_is_told_before_training(copy, text_file, kind, capsys):
    shutil.rmtree(copy / "final")
    if kind == "link":
        (copy / "final").symlink_to(copy.parent)
    elif kind == "file":
        (copy / "final").write_text("mine")
    else:
        (copy / "final").mkdir()
        (copy / "final" / "precious.txt").touch()
    before = everything(copy)
    assert run(copy, text_file, max_steps=9, resume_from_checkpoint="auto") == 2
    assert "final" in capsys.readouterr().err
    assert everything(copy) == before


def test_a_plain_resumption_leaves_foreign_partial_folders(copy, text_file):
    (copy / "download.partial").mkdir()
    (copy / "download.partial" / "precious.txt").touch()
    (copy / "checkpoint-10.partial").mkdir()
    (copy / "checkpoint-10.partial" / "model.safetensors").touch()
    assert run(copy, text_file, max_steps=9, resume_from_checkpoint="auto") == 0
    assert (copy / "download.partial" / "precious.txt").exists()
    assert not (copy / "checkpoint-10.partial").exists()


# --- Rotation


def test_going_back_moves_later_checkpoints_aside(copy, text_file, capsys):
    """Neither the checkpoint resumed from nor the one just written is rotated out."""
    named = copy / "checkpoint-2"
    assert run(copy, text_file, max_steps=8, resume_from_checkpoint=named, save_total_limit=2) == 0
    assert "later checkpoints are moved to" in capsys.readouterr().out
    assert checkpoints(copy) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    aside = copy / "aside-1"
    assert checkpoints(aside) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert same_weights(aside / "final", copy / "final") and steps(aside) == steps(copy) == list(range(1, 9))


def test_a_backup_of_an_older_checkpoint_is_gone_on_from(copy, text_file, tmp_path):
    backup = shutil.copytree(copy / "checkpoint-2", tmp_path / "backup" / "checkpoint-2")
    shutil.rmtree(copy / "checkpoint-2")
    assert run(copy, text_file, max_steps=6, resume_from_checkpoint=backup, save_total_limit=1) == 0
    assert checkpoints(copy) == ["checkpoint-6"] and (backup / "training_state.pt").is_file()


def test_the_limit_counts_what_this_run_wrote(copy, text_file):
    (copy / "checkpoint-999").write_text("a file of that name")
    assert run(copy, text_file, max_steps=12, resume_from_checkpoint="auto", save_total_limit=2) == 0
    assert checkpoints(copy) == ["checkpoint-10", "checkpoint-12", "checkpoint-999"]


# --- auto is idempotent


@pytest.mark.parametrize(
    "written", [(), (MARK,), (MARK, "config.yaml"), (MARK, "config.yaml", "metrics.jsonl")]
)
def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path, finished, text_file, written, capsys
):
    for name in written:
        shutil.copy2(finished / name, tmp_path)
    assert run(tmp_path, text_file, max_steps=2, resume_from_checkpoint="auto") == 0
    assert "starting anew" in capsys.readouterr().out and steps(tmp_path) == [1, 2]


def test_a_run_killed_while_it_wrote_its_mark_starts_again(tmp_path, text_file):
    (tmp_path / f"{MARK}.partial").write_text('{"made_by')
    (tmp_path / LOCK).write_text("process 1 on nowhere")
    assert run(tmp_path, text_file, max_steps=2, resume_from_checkpoint="auto") == 0
    assert steps(tmp_path) == [1, 2] and not (tmp_path / f"{MARK}.partial").exists()


def test_auto_on_a_finished_run_ends_as_it_ended(copy, text_file):
    before = everything(copy)
    assert run(copy, text_file, max_steps=8, resume_from_checkpoint="auto") == 0
    after = everything(copy)
    changed = {name for name in before if after.get(name) != before[name]} | (after.keys() - before.keys())
    assert changed <= {"config.yaml"}, changed


@pytest.mark.parametrize("overwrite", [False, True])
def test_auto_changes_nothing_where_no_checkpoint_can_be_read(copy, text_file, overwrite, capsys):
    for path in copy.glob("checkpoint-*/training_state.pt"):
        path.write_bytes(b"")
    before = everything(copy)
    assert run(copy, text_file, resume_from_checkpoint="auto", overwrite_output_dir=overwrite) == 2
    assert "none of 4 checkpoints can be read" in capsys.readouterr().err
    assert everything(copy) == before


# --- One owner


def test_a_second_process_is_told_the_first(copy, text_file):
    with owned(copy):
        command = [sys.executable, "-m", "refine.train"]
        command += arguments(copy, text_file, resume_from_checkpoint="auto")
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"is in use by process {os.getpid()} on " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_lock_goes_with_its_owner(tmp_path):
    with owned(tmp_path), pytest.raises(FolderInUse, match="in use by process"), owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_a_folder_made_meanwhile_is_left_alone(tmp_path):
    """Two runs that found nothing there: the second to come is refused under the lock."""
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.look("none", False) is None and second.look("none", False) is None
    first.begin(None, 0, False)
    with pytest.raises(ValueError, match="in use by process"):
        second.begin(None, 0, False)
    first.close()
    with pytest.raises(ValueError, match="was made in it meanwhile"):
        second.begin(None, 0, False)


# --- What a crash leaves amid a replacement


def test_a_checkpoint_amid_its_replacement_comes_back(copy):
    (copy / "final").rename(copy / "final.old.partial")
    shutil.copytree(copy / "checkpoint-8", copy / "final.partial")
    checkpoint.clear_partial(copy)
    assert (copy / "final" / "model.safetensors").is_file() and not list(copy.glob("*.partial"))


def test_a_mark_that_cannot_be_read_is_made_anew(copy, text_file):
    (copy / MARK).write_text("garbage")
    assert run(copy, text_file, max_steps=9, resume_from_checkpoint="auto") == 0
    assert json.loads((copy / MARK).read_text())["checkpoints"][-1] == "checkpoint-9"
