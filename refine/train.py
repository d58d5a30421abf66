"""``python -m refine.train``: the story of a run, from settings to a trained model.

What it knows: in which order things happen, and that however a run ends, what it had learned is saved.
What a step is stands in :mod:`refine.method`, what the phases do in :mod:`refine.training.phases`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from refine.commands import answer_help
from refine.models.body import checkpoint_activations

if __name__ == "__main__":
    answer_help("train", sys.argv[1:])  # before the seconds that the imports below take

import torch
from transformers import get_scheduler
from transformers.utils.logging import disable_progress_bar

from refine.data.document import DataError
from refine.environment import describe_machine, versions
from refine.evaluation.held_out import held_out_by_document
from refine.evaluation.metrics import wilson_interval
from refine.evaluation.recall import answered_greedily, questions_of_recall
from refine.files import why, write_whole
from refine.prepare import (
    check_environment,
    choose_device,
    is_out_of_memory,
    load_model_and_tokenizer,
    try_reward,
)
from refine.reporting import write_report
from refine.settings import SettingsError, to_yaml
from refine.signals import Terminated, name_and_code, stop_requests, terminations
from refine.terminal import duration, terminal
from refine.training import checkpoint, resume
from refine.training.group_phase import write_completions
from refine.training.parallel import World, join_world, wrap
from refine.training.phases import make_phase, open_streams
from refine.training.plots import draw_plots
from refine.training.report import describe_update, print_banner, print_report
from refine.training.run_folder import RunFolder
from refine.training.samples import examine_document, write_document, write_samples
from refine.training.settings import TrainSettings, parse_settings
from refine.training.tracking import Tracker, check_reporters, first_evaluation
from refine.training.update import adamw

_EXPECTED_AFTER = 10  # updates


class TrainingStopped(RuntimeError):
    """The run cannot go on: the message says why, and what is saved."""


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when the run ended well or was stopped at a whole update, else one sentence and
    2 (it could not begin, or could not write), 1 (training failed), 130 or 143 (stopped elsewhere by a signal)."""
    disable_progress_bar()  # of loading and saving; a run shows its own
    run: list[RunFolder] = []
    try:
        with terminations():
            train(parse_settings(sys.argv[1:] if arguments is None else arguments), run)
    except (SettingsError, DataError, checkpoint.CheckpointError, OSError) as error:
        sentence = f"{why(error)}" if isinstance(error, OSError) and error.errno else str(error)
        return _say(sentence, run, 2)
    except TrainingStopped as error:
        there = run[0].whole_checkpoints() if run else ""
        return _say(f"{error}; {there}; go on from one with --resume_from_checkpoint FOLDER", run, 1)
    except ValueError as error:  # of the model or the method, about what it was given
        return _say(str(error), run, 1 if run and run[0].begun else 2)
    except (KeyboardInterrupt, Terminated) as error:
        name, code = name_and_code(error)
        return _say(f"stopped by {name}", run, code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _say(
            f"out of memory ({str(error).splitlines()[0]}). Try a smaller per_device_train_batch_size, "
            "gradient_checkpointing, segment_length, or parallel fsdp2", run, 1,
        )  # fmt: skip
    return 0


def train(settings: TrainSettings, run: list[RunFolder] | None = None) -> Path:
    """Train as told; returns the folder of the final model, or of the run where a signal stopped it.

    Args:
        settings: of the run.
        run: gets the run's folder, for what is to be said after an error.

    Raises:
        SettingsError, DataError, FileNotFoundError, CheckpointError: something about the settings, the data,
            the model or a checkpoint is wrong; raised before any training, with existing files untouched.
        CheckpointError: a checkpoint cannot be written.
        TrainingStopped: too many non-finite updates in a row, or weights that are not finite.
    """
    check_environment()
    check_reporters(settings.report_to)
    try:
        world = join_world(settings.parallel, choose_device(settings.device))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    terminal.open(shown=world.is_main)
    if not world.is_main:
        logging.getLogger("refine").setLevel(logging.ERROR)  # rank 0 warns of data that all ranks read
    folder = RunFolder(Path(settings.output_dir))
    if run is not None:
        run.append(folder)
    try:
        return _Run(settings, world, folder).go()
    finally:
        folder.close()
        world.close()


class _Run:
    """The run of one process; rank 0 writes files and prints."""

    def __init__(self, settings: TrainSettings, world: World, folder: RunFolder):
        self.settings, self.world, self.folder = settings, world, folder
        self.started = time.perf_counter()
        # seconds: of draws and updates
        self.counters = {"step": 0, "tokens": 0, "sequences": 0, "skipped": 0, "seconds": 0.0}
        self.first_step = 0  # of this process
        self.training_began = 0.0
        self.clock = self.started  # up to here, seconds are counted
        self.skipped_in_a_row = 0
        self.saved_step: int | None = None  # of the last checkpoint
        self.between = False  # amid an update: the optimizer has begun, the counters have not moved
        self.rotation_is_due = False
        self.has_gradient = True  # in the last update
        self.tracker: Tracker | None = None
        self.examined: dict[str, Any] | None = None

    def go(self) -> Path:
        """From the first look at the folder to the final model."""
        found = self.look()
        self.prepare(found)
        before = self.evaluate() if self.held_out and not found else None
        self.begin(found)
        if before:
            self.log(before)
            self.write_examined()
        with stop_requests() as stop:
            self.train_until(stop)
        if self.saved_step != self.counters["step"]:
            self.save()
        if self.world.any(bool(stop)):
            self.close()
            by = stop[0] if stop else "a signal to another process"
            terminal.say(
                f"stopped by {by} after update {self.counters['step']}; go on with --resume_from_checkpoint auto"
            )
            return self.folder.path
        return self.finish(before)

    def look(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, with its state; the same in every process."""
        settings = self.settings
        found = self.on_rank_0(
            lambda: self.folder.look(settings.resume_from_checkpoint, settings.overwrite_output_dir)
        )
        path = self.world.from_main(found[0] if found else None)
        if path is not None and found is None:
            found = path, checkpoint.load_training_state(path)
        return found

    def prepare(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Model, data, optimizer, and where all of them stood; nothing is written."""
        settings, world = self.settings, self.world
        self.changes = resume.compare_settings(settings, *found) if found else {}
        torch.manual_seed(settings.seed + world.rank)  # of dropout; all other draws have seeds of their own
        path = found[0] if found else None
        try:
            with terminal.stage("loading the model"):
                model, self.tokenizer = load_model_and_tokenizer(settings, settings, path)
        except (SettingsError, FileNotFoundError, RuntimeError, OSError) as error:
            if found is None:
                raise
            raise checkpoint.CheckpointError(f"{path} cannot be loaded: {error}") from error
        try_reward(settings, model.config.hidden_size)
        model.to(world.device)
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        self.model = wrap(model, world, torch.bfloat16 if settings.bf16 else None)
        with terminal.stage("reading the data"):
            self.stream, self.held_out = open_streams(settings, self.tokenizer, world)
            self.questions = self._questions()
        self.optimizer = adamw(self.model, settings)
        self.optimizer.register_step_pre_hook(self._amid_an_update)
        self.phase = make_phase(settings, self.model, self.optimizer, world, self.tokenizer)
        self.schedule = get_scheduler(
            settings.lr_scheduler_type,
            self.optimizer,
            settings.warmup_steps,
            num_training_steps=settings.max_steps,
        )
        if found:
            state = found[1]
            checkpoint.restore_optimizer(*found, self.model, self.optimizer)
            resume.restore_schedule(self.schedule, self.optimizer, state["schedule"])
            resume.restore_position(self.stream, found[0], state["data"])
            self.counters |= state["counters"]
            self.rotation_is_due = True  # what ended the run may have come before it
            if "sequences" not in state["counters"]:  # of an earlier version, which did not count them
                del self.counters["sequences"]
            if found[0].resolve().parent == self.folder.path.resolve():
                self.saved_step = self.counters["step"]
            checkpoint.set_random_state(state["random"])
        self.position = self.stream.state_dict()
        self.first_step = self.counters["step"]
        print_banner(settings, model, world.device, world.size, len(self.held_out), self.first_step)

    def begin(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        """Take the folder: from here on files are written."""
        self.on_rank_0(lambda: self._begin(found))

    def _begin(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        settings, step = self.settings, self.counters["step"]
        by_name = settings.resume_from_checkpoint not in ("none", "auto")
        self.folder.begin(found[0] if found else None, step, by_name)
        if found:
            terminal.say(f"going on from {found[0]}, after update {step}")
            if self.changes:
                terminal.say("settings changed since then: " + resume.describe(self.changes))
        elif settings.resume_from_checkpoint == "auto":
            terminal.say(f"no checkpoint in {self.folder.path}: starting anew")
        write_whole(self.folder.path / "config.yaml", to_yaml(settings))
        self._write_environment(anew=found is None)
        self.tracker = Tracker(
            self.folder.path, settings.report_to, settings.run_name, dataclasses.asdict(settings), step,
            closed=step >= settings.max_steps,
        )  # fmt: skip

    def train_until(self, stop: list[str]) -> None:
        """Updates up to ``max_steps`` or a request to stop. After an error the last whole update is saved."""
        try:
            settings, done = self.settings, self.counters["step"]
            self.training_began = time.perf_counter()
            with terminal.progress(settings.phase, settings.max_steps, done, "update") as advance:
                self.model.train()
                batches = self.stream.batches(settings.per_device_train_batch_size)
                while self.counters["step"] < settings.max_steps and not self.world.any(bool(stop)):
                    self.train_on_one_draw(batches, advance)
        except checkpoint.CheckpointError:
            raise
        except Exception:
            self.save_after_an_error()
            raise

    def train_on_one_draw(self, batches: Iterator, advance: Callable[[int, str], None]) -> None:
        """The updates that one draw of rollouts serves (one, on-policy), and a checkpoint where one is due."""
        settings, counters = self.settings, self.counters
        self.clock = time.perf_counter()
        updates = min(settings.num_mini_batches, settings.max_steps - counters["step"])
        saved_before = counters["step"] // settings.save_steps if settings.save_steps else 0
        with self._reading():
            mini_batches = [
                [next(batches).to(self.world.device) for _ in range(settings.gradient_accumulation_steps)]
                for _ in range(updates)
            ]
        drawn = list(zip(mini_batches, self.phase.draw(mini_batches, counters["step"])))
        for mini_batch, draws in (drawn * settings.num_iterations)[: settings.max_steps - counters["step"]]:
            began = time.perf_counter()
            metrics, last = self.phase.update(mini_batch, draws, counters["step"])
            self.count(metrics, mini_batch, time.perf_counter() - began)
            self.position = self.stream.state_dict()
            self.between = False
            self.rotate(proven=not metrics["skipped"])
            self.record(metrics, mini_batch, last)
            advance(1, describe_update(metrics, counters))
            self._say_expected_time()
            if self.skipped_in_a_row >= settings.max_skipped_updates:
                raise TrainingStopped(
                    f"{self.skipped_in_a_row} updates in a row had a non-finite loss or gradient "
                    f"(max_skipped_updates; is learning_rate={settings.learning_rate:g} too large?); stopped at "
                    f"update {counters['step']}"
                )
            left = settings.max_steps - counters["step"]
            if self.held_out and settings.eval_steps and counters["step"] % settings.eval_steps == 0 < left:
                self.log(self.evaluate())
                self.write_examined()
                self.clock = time.perf_counter()
        if settings.save_steps and counters["step"] // settings.save_steps > saved_before:
            self.save()

    def count(self, metrics: dict[str, float], mini_batch: list, seconds: float) -> None:
        """Move the counters and the learning rate on, and add them to an update's metrics."""
        counters = self.counters
        counters["step"] += 1
        now = time.perf_counter()
        counters["seconds"] += now - self.clock
        self.clock = now
        self.schedule.step()
        counters["tokens"] += metrics["tokens"]
        if "sequences" in counters:
            counters["sequences"] += sum(len(batch.input_ids) for batch in mini_batch) * self.world.readers[1]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped"] else 0
        self.has_gradient = metrics["grad_norm"] != 0
        counters["skipped"] += metrics["skipped"]
        metrics |= {
            "learning_rate": self.schedule.get_last_lr()[0],
            "tokens_per_second": metrics["tokens"] / max(seconds, 1e-9),
            "total_tokens": counters["tokens"],
            "train_seconds": counters["seconds"],
            "skipped_updates": counters["skipped"],
        }

    def record(self, metrics: dict[str, float], mini_batch: list, last) -> None:
        """An update's line of metrics, and its samples."""
        step, settings = self.counters["step"], self.settings
        if step % settings.logging_steps == 0 or step == settings.max_steps:
            self.log(metrics)
        if self.tracker is None or last is None or not settings.sample_steps or step % settings.sample_steps:
            return
        folder, batch = self.folder.path / "samples", mini_batch[-1]
        if settings.phase == "grpo":
            self.tracker.attempt("samples", lambda: write_completions(folder, step, batch, last))
        else:
            ids = batch.input_ids[0, : int(batch.attention_mask[0].sum())]
            self.tracker.attempt("samples", lambda: write_samples(folder, step, ids, last, self.tokenizer))

    def log(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.tracker is not None:
            self.tracker.log(self.counters["step"], metrics)

    def evaluate(self) -> dict[str, Any]:
        """The measures of held-out data; ``_low`` and ``_high`` are the ends of their 95 % intervals. The first
        held-out document is examined too."""
        settings = self.settings
        with self.phase.precision():
            measured = {}
            if self.phase.holds_out_text:
                held_out = terminal.track(self.held_out, "evaluating")
                measured, intervals = held_out_by_document(self.model, held_out, settings, settings.seed)
                measured |= _ends(intervals)
                self.examined = examine_document(
                    self.model, self.held_out[0], settings, self.tokenizer, settings.seed
                )
            measured |= self.phase.measure(terminal.track(self.held_out, "evaluating answers"))
            for name, rows in terminal.track(list(self.questions.items()), "asking questions"):
                share = sum(answered_greedily(self.model, rows)) / len(rows)
                measured |= {f"eval_{name}": share} | _ends(
                    {f"eval_{name}": wilson_interval(share, len(rows))}
                )
            return measured

    def write_examined(self) -> None:
        """The held-out document that the last evaluation examined."""
        if self.tracker is not None and self.examined is not None:
            folder, step, examined = self.folder.path / "samples", self.counters["step"], self.examined
            self.tracker.attempt("samples", lambda: write_document(folder, "held-out", step, examined))

    def rotate(self, proven: bool) -> None:
        """Remove old checkpoints once the newest has proven good: an update from it, or an evaluation, was finite.
        So a model that the last update ruined pushes no good one out."""
        if proven and self.rotation_is_due and self.world.is_main:
            self.folder.rotate(self.settings.save_total_limit)
            self.rotation_is_due = False

    def save(self) -> None:
        """A checkpoint of the last whole update."""
        step, settings = self.counters["step"], self.settings
        state = {
            "schedule": self.schedule.state_dict(),
            "data": self.position,
            "counters": self.counters,
            "settings": dataclasses.asdict(settings),
        }
        began = time.perf_counter()
        path = self.folder.checkpoint(step)
        if self.world.is_main:
            self.folder.about_to_write(path)
        try:
            checkpoint.save_folder(path, self.model, self.tokenizer, state, self.optimizer, self.world)
        except checkpoint.NotFiniteError as error:
            raise TrainingStopped(
                f"after update {step} {error} is not finite (is learning_rate={settings.learning_rate:g} or "
                f"weight_decay={settings.weight_decay:g} too large?); it is not saved"
            ) from error
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(f"{error}; {self.folder.whole_checkpoints()}") from error
        self.saved_step = step
        if self.world.is_main:
            self.folder.last_saved = path
            self.rotation_is_due = True
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            terminal.say(f"saved {path} ({size:.0f} MB, {time.perf_counter() - began:.1f} s)")

    def save_after_an_error(self) -> None:
        """The last whole update, if it is not saved and this process can do it alone."""
        if self.between or self.world.size > 1 or self.saved_step == self.counters["step"]:
            return
        if self.counters["step"] == 0:
            return
        try:
            self.save()
        except (checkpoint.CheckpointError, TrainingStopped, OSError) as error:
            print(f"the last save failed too: {error}", file=sys.stderr)

    def finish(self, before: dict[str, float] | None) -> Path:
        """The closing evaluation, the final model, the pictures and the report."""
        after = None
        if self.held_out:
            after = self.evaluate()
            self.log(after)
            self.write_examined()
        finite = all(math.isfinite(value) for value in (after or {}).values() if isinstance(value, float))
        self.rotate(proven=finite)
        final = self.folder.path / "final"
        try:
            checkpoint.save_folder(final, self.model, self.tokenizer, world=self.world)
        except checkpoint.NotFiniteError as error:
            raise TrainingStopped(f"{error} is not finite; the model is not saved") from error
        self.close()
        if self.tracker is not None:
            made = self._draw()
            if not self.has_gradient:
                terminal.say(
                    "the last gradient was 0: has the model collapsed? Look at the loss, and at learning_rate"
                )
            seconds = time.perf_counter() - self.started
            before = before or first_evaluation(self.folder.path / "metrics.jsonl", after)
            print_report(self.folder.path, before, after, self.counters, self.stream.counts, made, seconds)
        return final

    def on_rank_0(self, act: Callable[[], Any]) -> Any:
        """What ``act`` gives on rank 0, and None elsewhere. If it fails, the others end without a word."""
        result, error = None, None
        if self.world.is_main:
            try:
                result = act()
            except Exception as failure:
                error = failure
        if not self.world.from_main(error is not None):
            return result
        raise error or SystemExit(2)

    def close(self) -> None:
        """Nothing more is logged."""
        if self.tracker is not None:
            self.tracker.close()

    def _questions(self) -> dict[str, list]:
        """What every evaluation asks the model."""
        settings = self.settings
        if not settings.recall_samples:
            return {}
        try:
            return questions_of_recall(
                self.tokenizer, settings.max_length, settings.recall_samples, settings.seed
            )
        except ValueError as error:
            raise SettingsError(f"recall_samples: {error}; max_length is {settings.max_length}") from error

    def _draw(self) -> dict[str, Path]:
        """The pictures and the report, by what they are; none of them is worth a run."""
        made, folder = {}, self.folder.path
        try:
            made |= {path.stem: path for path in draw_plots(folder)}
        except ImportError:
            terminal.say(
                "no pictures: matplotlib is not installed (pip install 'refine-fast-weights[plots]')"
            )
        except Exception as error:
            terminal.say(f"no pictures: {type(error).__name__}: {why(error)}")
        try:
            with terminal.stage("writing the report"):
                made["report"] = write_report([folder], folder / "report.html")
        except Exception as error:
            terminal.say(f"no report: {type(error).__name__}: {why(error)}")
        return made

    def _write_environment(self, anew: bool) -> None:
        """What the numbers of this run are made with; a run that goes on keeps when it began."""
        path, begun = self.folder.path / "environment.json", time.strftime("%Y-%m-%d %H:%M:%S %z")
        if not anew and path.is_file():
            with suppress(ValueError, TypeError, KeyError, OSError):
                begun = json.loads(path.read_text(encoding="utf-8"))["begun"]
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        about = {
            "begun": begun,
            "parameters": parameters,
            "machine": describe_machine(self.world.device, self.world.size),
            "versions": versions(),
        }
        write_whole(path, json.dumps(about, indent=2) + "\n")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Reading a block of the data takes a while where it is shuffled; that is shown before the first update."""
        if self.counters["step"] > self.first_step:
            yield
            return
        with terminal.stage("tokenising", lambda: f"{self.stream.counts.windows:,} sequences"):
            yield

    def _say_expected_time(self) -> None:
        """After ten updates: how long the others will take."""
        took, left = self.counters["step"] - self.first_step, self.settings.max_steps - self.counters["step"]
        if took == _EXPECTED_AFTER and left > 0:
            seconds = time.perf_counter() - self.training_began
            terminal.say(
                f"{took} updates took {duration(seconds)}: about {duration(seconds / took * left)} for the other "
                f"{left:,}, evaluations apart"
            )

    def _amid_an_update(self, *_) -> None:
        self.between = True


def _ends(intervals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Intervals as two numbers each."""
    return {
        f"{name}_{end}": value
        for name, interval in intervals.items()
        for end, value in zip(("low", "high"), interval)
    }


def _say(sentence: str, run: list[RunFolder], code: int) -> int:
    """One sentence, with what is saved."""
    saved = run[0].last_saved if run else None
    if saved is not None and "written before" not in sentence:
        sentence += f"; the last checkpoint is {saved}, go on with --resume_from_checkpoint auto"
    print(f"refine.train: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
