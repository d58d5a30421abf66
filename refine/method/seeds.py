"""Every random draw of a step, by counter: a draw depends on its own sequence, chunk, rollout and token, and
on nothing else: not on the batch size, the place in the batch, or what the other sequences are.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from refine_kernels.linear_logprob import mix_seeds


class Stream(IntEnum):
    """What a draw is for; no two purposes share random numbers."""

    SEQUENCE = 1
    POSITION = 2
    TOKEN = 3


def sequence_seeds(
    input_ids: torch.Tensor,  # [B, T]
    lengths: torch.Tensor,  # [B]
    generator: torch.Generator | None = None,
) -> torch.Tensor:  # [B] int64
    """One seed a sequence, from one draw of the generator and the sequence's own tokens."""
    device = generator.device if generator is not None else "cpu"
    base = torch.randint(2**62, (), generator=generator, device=device).to(input_ids.device)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    hashed = mix_seeds(input_ids, column) * (column < lengths[:, None])  # [B, T]
    return mix_seeds(base, Stream.SEQUENCE.value, hashed.sum(1))


def rollout_seeds(seeds: torch.Tensor, chunks: int, rollouts: int, tokens: int) -> torch.Tensor:
    """[B] -> [B, c, n, k] int64: one seed a sampled token."""
    j, r, t = (torch.arange(size, device=seeds.device) for size in (chunks, rollouts, tokens))
    return mix_seeds(seeds[:, None, None, None], Stream.TOKEN.value, j[:, None, None], r[:, None], t)


def uniform(*counters: int | torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1), a pure function of the (broadcast) counters."""
    bits = mix_seeds(*(int(c) if isinstance(c, int) else c for c in counters))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53
