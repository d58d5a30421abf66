"""The settings of the method, with the paper's values as defaults (arXiv 2602.16704, Sec. 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from refine.method.objective import OBJECTIVES, find_objective
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
        objective: ``grpo`` (clipped policy gradient on group-standardised rewards), ``bnpo``, ``dr_grpo``,
            ``dapo``, ``gspo``, ``cispo``, ``sapo`` (see :mod:`refine.method.objective`), or ``module:function``.
        lambda_sft: weight of the next-token loss.
        lambda_rl: weight of the next-sequence loss; 0 makes the step plain SFT.
        temperature: of the policy, in sampling and in log-probs.
        clip_range: epsilon of the clipped policy gradient: the ratio counts from 1 - epsilon on.
        clip_range_high: and up to 1 + this; None: ``clip_range``. With ``cispo`` the cap of the ratio itself.
        dual_clip: the bound on the ratio where the advantage is negative; None: no bound.
        beta: weight of the KL divergence to a reference model.
        top_entropy_quantile: only so large a share of the rollout tokens, those with the highest entropies of
            their predictions, enters the policy gradient.
        sapo_temperature_pos, sapo_temperature_neg: of ``sapo``'s gate, where the advantage is positive and not.
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
    clip_range_high: float | None = None
    dual_clip: float | None = 3.0
    beta: float = 0.0
    top_entropy_quantile: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    step: str = "shared_prefix"
    state_stride: int = 64
    segment_length: int | None = None

    def __post_init__(self):
        for name in ("num_chunks", "rollout_length", "num_rollouts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        for name in ("lambda_sft", "lambda_rl", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)!r}")
        positive = ("temperature", "selection_temperature", "clip_range")
        for name in (*positive, "sapo_temperature_pos", "sapo_temperature_neg"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be over 0 and finite, got {getattr(self, name)!r}")
        self._check_clips()
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile must be over 0 and at most 1, got {self.top_entropy_quantile!r}"
            )
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

    def _check_clips(self) -> None:
        if self.clip_range_high is not None and not 0 < self.clip_range_high < math.inf:
            raise ValueError(
                f"clip_range_high must be over 0 and finite or none, got {self.clip_range_high!r}"
            )
        if self.objective == "cispo" and self.clip_range_high is None:
            raise ValueError(
                "objective cispo caps the ratio itself at clip_range_high, which is none: give it (5.0, say)"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be over 1 or none, got {self.dual_clip!r}")
        if self.objective not in OBJECTIVES and (self.beta or self.top_entropy_quantile < 1):
            name = "beta" if self.beta else "top_entropy_quantile"
            raise ValueError(f"{name} is for the built-in objectives, {self.objective!r} does not know it")

    @property
    def upper_clip_range(self) -> float:
        """How far the ratio may rise over 1 before it is clipped."""
        return self.clip_range if self.clip_range_high is None else self.clip_range_high

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropies of rollout tokens' predictions are needed."""
        return self.rollout_stop_entropy is not None or self.top_entropy_quantile < 1

    @property
    def min_tokens(self) -> int:
        """The shortest sequence, in tokens, in which every chunk can hold a rollout between the margins."""
        room = max(MARGIN, self.rollout_length)
        return max(self.num_chunks * room, MARGIN + room)
