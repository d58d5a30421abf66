"""Fixtures of the tests that run a training."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import refine.train as training
from refine.paper import stages
from tests.refine.runs import write_text


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A file of documents of a few hundred tokens each, which no test changes."""
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl")


@pytest.fixture(scope="module")
def one_thread():
    """For runs compared bit for bit: on several threads the same products may differ in their last place."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Runs draw nothing, which takes longer than a small run."""
    monkeypatch.setattr(training, "draw_plots", lambda folder: [])


class InThisProcess:
    """Runs a stage's command here: starting a process takes longer than what it does."""

    def __init__(self, command, stdout, stderr):
        self.code = None
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
            self.code = importlib.import_module(command[2]).main(command[3:])

    def wait(self) -> int:
        return self.code


@pytest.fixture
def stages_in_this_process(monkeypatch):
    """Stages of ``refine.reproduce`` without the seconds that a process takes to start."""
    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(Popen=InThisProcess, STDOUT=None))
