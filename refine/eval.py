"""``python -m refine.eval``: the story of an evaluation, from settings to a table.

Two kinds of tasks. *Measures* look at the model's predictions of given text: ``held_out`` (next-token loss and
accuracy, and the rewards of rollouts), ``copying``, ``recall``, and the curves ``recall_curve`` and
``loss_by_position``. The others are *answered* in the model's own words, greedily, and may come after training on
the prompts themselves: RULER's needles in haystacks (``niah``), its other generated tasks (``vt``, ``cwe``,
``fwe``; with ``niah`` they are ``ruler``) and question answering (``ruler_qa``), LongBench (``longbench``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from refine.commands import answer_help

if __name__ == "__main__":
    answer_help("eval", sys.argv[1:])  # before the seconds that the imports below take

import numpy as np
from transformers.utils.logging import disable_progress_bar

from refine.data.recall_documents import recall_items
from refine.data.stream import DataConfig, held_out_stream
from refine.environment import versions
from refine.evaluation.answers import answer_items, whole_batches
from refine.evaluation.curves import (
    bootstrap_interval,
    draw_curves,
    entropy_by_position,
    loss_by_position,
    recall_over_distance,
)
from refine.evaluation.held_out import held_out_by_document
from refine.evaluation.metrics import wilson_interval
from refine.evaluation.predictions import RESULTS, Predictions, PredictionsError, check_folder, fingerprint
from refine.evaluation.recall import evaluate_copying, evaluate_recall
from refine.evaluation.report import (
    average_scores,
    describe_model,
    draw_heat_maps,
    score_predictions,
    score_records,
    table,
)
from refine.evaluation.settings import FREE_ON_RESUME, EvalSettings, parse_settings
from refine.evaluation.tasks.haystack import find_essay
from refine.evaluation.tasks.item import Item
from refine.evaluation.tasks.longbench import PREFIX, longbench_items
from refine.evaluation.tasks.niah import NIAH_TASKS, SAMPLES, NiahGenerator, TokenCounter
from refine.evaluation.tasks.qa import qa_items
from refine.evaluation.tasks.rows import BadRows, Columns
from refine.evaluation.tasks.ruler import RULER_TASKS, RulerGenerator
from refine.evaluation.tasks.words import find_words
from refine.files import why, write_whole
from refine.prepare import (
    check_environment,
    choose_device,
    is_out_of_memory,
    load_model_and_tokenizer,
    try_reward,
)
from refine.settings import SettingsError
from refine.signals import Terminated, name_and_code, terminations
from refine.terminal import fixed, terminal

DOCUMENTS = 96  # of a measure
COPY_DISTANCES = (32, 64, 128)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when it ended well, 2 with one sentence when it could not begin."""
    disable_progress_bar()  # of loading
    code, sentence = 0, ""
    try:
        with terminations():
            evaluate(parse_settings(sys.argv[1:] if arguments is None else arguments))
    except OSError as error:
        code, sentence = 2, why(error) if error.errno else str(error)
    except ValueError as error:  # of settings, data, files, or of the model about what it was given
        code, sentence = 2, str(error)
    except (KeyboardInterrupt, Terminated) as error:
        name, code = name_and_code(error)
        sentence = f"stopped by {name}; answers that are in output_dir stay, go on with --resume"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, sentence = 1, f"out of memory ({str(error).splitlines()[0]}). Try a smaller batch_size"
    if sentence:
        print(f"refine.eval: {sentence}", file=sys.stderr)
    return code


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Evaluate as told; returns what results.json holds.

    Raises:
        SettingsError, DataError, PredictionsError, FileNotFoundError: something about the settings, the data,
            the model or earlier predictions is wrong; raised before any answer.
    """
    check_environment()
    folder = None if settings.output_dir is None else Path(settings.output_dir)
    if folder is not None:
        check_folder(folder, settings.resume, settings.overwrite_output_dir)
    device = choose_device(settings.device)
    terminal.open()
    with terminal.stage("loading the model"):
        model, tokenizer = load_model_and_tokenizer(settings)
    try_reward(settings, model.config.hidden_size)
    model.to(device).eval()
    bad = BadRows()
    with terminal.stage("preparing the tasks"):
        items = _items(settings, tokenizer, bad)
    _print_banner(settings, model, device, len(items))
    for sentence in bad.describe():
        print(f"refine.eval: {sentence}", file=sys.stderr)
    identity = _identity(settings, model) if items else {}
    predictions = Predictions(
        folder if items else None, identity, resume=settings.resume, overwrite=settings.overwrite_output_dir
    )
    if predictions.lines:
        terminal.say(f"going on: {len(predictions.lines)} of {len(items)} samples are answered")

    results, intervals = _measure(model, tokenizer, settings)
    curves = _curves(model, tokenizer, settings)
    for name, curve in curves.items():
        results |= {f"{name}_{place}": value for place, (value, _) in curve.items()}
        intervals |= {f"{name}_{place}": interval for place, (_, interval) in curve.items() if interval}
    for name, value in results.items():
        terminal.say(f"{name:<28}{value:>12,}" if isinstance(value, int) else f"{name:<28}{fixed(value):>12}")

    trainer = answer_items(model, tokenizer, items, settings, predictions) if items else None
    predictions.close()
    lines = [predictions.lines[item.key] for item in items]
    scores = score_predictions(lines, trainer is not None)
    averages = average_scores(scores)
    if scores:
        terminal.say("\n".join(table(scores, averages)))
        _say_counts(scores, bad, trainer)
    for score in (*scores, *averages):
        results[score.name] = score.score
        intervals[score.name] = score.interval

    record = {
        "model": settings.model_name_or_path,
        "about_model": describe_model(model),
        "results": results,
        "intervals": intervals,
        "scores": score_records(scores),
        "averages": score_records(averages),
        "bad_rows": bad.count,
        "skipped_updates": 0 if trainer is None else trainer.skipped,
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
    } | identity.get("sources", {})
    if folder is not None:
        _write(folder, record, lines, curves)
    return record


def _print_banner(settings: EvalSettings, model, device, items: int) -> None:
    """What is about to happen."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = settings.model_name_or_path or "the tiny model of this package"
    rows = [
        ("model", f"{name}: {model.config.model_type}, {parameters:,} parameters, {device}"),
        ("tasks", ", ".join(settings.tasks)),
    ]
    if items:
        trained = (
            "" if settings.ttt == "none" else f", after test-time training ({settings.ttt}) on the prompts"
        )
        rows.append(("answers", f"{items:,} prompts, {settings.batch_size} together{trained}"))
    rows.append(("folder", settings.output_dir or "none: results are printed alone"))
    terminal.banner("refine: evaluation", rows)


def _items(settings: EvalSettings, tokenizer, bad: BadRows) -> list[Item]:
    """Every sample to be answered, by task and length."""
    items: list[Item] = []
    columns = Columns(settings.prompt_column, settings.answer_column, settings.task_column)
    rest = {
        "bad": bad, "samples": settings.samples, "max_prompt_length": settings.max_prompt_length,
        "add_bos_token": settings.add_bos_token,
    }  # fmt: skip
    try:
        counter, essay = TokenCounter(tokenizer, settings.add_bos_token), None
        for name in [task for task in settings.tasks if task in NIAH_TASKS]:
            if NIAH_TASKS[name].haystack == "essay":
                essay = find_essay(settings.essay_file)
            for length in settings.lengths:
                generator = NiahGenerator(
                    NIAH_TASKS[name], counter, length, essay, settings.seed, wording=settings.needle_wording
                )
                items += generator.items(settings.samples or SAMPLES)
        for name in [task for task in settings.tasks if task in RULER_TASKS]:
            for length in settings.lengths:
                items += RulerGenerator(name, counter, length, settings.seed).items(
                    settings.samples or SAMPLES
                )
        if asked := [task for task in settings.tasks if task.startswith("ruler_")]:
            of = None if "ruler_qa" in asked else asked
            items += qa_items(
                settings.ruler_qa_files, columns, tokenizer, tasks=of, lengths=settings.qa_lengths, **rest
            )
        if asked := [task.removeprefix(PREFIX) for task in settings.tasks if task.startswith(PREFIX)]:
            items += longbench_items(settings.longbench_files, columns, tokenizer, tasks=asked, **rest)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    order = {(item.task, item.length): None for item in items}  # rows of one task may lie apart in the files
    place = {group: number for number, group in enumerate(order)}
    items = sorted(items, key=lambda item: place[item.task, item.length])
    return whole_batches(items, settings) if settings.drop_last_batch else items


def _identity(settings: EvalSettings, model) -> dict[str, Any]:
    """What answers follow from: all settings but those that change none, the weights, the texts."""
    chosen = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE_ON_RESUME}
    chosen |= {"model_fingerprint": fingerprint(model)}
    needles = [NIAH_TASKS[task] for task in settings.tasks if task in NIAH_TASKS]
    sources = {"words": find_words().source} if needles or "cwe" in settings.tasks else {}
    if any(task.haystack == "essay" for task in needles):
        sources["essay"] = find_essay(settings.essay_file).source
    return chosen | {"sources": sources}


def _measure(model, tokenizer, settings: EvalSettings) -> tuple[dict, dict]:
    """The measures asked for, and their 95 % intervals."""
    results: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    count = settings.samples or DOCUMENTS
    if "held_out" in settings.tasks:
        stream = held_out_stream(_held_out_text(settings), tokenizer)
        with terminal.stage("tokenising held-out text"):
            documents = list(islice(stream.batches(1), count))
        read = terminal.track(documents, "held_out")
        results, intervals = held_out_by_document(model, read, settings, settings.seed)
        del results["eval_cosine_by_sequence"]  # for a run's curve
    if "copying" in settings.tasks:
        for distance in terminal.track(COPY_DISTANCES, "copying"):
            found = evaluate_copying(model, len(tokenizer), distance, count, settings.seed)
            results |= {name.replace("_", f"_{distance}_", 1): value for name, value in found.items()}
            intervals[f"copy_{distance}_accuracy"] = wilson_interval(found["copy_accuracy"], count)
    if "recall" in settings.tasks:
        for tokens in terminal.track(settings.recall_tokens, "recall"):
            found = _recall(model, tokenizer, settings.seed, count, tokens)
            results |= {
                name.replace("recall_", f"recall_{tokens}_", 1): value for name, value in found.items()
            }
            intervals[f"recall_{tokens}_accuracy"] = wilson_interval(found["recall_accuracy"], count)
    return results, intervals


def _curves(model, tokenizer, settings: EvalSettings) -> dict[str, dict[int, tuple[float, Any]]]:
    """The curves asked for: name -> {distance or position: (value, its 95 % interval)}."""
    curves = {}
    count = settings.samples or DOCUMENTS
    if "recall_curve" in settings.tasks:
        text = np.concatenate(_held_out_windows(settings, tokenizer, settings.max_length, 2))
        distances = settings.recall_distances
        with terminal.stage("recall_curve"):
            found = recall_over_distance(model, text, distances, count, settings.seed, settings.batch_size)
        curves["recall_curve"] = {
            distance: (own["accuracy"], bootstrap_interval(own["passages"]))
            for distance, own in found.items()
        }
        curves["recall_curve_nats"] = {distance: (own["nats"], None) for distance, own in found.items()}
    if "loss_by_position" in settings.tasks:
        documents = _held_out_windows(settings, tokenizer, settings.positions, settings.positions)
        read = terminal.track(documents[:count], "loss_by_position")
        found = loss_by_position(model, read, settings.positions)
        curves["loss_by_position"] = {
            end: (float(losses.mean()), bootstrap_interval(losses)) for end, losses in found.items()
        }
    if "entropy_by_position" in settings.tasks:
        documents = _held_out_windows(settings, tokenizer, settings.positions, settings.positions)
        found = entropy_by_position(model, documents[:count], settings.positions)
        curves["entropy_by_position"] = {
            end: (float(own.mean()), bootstrap_interval(own)) for end, own in found.items()
        }
    return curves


def _held_out_windows(settings: EvalSettings, tokenizer, longest: int, shortest: int) -> list[np.ndarray]:
    """Held-out text in windows of so many tokens."""
    config = dataclasses.replace(_held_out_text(settings), max_length=longest, min_length=shortest)
    stream = held_out_stream(config, tokenizer)
    if stream is None:
        raise SettingsError(f"positions is {shortest}, but no held-out document has so many tokens")
    return [example.input_ids for example in stream.examples()]


def _held_out_text(settings: EvalSettings) -> DataConfig:
    """What measures read: all of the text named, or what is held out of the default text."""
    return DataConfig(
        dataset_name_or_path=settings.dataset_name_or_path,
        dataset_config=settings.dataset_config,
        dataset_split=settings.dataset_split,
        text_column=settings.text_column,
        eval_dataset_name_or_path=settings.dataset_name_or_path,
        max_length=settings.max_length,
        min_length=settings.min_tokens,
        seed=settings.seed,
        add_bos_token=settings.add_bos_token,
    )


def _recall(model, tokenizer, seed: int, count: int, tokens: int) -> dict[str, float]:
    """Recall over documents of about so many tokens."""
    sample = [item.prompt for item in recall_items(seed, 8, 4 * tokens)]
    per_token = sum(map(len, sample)) / sum(len(tokenizer(text)["input_ids"]) for text in sample)
    return evaluate_recall(model, tokenizer, recall_items(seed, count, int(per_token * tokens)))


def _say_counts(scores, bad: BadRows, trainer) -> None:
    """What was not as asked for."""
    for count, what in (
        (
            sum(score.cut_prompts for score in scores),
            "prompts were over max_prompt_length and cut in the middle",
        ),
        (bad.count, "bad rows were left out"),
        (sum(score.not_trained for score in scores), "prompts were too short for test-time training"),
        (
            0 if trainer is None else trainer.skipped,
            "updates were skipped: a loss or gradient was not finite",
        ),
    ):
        if count:
            terminal.say(f"{count} {what}")


def _write(
    folder: Path, record: dict[str, Any], lines: list[dict[str, Any]], curves: dict[str, dict]
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESULTS, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise PredictionsError(f"output_dir {str(folder)!r} cannot be written: {why(error)}") from error
    try:
        if draw_heat_maps(lines, folder / "niah.png"):
            terminal.say(f"picture  {folder / 'niah.png'}")
        recall, loss = (curves.get(name, {}) for name in ("recall_curve", "loss_by_position"))
        if draw_curves(recall, loss, folder / "curves.png"):
            terminal.say(f"picture  {folder / 'curves.png'}")
    except Exception as error:  # no picture is worth an evaluation
        print(f"no picture: {type(error).__name__}: {why(error)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
