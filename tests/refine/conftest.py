"""Fixtures of the tests that run a training."""

from __future__ import annotations

from pathlib import Path

import pytest

import refine.train as training
from tests.refine.runs import write_text


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A file of documents of a few hundred tokens each, which no test changes."""
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl")


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Runs draw nothing, which takes longer than a small run."""
    monkeypatch.setattr(training, "draw_plots", lambda folder: [])
