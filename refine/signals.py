"""Ctrl-C and SIGTERM: as a request to finish first, or as an exception."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM came where nothing can be finished first."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that is filled by the first Ctrl-C or SIGTERM; the second one stops at once."""
    received: list[str] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        received.append(signal.Signals(number).name)
        print(f"{received[0]}: finishing this update, then saving; once more to stop at once")

    with _handlers({signal.SIGINT: note, signal.SIGTERM: note}):
        yield received


@contextmanager
def terminations() -> Iterator[None]:
    """SIGTERM as an exception, like Ctrl-C."""

    def stop(number, frame):
        raise Terminated

    with _handlers({signal.SIGTERM: stop}):
        yield


def name_and_code(error: KeyboardInterrupt | Terminated) -> tuple[str, int]:
    """The signal that an exception stands for, and the exit code of a process that it ended."""
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    return number.name, 128 + number


@contextmanager
def _handlers(handlers: dict[int, Any]) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not in the main thread, which alone handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
