"""``make test-faults``: random kills, placed faults, random edits of settings. Longer than the suite; the last
figures stand in docs/reliability.md.

``REFINE_FAULTS=0.1`` takes a tenth of everything.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from refine.prepare import packaged_model
from tests.faults import children
from tests.refine.runs import arguments, write_text
from tests.refine.test_reliability import check_one

pytestmark = pytest.mark.slow
SHARE = float(os.environ.get("REFINE_FAULTS", "1"))
FIGURES: dict[str, str] = {}

TRAIN = {"max_steps": 12, "save_steps": 3, "save_total_limit": 2, "sample_steps": 4, "eval_samples": 2}
VARIANTS = [
    {},
    {"phase": "sft"},
    {"num_mini_batches": 3},
    {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"},
    {"save_steps": 0},
    {"segment_length": 64},
    {"eval_steps": 3, "save_total_limit": 1},
    {
        "model_type": "gated_deltanet",
        "config_overrides": "hidden_size=16,num_hidden_layers=1,num_heads=1,head_dim=16",
    },
]
EVALS = [
    ["--tasks", "niah_single_1", "--lengths", "400", "--samples", "8", "--batch_size", "2"],
    ["--tasks", "niah_single_1", "--lengths", "400", "--samples", "6", "--ttt", "sft", "--ttt_batch_size", "2",
     "--learning_rate", "1e-3"],
]  # fmt: skip
KILLS = 5  # of each run


@pytest.fixture(scope="module", autouse=True)
def _figures():
    yield
    print("\n" + "\n".join(f"{what}: {figure}" for what, figure in FIGURES.items()))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl")


def of(count: int) -> int:
    """The share of a number that this call takes."""
    return max(1, round(count * SHARE))


def command(folder: Path, data: Path, **changes) -> list[str]:
    return arguments(folder, data, **TRAIN | changes, resume_from_checkpoint="auto")


def test_random_kills_of_training(tmp_path, text_file):
    """28 runs killed 5 times each at random moments, begun again by the same command: the run of nobody's kill."""
    landed, log = 0, tmp_path / "log"
    runs = of(28)
    straight: dict[int, float] = {}
    for number in range(runs):
        variant = number % len(VARIANTS)
        if variant not in straight:
            first = tmp_path / f"straight-{variant}"
            straight[variant] = children.run_to_its_end(
                "train", command(first, text_file, **VARIANTS[variant]), log
            )
        folder, draw = tmp_path / f"run-{number}", random.Random(number)
        again = command(folder, text_file, **VARIANTS[variant])
        landed += children.run_with_kills("train", again, log, KILLS, straight[variant], draw)
        children.check_same_run(folder, tmp_path / f"straight-{variant}")
        shutil.rmtree(folder)
    FIGURES["kill -9 of training"] = (
        f"{landed} kills in {runs} runs, all bit-identical in weights and metrics"
    )


def test_random_kills_of_evaluation(tmp_path):
    landed, log = 0, tmp_path / "log"
    runs = of(10)
    for number in range(runs):
        tasks, draw = EVALS[number % len(EVALS)], random.Random(number)
        straight = tmp_path / f"straight-{number % len(EVALS)}"
        seconds = children.run_to_its_end("eval", [*tasks, "--resume", "--output_dir", str(straight)], log)
        folder = tmp_path / f"eval-{number}"
        again = [*tasks, "--resume", "--output_dir", str(folder)]
        landed += children.run_with_kills("eval", again, log, KILLS, seconds, draw)
        children.check_same_evaluation(folder, straight)
    FIGURES["kill -9 of evaluation"] = f"{landed} kills in {runs} runs, all predictions and scores equal"


def test_random_kills_of_reproduce(tmp_path):
    """A row of two stages; kill -9 goes to the whole process group."""
    row = tmp_path / "row.yaml"
    row.write_text(
        "table: t\nrow: r\nfamily: delta_net\nstages:\n"
        "  mid: {train: {dataset_name_or_path: default, max_length: 256, max_steps: 4, save_steps: 1,\n"
        "    eval_samples: 0}}\n"
        "  test: {eval: {tasks: [niah_single_1], lengths: [400], samples: 2}}\n"
    )
    (tmp_path / "published.yaml").write_text("tables: {t: {title: T, columns: {S: [niah_single_1]}}}")
    log, landed, runs = tmp_path / "log", 0, of(2)

    def again(folder: Path) -> list[str]:
        return [str(row), "--model", str(packaged_model()), "--output_dir", str(folder)]

    seconds = children.run_to_its_end("reproduce", again(tmp_path / "straight"), log)
    for number in range(runs):
        folder = tmp_path / f"reproduce-{number}"
        landed += children.run_with_kills(
            "reproduce", again(folder), log, KILLS, seconds, random.Random(number)
        )
        found = (folder / "tables.json").read_text().replace(str(folder), str(tmp_path / "straight"))
        assert found == (tmp_path / "straight" / "tables.json").read_text()
    FIGURES["kill -9 of reproduce"] = f"{landed} kills in {runs} runs, all tables equal"


PLACES = [
    "pathlib:Path.rename",
    "pathlib:Path.replace",
    "pathlib:Path.unlink",
    "os:fsync",
    "torch:save",
    "transformers:PreTrainedModel.save_pretrained",
    "refine.training.tracking:Tracker.log",
    "refine.training.checkpoint:remove_folder",
    "refine.training.checkpoint:_write_checksums",
    "refine.training.run_folder:RunFolder._write_mark",
    "refine.train:held_out_by_document",
    "refine.train:write_samples",
    "refine.train:draw_plots",
    "refine.train:load_model_and_tokenizer",
    "refine.training.phases:refine_step",
]


def test_signals_at_every_place(tmp_path, text_file):
    """SIGKILL, SIGTERM and Ctrl-C before a certain call; then the same command again."""
    log, straight, tried = tmp_path / "log", tmp_path / "straight", 0
    children.run_to_its_end("train", command(straight, text_file), log)
    cases = [
        (place, call, number)
        for place in PLACES
        for call in (1, 2, 5)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    ]
    for place, call, number in random.Random(0).sample(cases, of(len(cases))):
        folder = tmp_path / "run"
        change = children.at_call(place, call, children.send(number))
        code = children.wait(children.start("train", command(folder, text_file), log, change))
        assert code in (0, 130, 143, -signal.SIGKILL), (
            f"{place} {call} {number!r}: {code} {log.read_text()[-2000:]}"
        )
        children.run_to_its_end("train", command(folder, text_file), log)
        children.check_same_run(folder, straight)
        assert len(list(folder.glob("checkpoint-*"))) <= 2
        shutil.rmtree(folder)
        tried += 1
    FIGURES["signals at a certain call"] = (
        f"{tried} cases at {len(PLACES)} places, all ended as the straight run"
    )


GARBAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "a bit": lambda data: (
        data[: len(data) // 3] + bytes([data[len(data) // 3] ^ 16]) + data[len(data) // 3 + 1 :]
    ),
    "text": lambda data: b"not what it was",
}


def test_garbage_in_every_file_of_a_checkpoint(tmp_path, text_file):
    log, straight, tried = tmp_path / "log", tmp_path / "straight", 0
    children.run_to_its_end("train", command(straight, text_file), log)
    names = sorted(path.name for path in (straight / "checkpoint-12").iterdir())
    cases = [(name, how) for name in names for how in GARBAGE]
    for name, how in random.Random(0).sample(cases, of(len(cases))):
        folder = shutil.copytree(straight, tmp_path / "run")
        path = folder / "checkpoint-12" / name
        path.write_bytes(GARBAGE[how](path.read_bytes()))
        log.write_text("")
        children.run_to_its_end("train", command(folder, text_file), log)
        assert "passing over a broken checkpoint" in log.read_text(), f"{name}: {how} was not noticed"
        children.check_same_run(folder, straight)
        shutil.rmtree(folder)
        tried += 1
    FIGURES["garbage in a file of the newest checkpoint"] = (
        f"{tried} cases, all noticed, all ended as the straight run"
    )


def test_full_disks(tmp_path, text_file):
    """Files that may grow to a certain size: the run ends with a sentence, and goes on where there is room."""
    log, straight, tried = tmp_path / "log", tmp_path / "straight", 0
    children.run_to_its_end("train", command(straight, text_file), log)
    largest = max(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    sizes = [10, 1000, 3000, 20_000, 100_000, 300_000, largest // 2, largest - 1, largest + 1]
    for size in sizes[: max(1, round(len(sizes) * SHARE))]:
        folder = tmp_path / "run"
        log.write_text("")
        code = children.wait(
            children.start("train", command(folder, text_file), log, children.files_up_to(size))
        )
        assert code in (0, 2, 70), f"{size}: {code} {log.read_text()[-2000:]}"
        children.run_to_its_end("train", command(folder, text_file), log)
        children.check_same_run(folder, straight)
        shutil.rmtree(folder)
        tried += 1
    FIGURES["files that may not grow"] = f"{tried} sizes, all ended as the straight run"


def test_two_processes_at_once(tmp_path, text_file):
    log, straight = tmp_path / "log", tmp_path / "straight"
    children.run_to_its_end("train", command(straight, text_file), log)
    pairs = of(6)
    for _ in range(pairs):
        folder = tmp_path / "run"
        both = [children.start("train", command(folder, text_file), tmp_path / f"log-{i}") for i in range(2)]
        codes = sorted(map(children.wait, both))
        assert codes == [0, 2], codes
        children.check_same_run(folder, straight)
        shutil.rmtree(folder)
    FIGURES["two processes in one folder"] = f"{pairs} pairs, one ran and one was told, each time"


def test_random_edits_of_settings(tmp_path, text_file):
    count = of(2000)
    results = [check_one(number, tmp_path, text_file) for number in range(count)]
    FIGURES["random edits of settings"] = (
        f"{count}: {results.count(0)} valid runs, {results.count(2)} clear errors, {results.count(1)} stopped runs"
    )
