"""Two independent runs side by side: which rows agree, and the pooled differences, as ``statement.AGAIN`` says."""

from __future__ import annotations

from benchmarks.reproduce_small.measures import MAIN, MEASURES
from benchmarks.reproduce_small.table import cell, label

COUNTS = ("overlap", "inside", "sure", "twice")


def pooled(*ones: dict) -> dict:
    """The mean of differences weighted by their seeds; its interval from the intervals as standard errors."""
    weights = [len(one["differences"]) / sum(len(one["differences"]) for one in ones) for one in ones]
    mean = sum(weight * one["difference"] for weight, one in zip(weights, ones))
    error = sum((weight * _error(one)) ** 2 for weight, one in zip(weights, ones)) ** 0.5
    return {"difference": mean, "interval": [mean - 1.96 * error, mean + 1.96 * error]}


def counted(first: dict[str, dict], second: dict[str, dict]) -> dict[str, int]:
    """Of rows that both have with intervals of some width: how many overlap; how many of the second's differences
    lie in the first's interval; how many of the first's leave 0 out, and the second's on the same side."""
    names = [name for name in MEASURES if _error(first[name]) > 0 and _error(second[name]) > 0]
    found = dict.fromkeys(("rows", *COUNTS), 0)
    for name in names:
        (low, high), (other_low, other_high) = first[name]["interval"], second[name]["interval"]
        found["rows"] += 1
        found["overlap"] += low <= other_high and other_low <= high
        found["inside"] += low <= second[name]["difference"] <= high
        found["sure"] += low * high > 0
        found["twice"] += low * high > 0 and other_low * other_high > 0 and low * other_low > 0
    return found


def both(first: dict, second: dict) -> dict[str, tuple[dict, dict]]:
    """The arms that two tables have differences of: the measures of either."""
    arms = [arm for arm in first["measures"] if arm in second["measures"]]
    pairs = {arm: (first["measures"][arm], second["measures"][arm]) for arm in arms}
    return {arm: pair for arm, pair in pairs.items() if all("difference" in one[MAIN] for one in pair)}


def in_words(first: dict, second: dict) -> str:
    """The main comparison of either run and of both, and how many rows agree beside what was expected."""
    pair = [table["measures"]["REFINE"][MAIN] for table in (first, second)]
    (low, high), (other_low, other_high) = (one["interval"] for one in pair)
    says = (
        "overlap: the runs agree" if low <= other_high and other_low <= high else "lie apart: the runs differ"
    )
    together = pooled(*pair)
    points = " to ".join(f"{100 * end:+.2f}" for end in together["interval"])
    return (
        f"The intervals of the main comparison {says}. Pooled, REFINE minus SFT is "
        f"{100 * together['difference']:+.2f} points of needles found ({points}). {_rows_in_words(first, second)}"
    )


def _rows_in_words(first: dict, second: dict) -> str:
    counts = {arm: counted(*pair) for arm, pair in both(first, second).items()}
    refine, total = counts["REFINE"], _sum(counts)
    shares = {name: total[name] / max(1, total["rows"]) for name in ("overlap", "inside")}
    text = (
        f"Of {refine['rows']} rows of REFINE minus SFT the intervals overlap in {refine['overlap']} (expected "
        f"99.4 %), and the second run's difference lies in the first's interval in {refine['inside']} (83 %); of "
        f"{refine['sure']} rows that left 0 out in the first run {refine['twice']} were found twice. Of the "
        f"{total['rows']} rows of all arms that both runs have it is {100 * shares['overlap']:.0f} % and "
        f"{100 * shares['inside']:.0f} %"
    )
    if shares["overlap"] < 0.994 and shares["inside"] < 0.83:
        text += (
            ", fewer than expected: an interval of one to three seeds knows too little of how seeds differ"
        )
    return f"{text}."


def _sum(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    return {name: sum(one[name] for one in counts.values()) for name in ("rows", *COUNTS)}


def render_counts(first: dict, second: dict) -> str:
    """Markdown: the counts of every arm, and their sum."""
    lines = [
        "| | seeds, first / second | rows | intervals overlap | second's difference in the first's interval "
        "| first's leaves 0 out | of these, found twice |",
        "|---" * 7 + "|",
    ]
    pairs = both(first, second)
    counts = {arm: counted(*pair) for arm, pair in pairs.items()}
    for arm, pair in pairs.items():
        seeds = " / ".join(str(len(one[MAIN]["differences"])) for one in pair)
        lines.append(_counts(arm, seeds, counts[arm]))
    lines.append(_counts("all", "", _sum(counts)))
    return "\n".join(lines)


def render_pair(first: dict, second: dict, arm: str = "REFINE") -> str:
    """Markdown: an arm's rows, of the first run, of the second, and pooled."""
    lines = [f"| {arm} minus SFT | first run | second run | pooled |", "|---" * 4 + "|"]
    ones, others = both(first, second)[arm]
    for name in MEASURES:
        cells = (ones[name], others[name], pooled(ones[name], others[name]))
        lines.append(f"| {label(name)} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def _counts(arm: str, seeds: str, count: dict[str, int]) -> str:
    rows = max(1, count["rows"])
    shares = (f"{count[name]} ({100 * count[name] / rows:.0f} %)" for name in ("overlap", "inside"))
    return f"| {arm} | {seeds} | {count['rows']} | " + " | ".join(
        [*shares, str(count["sure"]), str(count["twice"])]
    ) + " |"  # fmt: skip


def _error(one: dict) -> float:
    low, high = one["interval"]
    return (high - low) / 3.92
