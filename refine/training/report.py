"""What a run says: what it is about to do, how an update went, and the table at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refine.data.stream import DataCounts
from refine.terminal import fixed, terminal
from refine.training.settings import TrainSettings

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
_PHASES = {
    "mid": "mid-training with REFINE",
    "sft": "training with the next-token loss",
    "post": "post-training on pairs of prompt and answer",
    "grpo": "training on rewarded completions",
}


def print_banner(
    settings: TrainSettings, model, device, processes: int, held_out: int, step: int = 0
) -> None:
    """What is about to happen.

    Args:
        model: its configuration and parameters are looked at.
        device: that it is on.
        processes: that train together.
        held_out: sequences, prompts or pairs that are held out.
        step: updates that were taken before.
    """
    config, batch = model.config, settings.per_device_train_batch_size
    kind = getattr(config, "model_type", type(model).__name__)
    name = f"{settings.model_name_or_path or 'the tiny model of this package'}: {kind}"
    if settings.model_type:
        name = f"a new {kind}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "" if trained == parameters else f" ({trained:,} trained)"
    if processes > 1:
        where = f"{processes} processes ({settings.parallel}), {device.type}"
    else:
        where = str(device)
    what = {"post": "pairs", "grpo": "prompts"}.get(settings.phase, "sequences")
    readers = 1 if settings.parallel == "context" else processes
    each = batch * settings.gradient_accumulation_steps * readers
    updates = f"{settings.max_steps}, learning rate {settings.learning_rate:g} ({settings.lr_scheduler_type})"
    if step:
        updates = f"{step} done of {updates}"
    rows = [
        (
            "model",
            f"{name}, {parameters:,} parameters{share}, {where}{', bfloat16' if settings.bf16 else ''}",
        ),
        (
            "data",
            f"{settings.dataset_name_or_path or 'default'}: {what} of at most {settings.max_length:,} tokens, "
            f"{each} an update; {held_out} held out",
        ),
        ("updates", updates),
    ]
    if settings.draws_rollouts:
        rollouts = (
            f"{settings.num_chunks * settings.num_rollouts} of {settings.rollout_length} tokens a sequence"
        )
        rows.append(
            ("rollouts", f"{rollouts}, chosen by {settings.selection}, rewarded by {settings.reward}")
        )
    if settings.phase == "grpo":
        rows.append(("groups", f"{settings.num_generations} completions a prompt"))
    rows.append(("folder", settings.output_dir))
    terminal.banner(f"refine: {_PHASES[settings.phase]}", rows)


def describe_update(metrics: dict[str, float], counters: dict[str, Any]) -> str:
    """An update's numbers in about 40 characters."""
    shown = [f"loss {fixed(metrics.get('ntp_loss', metrics['loss']), 3)}"]
    if "reward" in metrics:
        shown.append(f"reward {fixed(metrics['reward'], 3)}")
    shown.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
    if counters["skipped"]:
        shown.append(f"{counters['skipped']} skipped")
    return "  ".join(shown)


def print_report(
    output_dir: Path,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    counters: dict[str, int],
    read: DataCounts,
    made: dict[str, Path],
    seconds: float,
) -> None:
    """The table at the end of a run.

    Args:
        before, after: the measures of held-out data.
        counters: of the run.
        read: what the stream has read, which is ahead of what was trained on.
        made: the files to look at, by what they are.
        seconds: that the run took in all.
    """
    say = terminal.say
    sequences = f"{counters['sequences']:,} sequences, " if "sequences" in counters else ""
    say(f"\n{counters['step']} updates, {sequences}{counters['tokens']:,} tokens, {seconds:.0f} s in all")
    if counters["skipped"]:
        say(f"{counters['skipped']} updates were skipped: their loss or gradient was not finite")
    left_out = {"too short": read.short_documents + read.short_windows, "bad rows": read.bad_rows}
    left_out = {what: count for what, count in left_out.items() if count}
    if left_out:
        counts = ", ".join(f"{count} {what}" for what, count in left_out.items())
        say(f"data: left out while reading, which goes ahead of training: {counts}")
    if read.cut_prompts:
        say(f"{read.cut_prompts} prompts were longer than max_length and cut in the middle")
    if after:
        say(f"\nheld out ({after['eval_sequences']} sequences)".ljust(27) + "  before     after    change")
        for key, name in EVALUATED.items():
            if key not in after:
                continue
            if before:
                change = fixed(after[key] - before[key], sign=True)
                row = f"{fixed(before[key]):>9} {fixed(after[key]):>9} {change:>9}"
            else:
                row = f"{'-':>9} {fixed(after[key]):>9} {'-':>9}"
            say(f"{name:<26}{row}")
    files = {"model": output_dir / "final", **made}
    width = max(map(len, files))
    say("")
    for what, path in files.items():
        say(f"{what.replace('_', ' '):<{width}}  {path}")
