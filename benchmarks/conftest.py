"""One screen of ratios at the end: pairs timed in turn on one machine are what counts.

``pytest benchmarks/ --benchmark-only --record`` also appends them to ``benchmarks/results/``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.results import record
from benchmarks.timing import Paired, keep_pages


@dataclass(frozen=True)
class Ratio:
    """``what / against = ratio``: of times unless ``what`` says otherwise. ``low`` and ``high`` are the quartiles
    over ``rounds`` pairs (the ratio itself where there was one)."""

    what: str
    against: str
    ratio: float
    low: float
    high: float
    rounds: int
    goal: str = ""


RATIOS: list[Ratio] = []


def add_ratio(what: str, against: str, found: Paired | float, goal: str = "", times: float = 1.0) -> None:
    """Show a ratio, ``times`` as large as the one found, in the summary."""
    if isinstance(found, Paired):
        numbers = (times * found.ratio, times * found.low, times * found.high, found.rounds)
    else:
        numbers = (times * found, times * found, times * found, 1)
    RATIOS.append(Ratio(what, against, *numbers, goal))


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the ratios to benchmarks/results/")


def pytest_configure(config):
    keep_pages()


def pytest_terminal_summary(terminalreporter, config):
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("what did not run here, and why")
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count:3} x {reason}")
    if not RATIOS:
        return
    terminalreporter.section("ratios, pair by pair (time of the first over time of the second)")
    for r in RATIOS:
        spread = f"({r.low:.2f}-{r.high:.2f}, {r.rounds})" if r.rounds > 1 else ""
        terminalreporter.write_line(f"{r.what:<48} {r.against:<32} {r.ratio:6.2f} {spread:<20} {r.goal}")
    if config.getoption("--record"):
        path = record("ratios", [dataclasses.asdict(r) for r in RATIOS])
        terminalreporter.write_line(f"written to {path}")
