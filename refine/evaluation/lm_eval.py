"""``python -m refine.evaluation.lm_eval``: short contexts by EleutherAI's lm-eval, a stage of the paper's rows.

The tasks are lm-eval's own, which it fetches where they are not at hand; ``include_path`` names a folder of
task files that go before them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from refine.environment import versions
from refine.evaluation.report import describe_model
from refine.files import why, write_whole
from refine.settings import SettingsError, build, check_values, read_command_line, read_file, setting
from refine.shared_settings import ModelSettings

# name -> (lm-eval's task, its measure, higher is a share between 0 and 1)
MEASURES = {
    "lm_wikitext_ppl": ("wikitext", "word_perplexity"),
    "lm_lambada_ppl": ("lambada_openai", "perplexity"),
    "lm_fda": ("fda", "contains"),
    "lm_swde": ("swde", "contains"),
    "lm_lambada": ("lambada_openai", "acc"),
    "lm_piqa": ("piqa", "acc"),
    "lm_hellaswag": ("hellaswag", "acc_norm"),
    "lm_winogrande": ("winogrande", "acc"),
    "lm_arc_easy": ("arc_easy", "acc"),
    "lm_arc_challenge": ("arc_challenge", "acc_norm"),
}


@dataclass(kw_only=True)
class LmEvalSettings(ModelSettings):
    """Everything that ``python -m refine.evaluation.lm_eval`` can be told."""

    ALIASES: ClassVar[dict[str, str]] = {"model": "model_name_or_path"}

    tasks: list[str] = setting(list(MEASURES), "of these", choices=tuple(MEASURES))
    samples: int | None = setting(None, "a task; default: all", least=1)
    batch_size: int = setting(8, "requests answered together", least=1)
    include_path: str | None = setting(None, "a folder of task files that go before lm-eval's own")
    output_dir: str | None = setting(None, "where results.json goes")

    def __post_init__(self):
        check_values(self)
        if not self.tasks:
            raise SettingsError("tasks: name at least one")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 0 when it ended well, 2 with one sentence when it could not begin."""
    try:
        given = read_command_line(
            LmEvalSettings, sys.argv[1:] if arguments is None else arguments,
            "python -m refine.evaluation.lm_eval", "Short-context tasks of lm-eval.",
        )  # fmt: skip
        path = given.pop("config", None)
        merged = {} if path is None else read_file(LmEvalSettings, path)
        evaluate(build(LmEvalSettings, merged | given))
    except (SettingsError, OSError) as error:
        text = why(error) if isinstance(error, OSError) and error.errno else str(error)
        print(f"refine.evaluation.lm_eval: {text}", file=sys.stderr)
        return 2
    return 0


def evaluate(settings: LmEvalSettings) -> dict[str, Any]:
    """Evaluate as told; returns what results.json holds, in the form of ``refine.eval``'s.

    Raises:
        SettingsError: lm-eval is not installed, or a setting is wrong.
        FileNotFoundError: there is no such model.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SettingsError(
            f"short contexts are measured by lm-eval: pip install 'refine-fast-weights[clients]' ({error})"
        ) from error
    from refine.prepare import (  # late: the paper's rows need the settings
        choose_device,
        load_model_and_tokenizer,
    )

    model, tokenizer = load_model_and_tokenizer(settings)
    device = choose_device(settings.device)
    model.to(device, torch.bfloat16 if settings.bf16 else None).eval()
    known = dict.fromkeys(MEASURES[name][0] for name in settings.tasks)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, device=str(device)),
        tasks=list(known), limit=settings.samples, random_seed=settings.seed, bootstrap_iters=0,
        task_manager=TaskManager(include_path=settings.include_path),
    )  # fmt: skip
    scores = [_score(found, name) for name in settings.tasks]
    record = {
        "model": settings.model_name_or_path,
        "about_model": describe_model(model),
        "results": {score["task"]: score["score"] for score in scores},
        "scores": scores,
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
    }
    for name, value in record["results"].items():
        print(f"{name:<20}{value:>12.4f}")
    if settings.output_dir is not None:
        folder = Path(settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", json.dumps(record, indent=2) + "\n")
    return record


def _score(found: dict[str, Any], name: str) -> dict[str, Any]:
    task, measure = MEASURES[name]
    own = found["results"][task]
    keys = [key for key in own if key.partition(",")[0] == measure]
    if not keys:
        raise SettingsError(f"lm-eval's task {task} has no measure {measure!r}: it has {', '.join(own)}")
    return {
        "task": name, "length": None, "score": float(own[keys[0]]), "interval": None,
        "samples": found["n-samples"][task]["effective"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
