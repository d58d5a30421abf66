"""Ratios that hold on a shared machine: calls take turns, and neighbours are compared. And peak memory.

Another job that slows the machine down slows all calls of a round. So a ratio is taken round by round, the order
turns round each time, and rounds are added until the medians are known well enough or the time for it is used up.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    ratios: tuple[float, ...] = field(default=(), repr=False)  # of every round

    @property
    def error(self) -> float:
        """Standard error of the median over the median, if the ratios were normal: 1.25 s / sqrt(n), and quartiles
        are 1.35 s apart."""
        return 1.25 * (self.high - self.low) / 1.35 / self.rounds**0.5 / self.ratio


def keep_pages() -> None:
    """Let the C library keep the memory that it has, for the rest of this process (glibc; nothing elsewhere).

    By default it hands the pages of large tensors back and takes them again for the next one, which on a CPU costs
    as much as some operations do, and by far not the same from one run to the next.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for setting, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            library.mallopt(setting, value)


def release_pages() -> None:
    """Hand free memory back after all (glibc), so that another process has it."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


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
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every function in every round.

    Args:
        functions: what to time, by name.
        against: the one that the others are to be compared with.
        least, most: rounds; between them it stops at ``PRECISION`` of every ratio, or after ``budget``.
        budget: seconds, the first calls not counted.
        warm_up: call each once before the first round.
    """
    for function in functions.values() if warm_up else ():
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
    ratios = tuple(x / y for x, y in zip(times[a], times[b]))
    low, middle, high = quartiles(ratios)
    medians = statistics.median(times[a]), statistics.median(times[b])
    return Paired(middle, low, high, *medians, len(ratios), ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value thrice that."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (*values,) * 3


def paired_ratio(a: Callable[[], object], b: Callable[[], object], **limits) -> Paired:
    """Two functions in turn, the first over the second; ``limits`` as of :func:`in_turns`."""
    return compare(in_turns({"a": a, "b": b}, "b", **limits), "a", "b")


def peak_memory(function: Callable[[], object]) -> float:
    """MB of tensors that one call holds at its highest beyond what was there before; on a CPU by the profiler's
    record of every allocation, which is the same in every run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate(size for _, size in changes), default=0) / 2**20
