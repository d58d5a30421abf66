"""REFINE: reinforced fast weights with next-sequence prediction (arXiv 2602.16704)."""

from refine.integrations.accelerate import accelerate_transformers
from refine.method import RefineConfig, RefineStepOutput, branch_logprobs, generate_group, refine_step
from refine.models import load_model

__version__ = "0.1.0"
__all__ = [
    "RefineConfig",
    "RefineStepOutput",
    "accelerate_transformers",
    "branch_logprobs",
    "generate_group",
    "load_model",
    "refine_step",
]
