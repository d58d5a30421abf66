"""Charts as SVG that follow the page's colours, drawn by matplotlib.

Colours are written as placeholders and replaced by the page's CSS variables, so that one drawing serves light and
dark. Long curves are thinned: each point is the mean of as many updates as needed, in a band from their least to
their most.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from refine.evaluation.report import NeedleShares
from refine.pictures import import_matplotlib
from refine.training.plots import running_mean

POINTS = 300  # of a curve
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = [f"#0000{number:02x}" for number in range(0x10, 0x18)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid"} | {
    color: f"s{number}" for number, color in enumerate(_SERIES)
}
SERIES = len(_SERIES)  # colours; further curves begin anew
_STROKES, _MARKERS = ("-", (0, (4, 1.5)), ":"), "osD"  # of several curves of one colour
_SIZE = (4.3, 2.5)  # inches


class Curve(NamedTuple):
    """One line of a chart."""

    label: str  # empty: not in the legend
    points: list[tuple[int, float]]  # (update, value)
    color: int  # number of a series
    dots: bool = False  # single measurements, joined by a thin line
    smooth: bool = True  # a running mean over the values
    intervals: list[tuple[float, float]] | None = None  # of every dot


class Thin(NamedTuple):
    """A curve of at most :data:`POINTS` points; each stands for ``per_point`` values."""

    steps: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    most: np.ndarray
    per_point: int


def thin(points: Sequence[tuple[int, float]], at_most: int = POINTS) -> Thin:
    """Means, least and most of stretches of a curve, in order."""
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    per_point = max(1, math.ceil(len(steps) / at_most))
    begins = np.arange(0, len(steps), per_point)
    counts = np.diff(np.append(begins, len(steps)))
    return Thin(
        np.add.reduceat(steps, begins) / counts if per_point > 1 else steps,
        np.add.reduceat(values, begins) / counts if per_point > 1 else values,
        np.minimum.reduceat(values, begins),
        np.maximum.reduceat(values, begins),
        per_point,
    )


def draw_curves(name: str, curves: Sequence[Curve], up: str, logarithmic: bool = False) -> str:
    """A chart over updates.

    Args:
        name: for those who cannot see it, and to tell drawings apart.
        curves: at least one, with at least one point.
        up: what the axis says.
        logarithmic: whether the axis is, where the values are over 0 and span a factor of 20.
    """
    with _figure() as figure:
        axes = figure.add_subplot()
        pale = 0.25 if len({curve.color for curve in curves}) > 1 else 0.4
        named = Counter()  # curves so far by colour and kind: the next of a colour has another stroke
        for curve in curves:
            color = _SERIES[curve.color % SERIES]
            before = named[color, curve.dots]
            named[color, curve.dots] += bool(curve.label)
            if curve.dots:
                _draw_dots(axes, curve, color, _MARKERS[before % len(_MARKERS)])
                continue
            line = thin(curve.points)
            stroke = {
                "color": color,
                "linestyle": _STROKES[before % len(_STROKES)],
                "label": curve.label or None,
            }
            if line.per_point > 1:
                axes.fill_between(line.steps, line.least, line.most, color=color, alpha=0.18, linewidth=0)
                axes.plot(line.steps, line.mean, linewidth=1.4, **stroke)
                continue
            if not curve.smooth:
                axes.plot(line.steps, line.mean, linewidth=1.6, **stroke)
                continue
            axes.plot(line.steps, line.mean, color=color, linewidth=0.8, alpha=pale)
            axes.plot(line.steps, running_mean(line.mean), linewidth=1.6, **stroke)
        values = [value for curve in curves for _, value in curve.points]
        if logarithmic and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        _finish(axes, "update", up)
        if len(curves) > 1:
            _legend(axes)
        return _svg(figure, name)


def draw_samples(name: str, groups: Sequence[Curve], up: str) -> str:
    """Points over updates, several at one update, with a line through their means."""
    with _figure() as figure:
        axes = figure.add_subplot()
        for curve in groups:
            color = _SERIES[curve.color % SERIES]
            steps, values = np.array(curve.points, np.float64).T
            axes.plot(steps, values, "o", color=color, markersize=3, alpha=0.45, markeredgewidth=0)
            places = np.unique(steps)
            means = [values[steps == place].mean() for place in places]
            axes.plot(
                places, means, "-o", color=color, markersize=5, linewidth=1.4, label=curve.label or None
            )
        _finish(axes, "update", up)
        _legend(axes)
        return _svg(figure, name)


def draw_needles(task: str, needles: NeedleShares) -> str:
    """A heat map: the share of needles found, by the prompt's length and the needle's depth."""
    lengths, share = needles
    with _figure() as figure:
        axes = figure.add_subplot()
        axes.set_facecolor(_GRID)  # no needle of that depth
        edges = np.arange(len(lengths) + 1), np.arange(share.shape[0] + 1)
        axes.pcolormesh(*edges, np.ma.masked_invalid(share), vmin=0, vmax=100, cmap="YlGnBu")
        for (row, column), value in np.ndenumerate(share):
            if not np.isnan(value):
                ink = "#fefefe" if value > 60 else "#111111"
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", size=7, color=ink
                )
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths])
        axes.set_yticks(np.arange(0, 11, 2), [f"{10 * tenth} %" for tenth in range(0, 11, 2)])
        axes.invert_yaxis()
        _finish(axes, "tokens of prompt and answer", "depth of the needle", grid=False)
        return _svg(figure, f"{task}: needles found, in percent")


def _draw_dots(axes: Any, curve: Curve, color: str, marker: str) -> None:
    steps, values = zip(*curve.points)
    if curve.intervals is not None:
        reach = [
            [max(0.0, value - low) for value, (low, _) in zip(values, curve.intervals)],
            [max(0.0, high - value) for value, (_, high) in zip(values, curve.intervals)],
        ]
        axes.errorbar(
            steps, values, reach, fmt=f"{marker}--", color=color, markersize=4, linewidth=1, capsize=3,
            label=curve.label or None,
        )  # fmt: skip
    else:
        axes.plot(
            steps, values, f"{marker}--", color=color, markersize=4, linewidth=1, label=curve.label or None
        )


@contextmanager
def _figure() -> Iterator[Any]:
    """An empty figure; texts stay texts, and a dollar sign is one."""
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "refine", "text.parse_math": False, "font.size": 8.5,
        "text.color": _INK, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "figure.facecolor": "none", "savefig.facecolor": "none", "axes.facecolor": "none",
        "axes.edgecolor": _GRID, "grid.color": _GRID, "axes.unicode_minus": False, "path.simplify": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        yield Figure(figsize=_SIZE, layout="constrained")


def _finish(axes: Any, across: str, up: str, grid: bool = True) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    if grid:
        axes.grid(axis="y", linewidth=0.6)
        axes.margins(x=0.02)


def _legend(axes: Any) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
    axes.legend(frameon=False, fontsize=7.5, loc="best", handlelength=1.4, borderaxespad=0.2)


def _svg(figure: Any, name: str) -> str:
    """The drawing as an element: without its size, its own colours and names that other drawings have too."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' id="(figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)[^"]*"', "", text)
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.S)
    text = re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", text)
    label = name.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
    return head.sub(
        lambda found: f'<svg role="img" aria-label="{label}" viewBox="{found[1]}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text, count=1,
    )  # fmt: skip
