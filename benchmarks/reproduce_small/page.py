"""``docs/reproduce_small.md`` and its picture, from results files alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reproduce_small import agreement
from benchmarks.reproduce_small.measures import MAIN, MEASURES
from benchmarks.reproduce_small.plan import (
    EQUAL_TIME,
    LOWER_RATES,
    ORDER,
    RATES,
    SELECT_SEED,
    SMALLER_STEPS,
    VARIANTS,
    WEIGHED,
)
from benchmarks.reproduce_small.runs import ROOT
from benchmarks.reproduce_small.statement import AGAIN, ANSWERS, SUPPORT
from benchmarks.reproduce_small.table import render, render_others, render_selection
from benchmarks.reproduce_small.words import (
    NAMES,
    WEIGHED_RUN,
    about_cost,
    about_earlier,
    about_lesson,
    about_pass,
    about_rates,
    about_steps,
    fill,
    what_came_out,
)
from benchmarks.results import read

FIRST = {  # what the first run's file does not say
    "first_seed": 0,
    "prompts": {"1": 20, "2": 160, "4": 12},
    "documents": 24,
    "jobs": 1,
}
SFT_ARMS = (EQUAL_TIME, SMALLER_STEPS)
Run = tuple[str, dict]  # path from the project's root, contents


def write() -> None:
    """The page and its picture."""
    runs = recorded()
    (ROOT / "docs" / "reproduce_small.md").write_text(page(runs, weighed()), encoding="utf-8")
    draw([contents["table"] for _, contents in runs], ROOT / "docs" / "reproduce_small.png")
    print("wrote docs/reproduce_small.md, docs/reproduce_small.png")


def recorded() -> list[Run]:
    """The newest file from seed 0 and, if there is one, the newest from another seed."""
    found = {contents["first_seed"] > 0: (path, contents) for path, contents in _plain()}
    return [found[again] for again in sorted(found)]


def _plain() -> list[Run]:
    """All files of the comparison with the plain loss, oldest first; others are ``earlier`` or ``weighed``."""
    return [
        (path, FIRST | contents)
        for path, contents in read("reproduce_small")
        if "select" in contents["table"] and "answer_weight" not in contents.get("settings", {})
    ]


def passes_before(run: Run) -> list[Run]:
    """Older files of the same seeds: a run that was stopped, and made again as a whole."""
    return [one for one in _plain() if one[1]["first_seed"] == run[1]["first_seed"] and one[0] != run[0]]


def weighed() -> Run | None:
    """The newest comparison with the loss on the answers."""
    return next(
        (run for run in read("reproduce_small")[::-1] if "answer_weight" in run[1].get("settings", {})), None
    )


def earlier() -> Run:
    """The comparison of a model that found no needle."""
    return next((path, one) for path, one in read("reproduce_small") if "select" not in one["table"])


def page(runs: list[Run], answers: Run | None = None) -> str:
    """All of it: the runs with the plain loss, and that with the loss on the answers."""
    tables = [contents["table"] for _, contents in runs]
    variants = [table for table in tables if set(VARIANTS[1:]) & set(table["refine_minus"])]
    return PAGE.format(
        support=SUPPORT.format(rates=", ".join(f"{rate:g}" for rate in RATES), seed=SELECT_SEED),
        again=AGAIN,
        out="\n\n".join(
            part
            for name, run in _named(runs)
            for part in (what_came_out(name, run), *(fill(about_pass(*one)) for one in passes_before(run)))
        ),
        together=TOGETHER.format(
            words=fill(agreement.in_words(*tables)),
            counts=agreement.render_counts(*tables),
            pair=agreement.render_pair(*tables),
        )
        if len(tables) == 2
        else "",
        tables="\n\n".join(f"### {name}\n\n{render(one['table'])}" for name, (_, one) in _named(runs)),
        others="\n\n".join(
            f"{name}:\n\n{render_others(one['table'], SFT_ARMS)}" for name, (_, one) in _named(runs)
        ),
        cost=fill(about_cost(tables)),
        steps="\n\n".join(fill(f"{name}: {about_steps(one['table'])}") for name, (_, one) in _named(runs)),
        variants=render_others(variants[-1], VARIANTS) if variants else "Not run yet.",
        selection="\n\n".join(
            f"{name}:\n\n{render_selection(one['table']['select'])}" for name, (_, one) in _named(runs)
        ),
        rates=fill(about_rates(tables)),
        answers=ANSWERS.format(**WEIGHED, rates=", ".join(f"{rate:g}" for rate in LOWER_RATES)),
        answers_out=_of_answers(answers) if answers else "Not run yet.",
        earlier=fill(about_earlier(*earlier())),
    )


def _of_answers(run: Run) -> str:
    table = run[1]["table"]
    parts = [what_came_out(WEIGHED_RUN, run), fill(about_lesson(table)), render(table)]
    if table["refine_minus"]:
        parts += [render_others(table, SFT_ARMS), fill(about_steps(table))]
    return "\n\n".join([*parts, render_selection(table["select"])])


def _named(runs: list[Run]) -> list[tuple[str, Run]]:
    return list(zip(NAMES, runs))


PAGE = """# SFT and REFINE from one small model

Written by `make reproduce-small` (`python -m benchmarks.reproduce_small --record`); what it does stands
there; `--page` writes this page again from the results files alone. From the package's tiny model, which finds
needles, on sequences of 1,024 tokens. The second run is `--first_seed 5`.

## What would count as support

Written and committed before any run of an arm had a result, the choice of the learning rates included (the log
of this file has it). Only the model as it is and SFT in two pilots, named at the end, had been measured by
then.

{support}

## How a second run is judged

{again}

## What came out

{out}
{together}
## All arms

Columns of REFINE and of "SFT, REFINE's time" (which takes as many more updates as REFINE's take time) are
differences from SFT of equal updates, those of plain text from SFT on plain text; item by item, with 95 %
intervals over items and seeds; bold where the interval leaves 0 out. Few seeds make such intervals somewhat too
narrow. Found: greedy decoding begins with the right number.

{tables}

![differences from SFT](reproduce_small.png)

## Is it more than a smaller step?

{others}

{cost}

{steps}

## Positions, reward, chunks

{variants}

REFINE with positions by entropy, the cosine reward and c = 8, minus REFINE with one of these changed.

## Learning rates

{selection}

{rates}

## With the loss on the answers

{answers}

{answers_out}

## Tried before

{earlier}
"""
TOGETHER = """
## Both runs together

{words}

{counts}

{pair}
"""


def draw(tables: list[dict], path: Path) -> None:
    """A panel a run: each difference in its standard error; beyond the grey band the interval leaves 0 out. (In
    units of SFT's own change from the model before one would divide by noise.)"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(MEASURES)
    size = (9 if len(tables) == 1 else 14, 0.32 * len(names) + 1.6)
    figure, panels = plt.subplots(
        1, len(tables), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    drawn = [
        arm
        for arm in ORDER
        if any("difference" in one["measures"].get(arm, {}).get(MAIN, {}) for one in tables)
    ]
    for axes, table, title in zip(panels[0], tables, NAMES):
        axes.axvspan(-1.96, 1.96, color="0.92", zorder=0)
        axes.axvline(0, color="0.5", linewidth=0.8)
        for place, arm in enumerate(drawn):
            at, values = [], []
            for row, name in enumerate(names):
                one = table["measures"].get(arm, {}).get(name, {})
                low, high = one.get("interval", (0, 0))
                if high > low:
                    at.append(row + (place - (len(drawn) - 1) / 2) * 0.12)
                    values.append(MEASURES[name][1] * one["difference"] / (high - low) * 3.92)
            axes.plot(values, at, "os^DvPX"[place], markersize=4, linestyle="", label=arm)
        axes.set_yticks(range(len(names)), [MEASURES[name][0] for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(title.lower(), fontsize=9)
        axes.set_xlabel("better than SFT on the same text, in standard errors of the difference", fontsize=8)
        axes.grid(axis="y", color="0.95")
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
