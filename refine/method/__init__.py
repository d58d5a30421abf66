"""The method: reading, selection, rollouts, rewards, objective, and the step that joins them."""

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
