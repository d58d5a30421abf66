"""From rewards to a loss: group-standardised advantages and the clipped policy gradient (GRPO)."""

from __future__ import annotations

import torch

from refine.method.config import RefineConfig


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [B, c, n] standardised within their group -> advantages [B, c, n] float32.

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
    logprobs: torch.Tensor,  # [B, c, n, k] float32, with a gradient
    old_logprobs: torch.Tensor,  # [B, c, n, k] float32, of the policy that sampled
    advantages: torch.Tensor,  # [B, c, n]
    config: RefineConfig,
    lengths: torch.Tensor | None = None,  # [B, c, n], tokens of each rollout that count; None: all k
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
    counted = torch.arange(loss.shape[-1], device=loss.device) < lengths[..., None]  # [B, c, n, k]

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (torch.where(counted, x, 0.0).sum((1, 2, 3)) / counted.sum((1, 2, 3))).mean()

    return mean(loss), mean(hit)
