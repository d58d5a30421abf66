"""Ratios that hold on a shared machine: calls take turns, and neighbours are compared.

Another job that slows the machine down slows all calls of a round. So a ratio is taken round by round, the order
turns round each time, and rounds are added until the medians are known well enough or the time for it is used up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

PRECISION = 0.015  # standard error of a median ratio, over it, at which no more rounds are taken


@dataclass(frozen=True)
class Paired:
    """Of ``time(a) / time(b)`` over rounds: median and quartiles; the median times of both, seconds."""

    ratio: float
    low: float
    high: float
    seconds_a: float
    seconds_b: float
    rounds: int

    @property
    def error(self) -> float:
        """Standard error of the median over the median, if the ratios were normal: 1.25 s / sqrt(n), and quartiles
        are 1.35 s apart."""
        return 1.25 * (self.high - self.low) / 1.35 / self.rounds**0.5 / self.ratio


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, with what it has started on a GPU."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(
    functions: dict[str, Callable[[], object]],
    against: str,
    *,
    least: int = 5,
    most: int = 100,
    budget: float = 4.0,
) -> dict[str, list[float]]:
    """Seconds of every function in every round; each runs once before the first.

    Args:
        functions: what to time, by name.
        against: the one that the others are to be compared with.
        least, most: rounds; between them it stops at ``PRECISION`` of every ratio, or after ``budget``.
        budget: seconds, the first calls not counted.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for done in range(1, most + 1):
        for name in functions if done % 2 else reversed(functions):
            times[name].append(seconds(functions[name]))
        if done >= least:
            errors = (compare(times, name, against).error for name in functions if name != against)
            if time.perf_counter() - began > budget or max(errors) <= PRECISION:
                break
    return times


def compare(times: dict[str, list[float]], a: str, b: str) -> Paired:
    """Two of what was timed in turns."""
    ratios = [x / y for x, y in zip(times[a], times[b])]
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return Paired(middle, low, high, statistics.median(times[a]), statistics.median(times[b]), len(ratios))


def paired_ratio(a: Callable[[], object], b: Callable[[], object], **limits) -> Paired:
    """Two functions in turn, the first over the second; ``limits`` as of :func:`in_turns`."""
    return compare(in_turns({"a": a, "b": b}, "b", **limits), "a", "b")
