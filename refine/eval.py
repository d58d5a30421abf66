"""``python -m refine.eval``: measure a model on held-out text and on in-context recall.

Tasks: ``held_out`` (next-token loss and accuracy, and the rewards of rollouts, on text that training does not
see), ``copying`` (random tokens that come a second time) and ``recall`` (questions about generated documents whose
answers stood long before).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from refine.evaluation.held_out import evaluate_held_out
from refine.evaluation.recall import evaluate_copying, evaluate_recall
from refine.training.data import DataError, held_out_stream
from refine.training.parts import choose_device, data_config, load_parts
from refine.training.recall import recall_items
from refine.training.settings import SettingsError, TrainSettings

TASKS = ("held_out", "copying", "recall")
COPY_DISTANCES = (32, 64, 128)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate from the command line; prints a table and, with ``--output_dir``, writes results.json."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    try:
        for task in options.tasks:
            if task not in TASKS:
                raise SettingsError(f"tasks must be of {', '.join(TASKS)}, got {task!r}")
        settings = TrainSettings(
            model_name_or_path=options.model,
            dataset_name_or_path=options.dataset_name_or_path,
            eval_dataset_name_or_path=options.dataset_name_or_path,
            max_length=options.max_length,
            eval_samples=options.samples,
            seed=options.seed,
            device=options.device,
        )
        if settings.eval_samples < 1:
            raise SettingsError(f"samples must be at least 1, got {settings.eval_samples}")
        if min(options.recall_tokens) < 64:
            raise SettingsError(f"recall_tokens must be at least 64 each, got {min(options.recall_tokens)}")
        device = choose_device(settings)
        model, tokenizer = load_parts(settings, None)
        model.to(device)
        results: dict[str, float] = {}
        if "held_out" in options.tasks:
            stream = held_out_stream(data_config(settings), tokenizer)
            results |= evaluate_held_out(
                model, islice(stream.batches(1), settings.eval_samples), settings, settings.seed
            )
        if "copying" in options.tasks:
            for distance in COPY_DISTANCES:
                found = evaluate_copying(model, len(tokenizer), distance, options.samples, options.seed)
                results |= {name.replace("_", f"_{distance}_", 1): value for name, value in found.items()}
        if "recall" in options.tasks:
            for tokens in options.recall_tokens:
                results |= _recall(model, tokenizer, settings, tokens)
    except (SettingsError, DataError, FileNotFoundError) as error:
        print(f"refine.eval: {error}", file=sys.stderr)
        return 2
    for name, value in results.items():
        print(f"{name:<24}{value:>12,}" if isinstance(value, int) else f"{name:<24}{value:>12.4f}")
    if options.output_dir:
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"model": options.model, "results": results, "torch": torch.__version__}
        record["settings"] = dataclasses.asdict(settings)
        (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def _recall(model, tokenizer, settings: TrainSettings, tokens: int) -> dict[str, float]:
    """Recall over documents of about so many tokens; the names of the results carry the number."""
    sample = [item.prompt for item in recall_items(settings.seed, 8, 4 * tokens)]
    per_token = sum(map(len, sample)) / sum(len(tokenizer(text)["input_ids"]) for text in sample)
    items = recall_items(settings.seed, settings.eval_samples, int(per_token * tokens))
    found = evaluate_recall(model, tokenizer, items)
    return {name.replace("recall_", f"recall_{tokens}_", 1): value for name, value in found.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m refine.eval", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", default=None, help="a folder or a hub name (default: the package's tiny model)"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--dataset_name_or_path", default=None, help="text for held_out (default: our own)")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens a document")
    parser.add_argument(
        "--recall_tokens", nargs="+", type=int, default=[128, 512, 2048], help="lengths of recall documents"
    )
    parser.add_argument("--samples", type=int, default=96, help="documents a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--output_dir", default=None, help="where to write results.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
