"""The command line of the comparison: plan, runs, results file, page."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import benchmarks.reproduce_small as package
from benchmarks.reproduce_small import page, plan, runs
from benchmarks.reproduce_small.measures import DOCUMENTS, NEEDLES
from benchmarks.reproduce_small.table import render, summarize
from benchmarks.results import record
from refine.prepare import packaged_model


def main(arguments: list[str] | None = None) -> int:
    """Choose learning rates and run all arms, or one run alone (``--one``, what the others are started as)."""
    options = parse(arguments)
    if options.page:
        page.write()
        return 0
    if options.one:
        arm, seed, steps, rate, *others = options.one
        job = plan.Job(arm, int(seed), int(steps), float(rate), *map(int, others))
        return runs.run_one(options.output_dir, options.model, job)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    options.until = time.time() + 60 * options.minutes
    timing, before = plan.Job(plan.TIMING), plan.before(options)
    runs.run(options, [timing])
    rates = runs.select(options)
    if options.select:
        return 0
    ratios = runs.read(options.output_dir, timing)["ratios"]
    jobs = plan.arms(options, rates, ratios)
    runs.run(options, [before, *jobs])
    found = [one for job in (before, *jobs) if (one := runs.read(options.output_dir, job))]
    table = summarize(found, ratios)
    table["select"] = runs.chosen_rates(options)
    missing = Counter(job.arm for job in jobs if not runs.read(options.output_dir, job))
    table["not_run"] = [f"{arm} ({seeds} seed{'s' * (seeds > 1)})" for arm, seeds in missing.items()]
    table["minutes"] = sum(one["minutes"] for one in found) + sum(table["select"]["minutes"])
    print(render(table))
    print(f"{table['minutes']:.0f} minutes of all runs together; not run: {table['not_run'] or 'nothing'}")
    if options.record:
        path = record(
            "reproduce_small", table, seeds=options.seeds, first_seed=options.first_seed, learning_rate=rates,
            settings=plan.COMMON
            | {"rollout_length": plan.ROLLOUT, "max_steps": options.steps}
            | (plan.WEIGHED if options.weigh_answers else {}),
            arms=plan.ARMS, prompts=NEEDLES, documents=DOCUMENTS, jobs=options.jobs, model=options.model.name,
        )  # fmt: skip
        print(f"wrote {path}")
        page.write()
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.reproduce_small", description=package.__doc__.split("\n")[0]
    )
    parser.add_argument("--output_dir", type=Path, default=runs.ROOT / "runs" / "reproduce-small")
    parser.add_argument("--model", type=Path, default=packaged_model(), help="what all arms begin with")
    parser.add_argument("--steps", type=int, default=50, help="updates of every arm")
    parser.add_argument("--seeds", type=int, default=5, help="of SFT and of REFINE")
    parser.add_argument("--other_seeds", type=int, default=3, help="of every other arm")
    parser.add_argument(
        "--first_seed", type=int, default=0, help="another one: other seeds, needles, documents, rates anew"
    )
    parser.add_argument(
        "--weigh_answers", action="store_true", help="the next-token loss on the answers; rates from 3e-5 on"
    )
    parser.add_argument("--arms", nargs="+", default=list(plan.ORDER), choices=list(plan.ORDER))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument(
        "--minutes", type=float, default=60, help="no run begins that would not be done by then"
    )
    parser.add_argument("--select", action="store_true", help="choose the learning rates and stop")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results, then as --page")
    parser.add_argument(
        "--page", action="store_true", help="docs/ and its plot from benchmarks/results alone"
    )
    parser.add_argument("--one", nargs=6, metavar=plan.Job._fields, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.seeds, options.other_seeds, options.steps, options.jobs) < 1:
        parser.error("--seeds, --other_seeds, --steps and --jobs must be at least 1")
    if not 0 <= options.first_seed <= plan.SELECT_SEED - max(options.seeds, options.other_seeds):
        parser.error(f"--first_seed: seeds from {plan.SELECT_SEED} on choose the learning rates")
    options.output_dir, options.model = options.output_dir.absolute(), options.model.absolute()
    return options


if __name__ == "__main__":
    sys.exit(main())
