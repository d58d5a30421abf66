"""``torchrun``: runs of two processes end where one process ends, and go on from one another's checkpoints."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from refine.training import checkpoint
from refine.training.tracking import read_metrics
from tests.numerics import assert_close
from tests.refine.test_train import command_line, run

SHORT = {"max_steps": 4, "learning_rate": 1e-3, "eval_samples": 2, "sample_steps": 2}
SHORT |= {"gradient_accumulation_steps": 1}


def torchrun(output_dir, data, **changes) -> str:
    """A run of two processes; what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    command += ["-m", "tests", "refine.train", *command_line(output_dir, data, **SHORT | changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def check_same(folder, other) -> None:
    """Final weights and the losses on the way agree as far as float32 lets AdamW agree."""
    expected = load_file(other / "final" / "model.safetensors")
    for name, value in load_file(folder / "final" / "model.safetensors").items():
        assert_close(value, expected[name], 1e-4, name)
    losses = [
        [line["loss"] for line in read_metrics(path / "metrics.jsonl") if "loss" in line]
        for path in (folder, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text_file):
    """What one process makes of the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(folder, text_file, **SHORT | {"gradient_accumulation_steps": 2}) == 0
    return folder


def test_fsdp2_ends_where_one_process_ends_and_ddp_goes_on_from_its_shards(tmp_path, alone, text_file):
    sharded, resumed = tmp_path / "fsdp2", tmp_path / "ddp"
    torchrun(sharded, text_file, parallel="fsdp2")
    check_same(sharded, alone)
    first = sharded / "checkpoint-2"
    assert {p.name for p in first.glob("optimizer-*")} == {"optimizer-0-of-2.pt", "optimizer-1-of-2.pt"}
    state = checkpoint.load_training_state(first)
    assert "optimizer" not in state and state["counters"]["step"] == 2
    said = torchrun(resumed, text_file, parallel="ddp", resume_from_checkpoint=first)
    assert said.count("going on from") == 1, "rank 0 alone logs"
    expected = load_file(sharded / "final" / "model.safetensors")
    for name, value in load_file(resumed / "final" / "model.safetensors").items():
        assert_close(value, expected[name], 1e-5, name)


@pytest.mark.slow
def test_ddp_ends_where_one_process_ends_and_fsdp2_goes_on_from_it(tmp_path, alone, text_file):
    torchrun(tmp_path / "ddp", text_file, parallel="ddp")
    check_same(tmp_path / "ddp", alone)
    torchrun(tmp_path / "on", text_file, parallel="fsdp2", resume_from_checkpoint=alone / "checkpoint-2")
    expected = load_file(alone / "final" / "model.safetensors")
    for name, value in load_file(tmp_path / "on" / "final" / "model.safetensors").items():
        assert_close(value, expected[name], 1e-4, name)


@pytest.mark.slow
def test_one_process_goes_on_from_shards(tmp_path, alone, text_file):
    torchrun(tmp_path / "fsdp2", text_file, parallel="fsdp2", gradient_checkpointing=True)
    resumed = {
        "gradient_accumulation_steps": 2,
        "resume_from_checkpoint": tmp_path / "fsdp2" / "checkpoint-2",
    }
    assert run(tmp_path / "one", text_file, **SHORT | resumed) == 0
    expected = load_file(alone / "final" / "model.safetensors")
    for name, value in load_file(tmp_path / "one" / "final" / "model.safetensors").items():
        assert_close(value, expected[name], 1e-4, name)


@pytest.mark.slow
def test_processes_that_share_documents_end_where_one_process_ends(tmp_path, alone, text_file):
    changes = {"parallel": "context", "segment_length": 64, "gradient_accumulation_steps": 2}
    torchrun(tmp_path / "context", text_file, **changes)
    check_same(tmp_path / "context", alone)


@pytest.mark.parametrize("phase", ["mid", "sft"])
def test_a_run_by_segments_is_the_run(tmp_path, text_file, phase):
    for name, length in (("whole", None), ("segments", 64)):
        assert run(tmp_path / name, text_file, phase=phase, segment_length=length, **SHORT) == 0
    check_same(tmp_path / "segments", tmp_path / "whole")


def test_a_lost_shard_or_torn_weights_are_passed_over(tmp_path, text_file, capsys):
    assert run(tmp_path, text_file, max_steps=4) == 0
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(tmp_path, text_file, max_steps=5, resume_from_checkpoint="auto") == 0
    printed = capsys.readouterr().out
    assert "passing over a broken checkpoint" in printed and "after update 2" in printed
    state_path = tmp_path / "checkpoint-5" / checkpoint.TRAINING_STATE
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        torch.save({key: value for key, value in state.items() if key != "optimizer"}, state_path)
        with pytest.raises(checkpoint.CheckpointError, match="since it was written"):
            checkpoint.load_training_state(tmp_path / "checkpoint-5")
        (tmp_path / "checkpoint-5" / checkpoint.CHECKSUMS).unlink()
        with pytest.raises(checkpoint.CheckpointError, match="holds no optimizer state"):
            checkpoint.load_training_state(tmp_path / "checkpoint-5")
