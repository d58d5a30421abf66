"""REFINE: reinforced fast weights with next-sequence prediction (arXiv 2602.16704)."""

import importlib

from refine.method import RefineConfig, RefineStepOutput, branch_logprobs, generate_group, refine_step
from refine.models import load_model

__version__ = "0.1.0"
__all__ = [
    "RefineConfig",
    "RefineStepOutput",
    "RefineTrainer",
    "RefineTrainingArguments",
    "accelerate_transformers",
    "branch_logprobs",
    "generate_group",
    "load_model",
    "refine_step",
]

_LAZY = {  # imported where they are used: they need more of transformers, which takes a while
    "RefineTrainer": "refine.integrations.trainer",
    "RefineTrainingArguments": "refine.integrations.trainer",
    "accelerate_transformers": "refine.integrations.accelerate",
}


def __getattr__(name: str):
    """What is imported late."""
    if name not in _LAZY:
        raise AttributeError(f"module 'refine' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
