"""One visit to a GPU: ``python -m benchmarks.gpu [--minutes 9] [--part numbers times ...]``.

First the numbers of every kernel configuration against float64, in several processes and stopping at nothing, and
beside them, as compiling takes longest, everything that will be timed, run once. Then the machine's own ceilings,
times beside the peers whose packages are there, training steps of published sizes (random weights), rollouts,
prompts read once, and other tiles than the chosen ones. Each part is apart, in a process of its own: one that
fails is noted and the next begins; what no longer fits the time is named. A compact table comes last; everything
goes into one file in ``benchmarks/results/``.

On a CPU it goes through the same motions at sizes of a few hundred tokens, so that a visit does not find the
mistakes of the script.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.gpu import numbers, pool, steps, tiles, times
from benchmarks.gpu.measuring import CUDA, Row
from benchmarks.results import machine, record, versions


def parts() -> dict[str, list[pool.Task]]:
    """What is timed, one after another."""

    def task(part: str, what: str, function: str, **arguments) -> pool.Task:
        return pool.Task(f"{part}: {what}", what, f"benchmarks.gpu.{part}:{function}", arguments)

    return {
        "times": [
            task("times", "ceilings", "ceilings"),
            task("times", "delta rule", "delta_times", gated=False),
            task("times", "gated delta rule", "delta_times", gated=True),
            task("times", "LM head", "head_times"),
            task("times", "LaCT", "lact_times"),
            task("times", "decoding", "decode_times"),
        ],
        "steps": [
            *(task("steps", name, "steps", name=name) for name in steps.SIZED),
            task("steps", "prompts read once", "prompt_once"),
        ],
        "tiles": [
            task("tiles", "delta rule", "delta", gated=False),
            task("tiles", "gated delta rule", "delta", gated=True),
            task("tiles", "spans", "spans", gated=False),
            task("tiles", "spans, gated", "spans", gated=True),
            task("tiles", "LM head", "head"),
            task("tiles", "LaCT", "lact"),
        ],
    }


def main() -> int:
    """Run the parts, print the table, write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing begins after this")
    parser.add_argument("--part", nargs="+", choices=["numbers", *parts()], default=["numbers", *parts()])
    parser.add_argument("--numbers_minutes", type=float, default=4.0, help="for numbers and compiling")
    parser.add_argument("--workers", type=int, default=12 if CUDA else 2, help="processes for those")
    parser.add_argument("--no_record", action="store_true", help="write no results file")
    options = parser.parse_args()
    began, table = time.time(), {}
    print(machine(), versions(), sep="\n")
    torch.manual_seed(0)
    try:
        _work(options, began, table)
    except KeyboardInterrupt:
        print("stopped")
    failed = sum(bool(r.get("failed")) for rows in table.values() for r in rows)
    width = max(len(str(r["what"])) for rows in table.values() for r in rows)
    print(f"\n{time.time() - began:.0f} s, {failed} failed")
    for name, rows in table.items():
        print(f"== {name}")
        for r in rows:
            print(f"{r['what']:<{width}}  {r['value']}")
    if not options.no_record:
        print(f"written to {record('gpu', table)}")
    return int(failed > 0)


def _work(options: argparse.Namespace, began: float, table: dict[str, list[Row]]) -> None:
    left = lambda: 60 * options.minutes - (time.time() - began)  # noqa: E731
    chosen = {name: tasks for name, tasks in parts().items() if name in options.part}
    first = numbers.tasks() if "numbers" in options.part else []
    for name, module in (("times", times), ("steps", steps), ("tiles", tiles)):
        first += module.compiling() if name in chosen else []
    timed = [task for of_part in chosen.values() for task in of_part]
    for tasks, workers, minutes in (
        (first, options.workers, options.numbers_minutes),
        (timed, 1, options.minutes),
    ):
        for task, found in pool.run(tasks, workers, min(60 * minutes, left())):
            table.setdefault(task.part, []).append(found)
            print(f"  {time.time() - began:.0f} s {found['what']}: {found['value']}", flush=True)
            if "trace" in found:
                print(found["trace"], flush=True)


if __name__ == "__main__":
    sys.exit(main())
