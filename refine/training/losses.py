"""Next-token losses, of whole sequences and of targets of one's own."""

from __future__ import annotations

import torch

from refine.method import ContextParallel, LabelledTokens, Sequences, next_token_loss
from refine.models.head import NextTokenLoss


def sequence_loss(
    model: torch.nn.Module,
    sequences: Sequences,
    segment_length: int | None = None,
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """The SFT loss: next-token cross-entropy, a mean over each sequence's targets, then over sequences, or the sum
    by the tokens' weights."""
    labelled = sequences.labelled()
    if segment_length is not None:
        return next_token_loss(model, labelled, segment_length, context)
    head = NextTokenLoss(labelled.targets, labelled.row_weight, entropy=False)
    return model(labelled.input_ids, use_cache=False, head=head, **sequences.places).loss


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
