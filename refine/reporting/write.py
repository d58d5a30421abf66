"""From folders to a file: the page is rendered with everything escaped, and replaces nothing but a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refine.files import write_whole
from refine.reporting.collect import ReportError, read_folders
from refine.reporting.page import build_page

_MARK = '<meta name="generator" content="refine report">'


def write_report(folders: Sequence[Path], output_file: Path) -> Path:
    """One page that holds everything it shows, from folders of runs and evaluations.

    Args:
        folders: of ``refine.train`` (metrics.jsonl) and ``refine.eval`` (results.json); several runs are laid over
            one another.
        output_file: an HTML file, whose folder is made where it is missing.

    Returns:
        The file.

    Raises:
        ReportError: a folder is neither, or the file is there and is no report.
        OSError: the file cannot be written.
    """
    output_file = Path(output_file)
    if output_file.is_dir():
        raise ReportError(f"output_file {str(output_file)!r} is a folder: name a file, report.html say")
    if output_file.exists() and not _is_report(output_file):
        raise ReportError(f"output_file {str(output_file)!r} is there and is no report: name another file")
    runs, evaluations = read_folders([Path(folder) for folder in folders])
    if not runs and not evaluations:
        raise ReportError("name at least one folder of a run")
    text = render(build_page(runs, evaluations, charts=_can_draw()))
    output_file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output_file, text.encode("utf-8", "replace").decode("utf-8"))  # lone surrogates
    return output_file


def render(page: dict) -> str:
    """The page's HTML. Only drawings are put in as they are; all other text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["drawing"] = Markup
    return environment.get_template("page.html.jinja").render(page, mark=Markup(_MARK))


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _is_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return _MARK in file.read(1000)
