"""The settings of the method, with the paper's values as defaults (arXiv 2602.16704, Sec. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refine.method.objective import find_objective
from refine.method.rewards import find_reward
from refine.method.selection import MARGIN, find_selection

STEPS = ("shared_prefix", "per_prefix")


@dataclass(kw_only=True)
class RefineConfig:
    """How one REFINE step is taken.

    Attributes:
        num_chunks: c, positions per sequence: one is drawn from each of c chunks.
        rollout_length: k, tokens per rollout; also the width of the entropy smoothing.
        num_rollouts: n, rollouts per position.
        reward: ``cosine``, ``binary``, ``hybrid``, ``edit`` (edit similarity over tokens),
            ``discounted_cosine`` (early tokens weigh more), or ``module:function`` for one of your own.
        selection: ``entropy``, ``uniform``, ``argmax``, ``argmin``, or ``module:function``.
        selection_temperature: tau of the softmax over smoothed entropies.
        rollout_stop_entropy: a rollout ends before the first token, from its second on, whose prediction has
            an entropy under this (nats, at ``temperature``). Rewards, group statistics and the loss are of what
            was generated until then. None: always ``rollout_length`` tokens.
        objective: ``grpo`` (clipped policy gradient on group-standardised rewards), or ``module:function``.
        lambda_sft: weight of the next-token loss.
        lambda_rl: weight of the next-sequence loss; 0 makes the step plain SFT.
        temperature: of the policy, in sampling and in log-probs.
        clip_range: epsilon of the clipped policy gradient.
        dual_clip: the bound on the ratio where the advantage is negative.
        step: ``shared_prefix`` (one forward, branches from its states) or ``per_prefix`` (full-prefix
            recomputation for every position, as in the paper's code; the reference).
        state_stride: states are kept every so many tokens, a multiple of 64. Larger saves memory and costs
            a longer delta rule at each position.
        segment_length: read sequences by segments of so many tokens (at least 64): the same gradient with the
            activations of one segment alive, for one more forward. None: one pass.
    """

    num_chunks: int = 8
    rollout_length: int = 5
    num_rollouts: int = 1
    reward: str = "cosine"
    selection: str = "entropy"
    selection_temperature: float = 1.0
    objective: str = "grpo"
    rollout_stop_entropy: float | None = None
    lambda_sft: float = 1.0
    lambda_rl: float = 0.2
    temperature: float = 1.0
    clip_range: float = 0.2
    dual_clip: float = 3.0
    step: str = "shared_prefix"
    state_stride: int = 64
    segment_length: int | None = None

    def __post_init__(self):
        for name in ("num_chunks", "rollout_length", "num_rollouts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        for name in ("lambda_sft", "lambda_rl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)!r}")
        for name in ("temperature", "selection_temperature", "clip_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be over 0 and finite, got {getattr(self, name)!r}")
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be over 1, got {self.dual_clip!r}")
        if self.rollout_stop_entropy is not None and not self.rollout_stop_entropy > 0:
            raise ValueError(
                f"rollout_stop_entropy must be over 0 or none, got {self.rollout_stop_entropy!r}"
            )
        if self.step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}, got {self.step!r}")
        if not isinstance(self.state_stride, int) or self.state_stride < 64 or self.state_stride % 64:
            raise ValueError(f"state_stride must be a positive multiple of 64, got {self.state_stride!r}")
        if self.segment_length is not None:
            if not isinstance(self.segment_length, int) or self.segment_length < 64:
                raise ValueError(f"segment_length must be at least 64 or none, got {self.segment_length!r}")
            if self.step == "per_prefix":
                raise ValueError("segment_length needs step=shared_prefix: per_prefix reads whole prefixes")
        find_reward(self.reward), find_selection(self.selection), find_objective(self.objective)

    @property
    def min_tokens(self) -> int:
        """The shortest sequence, in tokens, in which every chunk can hold a rollout between the margins."""
        room = max(MARGIN, self.rollout_length)
        return max(self.num_chunks * room, MARGIN + room)
