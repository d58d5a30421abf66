"""What a run prints: the line of its progress, and the table at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

EVALUATED = {  # a measure of the held-out sequences -> what the report calls it
    "eval_loss": "next-token loss",
    "eval_accuracy": "next-token accuracy",
    "eval_cosine": "cosine reward",
    "eval_exact_match": "binary reward",
    "eval_answer_loss": "answer loss",
    "eval_reward": "reward",
    "eval_niah_single_1": "needles found in noise",
    "eval_niah_single_2": "needles found in prose",
    "eval_recall": "recall questions answered",
}


def show(bar: tqdm, metrics: dict[str, float], counters: dict[str, Any]) -> None:
    """Move the bar on by an update."""
    shown = {"loss": f"{metrics.get('ntp_loss', metrics['loss']):.3f}"}
    if "reward" in metrics:
        shown["reward"] = f"{metrics['reward']:.3f}"
    shown["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
    if counters["skipped"]:
        shown["skipped"] = counters["skipped"]
    bar.set_postfix(shown, refresh=False)
    bar.update()


def print_report(
    output_dir: Path,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    counters: dict[str, int],
    read: Any,
    plots: list[Path],
    seconds: float,
) -> None:
    """The table at the end of a run; ``read`` are a stream's :class:`~refine.data.stream.DataCounts`."""
    print(f"\n{counters['step']} updates, {counters['tokens']:,} tokens, {seconds:.0f} s in all")
    if counters["skipped"]:
        print(f"{counters['skipped']} updates were skipped: their loss or gradient was not finite")
    print(
        f"data: {read.windows} sequences of {read.documents} documents read, shuffled ones ahead too", end=""
    )
    left_out = {"too short": read.short_documents + read.short_windows, "bad rows": read.bad_rows}
    print("".join(f", {count} {what} left out" for what, count in left_out.items() if count))
    if read.cut_prompts:
        print(f"{read.cut_prompts} prompts were longer than max_length and cut in the middle")
    if after:
        print(f"\nheld out ({after['eval_sequences']} sequences)   before     after    change")
        for key, name in EVALUATED.items():
            if key not in after:
                continue
            if before:
                row = f"{before[key]:9.4f} {after[key]:9.4f} {after[key] - before[key]:+9.4f}"
            else:
                row = f"{'-':>9} {after[key]:9.4f} {'-':>9}"
            print(f"{name:<26}{row}")
    print(f"\nmodel    {output_dir / 'final'}")
    for plot in plots:
        print(f"picture  {plot}")
