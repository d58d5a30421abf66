"""The method, in the paper's order: selection, rollout, rewards, objective, and the step that joins them."""

from refine.method.config import RefineConfig
from refine.method.step import RefineStepOutput, refine_step

__all__ = ["RefineConfig", "RefineStepOutput", "refine_step"]
