"""What a run survives: ten thousand steps, and whatever a configuration says. Kills stand in tests/faults."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import refine.train as training
from refine.training.tracking import read_metrics

SETTINGS = {
    "model_type": "delta_net",
    "config_overrides": {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "intermediate_size": 16},
    "max_length": 200,
    "max_steps": 40,
    "learning_rate": 1e-2,
    "eval_samples": 2,
    "save_steps": 3,
    "sample_steps": 10,
    "shuffle_buffer": 8,
}


def start(config: Path, *arguments: str) -> subprocess.Popen:
    """A run in a process of its own."""
    command = [sys.executable, "-m", "refine.train", "--config", str(config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_in(folder: Path) -> int:
    """The last step of metrics.jsonl."""
    lines = read_metrics(folder / "metrics.jsonl")
    return max((line["step"] for line in lines), default=0)


@pytest.mark.slow
def test_ten_thousand_steps_need_no_more_memory_than_five_hundred(tmp_path, text_file):
    """Resident memory grows by under 2 % after the first 500 steps, and no step is missing."""
    config, folder = tmp_path / "long.yaml", tmp_path / "long"
    settings = SETTINGS | {"dataset_name_or_path": str(text_file), "output_dir": str(folder)}
    settings |= {"max_steps": 10_000, "save_steps": 1000, "sample_steps": 0, "learning_rate": 1e-4}
    config.write_text(yaml.safe_dump(settings))
    process, memory = start(config), {}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            text = status.read_text()
            resident = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))
            memory[steps_in(folder)] = resident / 1024
        time.sleep(2)
    assert process.returncode == 0, process.stdout.read()
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 10_001))
    early = max(mb for step, mb in memory.items() if step <= 600)
    late = [mb for step, mb in memory.items() if 9000 < step < 9990]
    print(f"{early:.0f} MB by step 600, {max(late):.0f} MB after step 9,000")
    assert max(late) < 1.02 * early


# ---- configurations --------------------------------------------------------------------------------------

JUNK = [
    None,
    "",
    "x",
    "none",
    -1,
    0,
    1,
    2,
    3,
    0.5,
    1e9,
    -0.0,
    float("nan"),
    True,
    [],
    ["a"],
    {},
    {"a": 1},
    "é\n",
    "1e-3",
]
SMALL_NUMBERS = {  # where a large number would be a valid, endless run
    "max_steps": [None, "x", -1, 0, 1, 2, 1.5, [], {}],
    "max_length": [None, "x", -1, 0, 100, 160, 200, 300],
    "per_device_train_batch_size": ["x", 0, 1, 2],
    "gradient_accumulation_steps": ["x", 0, 1, 2],
    "num_mini_batches": ["x", 0, 1, 2],
    "num_rollouts": ["x", 0, 1, 2],
    "rollout_length": ["x", 0, 1, 3, 5],
    "eval_samples": ["x", -1, 0, 1],
    "shuffle_buffer": ["x", 0, 1, 8],
    "output_dir": [],
    "dataset_name_or_path": ["", "no/such/file.jsonl", "recall", "/", "x.parquet"],
    "model_type": ["lact", "gated_deltanet", "rnn", "", 3],
    "config_overrides": [  # never without sizes: the published ones would be a valid run of gigabytes
        {"hidden_size": 15, "num_heads": 2},
        {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2},
        {"hidden_size": -3},
        {"num_heads": 0},
        {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 10},
        {"nonsense": 1},
        {"hidden_size": "wide"},
        "hidden_size=16,num_hidden_layers=1,num_heads=1",
        [],
    ],
    "tokenizer_name_or_path": [None, "no/such/tokenizer", ""],
    "model_name_or_path": [None, "no/such/model"],
    "report_to": [None, [], "tensorboard", "nobody"],
    "device": [None, "cpu", "tpu", "cuda:9"],
    "parallel": ["none", "ddp", "x"],
    "resume_from_checkpoint": ["none", "auto", "no/such/folder"],
}


def edited(settings: dict, draw: random.Random) -> tuple[dict, list[str]]:
    """One to three random edits of a valid configuration, in the file or on the command line."""
    import dataclasses

    from refine.training.settings import TrainSettings

    names = [f.name for f in dataclasses.fields(TrainSettings) if f.name not in ("output_dir",)]
    changed, arguments = dict(settings), []
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(names)
        value = draw.choice(SMALL_NUMBERS.get(name, JUNK))
        kind = draw.random()
        if kind < 0.5:
            changed[name] = value
        elif kind < 0.8:
            arguments += [f"--{name}", str(value)] if draw.random() < 0.8 else [f"--{name}={value}"]
        elif kind < 0.9:
            letter = draw.randrange(len(name))
            changed[name[:letter] + draw.choice("abc_") + name[letter + 1 :]] = value
        else:
            changed.pop(draw.choice(sorted(changed.keys() - {"config_overrides", "max_length"})), None)
    changed["output_dir"] = settings["output_dir"]
    if not isinstance(changed.get("max_steps"), int | float) or changed["max_steps"] > 2:
        changed["max_steps"] = settings["max_steps"]
    if "dataset_name_or_path" not in changed:
        changed["dataset_name_or_path"] = settings["dataset_name_or_path"]
    return changed, arguments


def check_one(number: int, tmp_path: Path, text_file: Path) -> int:
    """One fuzzed run: it ends well with a model, or with one sentence and nothing half made."""
    draw = random.Random(number)
    folder, config = tmp_path / f"run-{number}", tmp_path / "run.yaml"
    base = SETTINGS | {
        "max_steps": 1, "eval_samples": 1, "save_steps": 0, "dataset_name_or_path": str(text_file),
        "output_dir": str(folder),
    }  # fmt: skip
    settings, arguments = edited(base, draw)
    config.write_text(yaml.safe_dump(settings))
    command = ["--config", str(config), *arguments]
    said, out = io.StringIO(), io.StringIO()
    about = f"edit {number}: {settings} {arguments}"
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
            status = training.main(command)
    except SystemExit as stop:  # argparse: a setting without its value
        status = stop.code
        assert status == 2, about
    except BaseException as error:
        raise AssertionError(f"{about}: {type(error).__name__}: {error}") from error
    assert "Traceback" not in said.getvalue(), about
    if status == 0:
        assert (folder / "final" / "model.safetensors").is_file(), about
    else:
        sentence = [line for line in said.getvalue().splitlines() if "refine.train: " in line]
        assert len(sentence) == 1, f"{about}: {said.getvalue()!r}"
        whole = not folder.exists() or (folder / "config.yaml").is_file()
        assert status == 1 or (not folder.exists()) or whole, about
        if status == 2:
            assert not folder.exists(), f"{about}: a half-made folder: {sorted(folder.iterdir())}"
    shutil.rmtree(folder, ignore_errors=True)
    return status


def test_a_fuzzed_configuration_runs_or_says_what_is_wrong(tmp_path, text_file):
    assert {check_one(number, tmp_path, text_file) for number in range(40)} >= {0, 2}
