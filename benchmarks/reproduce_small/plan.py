"""What is run: the arms with their settings, and every run in the order of its worth."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
VARIANTS = ("REFINE, c = 32", "REFINE, uniform positions", "REFINE, binary reward")
ORDER = (
    "SFT",
    "REFINE",
    EQUAL_TIME,
    SMALLER_STEPS,
    "REFINE, c = 32",
    *list(ARMS)[4:],
)  # the table's columns
TIMING = "timing"  # the job that measures these ratios, before anything else runs
SELECT = "select"  # the folder of the runs that choose the learning rates
RATES = (1e-4, 3e-4, 1e-3)  # to choose from, for each side
WEIGHED = {"answer_weight": 8.0, "context_weight": 0.05}  # --weigh_answers: as when the model learned needles
LOWER_RATES = (3e-5, *RATES)  # to choose from with it
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


class Job(NamedTuple):
    """One run: an arm, or ``before``, ``timing``; ``select`` and an arm for the choice of the rate."""

    arm: str
    seed: int = 0
    steps: int = 0
    rate: float = 0.0
    first_seed: int = 0  # of all runs: which items are measured
    weighed: int = 0  # whether the next-token loss has the weights ``WEIGHED``

    def folder(self, output_dir: Path) -> Path:
        """Where it is written."""
        name = "".join(letter if letter.isalnum() else "_" for letter in self.arm)
        name += "-weighed" * self.weighed
        return output_dir / f"{name}-{self.seed}-{self.steps}-{self.rate:g}-{self.first_seed}"


def before(options) -> Job:
    """The model as it is, measured on the items of these runs."""
    return Job("before", first_seed=options.first_seed)


def arms(options, rates: dict[str, float], ratios: dict[str, float]) -> list[Job]:
    """The runs of all arms in the order of their worth: the main pair, then the others, a seed at a time.

    Args:
        options: of the command line.
        rates: the learning rate of either side.
        ratios: time of an update over that of SFT, by arm.
    """
    jobs = []
    for arm in (arm for arm in ORDER if arm in options.arms):
        side = "SFT" if arm == EQUAL_TIME or ARMS[arm].get("phase") == "sft" else "REFINE"
        steps = round(options.steps * ratios["REFINE"]) if arm == EQUAL_TIME else options.steps
        seeds = options.seeds if arm in ("SFT", "REFINE") else options.other_seeds
        rate = rates[side] * (0.8 if arm == SMALLER_STEPS else 1)
        first, weighed = options.first_seed, int(options.weigh_answers)
        jobs += [Job(arm, seed, steps, rate, first, weighed) for seed in range(first, first + seeds)]
    groups = (("SFT", "REFINE"), (EQUAL_TIME,), tuple(ARMS)[4:])

    def worth(job: Job) -> tuple[int, int]:
        return next((i for i, group in enumerate(groups) if job.arm in group), len(groups)), job.seed

    return sorted(jobs, key=worth)


def selection(options) -> dict[tuple[str, float], Job]:
    """The runs that choose the learning rates, by side and rate."""
    seed, weighed = SELECT_SEED + options.first_seed, int(options.weigh_answers)
    return {
        (arm, rate): Job(f"{SELECT} {arm}", seed, options.steps, rate, options.first_seed, weighed)
        for arm in ("SFT", "REFINE")
        for rate in (LOWER_RATES if weighed else RATES)
    }
