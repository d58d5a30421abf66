"""``python -m benchmarks.reproduce_small``: does REFINE help a small model more than further SFT does?

From the tiny pretrained DeltaNet of this package, which finds needles: SFT and REFINE at equal updates, SFT once
more for as long as REFINE takes, then REFINE with other settings and the pair on text without needles. Arms of one
seed read the same documents in the same order. The learning rate of each side is chosen first, on other documents,
needles and another seed (``--select`` does that alone). Measured are needles at the training length and at two and
four times that, the nats of their answers, recall of several tokens over distance, and held-out loss. Differences
are taken item by item (the same item, the same seed); their 95 % intervals are percentiles of 4,000 resamplings of
items and of seeds. ``SUPPORT`` says what counts as support; it was written before any of these runs.

Runs go on where they were stopped: each writes its measures when it is done, and finished ones are not repeated.
Within ``--minutes`` arms are run in the order of their worth; what was not run is said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 1024  # tokens of a training sequence
ROLLOUT = 5
ARMS = {  # settings of refine.train that an arm adds
    "SFT": {"phase": "sft"},
    "REFINE": {},
    "REFINE, c = 32": {"num_chunks": 32},
    "SFT, 0.8 x rate": {"phase": "sft"},
    "SFT, plain text": {"phase": "sft", "dataset_name_or_path": "default"},
    "REFINE, plain text": {"dataset_name_or_path": "default"},
    "REFINE, uniform positions": {"selection": "uniform"},
    "REFINE, binary reward": {"reward": "binary"},
}
SMALLER_STEPS = "SFT, 0.8 x rate"  # SFT that moves about as little as REFINE does in SFT's direction
EQUAL_TIME = "SFT, REFINE's time"  # more updates of SFT, by the ratio of an update's times
BASES = {"REFINE, plain text": "SFT, plain text"}  # what an arm is compared with, if not SFT
ORDER = (
    "SFT",
    "REFINE",
    EQUAL_TIME,
    SMALLER_STEPS,
    "REFINE, c = 32",
    *list(ARMS)[4:],
)  # which arms come first
TIMING = "timing"  # the job that measures these ratios, before anything else runs
SELECT = "select"  # the folder of the runs that choose the learning rates
RATES = (1e-4, 3e-4, 1e-3)  # to choose from, for each side
SELECT_SEED = 100  # no other run has it
COMMON = {
    "dataset_name_or_path": "default+needles",
    "recall_weight": 0.5,
    "max_length": LENGTH,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "max_grad_norm": 1.0,
    "bf16": True,
    "eval_samples": 0,
    "sample_steps": 0,
    "save_steps": 0,
    "logging_steps": 1,
    "shuffle_buffer": 512,
}
DOCUMENTS = 24  # held out; those after them serve the choice of the learning rate
COPIED = (32, 64, 128)  # tokens between the two readings of random tokens
RETURNS = (256, 1024)  # tokens between a passage of real text and its return
TASKS = ("niah_single_2", "niah_multikey_1")  # one needle in prose, or four, each of which is asked for
NEEDLES = {1: 20, 2: 160, 4: 12}  # length over LENGTH -> samples of each task
SELECT_NEEDLES = {2: 32}
COPIES = 40
MAIN = "needles"  # the measure that the statement below is about
# name of a measure -> (what the table calls it, better is)
MEASURES = {
    MAIN: (f"needles found at {2 * LENGTH}, both tasks", 1),
    **{
        f"{task}_{scale}x_{what}": (f"{task} at {scale * LENGTH}, {label}", sign)
        for task in TASKS
        for scale in NEEDLES
        for what, label, sign in (("score", "found", 1), ("nats", "nats a token of the answer", -1))
    },
    **{f"copy_{d}": (f"random tokens again after {d}", 1) for d in COPIED},
    **{f"copy_five_{d}": (f"- five in a row, after {d}", 1) for d in COPIED},
    **{f"return_{d}": (f"returning passage after {d}", 1) for d in RETURNS},
    **{f"return_five_{d}": (f"- five in a row, after {d}", 1) for d in RETURNS},
    "loss": (f"held-out loss to {LENGTH}, nats", -1),
    "loss_2x": (f"held-out loss from {LENGTH} to {2 * LENGTH}, nats", -1),
}  # fmt: skip
SUPPORT = """The claim under test: beside the next-token loss, next-sequence prediction makes a fast-weight
model use a long context better than the same training without it. The main comparison is REFINE (c = 8, cosine
reward, positions by entropy) minus SFT at equal updates, five seeds, on text of which half is generated
documents of needles; the main measure is the share of needles found at 2,048 tokens, twice the training length,
over niah_single_2 and niah_multikey_1, which weigh alike; each of the four needles of a niah_multikey_1 prompt
is asked for, and their mean is one item.

- **Supported**: the 95 % interval of that difference lies above 0, and the difference from SFT for REFINE's
  time is above 0 as well. If the first holds and the second does not, it is supported at equal updates only.
- **Contradicted**: the interval lies below 0.
- **No difference seen**: the interval holds 0. If it lies within 3 points to either side, an effect of more
  than 3 points is excluded for this model, data and number of updates; else the question stays open.

The other rows are there to be read beside it and decide nothing: of so many, one in twenty leaves 0 out by
chance. A gain in needles that comes with a held-out loss worse by over 0.02 nats is reported as a trade, not as
support.

The learning rate of either side is the one of {rates} with the fewest nats a token of the right answers: 32
needles a task at 2,048 tokens, other than those measured, one run of seed {seed} and as many updates as the
arms."""


def main(arguments: list[str] | None = None) -> int:
    """Choose learning rates and run all arms, or one run alone (``--one``, what the others are started as)."""
    parser = argparse.ArgumentParser(prog="benchmarks.reproduce_small", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "reproduce-small")
    parser.add_argument("--steps", type=int, default=50, help="updates of every arm")
    parser.add_argument("--seeds", type=int, default=5, help="of SFT and of REFINE")
    parser.add_argument("--other_seeds", type=int, default=3, help="of every other arm")
    parser.add_argument("--arms", nargs="+", default=list(ORDER), choices=list(ORDER))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument(
        "--minutes", type=float, default=60, help="no run begins that would not be done by then"
    )
    parser.add_argument("--select", action="store_true", help="choose the learning rates and stop")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results, docs/ and the plot")
    parser.add_argument("--one", nargs=4, metavar=("ARM", "SEED", "STEPS", "RATE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.seeds, options.other_seeds, options.steps, options.jobs) < 1:
        parser.error("--seeds, --other_seeds, --steps and --jobs must be at least 1")
    if options.one:
        arm, seed, steps, rate = options.one
        return run_one(options.output_dir, Job(arm, int(seed), int(steps), float(rate)))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    options.until = time.time() + 60 * options.minutes
    _run(options, [Job(TIMING)])
    rates = select(options)
    if options.select:
        return 0
    jobs = _plan(options, rates)
    _run(options, [Job("before"), *jobs])
    found = [one for job in (Job("before"), *jobs) if (one := _read(options.output_dir, job))]
    table = summarize(found, _ratios(options))
    table["select"] = _selection(options)
    missing = Counter(job.arm for job in jobs if not _read(options.output_dir, job))
    table["not_run"] = [f"{arm} ({seeds} seed{'s' * (seeds > 1)})" for arm, seeds in missing.items()]
    table["minutes"] = sum(one["minutes"] for one in found) + sum(table["select"]["minutes"])
    print(render(table))
    print(f"{table['minutes']:.0f} minutes of all runs together; not run: {table['not_run'] or 'nothing'}")
    if options.record:
        _record(options, table)
    return 0


class Job(NamedTuple):
    """One run: an arm, or ``before``, ``timing``; ``select`` and an arm for the choice of the rate."""

    arm: str
    seed: int = 0
    steps: int = 0
    rate: float = 0.0

    def folder(self, output_dir: Path) -> Path:
        """Where it is written."""
        name = "".join(letter if letter.isalnum() else "_" for letter in self.arm)
        return output_dir / f"{name}-{self.seed}-{self.steps}-{self.rate:g}"


def _plan(options, rates: dict[str, float]) -> list[Job]:
    """All runs in the order of their worth: the main pair, then the others, a seed at a time."""
    jobs = []
    for arm in (arm for arm in ORDER if arm in options.arms):
        side = "SFT" if arm == EQUAL_TIME or ARMS[arm].get("phase") == "sft" else "REFINE"
        steps = round(options.steps * _ratios(options)["REFINE"]) if arm == EQUAL_TIME else options.steps
        seeds = options.seeds if arm in ("SFT", "REFINE") else options.other_seeds
        rate = rates[side] * (0.8 if arm == SMALLER_STEPS else 1)
        jobs += [Job(arm, seed, steps, rate) for seed in range(seeds)]
    groups = (
        ("SFT", "REFINE"),
        (EQUAL_TIME,),
        (SMALLER_STEPS, "REFINE, c = 32"),
        ("SFT, plain text", "REFINE, plain text"),
    )

    def worth(job: Job) -> tuple[int, int]:
        return next((i for i, group in enumerate(groups) if job.arm in group), len(groups)), job.seed

    return sorted(jobs, key=worth)


def _read(output_dir: Path, job: Job) -> dict | None:
    path = job.folder(output_dir) / "measures.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _run(options, jobs: list[Job]) -> None:
    """The jobs that have no measures yet, each in a process of one thread, as far as time allows."""
    longest = 0.0

    def start(job: Job) -> None:
        nonlocal longest
        folder = job.folder(options.output_dir)
        if (folder / "measures.json").is_file() or time.time() + longest > options.until:
            return
        command = [
            sys.executable, "-m", "benchmarks.reproduce_small", "--output_dir", str(options.output_dir),
            "--one", *map(str, job),
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


def _ratios(options) -> dict[str, float]:
    """Time of an update over that of SFT, by arm."""
    return _read(options.output_dir, Job(TIMING))["ratios"]


def _select_jobs(options) -> dict[tuple[str, float], Job]:
    return {
        (arm, rate): Job(f"{SELECT} {arm}", SELECT_SEED, options.steps, rate)
        for arm in ("SFT", "REFINE")
        for rate in RATES
    }


def select(options) -> dict[str, float]:
    """The learning rate of each side: that with the fewest nats of the right answers, on separate items."""
    _run(options, list(_select_jobs(options).values()))
    chosen = _selection(options)["chosen"]
    print(f"learning rates: {chosen}", flush=True)
    return chosen


def _selection(options) -> dict:
    """What the runs that choose the rates measured, and what they choose."""
    rows, nats = [], {}
    found = {key: _read(options.output_dir, job) for key, job in _select_jobs(options).items()}
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
    chosen = {arm: min(RATES, key=lambda rate: nats[arm, rate]) for arm in ("SFT", "REFINE")}
    return {"rows": rows, "chosen": chosen, "minutes": [one["minutes"] for one in found.values()]}


def run_one(output_dir: Path, job: Job) -> int:
    """Train one arm and measure it; ``before`` is measured as it is, ``timing`` times all arms' updates."""
    from refine.prepare import packaged_model
    from refine.train import train
    from refine.training.settings import TrainSettings

    began, folder, model = time.time(), job.folder(output_dir), packaged_model()
    about = job._asdict()
    folder.mkdir(parents=True, exist_ok=True)
    if job.arm == TIMING:
        (folder / "measures.json").write_text(json.dumps(about | {"ratios": time_arms(model)}))
        return 0
    arm = job.arm.removeprefix(f"{SELECT} ")
    if job.steps:
        settings = TrainSettings(
            **COMMON | ARMS["SFT" if arm == EQUAL_TIME else arm],
            output_dir=str(folder / "run"),
            overwrite_output_dir=True,
            max_steps=job.steps,
            seed=job.seed,
            learning_rate=job.rate,
        )
        model = train(settings)
    about["training_minutes"] = (time.time() - began) / 60
    items = measure(model, output_dir, separate=arm != job.arm)
    about |= {"items": items, "minutes": (time.time() - began) / 60}
    (folder / "measures.json.partial").write_text(json.dumps(about))
    os.replace(folder / "measures.json.partial", folder / "measures.json")
    return 0


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
        with _autocast():
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


def _autocast():
    return torch.autocast("cpu", torch.bfloat16)


def measure(path: Path, cache: Path, separate: bool = False) -> dict[str, list[float]]:
    """Every measure of a model, one number an item; the items are the same for every model.

    Args:
        path: the model.
        cache: where prompts are kept for the next model.
        separate: needles and held-out loss alone, on the items that choose the learning rate.
    """
    from transformers import AutoTokenizer

    from refine.models import load_model

    model, tokenizer = load_model(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    documents = _documents(tokenizer, separate)
    with torch.no_grad(), _autocast():
        if separate:
            prompts = _prompts(tokenizer, cache / "prompts-select.pt", SELECT_NEEDLES, seed=1)
            return {**_needles(model, prompts), **_held_out(model, documents)}
        needles = _needles(model, _prompts(tokenizer, cache / "prompts.pt", NEEDLES, seed=0))
        return {
            MAIN: [score for task in TASKS for score in needles[f"{task}_2x_score"]],
            **needles,
            **_copies(model, len(tokenizer)),
            **_returns(model, documents),
            **_held_out(model, documents),
        }


def _documents(tokenizer, separate: bool = False) -> torch.Tensor:
    """Held-out documents, [DOCUMENTS, 2 x LENGTH], none of which an arm has read."""
    from itertools import islice

    from refine.data.stream import DataConfig, held_out_stream

    config = DataConfig(dataset_name_or_path="default", max_length=2 * LENGTH, min_length=2 * LENGTH)
    first = DOCUMENTS if separate else 0
    batches = islice(held_out_stream(config, tokenizer).batches(1), first, first + DOCUMENTS)
    return torch.cat([batch.input_ids for batch in batches])


def _greedy(model, ids, targets=None):
    """Best guess at each position, [B, T], and the log-prob of ``targets`` if given."""
    from refine.models.head import SampleToken

    found = model(ids, use_cache=False, head=SampleToken(temperature=0.0, targets=targets))
    return found.token, found.logprob


def _in_a_row(right: torch.Tensor, count: int = ROLLOUT) -> torch.Tensor:
    """[..., T] bool -> [..., T - count + 1]: all of ``count`` neighbours. What greedy decoding from the true
    prefix gets right as a whole."""
    return right.unfold(-1, count, 1).all(-1)


def _held_out(model, documents) -> dict[str, list[float]]:
    rows = []
    for few in documents.split(4):
        _, logprob = _greedy(model, few[:, :-1], few[:, 1:])
        rows.append(-logprob)
    nats = torch.cat(rows)
    return {"loss": nats[:, : LENGTH - 1].mean(1).tolist(), "loss_2x": nats[:, LENGTH - 1 :].mean(1).tolist()}


def _copies(model, vocabulary: int) -> dict[str, list[float]]:
    """Random tokens, read twice."""
    found = {}
    for distance in COPIED:
        once = torch.randint(
            vocabulary, (COPIES, distance), generator=torch.Generator().manual_seed(distance)
        )
        rows = []
        for few in once.split(8):
            token, _ = _greedy(model, torch.cat([few, few], 1))
            rows.append(token[:, distance:-1] == few[:, 1:])
        right = torch.cat(rows)
        found[f"copy_{distance}"] = right.float().mean(1).tolist()
        found[f"copy_five_{distance}"] = _in_a_row(right).float().mean(1).tolist()
    return found


def _returns(model, documents, passage: int = 64) -> dict[str, list[float]]:
    """A passage of real text, other text of the same document, and the passage again."""
    found = {}
    for distance in RETURNS:
        rows = []
        for few in documents.split(8):
            first, between = few[:, :passage], few[:, passage : passage + distance]
            token, _ = _greedy(model, torch.cat([first, between, first], 1))
            rows.append(token[:, passage + distance : -1] == first[:, 1:])
        # its first eight tokens tell which passage it is
        right = torch.cat(rows)[:, 8:]
        found[f"return_{distance}"] = right.float().mean(1).tolist()
        found[f"return_five_{distance}"] = _in_a_row(right).float().mean(1).tolist()
    return found


def _prompts(tokenizer, path: Path, needles: dict[int, int], seed: int) -> dict[str, list[tuple]]:
    """Name of task and length -> for each sample the ids that its questions share, and for each question the rest
    of its ids and those of its answer. Made once.
    """
    from refine.evaluation.tasks.haystack import find_essay
    from refine.evaluation.tasks.niah import NIAH_TASKS, NiahGenerator, TokenCounter, draw_needles

    wanted = f"{TASKS} {needles} {seed} {LENGTH}"
    if path.is_file() and (kept := torch.load(path))["wanted"] == wanted:
        return kept["prompts"]
    counter, essay, found = TokenCounter(tokenizer), find_essay(None), {}
    for name in TASKS:
        task = NIAH_TASKS[name]
        for scale, samples in needles.items():
            generator = NiahGenerator(task, counter, scale * LENGTH, essay, seed, new_tokens=32)
            found[f"{name}_{scale}x"] = rows = []
            for index in range(samples):
                draw = draw_needles(task, random.Random(f"niah/{name}/{seed}/{index}"))
                text = tokenizer.decode(generator.make(index).ids, skip_special_tokens=True)
                before, what, question = text.rpartition("What is the special magic")
                asked = draw.keys[draw.asked[0]]
                assert question.count(asked) == 2
                whole = [counter.encode(before + what + question.replace(asked, key)) for key in draw.keys]
                shared = counter.encode(before + what)
                while any(one[: len(shared)] != shared for one in whole):
                    shared.pop()
                answers = [
                    tokenizer(f" {value}", add_special_tokens=False)["input_ids"] for (value,) in draw.values
                ]
                rows.append((shared, [(one[len(shared) :], told) for one, told in zip(whole, answers)]))
    torch.save({"wanted": wanted, "prompts": found}, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)
    return found


def _needles(model, prompts: dict[str, list[tuple]]) -> dict[str, list[float]]:
    """Whether greedy decoding begins with the right answer, and the nats a token of that answer; means of a
    sample's questions, which all go on from one reading of its text.

    Greedy decoding says the answer exactly where each of its tokens is the best guess after those before it.
    (RULER's score also counts an answer that comes later.)
    """
    from refine.models.head import HiddenOnly, SampleToken

    found = {}
    for name, samples in prompts.items():
        scores, nats = [], []
        for shared, questions in samples:
            read = model(torch.tensor([shared]), use_cache=True, head=HiddenOnly())
            state = read.past_key_values.select(torch.zeros(len(questions), dtype=torch.int64))
            width = max(len(rest) + len(answer) for rest, answer in questions)
            ids = torch.zeros(len(questions), width, dtype=torch.int64)
            for row, (rest, answer) in enumerate(questions):  # padding on the right reaches nothing before it
                ids[row, : len(rest) + len(answer)] = torch.tensor([*rest, *answer])
            hidden = model(ids, past_key_values=state, use_cache=True, head=HiddenOnly()).last_hidden_state
            right, cost = [], []
            for row, (rest, answer) in enumerate(questions):
                targets = torch.tensor([answer])
                at = hidden[row : row + 1, len(rest) - 1 : len(rest) - 1 + len(answer)]
                said = model(hidden_states=at, head=SampleToken(temperature=0.0, targets=targets))
                right.append(float((said.token == targets).all()))
                cost.append(-said.logprob.mean().item())
            scores.append(float(np.mean(right)))
            nats.append(float(np.mean(cost)))
        found |= {f"{name}_score": scores, f"{name}_nats": nats}
    return found


def summarize(found: list[dict], ratios: dict[str, float]) -> dict:
    """The table: for each arm and measure the mean, the difference from what it is compared with (``BASES``, else
    SFT of equal updates) over the seeds that both have, and its interval."""
    arms = [name for name in ORDER if any(one["arm"] == name for one in found)]
    by_arm = {arm: {one["seed"]: one for one in found if one["arm"] == arm} for arm in arms}
    before = next(one for one in found if one["arm"] == "before")
    rows: dict = {"before": {name: {"mean": float(np.mean(before["items"][name]))} for name in MEASURES}}
    for arm, ones in by_arm.items():
        base = {} if arm in ("SFT", *BASES.values()) else by_arm.get(BASES.get(arm, "SFT"), {})
        rows[arm] = {}
        for name in MEASURES:
            means = [float(np.mean(ones[seed]["items"][name])) for seed in sorted(ones)]
            rows[arm][name] = {"mean": float(np.mean(means)), "seeds": means} | _compare(ones, base, name)
    others = {
        arm: {name: _compare(by_arm["REFINE"], by_arm[arm], name) for name in MEASURES}
        for arm in (EQUAL_TIME, SMALLER_STEPS)
        if arm in by_arm and "REFINE" in by_arm
    }
    about = {
        arm: {
            "updates": next(iter(ones.values()))["steps"],
            "seeds": len(ones),
            "time_of_an_update": ratios.get(arm, 1.0),
        }
        for arm, ones in by_arm.items()
    }
    return {"measures": rows, "arms": about, "refine_minus": others}


def _compare(ones: dict[int, dict], base: dict[int, dict], name: str) -> dict:
    """Of the seeds that both have; nothing where there are none."""
    both = sorted(set(ones) & set(base))
    if not both:
        return {}
    difference = np.array(
        [np.array(ones[seed]["items"][name]) - np.array(base[seed]["items"][name]) for seed in both]
    )
    return {
        "difference": float(difference.mean()),
        "interval": interval(difference),
        "differences": difference.mean(1).tolist(),
    }


def interval(difference: np.ndarray, draws: int = 4000) -> list[float]:
    """95 % interval of the mean of [seeds, items], by resampling both."""
    rng = np.random.default_rng(0)
    seeds, items = difference.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # [draws, seeds]
    of_items = rng.multinomial(items, np.full(items, 1 / items), size=draws) / items
    means = ((of_seeds @ difference) * of_items).sum(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def render(table: dict) -> str:
    """Markdown: one row a measure, one column an arm; a difference whose interval leaves 0 out is bold."""
    rows, about = table["measures"], table["arms"]
    arms = list(about)
    lines = ["| | before | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    lines.append("| updates | - | " + " | ".join(str(about[arm]["updates"]) for arm in arms) + " |")
    lines.append("| seeds | - | " + " | ".join(str(about[arm]["seeds"]) for arm in arms) + " |")
    ratio = " | ".join(f"{about[arm]['time_of_an_update']:.2f}" for arm in arms)
    lines.append(f"| time of an update / SFT | - | {ratio} |")
    for name in MEASURES:
        cells = [f"{rows['before'][name]['mean']:.4f}"]
        for arm in arms:
            one = rows[arm][name]
            cells.append(_cell(one) if "difference" in one else f"{one['mean']:.4f}")
        lines.append(f"| {_label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_others(table: dict) -> str:
    """Markdown: REFINE minus the other arms of SFT, where they are there."""
    others = table["refine_minus"]
    if not others:
        return "Nothing to compare."
    names = [MAIN, *(f"{task}_{scale}x_nats" for scale in NEEDLES for task in TASKS), "loss", "loss_2x"]
    lines = ["| REFINE minus | " + " | ".join(others) + " |", "|---" * (len(others) + 1) + "|"]
    lines.append(
        "| seeds | " + " | ".join(str(len(one[MAIN]["differences"])) for one in others.values()) + " |"
    )
    for name in names:
        cells = [_cell(one[name]) for one in others.values()]
        lines.append(f"| {_label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def about_steps(table: dict) -> str:
    """What the control says, in words."""
    names = [f"{task}_2x_nats" for task in TASKS]
    beside = [table["measures"]["REFINE"][name] for name in names]
    control = [table["refine_minus"].get(SMALLER_STEPS, {}).get(name) for name in names]
    if not all(control):
        return "That arm was not run."
    numbers = f"answers at {2 * LENGTH:,} tokens cost REFINE " + " and ".join(
        f"{one['difference']:+.4f} nats beside SFT, {other['difference']:+.4f} beside SFT with the smaller step"
        for one, other in zip(beside, control)
    )
    if all(other["interval"][0] > 0 for other in control):
        says = (
            "SFT with the smaller step gives the answers more probability than REFINE does, so a smaller step is "
            "enough to explain REFINE's gain"
        )
    elif all(other["interval"][1] < 0 for other in control):
        says = "REFINE gives the answers more probability than SFT with the smaller step does, too"
    else:
        says = "REFINE and SFT with the smaller step cannot be told apart"
    text = f"{says}: {numbers} ({', '.join(TASKS)})."
    longer = table["measures"].get(EQUAL_TIME, {}).get(MAIN, {}).get("difference", 0)
    if longer < 0:
        text += (
            f" SFT for REFINE's time makes more of these updates and finds {-100 * longer:.1f} points fewer "
            "needles than SFT; that REFINE is ahead of it is therefore no sign of a better use of the context."
        )
    return text


def _cell(one: dict) -> str:
    low, high = one["interval"]
    text = f"{one['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"**{text}**" if low * high > 0 else text


def _label(name: str) -> str:
    label, sign = MEASURES[name]
    return f"{label}{' (less is better)' if sign < 0 else ''}"


def verdict(table: dict) -> str:
    """What ``SUPPORT`` says to the main comparison, in words."""
    main = table["measures"]["REFINE"][MAIN]
    low, high = (100 * end for end in main["interval"])
    seeds = ", ".join(f"{100 * one:+.1f}" for one in main["differences"])
    lines = [
        f"REFINE minus SFT at equal updates: **{100 * main['difference']:+.2f} points** of needles found at "
        f"{2 * LENGTH:,} tokens, 95 % interval {low:+.2f} to {high:+.2f} ({high - low:.1f} points wide); "
        f"by seed {seeds}."
    ]
    more = None
    if at_time := table["refine_minus"].get(EQUAL_TIME, {}).get(MAIN):
        more = 100 * at_time["difference"]
        ends = " to ".join(f"{100 * end:+.2f}" for end in at_time["interval"])
        seeds = len(at_time["differences"])
        lines.append(f"REFINE minus SFT for REFINE's time: {more:+.2f} points ({ends}; {seeds} seeds).")
    if low > 0 and table["measures"]["REFINE"]["loss"]["difference"] > 0.02:
        lines.append("**A trade**: more needles, at a held-out loss worse by over 0.02 nats.")
    elif low > 0:
        known = "**Supported**" if more is not None and more > 0 else "**Supported at equal updates only**"
        lines.append(f"{known}, for this model, data and number of updates.")
    elif high < 0:
        lines.append("**Contradicted**, for this model, data and number of updates.")
    elif low > -3 and high < 3:
        lines.append(
            "**No difference seen**; an effect of more than 3 points is excluded for this model, data and "
            "number of updates."
        )
    else:
        lines.append("**No difference seen**, and the question stays open.")
    return " ".join(lines)


def _record(options, table: dict) -> None:
    """A results file, docs/reproduce_small.md and its picture."""
    from benchmarks.results import record

    chosen = table["select"]["chosen"]
    path = record(
        "reproduce_small", table, seeds=options.seeds, learning_rate=chosen,
        settings=COMMON | {"rollout_length": ROLLOUT, "max_steps": options.steps}, arms=ARMS,
    )  # fmt: skip
    draw(table, ROOT / "docs" / "reproduce_small.png")
    contents = json.loads((ROOT / path).read_text())
    selection = [
        "| side | rate | nats a token of the answer | needles found | held-out loss |",
        "|---" * 5 + "|",
    ]
    for row in table["select"]["rows"]:
        numbers = f"{row['nats']:.3f} | {row['needles']:.3f} | {row['loss']:.4f}"
        best = "**" if chosen[row["arm"]] == row["rate"] else ""
        selection.append(f"| {row['arm']} | {best}{row['rate']:g}{best} | {numbers} |")
    (ROOT / "docs" / "reproduce_small.md").write_text(
        PAGE.format(
            support=SUPPORT.format(rates=", ".join(f"{rate:g}" for rate in RATES), seed=SELECT_SEED),
            verdict=fill(verdict(table)),
            table=render(table),
            others=render_others(table),
            steps=fill(about_steps(table)),
            selection="\n".join(selection),
            samples=2 * NEEDLES[2],
            counts=", ".join(map(str, NEEDLES.values())),
            documents=DOCUMENTS,
            date=contents["date"],
            processor=contents["machine"]["processor"],
            jobs=options.jobs,
            minutes=f"{table['minutes']:.0f}",
            torch=contents["versions"]["torch"],
            file=path,
            not_run=fill("Planned and not run: " + ("; ".join(table["not_run"]) or "nothing") + "."),
        ),
        encoding="utf-8",
    )
    print(f"wrote {path}, docs/reproduce_small.md, docs/reproduce_small.png")


def fill(text: str) -> str:
    """Lines of at most 116 characters."""
    return textwrap.fill(text, 116, break_long_words=False, break_on_hyphens=False)


PAGE = """# SFT and REFINE from one small model

Written by `make reproduce-small` (`python -m benchmarks.reproduce_small --record`); what it does stands in that
file. From the package's tiny model, which finds needles, on sequences of 1,024 tokens.

## What would count as support

Written and committed before any run of an arm had a result, the choice of the learning rates included (the log
of this file has it). Only the model as it is and SFT in two pilots, named at the end, had been measured by
then.

{support}

## What came out

{verdict}

The interval is over {samples} prompts and the seeds, item by item. {date}; {minutes} minutes of all runs
together, {jobs} at a time of one thread each, on {processor}, torch {torch} ([file](../{file})).

{not_run}

Columns of REFINE and of "SFT, REFINE's time" (which takes as many more updates as REFINE's take time) are
differences from SFT of equal updates, those of plain text from SFT on plain text; item by item, with 95 %
intervals over items and seeds; bold where the interval leaves 0 out. Few seeds make such intervals somewhat too
narrow. Found: greedy decoding begins with the right number. {counts} prompts a task at 1,024, 2,048 and 4,096
tokens; {documents} held-out documents.

{table}

![differences from SFT](reproduce_small.png)

## Is it more than a smaller step?

{others}

Added after the main pair had been looked at, so it decides nothing. These 50 updates cost the model needles at
twice the training length (the model before stands in the first column), and gradients are clipped to a norm of
1 in sum and divided by their own size in AdamW. The policy gradient adds to that size (in the main runs mean
norms of 1.7 for 1.4), so REFINE moves about 0.8 times as far along the next-token loss as SFT does. SFT at 0.8
times its rate shows how much of a difference such a smaller step makes by itself.

{steps}

## Learning rates

{selection}

Each side from one run of its own; the bold rate has the fewest nats of the right answers. The lowest rate tried
was best for both; with the larger ones fewer needles are found. Whether a still lower one would be better was
not asked.

## Tried before

An older model that found no needle, 160 updates at 1e-4 on text half of which was recall documents, three seeds
(2026-11-24, [file](../benchmarks/results/reproduce_small_cpu_20261124_0414.json)): REFINE read more random
tokens again than SFT (+0.022, +0.019, +0.006 after 32, 64, 128), gave a needle's answer fewer nats (-0.049 at
1,024, -0.037 at 2,048 tokens of prose, neither certain), and was 0.0033 nats worse in held-out loss; with c =
32 all of that was larger, and the loss no worse. Before the statement was written, one SFT run of 40 updates at
3e-4 on each of two texts (half needle documents, half recall documents; 32 other needles) was looked at to
choose the text; no REFINE run had been made.
"""


def draw(table: dict, path: Path) -> None:
    """Differences from SFT in units of SFT's own change from the model before would divide by noise; so each
    measure is drawn in the standard error of its difference: beyond the grey band the interval leaves 0 out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = table["measures"]
    arms = [arm for arm in table["arms"] if "difference" in rows[arm][MAIN]]
    names = list(MEASURES)
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(names) + 1.6), layout="constrained")
    axes.axvspan(-1.96, 1.96, color="0.92", zorder=0)
    axes.axvline(0, color="0.5", linewidth=0.8)
    for place, arm in enumerate(arms):
        at, values = [], []
        for row, name in enumerate(names):
            one, sign = rows[arm][name], MEASURES[name][1]
            low, high = one["interval"]
            error = (high - low) / 3.92
            if error > 0:
                at.append(row + (place - (len(arms) - 1) / 2) * 0.14)
                values.append(sign * one["difference"] / error)
        axes.plot(values, at, "os^DvP"[place % 6], markersize=4, label=arm)
    axes.set_yticks(range(len(names)), [MEASURES[name][0] for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("better than SFT on the same text, in standard errors of the difference")
    axes.grid(axis="y", color="0.95")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
