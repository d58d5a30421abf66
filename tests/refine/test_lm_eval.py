"""Models of this project in EleutherAI's lm-eval, after ``import refine``: needles without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refine

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[hf,ruler]'")
pytest.importorskip(
    "accelerate", reason="lm-eval's hf models need accelerate: pip install 'lm-eval[hf,ruler]'"
)
pytest.importorskip(
    "wonderwords", reason="lm-eval's needles need wonderwords: pip install 'lm-eval[hf,ruler]'"
)

TINY = Path(refine.__file__).parent / "assets" / "tiny-delta-net"


def test_needles_of_the_tiny_model(tmp_path):
    """Every sample is answered and scored; the tiny model finds no needle, so the score only has to be one."""
    code = "import refine, lm_eval.__main__ as command; command.cli_evaluate()"
    arguments = [
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={TINY},dtype=float32",
        "--device",
        "cpu",
    ]
    arguments += ["--tasks", "niah_single_1", "--limit", "2", "--batch_size", "2"]
    arguments += ["--metadata", json.dumps({"max_seq_lengths": [1024], "tokenizer": str(TINY)})]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--output_path", str(tmp_path / "out")],
        env=os.environ | offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert 0 <= results["results"]["niah_single_1"]["1024,none"] <= 1
    assert results["n-samples"]["niah_single_1"]["effective"] == 2
