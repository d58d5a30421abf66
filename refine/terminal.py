"""What a command shows while it works: sentences, a banner, and how far it has come.

One process has one :data:`terminal`, which shows nothing until a command opens it, and nothing on ranks other than
0. On a real terminal progress is a line at its foot that fits the width; where output goes into a file or a pipe,
it is a plain line now and then. Everything goes to standard output; where that is closed or full, nothing more is
shown and the work goes on.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
_SHORTEST_BAR = 6  # columns
_OFTEN, _SELDOM = 2.0, 30.0  # seconds between two plain lines: at least, and at most while something is done


class _Console(Console):
    """A console whose closed pipe is an error like any other, and not the end of the process."""

    def on_broken_pipe(self) -> None:
        raise


class Terminal:
    """The terminal of this process.

    Args:
        shown: whether anything is shown.
        console: where; default: standard output.
    """

    def __init__(self, shown: bool = False, console: Console | None = None):
        self.shown = shown
        self._console = console or _Console(highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None

    def open(self, shown: bool = True) -> None:
        """Begin to show, or not to: what a command does first."""
        self.shown = shown

    @property
    def is_live(self) -> bool:
        """Whether a line can be drawn again and again."""
        console = self._console
        return self.shown and console.is_terminal and not console.is_dumb_terminal

    def say(self, text: str = "", bold: bool = False) -> None:
        """A line, or several."""
        if not self.shown:
            return
        try:
            self._console.print(text, style="bold" if bold else None, soft_wrap=True)
        except OSError:
            self.shown = False
            with suppress(OSError, ValueError):  # nor does Python fail at its end to write what is left
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._console.file.fileno())

    def banner(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """What is about to happen: a title, and rows of a name and its sentence, wrapped to the width."""
        rows = list(rows)
        self.say(title, bold=True)
        indent = 2 + max(len(name) for name, _ in rows) + 2
        width = max(30, self._console.width - indent)
        for name, sentence in rows:
            whole = {"break_long_words": False, "break_on_hyphens": False}  # so that a path can be copied
            lines = textwrap.wrap(sentence, width, **whole) if self.is_live else [sentence]
            self.say(f"  {name.ljust(indent - 2)}{lines[0]}")
            for line in lines[1:]:
                self.say(" " * indent + line)

    @contextmanager
    def stage(self, what: str, detail: Callable[[], str] | None = None) -> Iterator[None]:
        """Something without a known length: what it is and for how long it has been going on.

        Args:
            detail: what to show beside it, asked again and again.
        """
        if not self.is_live:
            self.say(what)
            yield
            return

        def said(task: Task) -> list[str]:
            return [*([detail()] if detail else []), duration(task.elapsed or 0)]

        with self._task(what, None, said):
            yield

    @contextmanager
    def progress(
        self, what: str, total: int, done: int = 0, unit: str = ""
    ) -> Iterator[Callable[[int, str], None]]:
        """Something of a known length; gives a function to call with how many are done more, and what to show.

        Args:
            what: in a word or two.
            total: its length.
            done: of it, before.
            unit: what is counted, for plain lines; with one, the last line is always there.
        """
        meter = _Meter(total, done)
        if not self.is_live:
            told = meter.began

            def advance(count: int, about: str = "") -> None:
                nonlocal told
                meter.advance(count)
                now, tenth = time.monotonic(), max(1, total // 10)
                due = meter.done % tenth < count and now - told >= _OFTEN
                last = meter.done == total and (unit or now - meter.began >= _OFTEN)
                if due or now - told >= _SELDOM or last:
                    told = now
                    parts = (f"{what} {unit} {meter.done}/{total}".replace("  ", " "), about, meter.left())
                    self.say("  ".join(part for part in parts if part))

            yield advance
            return
        text = ""

        def said(task: Task) -> list[str]:
            return [part for part in (f"{meter.done}/{total}", *text.split("  "), meter.left()) if part]

        with self._task(what, total, said, done) as (bar, task):

            def advance_bar(count: int, about: str = "") -> None:
                nonlocal text
                meter.advance(count)
                text = about
                bar.update(task, completed=meter.done)

            yield advance_bar

    def track(self, items: Sequence[T], what: str) -> Iterator[T]:
        """The items, with progress while they are worked on."""
        with self.progress(what, len(items)) as advance:
            for item in items:
                yield item
                advance(1, "")

    @contextmanager
    def _task(
        self, what: str, total: int | None, said: Callable[[Task], list[str]], done: int = 0
    ) -> Iterator[tuple[Progress, TaskID]]:
        """A line at the foot of the terminal; tasks within tasks are further lines."""
        progress = self._progress
        outermost = progress is None
        if progress is None:
            said_column = _Said(table_column=Column(no_wrap=True, justify="right"))
            progress = self._progress = said_column.progress = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None),
                said_column,
                console=self._console, expand=True, transient=True, refresh_per_second=4,
            )  # fmt: skip
            progress.start()
        task = progress.add_task(what, total=total, completed=done, said=said)
        try:
            yield progress, task
        finally:
            progress.remove_task(task)
            if outermost:
                self._progress = None
                progress.stop()


class _Said(ProgressColumn):
    """What a task says of itself now: the parts of it that fit beside its name and a short bar."""

    progress: Progress

    def render(self, task: Task) -> Text:
        names = max(len(other.description) for other in self.progress.tasks)
        room = self.progress.console.width - names - _SHORTEST_BAR - 3
        parts = task.fields["said"](task)
        while len(parts) > 2 and len("  ".join(parts)) > room:
            del parts[-2]  # the count and the time stay
        return Text("  ".join(parts))


class _Meter:
    """How much is done, and how long the rest takes at the pace so far."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self.first = total, done, done
        self.began = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count

    def left(self) -> str:
        """An estimate, from the second item on."""
        if self.done - self.first < 2 or self.done >= self.total:
            return ""
        pace = (time.monotonic() - self.began) / (self.done - self.first)
        return f"{duration(pace * (self.total - self.done))} left"


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    whole = round(seconds)
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def fixed(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number with so many decimals; what rounds to 0 has no sign."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


terminal = Terminal()
