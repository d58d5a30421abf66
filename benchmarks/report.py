"""The tables of docs/results.md and the pictures in ``docs/``, drawn from ``benchmarks/results/`` and nothing else.

``python -m benchmarks.report`` writes what stands between the two markers of docs/results.md, and the pictures;
``--check`` writes nothing and says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import cost_model, roofline
from benchmarks.results import read

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- begin: written by python -m benchmarks.report -->"
END = "<!-- end: written by python -m benchmarks.report -->"
WAYS = ("sft", "shared_prefix", "per_prefix")
NAMES = {"delta_net": "DeltaNet", "gated_deltanet": "Gated DeltaNet", "lact": "LaCT"}


def newest(kind: str, device: str) -> dict[str, tuple[str, dict]]:
    """The last file of a kind, by the name it carries."""
    return {contents.get("name", "delta_net"): (path, contents) for path, contents in read(kind, device)}


def section() -> str:
    """Everything between the markers."""
    parts = [
        "*Measured on a CPU* (times are ratios of neighbours in one run; the machine is named below each table).",
        "",
    ]
    for name, (path, contents) in newest("step_cost", "cpu").items():
        parts += [_step(name, path, contents), ""]
    if Path(ROOT / "docs" / "step_cost.png").exists():
        parts += ["![time of a REFINE step over an SFT step, against T, c and k](step_cost.png)", ""]
    if large := newest("large_step", "cpu"):
        parts += [_large(large), ""]
    for path, contents in list(newest("ratios", "cpu").values())[-1:]:
        parts += [_ratios(path, contents), ""]
    parts += ["*Measured on a GPU.* " + _gpu(), ""]
    parts += [
        "*Counted, on no machine* (`python -m benchmarks.cost_model`; `--memory` counts what a forward keeps).",
        "",
        roofline.table(_gpu_contents()),
        "",
        "![FLOPs a byte and the roof of an H100](roofline.png)",
        "",
        cost_model.tables(),
        cost_model.memory_table(),
    ]
    return "\n".join(parts)


def _where(path: str, contents: dict) -> str:
    about, versions = contents["machine"], contents["versions"]
    gpu = f"{about['gpu']}, " if "gpu" in about else ""
    return (
        f"{contents['date']}, {gpu}{about['threads']} threads of {about['processor']} "
        f"(load {about['load_before']:.1f} before the run), torch {versions['torch']} ([file](../{path}))."
    )


def _step(name: str, path: str, contents: dict) -> str:
    table = contents["table"]
    by_tokens = {row["tokens"]: row for row in table["tokens"]}
    at = by_tokens[8192]
    model = contents.get("model", "DeltaNet, hidden 256, 4 layers, 4 heads of 64")
    lines = [
        f"**{model}**, vocabulary 4,096, float32, batch 1; forward and backward, time over that of an SFT step, "
        f"medians of {at['pairs']} pairs (quartiles).",
        "",
    ]
    for key, symbol, rest in (
        ("tokens", "T", "c = 8, k = 5"),
        ("chunks", "c", "T = 8,192, k = 5"),
        ("length", "k", "T = 8,192, c = 8"),
    ):
        lines.append(f"| {symbol} ({rest}) | " + " | ".join(f"{row[key]:,}" for row in table[key]) + " |")
        lines.append("|---" * (len(table[key]) + 1) + "|")
        cells = (f"{r['ratio']:.2f} ({r['ratio_low']:.2f}-{r['ratio_high']:.2f})" for r in table[key])
        lines += ["| REFINE / SFT | " + " | ".join(cells) + " |", ""]
    memory = table["memory_mb"]
    lines += [
        "| T = 8,192, c = 8, k = 5 | SFT | REFINE, shared prefix | full-prefix recomputation |",
        "|---|---|---|---|",
        f"| time / SFT | 1 | {at['ratio']:.2f} | {table['per_prefix']['ratio']:.1f} |",
        "| peak memory of the step, MB | " + " | ".join(f"{memory[w]:.0f}" for w in WAYS) + " |",
        "",
    ]
    if "uncached_generation" in table:
        extra = table["uncached_generation"]["ratio"]
        lines += [
            "The public code samples each of the c k tokens by reading the whole prefix again, as it "
            f"has no state to go on from: {extra:.1f} SFT steps more, measured; the "
            f"{table['per_prefix']['ratio']:.1f} above sample with our cache.",
            "",
        ]
    return "\n".join([*lines, _where(path, contents)])


def _large(found: dict[str, tuple[str, dict]]) -> str:
    """The largest models that were measured, one length each."""
    lines = [
        "| larger models, c = 8, k = 5, gradient checkpointing | T | REFINE / SFT "
        "| full-prefix recomputation / SFT "
        "| peak memory of a step, SFT and REFINE, MB | an SFT step, s |",
        "|---|---|---|---|---|---|",
    ]
    for _, contents in found.values():
        table = contents["table"]
        ours, paper = table["shared_prefix"], table.get("per_prefix", {})
        found_memory = table.get("memory_mb", {})
        memory = ", ".join(f"{found_memory[w]:,.0f}" for w in WAYS if w in found_memory) or "-"
        papers = format(paper["ratio"], ".1f") if "ratio" in paper else "out of memory" if paper else "-"
        lines.append(
            f"| {contents['model']}, vocabulary 32,000 | {table['tokens']:,} "
            f"| {ours['ratio']:.2f} ({ours['low']:.2f}-{ours['high']:.2f}, {ours['rounds']} pairs) "
            f"| {papers} "
            f"| {memory} "
            f"| {ours['seconds_b']:.0f} |"
        )
    return "\n".join([*lines, "", *(_where(path, contents) for path, contents in found.values())])


def agreement(files: list[tuple[str, dict]]) -> str:
    """How far the ratios of the last two runs of one machine lie apart, as a sentence; empty with one run."""
    (_, last), earlier = files[-1], files[:-1]
    here = [last["machine"][key] for key in ("processor", "threads")]
    now = {(row["what"], row["against"]): row["ratio"] for row in last["table"]}
    for path, contents in reversed(earlier):
        before = {(row["what"], row["against"]): row["ratio"] for row in contents["table"]}
        same = [contents["machine"][key] for key in ("processor", "threads")] == here
        both = now.keys() & before.keys()
        if same and len(both) > len(now) / 2:
            apart = {what: abs(now[what] / before[what] - 1) for what in sorted(both)}
            worst = max(apart, key=apart.get)
            within = sum(x <= 0.1 for x in apart.values())
            return (
                f"The run before on this machine ([file](../{path})): of the {len(apart)} ratios that both have, "
                f"{within} are within 10 %, the furthest {100 * apart[worst]:.0f} % apart ({worst[0]})."
            )
    return ""


def _ratios(path: str, contents: dict) -> str:
    lines = [
        "| `pytest benchmarks/ --benchmark-only`: what | against | ratio (quartiles) | |",
        "|---|---|---|---|",
    ]
    for row in contents["table"]:
        spread = f" ({row['low']:.2f}-{row['high']:.2f})" if row.get("rounds", 1) > 1 else ""
        lines.append(f"| {row['what']} | {row['against']} | {row['ratio']:.2f}{spread} | {row['goal']} |")
    return "\n".join([*lines, "", _where(path, contents), agreement(read("ratios", "cpu"))])


def _gpu_contents() -> dict | None:
    found = list(newest("gpu", "cuda").values())
    return found[-1][1] if found else None


def _gpu() -> str:
    found = newest("gpu", "cuda")
    if not found:
        return (
            "There is no measurement on a GPU yet: the Triton kernels have been run by Triton's interpreter and "
            "compiled for sm_80, sm_90, sm_100 and gfx942 (`python -m refine_kernels.inspect`), not timed."
        )
    path, contents = list(found.values())[-1]
    lines = [_where(path, contents), "", "| what | value |", "|---|---|"]
    for part, rows in contents["table"].items():
        if "numbers" not in part and part != "compiling":
            lines += [f"| {row['what']} | {row['value']} |" for row in rows if not row.get("failed")]
    return "\n".join([*lines, "", counted_against_measured(contents), "", errors_on_a_gpu(contents)])


def counted_against_measured(contents: dict) -> str:
    """The table of kernels' times on a GPU beside the counted clock's bound of the same call."""
    lines = [
        "Counted against measured: microseconds of all launches of a kernel in one call, forward and backward "
        "(measured by the profiler), over the [counted clock's](counted_clock.md) bound.",
        "",
        "| call | kernel | counted | measured | times |",
        "|---|---|---|---|---|",
    ]
    for rows in contents["table"].values():
        for row in rows:
            for kernel, counted in row.get("counted", {}).items():
                if kernel in row["kernels"]:
                    measured = row["kernels"][kernel][1]
                    call = row["what"].removesuffix(": ours")
                    name, times = kernel.removesuffix("_kernel"), measured / counted
                    lines.append(f"| {call} | {name} | {counted:.0f} | {measured:.0f} | {times:.1f} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def errors_on_a_gpu(contents: dict) -> str:
    """Relative errors against float64 of every configuration, and of what was beside it: the largest of all outputs
    and gradients, and where it is."""
    lines = [
        "Errors against float64, the largest of outputs and gradients (where):",
        "",
        "| kernels | ours | beside |",
        "|---|---|---|",
    ]
    for part, rows in contents["table"].items():
        for row in rows if "numbers" in part else ():
            if "errors" not in row:
                if not row["value"].startswith("not run"):
                    lines.append(f"| {row['what']} | {row['value'].split('. ')[0][:100]} | |")
                continue
            text = {}
            for who, errors in row["errors"].items():
                where = max(errors, key=errors.get)
                text[who] = f"{errors[where]:.1e} ({where})"
            beside = "; ".join(f"{who} {value}" for who, value in text.items() if who != "ours")
            lines.append(f"| {row['what']} | {text['ours']} | {beside} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def draw() -> None:
    """``docs/step_cost.png``: ratio to SFT against T, c and k, time and memory against T. ``docs/roofline.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = newest("step_cost", "cpu")
    (ROOT / "docs").mkdir(exist_ok=True)
    figure, (ratios, absolute) = plt.subplots(2, 3, figsize=(11, 6.4))
    panels = (
        ("tokens", "T, tokens (c = 8, k = 5)"),
        ("chunks", "c, positions (T = 8,192)"),
        ("length", "k, tokens of a rollout (T = 8,192)"),
    )
    for i, (name, (_, contents)) in enumerate(found.items()):
        table = contents["table"]
        for axis, (key, label) in zip(ratios, panels):
            rows = table[key]
            x = [row[key] for row in rows]
            axis.plot(x, [row["ratio"] for row in rows], "o-", ms=4, color=f"C{i}", label=NAMES[name])
            axis.fill_between(
                x, [r["ratio_low"] for r in rows], [r["ratio_high"] for r in rows], color=f"C{i}", alpha=0.15
            )
            axis.set_xlabel(label)
            if key != "length":
                axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        x = [row["tokens"] for row in table["tokens"]]
        for key, style, way in (("sft_seconds", "--", "SFT"), ("seconds", "-", "REFINE")):
            times = [row[key] for row in table["tokens"]]
            absolute[0].plot(x, times, "o" + style, ms=4, color=f"C{i}", label=f"{NAMES[name]}, {way}")
        if "memory" in table:
            x = [row["tokens"] for row in table["memory"]]
            for key, style, way in (("sft", "--", "SFT"), ("shared_prefix", "-", "REFINE")):
                memory = [row[key] for row in table["memory"]]
                absolute[1].plot(x, memory, "o" + style, ms=4, color=f"C{i}", label=f"{NAMES[name]}, {way}")
            paper = [(row["tokens"], row["per_prefix"]) for row in table["memory"] if "per_prefix" in row]
            absolute[1].plot(
                *zip(*paper), "x", color=f"C{i}", label=f"{NAMES[name]}, full-prefix recomputation"
            )
    for axis, label in zip(absolute, ("time of a step, s", "peak memory of a step, MB")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("T, tokens (c = 8, k = 5)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False, fontsize=7, handlelength=4)
        else:
            axis.axis("off")  # files of before it was measured
    absolute[2].axis("off")
    tallest = max(line.get_ydata().max() for axis in ratios for line in axis.get_lines())
    for axis in ratios:
        axis.set_ylim(0.95, 1.1 * tallest)  # the quartiles of a disturbed pair may lie outside
    ratios[0].set_ylabel("time of a REFINE step / SFT step")
    ratios[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "step_cost.png", dpi=130)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(6, 4))
    roofline.draw(axis, _gpu_contents())
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "roofline.png", dpi=130)
    plt.close(figure)


def renewed(page: str) -> str:
    """The page with a fresh section.

    Raises:
        ValueError: the markers are missing or in the wrong order.
    """
    begin, end = page.find(BEGIN), page.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"docs/results.md must hold the lines {BEGIN!r} and {END!r}, in this order")
    return page[: begin + len(BEGIN)] + "\n" + section() + "\n" + page[end:]


def main() -> int:
    """Write the section and the pictures; with ``--check`` only compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page is not up to date")
    options = parser.parse_args()
    path = ROOT / "docs" / "results.md"
    page = path.read_text(encoding="utf-8")
    if options.check:
        return int(renewed(page) != page)
    draw()
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
