"""The losses that training and test-time training take from the method: their only calls to it."""

from __future__ import annotations

import torch

from refine.method import (
    ContextParallel,
    LabelledTokens,
    RefineConfig,
    RefineStepOutput,
    Sequences,
    next_token_loss,
    refine_step,
)
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
    context: ContextParallel | None = None,
    reference: torch.nn.Module | None = None,
) -> RefineStepOutput:
    """A REFINE step whose draws follow from the run's seed, the step and each sequence's key alone; with ``draw``
    the rollouts are those of an earlier policy."""
    seeds = mix_seeds(seed, step, keys)
    rollouts = None if draw is None else draw.drawn
    return refine_step(
        model,
        input_ids,
        config,
        attention_mask=attention_mask,
        seeds=seeds,
        rollouts=rollouts,
        context=context,
        reference=reference,
    )


def sequence_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    attention_mask: torch.Tensor,  # [B, T], padding on the right
    segment_length: int | None = None,
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """Next-token cross-entropy, the mean over each sequence's targets, then over sequences: the SFT loss."""
    labelled = Sequences(input_ids, attention_mask.sum(1)).labelled()
    return next_token_loss(model, labelled, segment_length, context)


def target_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    targets: torch.Tensor,  # [B, T], -100 where there is none
    weight: torch.Tensor,  # [B, T] float32
    segment_length: int | None = None,
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """The weighted sum of next-token cross-entropies."""
    return next_token_loss(model, LabelledTokens(input_ids, targets, weight), segment_length, context)
