"""One screen of ratios at the end: pairs timed in turn on one machine are what counts."""

from __future__ import annotations

RATIOS: list[tuple[str, str, float, str]] = []  # (what, against what, ratio, goal)


def add_ratio(what: str, against: str, ratio: float, goal: str = "") -> None:
    """Show ``what / against = ratio`` in the summary."""
    RATIOS.append((what, against, ratio, goal))


def pytest_terminal_summary(terminalreporter):
    if not RATIOS:
        return
    terminalreporter.section("ratios, pair by pair (time of the first over time of the second)")
    for what, against, ratio, goal in RATIOS:
        terminalreporter.write_line(f"{what:<44} {against:<34} {ratio:6.2f}   {goal}")
