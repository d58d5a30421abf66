"""Sums: means, differences item by item with their intervals, and tables of them."""

from __future__ import annotations

import numpy as np

from benchmarks.reproduce_small.measures import MAIN, MEASURES, NEEDLES, TASKS
from benchmarks.reproduce_small.plan import BASES, EQUAL_TIME, ORDER, SMALLER_STEPS, VARIANTS


def summarize(found: list[dict], ratios: dict[str, float]) -> dict:
    """The table: for each arm and measure the mean, the difference from what it is compared with (``BASES``, else
    SFT of equal updates) over the seeds that both have, and its interval."""
    arms = [name for name in ORDER if any(one["arm"] == name for one in found)]
    by_arm = {arm: {one["seed"]: one for one in found if one["arm"] == arm} for arm in arms}
    before = next(one for one in found if one["arm"] == "before")
    rows: dict = {"before": {name: {"mean": float(np.mean(before["items"][name]))} for name in MEASURES}}
    for arm, ones in by_arm.items():
        base = {} if arm in ("SFT", *BASES.values()) else by_arm.get(BASES.get(arm, "SFT"), {})
        rows[arm] = {}
        for name in MEASURES:
            means = [float(np.mean(ones[seed]["items"][name])) for seed in sorted(ones)]
            rows[arm][name] = {"mean": float(np.mean(means)), "seeds": means} | _compare(ones, base, name)
    others = {
        arm: {name: _compare(by_arm["REFINE"], by_arm[arm], name) for name in MEASURES}
        for arm in (EQUAL_TIME, SMALLER_STEPS, *VARIANTS)
        if arm in by_arm and "REFINE" in by_arm
    }
    about = {
        arm: {
            "updates": next(iter(ones.values()))["steps"],
            "seeds": len(ones),
            "time_of_an_update": ratios.get(arm, 1.0),
        }
        | _norms(ones)
        for arm, ones in by_arm.items()
    }
    return {"measures": rows, "arms": about, "refine_minus": others}


def _norms(ones: dict[int, dict]) -> dict:
    """The mean norm of the gradients, where every run has noted it."""
    norms = [one.get("grad_norm") for one in ones.values()]
    return {} if None in norms else {"grad_norm": float(np.mean(norms))}


def _compare(ones: dict[int, dict], base: dict[int, dict], name: str) -> dict:
    """Of the seeds that both have; nothing where there are none."""
    both = sorted(set(ones) & set(base))
    if not both:
        return {}
    difference = np.array(
        [np.array(ones[seed]["items"][name]) - np.array(base[seed]["items"][name]) for seed in both]
    )
    return {
        "difference": float(difference.mean()),
        "interval": interval(difference),
        "differences": difference.mean(1).tolist(),
    }


def interval(difference: np.ndarray, draws: int = 4000) -> list[float]:
    """95 % interval of the mean of [seeds, items], by resampling both."""
    rng = np.random.default_rng(0)
    seeds, items = difference.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # [draws, seeds]
    of_items = rng.multinomial(items, np.full(items, 1 / items), size=draws) / items
    means = ((of_seeds @ difference) * of_items).sum(1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def render(table: dict) -> str:
    """Markdown: one row a measure, one column an arm; a difference whose interval leaves 0 out is bold."""
    rows, about = table["measures"], table["arms"]
    arms = list(about)
    lines = ["| | before | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    lines.append("| updates | - | " + " | ".join(str(about[arm]["updates"]) for arm in arms) + " |")
    lines.append("| seeds | - | " + " | ".join(str(about[arm]["seeds"]) for arm in arms) + " |")
    ratio = " | ".join(f"{about[arm]['time_of_an_update']:.2f}" for arm in arms)
    lines.append(f"| time of an update / SFT | - | {ratio} |")
    for name in MEASURES:
        cells = [f"{rows['before'][name]['mean']:.4f}"]
        for arm in arms:
            one = rows[arm][name]
            cells.append(cell(one) if "difference" in one else f"{one['mean']:.4f}")
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_others(table: dict, arms: tuple[str, ...]) -> str:
    """Markdown: REFINE minus some of the arms, where they are there."""
    others = {arm: one for arm, one in table["refine_minus"].items() if arm in arms}
    if not others:
        return "Nothing to compare."
    names = [MAIN, *(f"{task}_{scale}x_nats" for scale in NEEDLES for task in TASKS), "loss", "loss_2x"]
    lines = ["| REFINE minus | " + " | ".join(others) + " |", "|---" * (len(others) + 1) + "|"]
    lines.append(
        "| seeds | " + " | ".join(str(len(one[MAIN]["differences"])) for one in others.values()) + " |"
    )
    for name in names:
        cells = [cell(one[name]) for one in others.values()]
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_selection(select: dict) -> str:
    """Markdown: what each learning rate gave; the chosen ones are bold."""
    lines = [
        "| side | rate | nats a token of the answer | needles found | held-out loss |",
        "|---" * 5 + "|",
    ]
    for row in select["rows"]:
        numbers = f"{row['nats']:.3f} | {row['needles']:.3f} | {row['loss']:.4f}"
        best = "**" if select["chosen"][row["arm"]] == row["rate"] else ""
        lines.append(f"| {row['arm']} | {best}{row['rate']:g}{best} | {numbers} |")
    return "\n".join(lines)


def cell(one: dict) -> str:
    low, high = one["interval"]
    text = f"{one['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"**{text}**" if low * high > 0 else text


def label(name: str) -> str:
    label, sign = MEASURES[name]
    return f"{label}{' (less is better)' if sign < 0 else ''}"
