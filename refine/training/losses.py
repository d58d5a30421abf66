"""The losses that training and test-time training take from the method: the only calls to it outside measures."""

from __future__ import annotations

from typing import Any

import torch

from refine.method.config import RefineConfig
from refine.method.segments import read_next_tokens
from refine.method.step import RefineStepOutput, next_token_targets, refine_step
from refine.models.head import NextTokenLoss
from refine_kernels.linear_logprob import mix_seeds


def refine_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    config: RefineConfig,
    *,
    attention_mask: torch.Tensor | None = None,  # [B, T]
    keys: torch.Tensor,  # [B] int64
    seed: int,
    step: int,
    draw: RefineStepOutput | None = None,
    relay: Any = None,
) -> RefineStepOutput:
    """A REFINE step whose draws follow from the run's seed, the step and each sequence's key alone; with ``draw``
    the rollouts are those of an earlier policy."""
    given: dict[str, Any] = {"relay": relay}
    if draw is not None:
        given |= {
            "positions": draw.positions,
            "rollouts": draw.rollouts,
            "old_logprobs": draw.logprobs,
            "advantages": draw.advantages,
        }
        if config.rollout_stop_entropy is not None:
            given["rollout_lengths"] = draw.rollout_lengths
    seeds = mix_seeds(seed, step, keys)
    return refine_step(model, input_ids, config, attention_mask=attention_mask, seeds=seeds, **given)


def sequence_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    lengths: torch.Tensor,  # [B]
    segment_length: int | None = None,
    relay: Any = None,
) -> torch.Tensor:
    """Next-token cross-entropy, the mean over each sequence's targets, then over sequences: the SFT loss."""
    targets, weight = next_token_targets(input_ids, lengths)
    return target_loss(model, input_ids, targets, weight, segment_length, relay)


def target_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    targets: torch.Tensor,  # [B, T], -100 where there is none
    weight: torch.Tensor,  # [B, T] float32
    segment_length: int | None = None,
    relay: Any = None,
) -> torch.Tensor:
    """The weighted sum of next-token losses, in one pass or by segments."""
    if segment_length is None:
        return model(input_ids, use_cache=False, head=NextTokenLoss(targets, weight, entropy=False)).loss
    return read_next_tokens(model, input_ids, targets, weight, segment_length, relay).ntp_loss
