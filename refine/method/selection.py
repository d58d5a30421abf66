"""Where to roll out: one position in each of c chunks, drawn by the entropy of the model's prediction (Eq. 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from refine.method.config import MARGIN, RefineConfig
from refine.method.seeds import Stream, uniform


def select_positions(
    entropy: torch.Tensor,  # [B, T] float32
    lengths: torch.Tensor,  # [B] int64, valid tokens; each at least config.min_tokens
    config: RefineConfig,
    seeds: torch.Tensor,  # [B] int64
) -> torch.Tensor:  # [B, c] int64
    """The positions p at which rollouts start: the first generated token stands where ``x_p`` stands.

    In chunk j of ``floor(length / c)`` tokens an index i is drawn; the rollout starts at ``i + 1``, so that its
    first token is the one that position i predicts, clamped to ``[20, length - max(20, k)]``.
    """
    batch, tokens = entropy.shape
    chunks = config.num_chunks
    size = (lengths // chunks)[:, None, None]  # [B, 1, 1]
    offset = torch.arange(max(tokens // chunks, 1), device=entropy.device)  # [S]
    index = torch.arange(chunks, device=entropy.device)[:, None] * size + offset  # [B, c, S]
    outside = offset >= size  # [B, 1, S]

    score = _scores(entropy, lengths, config)
    score = score.gather(1, index.clamp_max(tokens - 1).flatten(1)).view(batch, chunks, -1)
    score = score.masked_fill(outside, float("-inf"))
    if config.selection in ("argmax", "argmin"):
        drawn = score.argmax(-1)  # [B, c]
    else:
        chunk = torch.arange(chunks, device=entropy.device)
        u = uniform(seeds[:, None], Stream.POSITION, chunk)  # [B, c] float64 in [0, 1)
        cumulative = score.double().softmax(-1).cumsum(-1)
        target = (u * cumulative[..., -1])[..., None]
        drawn = torch.searchsorted(cumulative, target, right=True)[..., 0]
    drawn = torch.minimum(drawn, size[..., 0] - 1)
    position = index.gather(2, drawn[..., None])[..., 0] + 1
    last = (lengths - max(MARGIN, config.rollout_length))[:, None]
    return torch.minimum(position.clamp_min(MARGIN), last)


def _scores(entropy: torch.Tensor, lengths: torch.Tensor, config: RefineConfig) -> torch.Tensor:
    """[B, T]: the log-weights that positions are drawn from, or the number whose maximum is taken."""
    if config.selection == "uniform":
        return torch.zeros_like(entropy)
    valid = torch.arange(entropy.shape[1], device=entropy.device) < lengths[:, None]
    entropy = entropy * valid
    if config.selection == "argmax":
        return entropy
    if config.selection == "argmin":
        return -entropy
    width = config.rollout_length + (config.rollout_length + 1) % 2  # the next odd width
    smooth = F.avg_pool1d(entropy[:, None], width, stride=1, padding=width // 2)[:, 0]
    return smooth / config.selection_temperature
