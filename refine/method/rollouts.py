"""Rollouts as one thing that goes back and forth: drawn by one step, taken again by later off-policy updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refine.method.config import RefineConfig
from refine.method.sequences import Sequences


@dataclass(kw_only=True)
class Rollouts:
    """S sequences, c positions each, n rollouts a position, k tokens a rollout.

    Positions are counted from a sequence's first token. What is None is found by the step that takes these:
    tokens are sampled, ``old_logprobs`` are the model's own (the on-policy step), advantages follow from the
    rewards, lengths from ``config.rollout_stop_entropy``.
    """

    positions: torch.Tensor | None = None  # [S, c] int64: a rollout's first token stands where x_p stands
    tokens: torch.Tensor | None = None  # [S, c, n, k] int64
    old_logprobs: torch.Tensor | None = None  # [S, c, n, k] float32, under the policy that sampled
    advantages: torch.Tensor | None = None  # [S, c, n] float32
    lengths: torch.Tensor | None = None  # [S, c, n] int64, 1 to k: the tokens that count; None: all

    @classmethod
    def given(cls, positions: torch.Tensor | None, rollouts: torch.Tensor | Rollouts | None) -> Rollouts:
        """What a caller of the step gave."""
        if not isinstance(rollouts, Rollouts):
            return cls(positions=positions, tokens=rollouts)
        if positions is not None:
            raise ValueError("positions were given twice: a Rollouts object holds its own")
        return rollouts

    def check(self, sequences: Sequences, config: RefineConfig) -> None:
        """Everything that is there must fit the batch and each other.

        Raises:
            ValueError: names what does not fit.
        """
        groups = (len(sequences), config.num_chunks)
        each = (*groups, config.num_rollouts, config.rollout_length)
        shapes = {
            "positions": (self.positions, groups),
            "rollouts": (self.tokens, each),
            "old_logprobs": (self.old_logprobs, each),
            "advantages": (self.advantages, each[:3]),
            "rollout lengths": (self.lengths, each[:3]),
        }
        for name, (value, shape) in shapes.items():
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if self.tokens is not None and self.positions is None:
            raise ValueError("rollouts were given without positions: give both")
        if self.tokens is None and any(
            x is not None for x in (self.old_logprobs, self.advantages, self.lengths)
        ):
            raise ValueError("old_logprobs, advantages and lengths belong to rollouts: give their tokens too")
        k = config.rollout_length
        if self.lengths is not None and not bool(((self.lengths >= 1) & (self.lengths <= k)).all()):
            raise ValueError(
                f"rollout lengths must lie between 1 and rollout_length {k}, got {self.lengths.tolist()}"
            )
        if self.positions is not None:
            last = (sequences.lengths - k)[:, None]
            if not bool(((self.positions >= 1) & (self.positions <= last)).all()):
                raise ValueError(
                    "positions must lie between 1 and length - rollout_length, got "
                    f"{self.positions.tolist()} for lengths {sequences.lengths.tolist()}"
                )


def rollout_lengths(
    entropy: torch.Tensor,  # [..., k], of the prediction of each rollout token
    stop_entropy: float,
) -> torch.Tensor:  # [...] int64, 1 to k
    """How many tokens of each rollout count: it ends before the first, from the second on, that the policy predicts
    with an entropy below ``stop_entropy`` nats.

    All k tokens are drawn whatever they are, so that shapes stay fixed and a group's draws do not depend on
    where another rollout ends; tokens behind an end count nowhere.
    """
    going_on = entropy[..., 1:] >= stop_entropy
    return 1 + going_on.long().cumprod(-1).sum(-1)
