"""``docs/reproduce_small.md`` and its picture, from results files alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks.reproduce_small.measures import MAIN, MEASURES
from benchmarks.reproduce_small.plan import RATES, SELECT_SEED
from benchmarks.reproduce_small.runs import ROOT
from benchmarks.reproduce_small.statement import AGAIN, SUPPORT, about_steps, verdict
from benchmarks.reproduce_small.table import render, render_others, render_selection
from benchmarks.results import read

FIRST = {  # what the first run's file does not say
    "first_seed": 0,
    "prompts": {"1": 20, "2": 160, "4": 12},
    "documents": 24,
    "jobs": 1,
}


def write() -> None:
    """The page and its picture."""
    path, contents = recorded()[-1]
    (ROOT / "docs" / "reproduce_small.md").write_text(page(path, contents), encoding="utf-8")
    draw(contents["table"], ROOT / "docs" / "reproduce_small.png")
    print("wrote docs/reproduce_small.md, docs/reproduce_small.png")


def recorded() -> list[tuple[str, dict]]:
    """The files of these comparisons with their paths, oldest first; those that chose no rates were others."""
    found = [(path, FIRST | contents) for path, contents in read("reproduce_small")]
    return [(path, contents) for path, contents in found if "select" in contents["table"]]


def page(path: str, contents: dict) -> str:
    """The page of a results file."""
    table = contents["table"]
    return PAGE.format(
        support=SUPPORT.format(rates=", ".join(f"{rate:g}" for rate in RATES), seed=SELECT_SEED),
        again=AGAIN,
        verdict=fill(verdict(table)),
        table=render(table),
        others=render_others(table),
        steps=fill(about_steps(table)),
        selection=render_selection(table["select"]),
        samples=2 * contents["prompts"]["2"],
        counts=", ".join(map(str, contents["prompts"].values())),
        documents=contents["documents"],
        date=contents["date"],
        processor=contents["machine"]["processor"],
        jobs=contents["jobs"],
        minutes=f"{table['minutes']:.0f}",
        torch=contents["versions"]["torch"],
        file=path,
        not_run=fill("Planned and not run: " + ("; ".join(table["not_run"]) or "nothing") + "."),
    )


def fill(text: str) -> str:
    """Lines of at most 116 characters."""
    return textwrap.fill(text, 116, break_long_words=False, break_on_hyphens=False)


PAGE = """# SFT and REFINE from one small model

Written by `make reproduce-small` (`python -m benchmarks.reproduce_small --record`); what it does stands
there; `--page` writes this page again from the results files alone. From the package's tiny model, which finds
needles, on sequences of 1,024 tokens.

## What would count as support

Written and committed before any run of an arm had a result, the choice of the learning rates included (the log
of this file has it). Only the model as it is and SFT in two pilots, named at the end, had been measured by
then.

{support}

## How a second run is judged

{again}

## What came out

{verdict}

The interval is over {samples} prompts and the seeds, item by item. {date}; {minutes} minutes of all runs
together, {jobs} at a time of one thread each, on {processor}, torch {torch} ([file](../{file})).

{not_run}

Columns of REFINE and of "SFT, REFINE's time" (which takes as many more updates as REFINE's take time) are
differences from SFT of equal updates, those of plain text from SFT on plain text; item by item, with 95 %
intervals over items and seeds; bold where the interval leaves 0 out. Few seeds make such intervals somewhat too
narrow. Found: greedy decoding begins with the right number. {counts} prompts a task at 1,024, 2,048 and 4,096
tokens; {documents} held-out documents.

{table}

![differences from SFT](reproduce_small.png)

## Is it more than a smaller step?

{others}

Added after the main pair had been looked at, so it decides nothing. These 50 updates cost the model needles at
twice the training length (the model before stands in the first column), and gradients are clipped to a norm of
1 in sum and divided by their own size in AdamW. The policy gradient adds to that size (in the main runs mean
norms of 1.7 for 1.4), so REFINE moves about 0.8 times as far along the next-token loss as SFT does. SFT at 0.8
times its rate shows how much of a difference such a smaller step makes by itself.

{steps}

## Learning rates

{selection}

Each side from one run of its own; the bold rate has the fewest nats of the right answers. The lowest rate tried
was best for both; with the larger ones fewer needles are found. Whether a still lower one would be better was
not asked.

## Tried before

An older model that found no needle, 160 updates at 1e-4 on text half of which was recall documents, three seeds
(2026-11-24, [file](../benchmarks/results/reproduce_small_cpu_20261124_0414.json)): REFINE read more random
tokens again than SFT (+0.022, +0.019, +0.006 after 32, 64, 128), gave a needle's answer fewer nats (-0.049 at
1,024, -0.037 at 2,048 tokens of prose, neither certain), and was 0.0033 nats worse in held-out loss; with c =
32 all of that was larger, and the loss no worse. Before the statement was written, one SFT run of 40 updates at
3e-4 on each of two texts (half needle documents, half recall documents; 32 other needles) was looked at to
choose the text; no REFINE run had been made.
"""


def draw(table: dict, path: Path) -> None:
    """Differences from SFT in units of SFT's own change from the model before would divide by noise; so each
    measure is drawn in the standard error of its difference: beyond the grey band the interval leaves 0 out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = table["measures"]
    arms = [arm for arm in table["arms"] if "difference" in rows[arm][MAIN]]
    names = list(MEASURES)
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(names) + 1.6), layout="constrained")
    axes.axvspan(-1.96, 1.96, color="0.92", zorder=0)
    axes.axvline(0, color="0.5", linewidth=0.8)
    for place, arm in enumerate(arms):
        at, values = [], []
        for row, name in enumerate(names):
            one, sign = rows[arm][name], MEASURES[name][1]
            low, high = one["interval"]
            error = (high - low) / 3.92
            if error > 0:
                at.append(row + (place - (len(arms) - 1) / 2) * 0.14)
                values.append(sign * one["difference"] / error)
        axes.plot(values, at, "os^DvP"[place % 6], markersize=4, label=arm)
    axes.set_yticks(range(len(names)), [MEASURES[name][0] for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("better than SFT on the same text, in standard errors of the difference")
    axes.grid(axis="y", color="0.95")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
