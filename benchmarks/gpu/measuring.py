"""What all parts of a GPU visit measure with: device, rows, times, memory, launches, peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.timing import peak_memory

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if CUDA else torch.float32  # what a CPU can check at all
Row = dict[str, object]  # what, value; and whatever a later reader may want
COMPILING = False  # set in workers that run what will be timed once, so that its kernels are compiled before


def row(what: str, value: str, **more) -> Row:
    """One line of a part's table."""
    return {"what": what, "value": value, **more}


def milliseconds(function: Callable[[], object], repeats: int = 10, cold: bool = False) -> float:
    """Median time of a call by device events (wall clock on a CPU), after two calls; ``cold`` empties L2 first."""
    function()
    if COMPILING:
        return 1.0
    if not CUDA:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    function()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE) if cold else None
    times = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def peak_gb(function: Callable[[], object]) -> float:
    """Memory of one call beyond what was allocated before it (0 on a CPU)."""
    return 0.0 if not CUDA or COMPILING else peak_memory(function) * 2**20 / 1e9


def launches(function: Callable[[], object], calls: int = 3) -> dict[str, tuple[float, float]]:
    """Of every kernel that a call starts: launches a call, and microseconds of all of them a call (by CUPTI)."""
    function()
    if not CUDA or COMPILING:
        return {}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    found = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            found[event.key] = (event.count / calls, event.self_device_time_total / calls)
    return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))


def peer(name: str):
    """A peer's module, or None with the reason on the screen."""
    try:
        return __import__(name, fromlist=["_"])
    except Exception as error:
        print(f"  {name} is not here: {type(error).__name__}: {error}")
        return None
