"""Tasks in several processes that stop at nothing: one that crashes, hangs or breaks its device is noted, and a
fresh process goes on with the next.

Kernels compile on processors: sixteen of them compile sixteen times as many, and what has been compiled lies in
Triton's cache for whoever needs it next.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from benchmarks.gpu.measuring import Row, row

PATIENCE = 150.0  # seconds that one task may take


class Task(NamedTuple):
    """A generator of rows, ``module:function``, and what it is called with."""

    part: str
    what: str
    function: str
    arguments: dict[str, Any]
    compiling: bool = False  # only run it once, for its kernels


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    task: Task | None = None
    began: float = 0.0


def run(tasks: list[Task], workers: int, seconds: float) -> Iterator[tuple[Task, Row]]:
    """Rows of all tasks as they come; one that fails has a row that says so. What ``seconds`` did not suffice for
    is named at the end."""
    context = multiprocessing.get_context("spawn")
    waiting, until = deque(tasks), time.monotonic() + seconds

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    crew = [start() for _ in range(min(workers, len(tasks)))]
    try:
        while waiting or any(worker.task for worker in crew):
            now = time.monotonic()
            if now > until:
                break
            for i, worker in enumerate(crew):
                if worker.task and now - worker.began > PATIENCE:
                    worker.process.kill()
                    yield (
                        worker.task,
                        row(worker.task.what, f"FAILED: no end within {PATIENCE:.0f} s", failed=True),
                    )
                    crew[i] = start()
                elif worker.task is None and waiting:
                    worker.task, worker.began = waiting.popleft(), now
                    worker.pipe.send(worker.task)
            ready = wait([worker.pipe for worker in crew if worker.task], timeout=1.0)
            for i, worker in enumerate(crew):
                if worker.pipe not in ready:
                    continue
                try:
                    kind, found = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join(5)
                    text = f"FAILED: the process ended with {worker.process.exitcode}"
                    yield worker.task, row(worker.task.what, text, failed=True)
                    crew[i] = start()
                    continue
                if kind == "row":
                    yield worker.task, found
                    continue
                if kind != "done":
                    yield (
                        worker.task,
                        row(worker.task.what, f"FAILED: {found[0]}", failed=True, trace=found[1]),
                    )
                worker.task = None
                if kind == "broken":
                    crew[i] = start()
    finally:
        left = [worker.task for worker in crew if worker.task] + list(waiting)
        for worker in crew:
            worker.process.kill()
    for task in left:
        yield task, row(task.what, "not run: no time left", failed=True)


def _work(pipe: Connection) -> None:
    import torch

    from benchmarks.gpu import measuring

    torch.set_num_threads(1)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        measuring.COMPILING = task.compiling
        module, name = task.function.split(":")
        try:
            for found in getattr(importlib.import_module(module), name)(**task.arguments):
                if not task.compiling:
                    pipe.send(("row", found))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                gc.collect()
                torch.cuda.empty_cache()
            pipe.send(("done", None))
        except Exception as error:
            text = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            # after an error of the device nothing that this process does there will work again
            broken = "CUDA" in text or "Accelerator" in text
            pipe.send(("broken" if broken else "failed", (text, traceback.format_exc()[-3000:])))
            if broken:
                os._exit(1)
