"""Commands of this package in processes that are cheap to start and may be killed at any moment.

A child is forked from a process that has imported everything, so that hundreds of them take minutes. What it prints
goes to a file.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import refine.eval
import refine.reproduce
import refine.train
from refine.pictures import import_pyplot
from refine.prepare import load_model_and_tokenizer
from refine.shared_settings import ModelSettings
from refine.training.tracking import read_metrics
from tests.refine.runs import same_weights

with contextlib.suppress(ImportError):  # so that no child has to
    import_pyplot()
load_model_and_tokenizer(ModelSettings())

MAINS = {"train": refine.train.main, "eval": refine.eval.main, "reproduce": refine.reproduce.main}
TIMES = ("tokens_per_second", "train_seconds")


def start(kind: str, command: list[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """Fork a process that runs a command; its id. ``before`` is called in it first."""
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # the child did it first, or has ended
            os.setpgid(process, process)  # so that a kill that comes at once finds the group
        return process
    code = 70
    try:
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)
        if before is not None:
            before()
        code = MAINS[kind](command)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a child; of one that a signal ended, its number below zero."""
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def run_to_its_end(kind: str, command: list[str], log: Path) -> float:
    """Run a command undisturbed; how long it took."""
    began = time.perf_counter()
    code = wait(start(kind, command, log))
    assert code == 0, log.read_text()[-2000:]
    return time.perf_counter() - began


def run_with_kills(
    kind: str, command: list[str], log: Path, kills: int, seconds: float, draw: random.Random
) -> int:
    """Run a command, killed so often with kill -9 at random moments and started again as it was; how many
    kills came before its end."""
    landed = 0
    for _ in range(4 * kills):
        if landed == kills:
            break
        process = start(kind, command, log)
        time.sleep(draw.random() * 0.7 * seconds)
        done, status = os.waitpid(process, os.WNOHANG)
        if done:  # its end came first
            assert os.waitstatus_to_exitcode(status) == 0, log.read_text()[-2000:]
            continue
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        landed += 1
    run_to_its_end(kind, command, log)
    return landed


def at_call(place: str, number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A change to a process: ``act`` comes before call ``number`` (from 1) of a function, by its dotted name."""

    def change() -> None:
        module, _, path = place.partition(":")
        owner = importlib.import_module(module)
        *inside, name = path.split(".")
        for part in inside:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), []

        def counted(*arguments, **given):
            calls.append(1)
            if len(calls) == number:
                act()
            return original(*arguments, **given)

        setattr(owner, name, counted)

    return change


def send(number: int) -> Callable[[], None]:
    """A signal to oneself."""
    return lambda: os.kill(os.getpid(), number)


def files_up_to(size: int) -> Callable[[], None]:
    """Files of at most so many bytes: what a full disk looks like without one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def check_same_run(folder: Path, straight: Path) -> None:
    """Weights bit for bit, every line of metrics but times, nothing half made."""
    assert same_weights(folder / "final", straight / "final"), "the weights differ"
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path / "metrics.jsonl")]
        for path in (folder, straight)
    ]
    assert lines[0] == lines[1], "metrics.jsonl differs"
    assert not list(folder.glob("*.partial")) and not (folder / "metrics.jsonl.broken").exists()


def check_same_evaluation(folder: Path, straight: Path) -> None:
    """Predictions and scores."""
    names = ("predictions.jsonl", "results.json")
    ours, theirs = ([(path / name).read_text() for name in names] for path in (folder, straight))
    assert ours[0] == theirs[0], "the predictions differ"
    found = [json.loads(text) for text in (ours[1], theirs[1])]
    assert found[0]["results"] == found[1]["results"] and found[0]["scores"] == found[1]["scores"]
