"""What a command shows: one line that fits, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io
import os
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

import refine.terminal as module
from refine.terminal import Terminal, duration, fixed

STATS = "loss 3.612  reward 0.312  12,345 tok/s  3 skipped"


def opened(width: int = 80, live: bool = True) -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=live, width=width, color_system=None, markup=False, highlight=False
    )
    return Terminal(True, console), file


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (-0.00001, False, "0.0000"),
        (-0.0, True, "0.0000"),
        (0.00004, True, "0.0000"),
        (0.5, True, "+0.5000"),
        (-1e-4, False, "-0.0001"),
    ],
)
def test_what_rounds_to_zero_has_no_sign(value, sign, text):
    assert fixed(value, sign=sign) == text


def test_durations_are_read_like_clocks():
    assert [duration(x) for x in (0.4, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]


@pytest.mark.parametrize("width", [80, 100])
def test_a_live_line_fits_and_says_everything(width):
    terminal, file = opened(width)
    with terminal.progress("mid", 10_000, 9_000, "update") as advance:
        for _ in range(3):
            advance(1, STATS)
        with terminal.stage("tokenising", lambda: "512 sequences"):
            terminal.say("a sentence above the line")
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]", file.getvalue())]
    assert max(map(cell_len, lines)) <= width
    shown = STATS if width == 100 else STATS.removesuffix("  3 skipped")
    assert any(re.match(rf"mid +━+╸?━+ +9003/10000  {shown}  0:\d\d left", line) for line in lines), lines
    assert any(re.match(r"tokenising +━+ +512 sequences  0:00", line) for line in lines), lines
    assert "a sentence above the line" in [line.strip() for line in lines]


def test_a_narrow_terminal_stays_on_one_line():
    terminal, file = opened(40)
    with terminal.progress("mid", 100) as advance:
        advance(1, STATS)
        with terminal.stage("x"):  # draws anew
            pass
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()))
    assert max(map(cell_len, lines)) <= 40 and any("1/100  loss 3.612" in line for line in lines)


def test_a_file_gets_plain_lines_now_and_then(monkeypatch):
    terminal, file = opened(live=False)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    terminal.banner("refine", [("model", "a/long path/" * 12), ("x", "y")])
    with terminal.stage("loading the model"), terminal.progress("mid", 40, unit="update") as advance:
        for _ in range(40):
            now[0] += 1.0
            advance(1, "loss 3.612")
    assert list(terminal.track([1, 2, 3], "evaluating")) == [1, 2, 3]
    text = file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[1] == "  model  " + "a/long path/" * 12 and lines[3] == "loading the model"
    assert lines[4] == "mid update 4/40  loss 3.612  0:36 left"
    assert lines[-1] == "mid update 40/40  loss 3.612" and len(lines) == 4 + 10


def test_other_ranks_are_silent():
    terminal, file = opened()
    terminal.open(shown=False)
    terminal.banner("refine", [("model", "x")])
    with terminal.stage("loading"), terminal.progress("mid", 2) as advance:
        advance(2, STATS)
    assert list(terminal.track([1], "evaluating")) == [1] and file.getvalue() == ""


def test_a_closed_pipe_ends_no_work():
    end, begin = os.pipe()
    with os.fdopen(begin, "w") as file:
        terminal = Terminal(True, module._Console(file=file, markup=False))
        terminal.say("a line")
        os.close(end)
        terminal.say("nobody reads this")
        assert not terminal.shown
        terminal.say("nor this")
        file.write("closing the file writes this, as Python does at its end")
