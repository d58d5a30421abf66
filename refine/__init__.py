"""REFINE: reinforced fast weights with next-sequence prediction (arXiv 2602.16704).

Importing it registers its models with ``transformers``' auto classes. Everything else is imported where it is first
used; the package's own commands also leave the models until they need them, so that ``--help`` takes no seconds.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refine.late import imported_late

if TYPE_CHECKING:
    from refine.integrations.accelerate import accelerate_transformers
    from refine.integrations.trainer import RefineTrainer, RefineTrainingArguments
    from refine.method import (
        RefineConfig,
        RefineStepOutput,
        Sequences,
        branch_logprobs,
        generate_group,
        refine_step,
    )
    from refine.models import load_model

__version__ = "0.1.0"
__all__ = [
    "RefineConfig",
    "RefineStepOutput",
    "RefineTrainer",
    "RefineTrainingArguments",
    "Sequences",
    "accelerate_transformers",
    "branch_logprobs",
    "generate_group",
    "load_model",
    "refine_step",
]

__getattr__ = imported_late(
    __name__,
    {
        "RefineTrainer": "refine.integrations.trainer",
        "RefineTrainingArguments": "refine.integrations.trainer",
        "accelerate_transformers": "refine.integrations.accelerate",
        "load_model": "refine.models",
        **dict.fromkeys(
            (
                "RefineConfig",
                "RefineStepOutput",
                "Sequences",
                "branch_logprobs",
                "generate_group",
                "refine_step",
            ),
            "refine.method",
        ),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_own_command() -> bool:
    """Whether this process is the script ``refine``, or Python is looking for the module of ``python -m refine...``
    (``sys.argv[0]`` is ``-m`` until it has found it)."""
    program = sys.argv[0] if sys.argv else ""
    words = sys.orig_argv
    if program == "-m":
        return "-m" in words and words[words.index("-m") + 1].partition(".")[0] == __name__
    return Path(program).stem == __name__


if not _is_own_command():
    import refine.models  # noqa: F401
