"""REFINE: reinforced fast weights with next-sequence prediction (arXiv 2602.16704)."""

from refine.integrations.accelerate import accelerate_transformers
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


def __getattr__(name: str):
    """The trainer is imported where it is used: it needs accelerate, and transformers' Trainer takes a while."""
    if name in ("RefineTrainer", "RefineTrainingArguments"):
        from refine.integrations import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'refine' has no attribute {name!r}")
