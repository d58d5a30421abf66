"""Fixtures that every test may use, and the two settings that keep results equal from run to run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the public implementations; tests that need them are skipped where they are not."""
    root = Path(__file__).resolve().parents[1]
    for folder in (
        Path(os.environ.get("REFINE_GOLDEN_DIR", "")),
        root / "shared" / "golden",
        root.parent / "shared" / "golden",
    ):
        if str(folder) != "." and folder.is_dir():
            return folder
    pytest.skip("no golden numbers here: set REFINE_GOLDEN_DIR to their folder")
