"""The scripts in ``examples/`` do what they say, each in a few steps."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f_{i}(x, y):\n    return x * {i} + y\n\n" for i in range(120)))
    return path


def test_every_example_is_short_and_tested():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == ["close_brackets", "kernels_in_a_loop", "own_text", "trainer_lora", "trl_grpo"]
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80 for name in names)


def test_own_text(text, tmp_path, capsys):
    example, folder = load("own_text"), tmp_path / "saved"
    example.main([str(text), "--steps", "1", "--length", "160", "--batch", "1", "--output_dir", str(folder)])
    told = capsys.readouterr().out
    assert "step 1: next-token loss" in told and "the model" in told
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="give a longer text"):
        example.main([str(text), "--length", "100000"])


def test_close_brackets(tmp_path):
    example = load("close_brackets")
    prompts = ["x = (a, [b", "{key", "f = ((a, [b"]
    assert example.closed(prompts, ["])", "x, }", "]) + 1}"]) == [1.0, 1.0, 2 / 3]
    assert example.closed(prompts, [")]", "(})", "a"]) == [0.0, 0.0, 0.0]
    assert example.main(["--output_dir", str(tmp_path / "run"), "--max_steps", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["eval_reward"] for line in lines if "eval_reward" in line]
    assert len(rewards) == 2 and all(0 <= reward <= 1 for reward in rewards)


def test_kernels_in_a_loop():
    assert load("kernels_in_a_loop").main(steps=80, half=12) > 0.3


def test_trainer_lora(text, tmp_path, capsys):
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    arguments = [str(text), "--output_dir", str(folder), "--max_steps", "2", "--length", "160"]
    trainer = load("trainer_lora").main(arguments)
    before, after = map(float, re.findall(r"(\d+\.\d+) -> (\d+\.\d+)", capsys.readouterr().out)[0])
    assert after < before
    assert {"reward", "entropy"} <= trainer.state.log_history[0].keys()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "truth" in (folder / "samples" / "step-000002.txt").read_text()


def test_trl_grpo(tmp_path):
    pytest.importorskip("trl", exc_type=ImportError)
    trainer = load("trl_grpo").main(["--output_dir", str(tmp_path), "--max_steps", "2"])
    line = trainer.state.log_history[0]
    assert 0 <= line["reward"] <= 1 and torch.isfinite(torch.tensor(line["kl"]))
