"""``python -m refine.train``: the story of a run, from settings to a trained model.

What it knows: in which order things happen, and that whatever goes wrong, nothing already written is lost.
What a step is stands in :mod:`refine.method`, what a state is in :mod:`refine.models`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import get_scheduler
from transformers.utils.logging import disable_progress_bar

from refine.evaluation.held_out import evaluate_held_out
from refine.method import LabelledTokens, RefineStepOutput, next_token_loss, next_token_targets, refine_step
from refine.models.head import NextTokenLoss
from refine.training import checkpoint
from refine.training.data import Batch, DataError, held_out_stream, training_stream
from refine.training.pairs import PairBatch, PairColumns, held_out_pairs, training_pairs
from refine.training.parallel import World, accumulating, clip_gradients, join_world, wrap
from refine.training.parts import choose_device, data_config, load_parts
from refine.training.plots import draw_plots
from refine.training.settings import SettingsError, TrainSettings, parse_settings, to_yaml
from refine.training.tracking import Tracker, check_reporters, write_samples
from refine_kernels.linear_logprob import mix_seeds

EVALUATED = {  # a measure of the held-out sequences -> what the report calls it
    "eval_loss": "next-token loss",
    "eval_accuracy": "next-token accuracy",
    "eval_cosine": "cosine reward",
    "eval_exact_match": "binary reward",
    "eval_answer_loss": "answer loss",
}


class TrainingStopped(RuntimeError):
    """The run cannot go on: the message says why, and that what was written is intact."""


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when the run ended well, 1 or 2 with one sentence when it did not."""
    disable_progress_bar()  # of loading and saving; a run shows its own
    try:
        settings = parse_settings(sys.argv[1:] if arguments is None else arguments)
        train(settings)
    except (SettingsError, DataError, FileNotFoundError, checkpoint.CheckpointError) as error:
        print(f"refine.train: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"refine.train: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"refine.train: out of memory ({str(error).splitlines()[0]}); what was written is intact. "
            "Try a smaller per_device_train_batch_size, gradient_checkpointing, segment_length, or parallel fsdp2",
            file=sys.stderr,
        )
        return 1
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU PyTorch raises a plain RuntimeError."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return out_of_memory or "can't allocate memory" in str(error)


def train(settings: TrainSettings) -> Path:
    """Train as told; returns the folder of the final model.

    Raises:
        SettingsError, DataError, FileNotFoundError, CheckpointError: something about the settings, the data,
            the model or a checkpoint is wrong; raised before any training, with existing files untouched.
        TrainingStopped: too many non-finite updates in a row.
    """
    check_reporters(settings.report_to)
    try:
        world = join_world(settings.parallel, choose_device(settings))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    try:
        return _train(settings, world)
    finally:
        world.close()


def _train(settings: TrainSettings, world: World) -> Path:
    """The run of one process; the main one writes files and speaks."""
    started = time.time()
    say = print if world.is_main else _say_nothing
    output_dir, device = Path(settings.output_dir), world.device
    resume = _check_output_dir(settings, output_dir) if world.is_main else None
    folder = world.from_main(resume[0] if resume else None)
    if folder is not None and resume is None:
        resume = folder, checkpoint.load_training_state(folder)
    model, tokenizer = load_parts(settings, folder)
    model.to(device)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = wrap(model, world, torch.bfloat16 if settings.bf16 else None)
    data, (rank, readers) = data_config(settings), world.readers
    if settings.phase == "post":
        columns = PairColumns(
            settings.prompt_column, settings.answer_column, settings.question_column, settings.passages_column
        )
        stream = training_pairs(data, columns, tokenizer, rank=rank, world_size=readers)
        held_out_text = held_out_pairs(data, columns, tokenizer) if settings.eval_samples else None
    else:
        stream = training_stream(data, tokenizer, rank=rank, world_size=readers)
        held_out_text = held_out_stream(data, tokenizer) if settings.eval_samples else None
    held_out = list(islice(held_out_text.batches(1), settings.eval_samples)) if held_out_text else []

    optimizer = _optimizer(model, settings)
    schedule = get_scheduler(
        settings.lr_scheduler_type, optimizer, settings.warmup_steps, num_training_steps=settings.max_steps
    )
    counters = {"step": 0, "tokens": 0, "skipped": 0}
    if resume:
        state = resume[1]
        checkpoint.restore_optimizer(*resume, model, optimizer)
        schedule.load_state_dict(state["schedule"])
        stream.load_state_dict(state["data"])
        counters |= state["counters"]
        checkpoint.set_random_state(state["random"])
        say(f"going on from {resume[0]}, after update {counters['step']}")
    elif settings.overwrite_output_dir and world.is_main:
        _clear(output_dir)
    tracker = None
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.clear_partial(output_dir)
        (output_dir / "config.yaml").write_text(to_yaml(settings), encoding="utf-8")
        tracker = Tracker(
            output_dir, settings.report_to, settings.run_name, dataclasses.asdict(settings), counters["step"]
        )

    def log(step: int, metrics: dict[str, float]) -> None:
        if tracker is not None:
            tracker.log(step, metrics)

    def evaluate() -> dict[str, float]:
        with _precision(settings, device):
            measured = evaluate_held_out(model, held_out, settings, seed=settings.seed)
            if settings.phase == "post":
                measured["eval_answer_loss"] = _held_out_answers(model, held_out, settings)
            return measured

    def save() -> None:
        state = {
            "schedule": schedule.state_dict(),
            "data": stream.state_dict(),
            "counters": counters,
        }
        began = time.time()
        folder = checkpoint.save_checkpoint(
            output_dir, counters["step"], model, optimizer, tokenizer, state, settings.save_total_limit, world
        )
        if world.is_main:
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            tqdm.write(f"saved {folder} ({size:.0f} MB, {time.time() - began:.1f} s)")

    before = None
    if held_out and not resume:
        before = evaluate()
        log(0, before)
    batches = stream.batches(settings.per_device_train_batch_size)
    model.train()
    with (
        stop_requests() as stop,
        tqdm(
            total=settings.max_steps,
            initial=counters["step"],
            desc=settings.phase,
            unit="update",
            disable=None if world.is_main else True,
        ) as bar,
    ):
        skipped_in_a_row = 0
        while counters["step"] < settings.max_steps and not world.any(bool(stop)):
            updates = min(settings.num_mini_batches, settings.max_steps - counters["step"])
            saved_before = counters["step"] // settings.save_steps if settings.save_steps else 0
            mini_batches = [
                [next(batches).to(device) for _ in range(settings.gradient_accumulation_steps)]
                for _ in range(updates)
            ]
            for mini_batch, draws in zip(
                mini_batches, _draw(model, mini_batches, settings, counters["step"])
            ):
                began = time.time()
                metrics, last = {}, None
                if settings.phase != "post" or settings.prompt_step != "none":
                    metrics, last = _update(
                        model, mini_batch, draws, optimizer, settings, counters["step"], world
                    )
                if settings.phase == "post":
                    metrics = _answer_update(model, mini_batch, optimizer, settings, world, metrics)
                counters["step"] += 1
                step = counters["step"]
                schedule.step()
                counters["tokens"] += metrics["tokens"]
                skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
                counters["skipped"] += metrics["skipped"]
                metrics |= {
                    "learning_rate": schedule.get_last_lr()[0],
                    "tokens_per_second": metrics["tokens"] / (time.time() - began),
                    "total_tokens": counters["tokens"],
                    "skipped_updates": counters["skipped"],
                }
                if step % settings.logging_steps == 0 or step == settings.max_steps:
                    log(step, metrics)
                _show(bar, metrics, counters)
                sampling = world.is_main and settings.sample_steps and step % settings.sample_steps == 0
                if last is not None and sampling:
                    write_samples(output_dir / "samples", step, mini_batch[-1].input_ids, last, tokenizer)
                if skipped_in_a_row >= settings.max_skipped_updates:
                    raise TrainingStopped(
                        f"{skipped_in_a_row} updates in a row had a non-finite loss or gradient "
                        f"(max_skipped_updates); stopped at update {step}, checkpoints in {output_dir} are intact"
                    )
                if (
                    held_out
                    and settings.eval_steps
                    and step % settings.eval_steps == 0 < settings.max_steps - step
                ):
                    log(step, evaluate())
            if settings.save_steps and counters["step"] // settings.save_steps > saved_before:
                save()
    if counters["step"] < settings.max_steps:
        save()
        if tracker is not None:
            tracker.close()
        by = stop[0] if stop else "a signal to another process"
        say(f"stopped by {by} after update {counters['step']}; go on with --resume_from_checkpoint auto")
        return output_dir

    after = None
    if held_out:
        after = evaluate()
        log(counters["step"], after)
    checkpoint.save_folder(output_dir / "final", model, tokenizer, world=world)
    if tracker is not None:
        tracker.close()
        plots = draw_plots(output_dir)
        _report(output_dir, before, after, counters, stream, plots, time.time() - started)
    return output_dir / "final"


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that is filled by the first Ctrl-C or SIGTERM; the second one stops at once."""
    received: list[str] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        tqdm.write(f"{received[0]}: finishing this update, then saving; once more to stop at once")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _draw(
    model, mini_batches: list[list[Batch]], settings: TrainSettings, step: int
) -> Iterator[list[RefineStepOutput | None]]:
    """Off-policy: the rollouts of every mini-batch by the policy as it is now. On-policy: none, they are drawn
    in the update itself.
    """
    if not settings.draws_rollouts or settings.num_mini_batches == 1:
        return iter([[None] * len(mini_batch) for mini_batch in mini_batches])
    device = next(model.parameters()).device
    with torch.no_grad(), _precision(settings, device):
        return iter(
            [
                [_refine(model, batch, settings, step + i) for batch in mini_batch]
                for i, mini_batch in enumerate(mini_batches)
            ]
        )


def _say_nothing(*_) -> None:
    """What processes other than the main one have to say."""


def _refine(model, batch: Batch, settings: TrainSettings, step: int, **given) -> RefineStepOutput:
    seeds = mix_seeds(settings.seed, step, batch.keys)
    return refine_step(
        model, batch.input_ids, settings, attention_mask=batch.attention_mask, seeds=seeds, **given
    )


def _update(
    model,
    mini_batch: list[Batch],
    draws: list[RefineStepOutput | None],
    optimizer,
    settings: TrainSettings,
    step: int,
    world: World,
) -> tuple[dict[str, float], RefineStepOutput | None]:
    """One optimizer update over a mini-batch, unless its loss or gradient is not finite."""
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    output = None
    for batch, draw in zip(mini_batch, draws):
        with accumulating(model, last=batch is mini_batch[-1]), _precision(settings, device):
            if not settings.draws_rollouts:
                loss = _next_token_loss(model, batch, settings, world)
                found = {"loss": loss, "ntp_loss": loss}
            else:
                given = {"context": world.relay}
                if draw is not None:
                    given["rollouts"] = draw.drawn
                output = _refine(model, batch, settings, step, **given)
                loss = output.loss
                found = {
                    "loss": loss,
                    "ntp_loss": output.ntp_loss,
                    "nsp_loss": output.nsp_loss,
                    "reward": output.rewards.mean(),
                    "reward_std": output.rewards.std(),
                    "cosine": output.cosine.mean(),
                    "exact_match": output.exact_match.mean(),
                    "entropy": output.entropy[batch.attention_mask.bool()].mean(),
                    "clip_fraction": output.clip_fraction,
                    "rollout_length": output.rollout_lengths.float().mean(),
                }
        with accumulating(model, last=batch is mini_batch[-1]):
            (loss / len(mini_batch)).backward()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / len(mini_batch)
    if world.relay is not None:
        world.relay.sum_gradients(model)
    metrics = world.mean({name: value.item() for name, value in sums.items()})
    metrics["grad_norm"] = clip_gradients(model, settings.max_grad_norm)
    finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    if finite:
        optimizer.step()
    tokens = sum(int(batch.attention_mask.sum()) for batch in mini_batch)
    tokens = tokens if world.relay is not None else world.total(tokens)
    return metrics | {"tokens": tokens, "skipped": int(not finite)}, output


def _answer_update(
    model,
    mini_batch: list[PairBatch],
    optimizer,
    settings: TrainSettings,
    world: World,
    metrics: dict[str, float],
) -> dict[str, float]:
    """The second update of a post-training step: next-token loss on the answers, every answer token of the
    batch (over micro-batches and processes) with the same weight. ``metrics`` are those of the first.
    """
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    local = sum(int((batch.full_targets != -100).sum()) for batch in mini_batch)
    answer_tokens = world.total(local)
    total = 0.0
    for batch in mini_batch:
        with accumulating(model, last=batch is mini_batch[-1]):
            with _precision(settings, device):
                weight = (batch.full_targets != -100).float() * (world.size / answer_tokens)
                loss = _weighted_loss(model, batch.full_ids, batch.full_targets, weight, settings, None)
            loss.backward()
        total += loss.item()
    loss = world.mean({"answer_loss": total})["answer_loss"]
    norm = clip_gradients(model, settings.max_grad_norm)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    if not metrics:
        prompt_tokens = world.total(sum(int(batch.attention_mask.sum()) for batch in mini_batch))
        metrics = {"loss": loss, "ntp_loss": loss, "grad_norm": norm, "tokens": prompt_tokens, "skipped": 0}
    return metrics | {
        "answer_loss": loss,
        "answer_grad_norm": norm,
        "tokens": metrics["tokens"] + answer_tokens,
        "skipped": metrics["skipped"] + int(not finite),
    }


@torch.no_grad()
def _held_out_answers(model, held_out: list[PairBatch], settings: TrainSettings) -> float:
    """The answer loss of held-out pairs, in nats a token."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for batch in held_out:
        batch = batch.to(device)
        weight = (batch.full_targets != -100).float()
        request = NextTokenLoss(batch.full_targets, weight, entropy=False)
        total += model(batch.full_ids, use_cache=False, head=request).loss.item()
        tokens += int(weight.sum())
    return total / tokens


def _next_token_loss(model, batch: Batch, settings: TrainSettings, world: World) -> torch.Tensor:
    """The SFT loss of a batch, in one pass or by segments."""
    targets = next_token_targets(batch.input_ids, batch.attention_mask.sum(1))
    return _weighted_loss(model, batch.input_ids, *targets, settings, world.relay)


def _weighted_loss(model, input_ids, targets, weight, settings: TrainSettings, relay) -> torch.Tensor:
    """The weighted sum of next-token losses, in one pass or by segments."""
    return next_token_loss(model, LabelledTokens(input_ids, targets, weight), settings.segment_length, relay)


def _optimizer(model, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; vectors (norms, decay rates) are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )


def _precision(settings: TrainSettings, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16)


def _check_output_dir(settings: TrainSettings, output_dir: Path) -> tuple[Path, dict] | None:
    """What to resume, if anything; a folder with files in it must be named on purpose."""
    resume = checkpoint.find_resume(output_dir, settings.resume_from_checkpoint)
    if output_dir.exists() and not output_dir.is_dir():
        raise SettingsError(f"output_dir {str(output_dir)!r} is a file")
    occupied = output_dir.is_dir() and any(output_dir.iterdir())
    if occupied and not resume and not settings.overwrite_output_dir:
        raise SettingsError(
            f"output_dir {str(output_dir)!r} is not empty: give --overwrite_output_dir, "
            "--resume_from_checkpoint auto, or another folder"
        )
    return resume


def _clear(output_dir: Path) -> None:
    """Remove what an earlier run of ours wrote, and nothing else."""
    for pattern in ("checkpoint-*", "final", "final.partial", "samples", "tensorboard"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for name in ("metrics.jsonl", "config.yaml", "loss.png", "reward.png"):
        (output_dir / name).unlink(missing_ok=True)


def _show(bar: tqdm, metrics: dict[str, float], counters: dict[str, Any]) -> None:
    shown = {"loss": f"{metrics['ntp_loss']:.3f}"}
    if "reward" in metrics:
        shown["reward"] = f"{metrics['reward']:.3f}"
    shown["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
    if counters["skipped"]:
        shown["skipped"] = counters["skipped"]
    bar.set_postfix(shown, refresh=False)
    bar.update()


def _report(output_dir, before, after, counters, stream, plots, seconds) -> None:
    """The table at the end of a run."""
    print(f"\n{counters['step']} updates, {counters['tokens']:,} tokens, {seconds:.0f} s in all")
    if counters["skipped"]:
        print(f"{counters['skipped']} updates were skipped: their loss or gradient was not finite")
    read = stream.counts
    print(f"data: {read.windows} sequences of {read.documents} documents read", end="")
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


if __name__ == "__main__":
    sys.exit(main())
