"""The page's paragraphs that are made from figures."""

from __future__ import annotations

import textwrap

from benchmarks.reproduce_small.measures import MAIN, TASKS
from benchmarks.reproduce_small.plan import EQUAL_TIME, LENGTH, RATES, SMALLER_STEPS
from benchmarks.reproduce_small.statement import verdict

NAMES = ("First run", "Second run")
WEIGHED_RUN = "Loss on the answers"
NORMS = {"SFT": 1.4, "REFINE": 1.7}  # of gradients, from the first run's logs; its file lacks them


def what_came_out(name: str, run: tuple[str, dict]) -> str:
    """A run's verdict and how it was made."""
    path, contents = run
    table, first = contents["table"], contents["first_seed"]
    counts = ", ".join(map(str, contents["prompts"].values()))
    made = (
        f"The interval is over {2 * contents['prompts']['2']} prompts and the seeds, item by item. {counts} "
        f"prompts a task at 1,024, 2,048 and 4,096 tokens, {contents['documents']} held-out documents. "
        f"{contents['date']}; {table['minutes']:.0f} minutes of all runs together, "
        f"{contents['jobs']} at a time of one thread each, on {contents['machine']['processor']}, "
        f"torch {contents['versions']['torch']} ([file](../{path})). "
        f"Planned and not run: {'; '.join(table['not_run']) or 'nothing'}."
    )
    seeds = len(table["measures"]["REFINE"][MAIN]["differences"])
    head = f"**{name}** (seeds {first} to {first + seeds - 1})."
    return f"{fill(f'{head} {verdict(table)}')}\n\n{fill(made)}"


def about_pass(path: str, contents: dict) -> str:
    """What an earlier pass of a run said to the main comparison."""
    main = contents["table"]["measures"]["REFINE"][MAIN]
    points = " to ".join(f"{100 * end:+.2f}" for end in main["interval"])
    missing = "; ".join(contents["table"]["not_run"])
    return (
        f"An earlier pass of the same seeds ({contents['date']}, [file](../{path})) was stopped with these arms "
        f"not run: {missing}. It had {100 * main['difference']:+.2f} points ({points}): the two passes differ by "
        "rounding, and for REFINE's time by the number of updates, which follows from a measured time."
    )


def about_cost(tables: list[dict]) -> str:
    """What the updates cost the model, and how long gradients are."""
    found, norms = [], []
    for name, table in zip(NAMES, tables):
        before, after = (table["measures"][arm][MAIN]["mean"] for arm in ("before", "SFT"))
        found.append(f"from {before:.3f} to {after:.3f} with SFT in the {name.lower()}")
        sft, refine = (table["arms"][arm].get("grad_norm", NORMS[arm]) for arm in ("SFT", "REFINE"))
        norms.append(f"{refine:.1f} for {sft:.1f} in the {name.lower()}")
    return (
        "Asked after the main pair of the first run had been looked at, so it decides nothing. These 50 updates "
        f"change the share of needles found at twice the training length {', '.join(found)}, and gradients are "
        "clipped to a norm of 1 in sum and divided by their own size in AdamW. The policy gradient adds to "
        f"that size (mean norms of {', '.join(norms)}), so REFINE moves less far along the next-token loss than "
        "SFT does, about 0.8 times as far. SFT at 0.8 times its rate shows how much of a difference such a "
        "smaller step makes by itself."
    )


def about_steps(table: dict) -> str:
    """What the control says, in words."""
    names = [f"{task}_2x_nats" for task in TASKS]
    beside = [table["measures"]["REFINE"][name] for name in names]
    control = [table["refine_minus"].get(SMALLER_STEPS, {}).get(name) for name in names]
    if not all(control):
        return "SFT at 0.8 times its rate was not run."
    numbers = f"answers at {2 * LENGTH:,} tokens cost REFINE " + " and ".join(
        f"{one['difference']:+.4f} nats beside SFT, {other['difference']:+.4f} beside SFT with the smaller step"
        for one, other in zip(beside, control)
    )
    if all(other["interval"][0] > 0 for other in control):
        says = (
            "SFT with the smaller step gives the answers more probability than REFINE does, so a smaller step is "
            "enough to explain REFINE's gain"
        )
    elif all(other["interval"][1] < 0 for other in control):
        says = "REFINE gives the answers more probability than SFT with the smaller step does, too"
    else:
        says = "REFINE and SFT with the smaller step cannot be told apart"
    text = f"{says}: {numbers} ({', '.join(TASKS)})."
    longer = table["measures"].get(EQUAL_TIME, {}).get(MAIN, {}).get("difference", 0)
    if longer < 0:
        text += (
            f" SFT for REFINE's time makes more of these updates and finds {-100 * longer:.1f} points fewer "
            "needles than SFT; that REFINE is ahead of it is therefore no sign of a better use of the context."
        )
    return text


def about_lesson(table: dict) -> str:
    """What SFT itself learned, beside which a difference is to be read."""
    told = []
    for name, what in (
        (MAIN, f"needles found at {2 * LENGTH:,} tokens"),
        (f"{TASKS[0]}_1x_score", f"{TASKS[0]} at {LENGTH:,}"),
    ):
        before, after = (table["measures"][arm][name]["mean"] for arm in ("before", "SFT"))
        told.append(f"{what}: {100 * before:.1f} to {100 * after:.1f} %")
    text = f"SFT's own lesson, before and after: {'; '.join(told)}."
    rates = [row["rate"] for row in table["select"]["rows"]]
    if set(table["select"]["chosen"].values()) == {min(rates)}:
        text += (
            f" Both sides chose the lowest rate, at which {table['arms']['SFT']['updates']} updates change little, "
            "whichever the gradient: this run excludes a large effect and cannot see a small one."
        )
    return text


def about_rates(tables: list[dict]) -> str:
    """Which rates were chosen, in words."""
    text = "Each side from one run of its own; the bold rate has the fewest nats of the right answers."
    if all(set(table["select"]["chosen"].values()) == {min(RATES)} for table in tables):
        text += " The lowest rate tried was best for both. Whether a still lower one would be better was not asked."
    return text


def about_earlier(path: str, contents: dict) -> str:
    """What an older model showed."""
    refine, more = (contents["table"]["measures"][arm] for arm in ("REFINE", "REFINE, c = 32"))
    updates = contents["table"]["arms"]["REFINE"]["updates"]

    def told(one: dict, names: tuple[str, ...], digits: int = 3) -> str:
        return ", ".join(f"{one[name]['difference']:+.{digits}f}" for name in names)

    copies, nats = ("copy_32", "copy_64", "copy_128"), ("niah_single_2_1x_nats", "niah_single_2_2x_nats")
    return (
        f"An older model that found no needle, {updates} updates at {contents['learning_rate']:g} on text half "
        f"of which was recall documents, {contents['seeds']} seeds ({contents['date']}, [file](../{path})). "
        f"REFINE minus SFT: random tokens read again after 32, 64, 128 {told(refine, copies)}; nats of a needle's "
        f"answer at 1,024 and 2,048 tokens of prose {told(refine, nats)}, neither certain; held-out loss "
        f"{told(refine, ('loss',), 4)}. With c = 32: {told(more, copies)}; {told(more, nats)}; "
        f"{told(more, ('loss',), 4)}. Before the statement was written, one SFT run of 40 updates at 3e-4 on "
        "each of two texts (half needle documents, half recall documents; 32 other needles) was looked at to "
        "choose the text; no REFINE run had been made."
    )


def fill(text: str) -> str:
    """Lines of at most 116 characters."""
    return textwrap.fill(text, 116, break_long_words=False, break_on_hyphens=False)
