"""The method: reading, selection, rollouts, rewards, objective, and the step that joins them."""

from typing import TYPE_CHECKING

from refine.late import imported_late

if TYPE_CHECKING:
    from refine.method.completions import CompletionLogprobs, branch_logprobs
    from refine.method.config import RefineConfig
    from refine.method.context_parallel import ContextParallel
    from refine.method.generation import GeneratedGroup, generate_group
    from refine.method.rollouts import Rollouts
    from refine.method.sequences import LabelledTokens, Sequences, next_token_targets
    from refine.method.step import RefineStepOutput, next_token_loss, refine_step

__all__ = [
    "CompletionLogprobs",
    "ContextParallel",
    "GeneratedGroup",
    "LabelledTokens",
    "RefineConfig",
    "RefineStepOutput",
    "Rollouts",
    "Sequences",
    "branch_logprobs",
    "generate_group",
    "next_token_loss",
    "next_token_targets",
    "refine_step",
]

__getattr__ = imported_late(
    __name__,
    {
        "CompletionLogprobs": "refine.method.completions",
        "branch_logprobs": "refine.method.completions",
        "RefineConfig": "refine.method.config",
        "ContextParallel": "refine.method.context_parallel",
        "GeneratedGroup": "refine.method.generation",
        "generate_group": "refine.method.generation",
        "Rollouts": "refine.method.rollouts",
        "LabelledTokens": "refine.method.sequences",
        "Sequences": "refine.method.sequences",
        "next_token_targets": "refine.method.sequences",
        "RefineStepOutput": "refine.method.step",
        "next_token_loss": "refine.method.step",
        "refine_step": "refine.method.step",
    },
)
