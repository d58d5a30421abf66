"""Where to roll out: one position in each of c chunks, drawn by the entropy of the model's prediction (Eq. 6).

A selection is a function of (entropy [S, L] float32, lengths [S] int64, config, seeds [S] int64) that returns
positions [S, c] int64, counted from a sequence's first token. The first generated token of a rollout stands where
``x_p`` stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from refine.method.seeds import Stream, uniform
from refine.plugins import find_function

if TYPE_CHECKING:
    from refine.method.config import RefineConfig

MARGIN = 20  # a rollout starts at least this many tokens from either end of a sequence
Selection = Callable[[torch.Tensor, torch.Tensor, "RefineConfig", torch.Tensor], torch.Tensor]


def select_positions(
    entropy: torch.Tensor,  # [S, L] float32
    lengths: torch.Tensor,  # [S] int64, valid tokens; each at least config.min_tokens
    config: RefineConfig,
    seeds: torch.Tensor,  # [S] int64
) -> torch.Tensor:  # [S, c] int64
    """Positions by the configured selection.

    Raises:
        ValueError: a selection of the user's own returned something else than one position per chunk, inside the
            sequence and with room for a rollout.
    """
    select = find_selection(config.selection)
    positions = select(entropy, lengths, config, seeds)
    if select in SELECTIONS.values():
        return positions
    shape = (len(lengths), config.num_chunks)
    if (
        not isinstance(positions, torch.Tensor)
        or tuple(positions.shape) != shape
        or positions.dtype.is_floating_point
    ):
        got = tuple(positions.shape) if isinstance(positions, torch.Tensor) else type(positions).__name__
        raise ValueError(
            f"selection {config.selection!r} must return whole numbers of shape {shape}, got {got}"
        )
    last = (lengths - config.rollout_length)[:, None]
    if not bool(((positions >= 1) & (positions <= last)).all()):
        raise ValueError(
            f"selection {config.selection!r} must return positions between 1 and length - rollout_length, got "
            f"{positions.tolist()} for lengths {lengths.tolist()}"
        )
    return positions.long()


def find_selection(name: str) -> Selection:
    """A selection by its name, or by ``module:function``.

    Raises:
        ValueError: there is no such selection.
    """
    return find_function("selection", name, SELECTIONS)


def entropy(entropy, lengths, config, seeds) -> torch.Tensor:
    """The paper's: drawn from the softmax of the smoothed entropies of a chunk."""
    valid = torch.arange(entropy.shape[1], device=entropy.device) < lengths[:, None]
    width = config.rollout_length + (config.rollout_length + 1) % 2  # the next odd width
    smooth = F.avg_pool1d((entropy * valid)[:, None], width, stride=1, padding=width // 2)[:, 0]
    return _draw(smooth / config.selection_temperature, lengths, config, seeds)


def uniform_positions(entropy, lengths, config, seeds) -> torch.Tensor:
    """Any position of a chunk, with equal probability."""
    return _draw(torch.zeros_like(entropy), lengths, config, seeds)


def argmax(entropy, lengths, config, seeds) -> torch.Tensor:
    """The largest entropy of a chunk, without smoothing (as in the paper's code)."""
    return _largest(entropy, lengths, config)


def argmin(entropy, lengths, config, seeds) -> torch.Tensor:
    """The smallest entropy of a chunk, without smoothing (as in the paper's code)."""
    return _largest(-entropy, lengths, config)


SELECTIONS: dict[str, Selection] = {
    "entropy": entropy,
    "uniform": uniform_positions,
    "argmax": argmax,
    "argmin": argmin,
}


def _draw(score, lengths, config, seeds) -> torch.Tensor:
    """One position per chunk from the softmax of ``score`` [S, L] over the chunk."""
    score, index = _chunks(score, lengths, config)
    chunk = torch.arange(config.num_chunks, device=score.device)
    u = uniform(seeds[:, None], Stream.POSITION, chunk)  # [S, c] float64 in [0, 1)
    cumulative = score.double().softmax(-1).cumsum(-1)
    target = (u * cumulative[..., -1])[..., None]
    drawn = torch.searchsorted(cumulative, target, right=True)[..., 0]
    return _starts(drawn, index, lengths, config)


def _largest(score, lengths, config) -> torch.Tensor:
    """The position of the largest ``score`` [S, L] of each chunk."""
    score, index = _chunks(score, lengths, config)
    return _starts(score.argmax(-1), index, lengths, config)


def _chunks(score, lengths, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (-inf outside) and token indices of the c chunks of ``floor(length / c)`` tokens, [S, c, size]."""
    tokens, chunks = score.shape[1], config.num_chunks
    size = (lengths // chunks)[:, None, None]  # [S, 1, 1]
    offset = torch.arange(max(tokens // chunks, 1), device=score.device)
    index = torch.arange(chunks, device=score.device)[:, None] * size + offset  # [S, c, size]
    score = score.gather(1, index.clamp_max(tokens - 1).flatten(1)).view(index.shape)
    return score.masked_fill(offset >= size, float("-inf")), index


def _starts(drawn, index, lengths, config) -> torch.Tensor:
    """Index i drawn in a chunk -> the rollout's position, ``i + 1`` clamped to ``[20, length - max(20, k)]``: its
    first token is the one that index i predicts."""
    size = (lengths // config.num_chunks)[:, None]
    drawn = torch.minimum(drawn, size - 1)
    position = index.gather(2, drawn[..., None])[..., 0] + 1
    last = (lengths - max(MARGIN, config.rollout_length))[:, None]
    return torch.minimum(position.clamp_min(MARGIN), last)
