"""The runs, each in a process of its own: what trains an arm and has it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.reproduce_small.measures import TASKS, autocast, measure
from benchmarks.reproduce_small.plan import (
    ARMS,
    COMMON,
    EQUAL_TIME,
    LENGTH,
    ORDER,
    SELECT,
    TIMING,
    WEIGHED,
    Job,
    selection,
)

ROOT = Path(__file__).resolve().parents[2]


def read(output_dir: Path, job: Job) -> dict | None:
    """What a run measured; None where it is not done."""
    path = job.folder(output_dir) / "measures.json"
    return json.loads(path.read_text()) if path.is_file() else None


def run(options, jobs: list[Job]) -> None:
    """The jobs that have no measures yet, each in a process of one thread, as far as time allows."""
    longest = 0.0

    def start(job: Job) -> None:
        nonlocal longest
        folder = job.folder(options.output_dir)
        if (folder / "measures.json").is_file() or time.time() + longest > options.until:
            return
        command = [
            sys.executable, "-m", "benchmarks.reproduce_small", "--output_dir", str(options.output_dir),
            "--model", str(options.model), "--one", *map(str, job),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        began = time.time()
        with open(folder.with_name(folder.name + ".log"), "w", encoding="utf-8") as out:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{job} ended with {done.returncode}: see {out.name}")
        longest = max(longest, time.time() - began)
        print(f"{job.arm}, seed {job.seed}, {job.steps} updates: {time.time() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, jobs))


def select(options) -> dict[str, float]:
    """The learning rate of each side: that with the fewest nats of the right answers, on separate items."""
    run(options, list(selection(options).values()))
    chosen = chosen_rates(options)["chosen"]
    print(f"learning rates: {chosen}", flush=True)
    return chosen


def chosen_rates(options) -> dict:
    """What the runs that choose the rates measured, and what they choose."""
    rows, nats = [], {}
    found = {key: read(options.output_dir, job) for key, job in selection(options).items()}
    if missing := [key for key, one in found.items() if one is None]:
        raise RuntimeError(
            f"no time was left to choose the learning rates: {missing} not run; raise --minutes"
        )
    for (arm, rate), one in found.items():
        means = {name: float(np.mean(values)) for name, values in one["items"].items()}
        nats[arm, rate] = float(np.mean([means[f"{task}_2x_nats"] for task in TASKS]))
        needles = float(np.mean([means[f"{task}_2x_score"] for task in TASKS]))
        rows.append(
            {"arm": arm, "rate": rate, "nats": nats[arm, rate], "needles": needles, "loss": means["loss"]}
        )
    chosen = {arm: min((key for key in nats if key[0] == arm), key=nats.get)[1] for arm in ("SFT", "REFINE")}
    return {"rows": rows, "chosen": chosen, "minutes": [one["minutes"] for one in found.values()]}


def run_one(output_dir: Path, start: Path, job: Job) -> int:
    """Train one arm from ``start`` and measure it; ``before`` is measured as it is, ``timing`` times all arms'
    updates."""
    from refine.train import train
    from refine.training.settings import TrainSettings

    began, folder, model = time.time(), job.folder(output_dir), start
    about = job._asdict()
    folder.mkdir(parents=True, exist_ok=True)
    if job.arm == TIMING:
        (folder / "measures.json").write_text(json.dumps(about | {"ratios": time_arms(model)}))
        return 0
    arm = job.arm.removeprefix(f"{SELECT} ")
    if job.steps:
        settings = TrainSettings(
            **COMMON | ARMS["SFT" if arm == EQUAL_TIME else arm] | (WEIGHED if job.weighed else {}),
            model_name_or_path=str(start),
            output_dir=str(folder / "run"),
            overwrite_output_dir=True,
            max_steps=job.steps,
            seed=job.seed,
            learning_rate=job.rate,
        )
        model = train(settings)
        about["grad_norm"] = _mean_norm(folder / "run" / "metrics.jsonl")
    about["training_minutes"] = (time.time() - began) / 60
    items = measure(model, output_dir, job.first_seed, separate=arm != job.arm)
    about |= {"items": items, "minutes": (time.time() - began) / 60}
    (folder / "measures.json.partial").write_text(json.dumps(about))
    os.replace(folder / "measures.json.partial", folder / "measures.json")
    return 0


def _mean_norm(path: Path) -> float:
    """Of the gradients of all updates, before they are clipped."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return float(np.mean([row["grad_norm"] for row in rows if "grad_norm" in row]))


def time_arms(path: Path, pairs: int = 7) -> dict[str, float]:
    """Forward, backward and optimizer of an update over SFT's: medians of the ratios of neighbours."""
    from benchmarks.timing import paired_ratio
    from refine.method import RefineConfig, next_token_targets, refine_step
    from refine.models import load_model
    from refine.models.head import NextTokenLoss

    model = load_model(path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch = COMMON["per_device_train_batch_size"]
    ids = torch.randint(len(model.get_input_embeddings().weight), (batch, LENGTH))
    targets = next_token_targets(ids, torch.full((batch,), LENGTH))

    def update(settings: dict) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            if settings.get("phase") == "sft":
                loss = model(ids, use_cache=False, head=NextTokenLoss(*targets, entropy=False)).loss
            else:
                loss = refine_step(model, ids, RefineConfig(**settings), seeds=torch.arange(batch)).loss
        loss.backward()
        optimizer.step()

    limits = {"least": pairs, "most": pairs}
    sft = ARMS["SFT"]
    ratios = {
        arm: paired_ratio(lambda arm=arm: update(ARMS[arm]), lambda: update(sft), **limits).ratio
        for arm in ("REFINE", "REFINE, c = 32")
    }
    for arm in ORDER:  # the others do the same work as one of these
        is_sft = arm == EQUAL_TIME or ARMS[arm].get("phase") == "sft"
        ratios.setdefault(arm, 1.0 if is_sft else ratios["REFINE"])
    return ratios
