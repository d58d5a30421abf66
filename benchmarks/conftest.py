"""One screen of ratios at the end: pairs timed in turn on one machine are what counts.

``pytest benchmarks/ --benchmark-only --record`` also appends them to ``benchmarks/results/``. A ratio is measured
in two visits minutes apart (``visit`` in a test's arguments) and taken over the rounds of both: what else a machine
does comes and goes within seconds to minutes, and two calls do not suffer from it alike. (PyTorch's chunked loss,
many times slower than the rest, has one.) On a CPU one thread is
used unless ``--threads`` says otherwise: with every core of a shared machine in use, ratios of two runs lay further
apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks.results import record
from benchmarks.timing import Paired, keep_pages, quartiles

VISITS = (1, 2)
RATIOS: dict[tuple[str, str], dict] = {}  # by what and against


def add_ratio(what: str, against: str, found: Paired | float, goal: str = "", times: float = 1.0) -> None:
    """Show ``what / against``, of times unless ``what`` says otherwise, in the summary.

    Args:
        what, against: names; a further visit's rounds join those of the visit before.
        found: rounds of a comparison, or one number.
        goal: a note beside it.
        times: show so many times the ratio found.
    """
    ratios: Sequence[float] = found.ratios if isinstance(found, Paired) else (found,)
    row = RATIOS.setdefault((what, against), {"ratios": [], "goal": goal})
    row["ratios"] += [times * x for x in ratios]


def table() -> list[dict]:
    """A row for each ratio: its median and quartiles over all rounds."""
    rows = []
    for (what, against), row in RATIOS.items():
        numbers = zip(("low", "ratio", "high"), quartiles(row["ratios"]))
        about = {"rounds": len(row["ratios"]), "goal": row["goal"]}
        rows.append({"what": what, "against": against, **dict(numbers), **about})
    return rows


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the ratios to benchmarks/results/")
    parser.addoption("--threads", type=int, default=1, help="PyTorch's threads on a CPU (default: 1)")


def pytest_configure(config):
    keep_pages()
    if (threads := config.getoption("--threads")) < 1:
        raise pytest.UsageError(f"--threads must be at least 1, got {threads}")
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    """The same inputs in every run."""
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    if "visit" in metafunc.fixturenames:
        metafunc.parametrize("visit", VISITS, ids="visit{}".format)


def pytest_collection_modifyitems(items):
    """Later visits after everything else; pytest's own order otherwise."""
    items.sort(key=lambda item: item.callspec.params.get("visit", 1) if hasattr(item, "callspec") else 1)


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
    rows = table()
    for r in rows:
        spread = "({low:.2f}-{high:.2f}, {rounds})".format(**r) if r["rounds"] > 1 else ""
        terminalreporter.write_line(
            f"{r['what']:<48} {r['against']:<32} {r['ratio']:6.2f} {spread:<20} {r['goal']}"
        )
    if config.getoption("--record"):
        path = record("ratios", rows)
        terminalreporter.write_line(f"written to {path}")
