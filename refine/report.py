"""``python -m refine.report RUN [RUN ...]``: one page of one run, or of several laid over one another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refine.files import why
from refine.reporting import ReportError, write_report


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when the report is written, 2 with one sentence when it cannot be."""
    parser = argparse.ArgumentParser(
        prog="refine report",
        description="Write one self-contained HTML page of a run: curves, documents with each token's entropy, "
        "rollouts beside the true continuation, needles. Several runs are laid over one another, with the settings "
        "that differ first.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of an evaluation"
    )
    parser.add_argument(
        "--output_file", type=Path, help="default: report.html in the run's folder; of several runs, here"
    )
    given = parser.parse_args(arguments)
    output = given.output_file
    if output is None:
        output = given.runs[0] / "report.html" if len(given.runs) == 1 else Path("report.html")
    try:
        print(f"report   {write_report(given.runs, output)}")
    except ReportError as error:
        print(f"refine.report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"refine.report: {why(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
