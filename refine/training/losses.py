"""Next-token losses, of whole sequences and of targets of one's own."""

from __future__ import annotations

import torch

from refine.method import ContextParallel, LabelledTokens, Sequences, next_token_loss
from refine.models.head import NextTokenLoss


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


def pack(
    input_ids: torch.Tensor,  # [B, T]
    attention_mask: torch.Tensor,  # [B, T], padding on the right
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences of a batch one after the other in one row, [1, T'], and where they begin and end, [B + 1]."""
    borders = torch.nn.functional.pad(attention_mask.sum(1).cumsum(0), (1, 0))
    return input_ids[attention_mask.bool()][None], borders


def packed_loss(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [1, T]
    cu_seqlens: torch.Tensor,  # [B + 1]
) -> torch.Tensor:
    """:func:`sequence_loss` of packed sequences."""
    sequences = Sequences.of(input_ids, cu_seqlens=cu_seqlens)
    labelled = sequences.labelled()
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
