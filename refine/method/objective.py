"""From rewards to a loss: group-standardised advantages and the clipped policy gradient (GRPO).

An objective is a function of (logprobs [S, c, n, k] with a gradient, old_logprobs [S, c, n, k], advantages
[S, c, n], config, lengths [S, c, n] or None) that returns two scalars: the loss, and the share of tokens whose
gradient is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from refine.method.plugins import find_function

if TYPE_CHECKING:
    from refine.method.config import RefineConfig

Objective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [S, c, n] standardised within their group -> advantages [S, c, n] float32.

    With n = 1 a group is all c rollouts of one sequence; with n > 1 it is the n rollouts of one position.
    ``(r - mean) / (std + 1e-6)`` with the unbiased std; a group whose std is 0 (or that has one member) gets 0.
    """
    dim = 1 if rewards.shape[2] == 1 else 2
    if rewards.shape[dim] == 1:
        return torch.zeros_like(rewards, dtype=torch.float32)
    rewards = rewards.float()
    std = rewards.std(dim, keepdim=True)
    advantages = (rewards - rewards.mean(dim, keepdim=True)) / (std + 1e-6)
    return torch.where(std == 0, 0.0, advantages)


def policy_loss(
    logprobs: torch.Tensor,  # [S, c, n, k] float32, with a gradient
    old_logprobs: torch.Tensor,  # [S, c, n, k] float32, of the policy that sampled
    advantages: torch.Tensor,  # [S, c, n]
    config: RefineConfig,
    lengths: torch.Tensor | None = None,  # [S, c, n], tokens of each rollout that count; None: all k
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped policy-gradient loss, mean over a sequence's tokens, then over sequences, and the share of
    tokens at which it is clipped.

    PPO's clip (arXiv 1707.06347, Eq. 7) with the dual clip for negative advantages (arXiv 1912.09729, Eq. 5);
    no KL term, no entropy bonus.
    """
    ratio = (logprobs - old_logprobs.detach()).exp()
    gain = advantages.to(logprobs.dtype)[..., None]
    plain = -gain * ratio
    clipped = -gain * ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    loss = torch.maximum(plain, clipped)
    bound = -gain * config.dual_clip
    dual = (gain < 0) & (loss > bound)
    loss = torch.where(dual, bound, loss)
    hit = ((clipped > plain) | dual).to(loss.dtype)
    if lengths is None:
        return loss.mean(), hit.mean()
    counted = torch.arange(loss.shape[-1], device=loss.device) < lengths[..., None]  # [S, c, n, k]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (torch.where(counted, x, 0.0).sum((1, 2, 3)) / counted.sum((1, 2, 3))).mean()

    return mean(loss), mean(hit)


OBJECTIVES: dict[str, Objective] = {"grpo": policy_loss}


def find_objective(name: str) -> Objective:
    """An objective by its name, or by ``module:function``.

    Raises:
        ValueError: there is no such objective.
    """
    return find_function("objective", name, OBJECTIVES)


def next_sequence_loss(
    logprobs: torch.Tensor,  # [S, c, n, k] float32, with a gradient
    old_logprobs: torch.Tensor,  # [S, c, n, k] float32
    advantages: torch.Tensor,  # [S, c, n]
    config: RefineConfig,
    lengths: torch.Tensor | None = None,  # [S, c, n]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The configured objective's loss and clipped share.

    Raises:
        ValueError: an objective of the user's own returned something else than two scalars.
    """
    found = find_objective(config.objective)(logprobs, old_logprobs, advantages, config, lengths)
    pair = found if isinstance(found, tuple) and len(found) == 2 else ()
    if not pair or any(not isinstance(x, torch.Tensor) or x.ndim for x in pair):
        raise ValueError(
            f"objective {config.objective!r} must return two scalar tensors (loss, share of tokens clipped), "
            f"got {found!r}"
        )
    return found
