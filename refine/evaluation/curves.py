"""What people look at in fast-weight models: recall over distance, and loss by position beyond the trained length.

``recall_curve``: a passage of random tokens stands in text, so many tokens of text follow, and the passage begins
again. Only the first reading tells how it goes on, so guessing scores nothing and nothing is learned from the text
around. ``loss_by_position``: the mean loss of held-out documents in ranges of positions that double, all of the
same documents; a model that uses a long context improves along it, and one that does not extrapolate rises behind
the length that it was trained at. Both are generated or read from text that is there, and need no download.

Long documents are read by segments, from state to state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine.models.head import SampleToken, TokenLogprob

PASSAGE = 16  # random tokens
CUE = 4  # of them are given at the second reading
SEGMENT = 1024  # tokens read at once
_FIRST_RANGE = 128  # positions; each later range is as long as all before it


@torch.no_grad()
def recall_over_distance(
    model, text: Sequence[int], distances: Sequence[int], count: int, seed: int = 0, batch_size: int = 8
) -> dict[int, dict[str, Any]]:
    """How well a passage of 16 random tokens is known when it begins again after so many tokens of text.

    Args:
        text: token ids to draw the text from, at least two; it begins anew where it ends.
        distances: tokens between the two readings, each at least 0.
        count: passages per distance.
        seed: of passages and of where the text begins; the same passages at every distance.

    Returns:
        For each distance ``accuracy`` (the share of the last 12 tokens that are the most likely ones), ``nats``
        (their loss per token), and ``passages`` [count], the accuracy of each.

    Raises:
        ValueError: an argument is out of range.
    """
    if len(text) < 2 or count < 1 or not distances or min(distances) < 0:
        raise ValueError(
            f"recall_over_distance needs two tokens of text, one passage and distances from 0 on; got {len(text)}, "
            f"{count} and {list(distances)}"
        )
    text = torch.as_tensor(np.asarray(text, np.int64))
    generator = torch.Generator().manual_seed(seed)
    passages = torch.randint(model.config.vocab_size, (count, PASSAGE), generator=generator)
    starts = torch.randint(len(text), (count,), generator=generator)
    found = {}
    for distance in distances:
        between = text[
            (starts[:, None] + torch.arange(distance + CUE)) % len(text)
        ]  # [count, distance + CUE]
        lead, between = between[:, :CUE], between[:, CUE:]
        rows = torch.cat([lead, passages, between, passages], 1)
        right, nats = [], []
        for batch in rows.split(batch_size):
            token, logprob = _read(model, batch)
            asked = slice(rows.shape[1] - PASSAGE + CUE - 1, rows.shape[1] - 1)  # predict the last 12
            right.append((token[:, asked] == batch[:, -(PASSAGE - CUE) :]).float().mean(1))
            nats.append(-logprob[:, asked].mean(1))
        right = torch.cat(right)
        found[distance] = {
            "accuracy": right.mean().item(),
            "nats": torch.cat(nats).mean().item(),
            "passages": right.tolist(),
        }
    return found


@torch.no_grad()
def loss_by_position(model, documents: Iterable[Sequence[int]], positions: int) -> dict[int, np.ndarray]:
    """The loss of each document in ranges of positions: 1 to 127, 128 to 255, 256 to 511, ... up to ``positions``.

    Args:
        documents: token ids; each is read up to ``positions``, and must have so many.

    Returns:
        For each range, by the position behind its last, the mean loss of every document, in nats per token.

    Raises:
        ValueError: a document is too short, or there is none.
    """
    # of tokens 1, 2, ..., positions - 1
    losses = _by_document("loss_by_position", documents, positions, lambda ids: -_read(model, ids)[1][0, :-1])
    result, begin = {}, 1
    for end in range_ends(positions):
        result[end] = losses[:, begin - 1 : end - 1].mean(1)
        begin = end
    return result


def _by_document(
    name: str,
    documents: Iterable[Sequence[int]],
    positions: int,
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> np.ndarray:  # [documents, measured positions] float64
    """``measure`` of ids [1, positions] of each document, for the curve ``name``."""
    found = []
    for document in documents:
        if len(document) < positions:
            raise ValueError(f"a document has {len(document)} tokens; {name} needs {positions}")
        ids = torch.as_tensor(np.asarray(document[:positions], np.int64))[None]
        found.append(measure(ids).double().numpy())
    if not found:
        raise ValueError(f"{name} needs at least one document")
    return np.stack(found)


@torch.no_grad()
def entropy_by_position(
    model, documents: Iterable[Sequence[int]], positions: int, ranges: int = 64
) -> dict[int, np.ndarray]:
    """The mean entropy of the predictions made at each range of positions, in nats; ranges are of equal width.

    Args:
        documents: token ids; each is read up to ``positions``, and must have so many.
        ranges: at most so many.

    Returns:
        For each range, by the position behind its last, the mean entropy of every document.

    Raises:
        ValueError: a document is too short, or there is none.
    """
    entropies = _by_document(
        "entropy_by_position", documents, positions, lambda ids: _entropies(model, ids)[0]
    )
    edges = np.linspace(0, positions, min(ranges, positions) + 1).astype(int)
    return {int(end): entropies[:, begin:end].mean(1) for begin, end in itertools.pairwise(edges)}


def range_ends(positions: int) -> list[int]:
    """Where the ranges of positions end: 128, 256, 512, ... and ``positions``."""
    ends = []
    end = _FIRST_RANGE
    while end < positions:
        ends.append(end)
        end *= 2
    return [*ends, positions]


def _entropies(model, rows: torch.Tensor) -> torch.Tensor:
    """The entropy [B, T] of the prediction made at every position of rows of the same length, by segments."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    state, found = None, []
    for begin in range(0, rows.shape[1], SEGMENT):
        ids = rows[:, begin : begin + SEGMENT].to(device)
        output = model(ids, past_key_values=state, use_cache=True, head=TokenLogprob(ids, entropy=True))
        state = output.past_key_values
        found.append(output.entropy.float().cpu())
    model.train(was_training)
    return torch.cat(found, 1)


def _read(model, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(most likely next token, log-probability of the true one) [B, T] of rows of the same length, by segments;
    those of the last position mean nothing."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    targets = torch.cat([rows[:, 1:], rows[:, :1]], 1)
    state, tokens, logprobs = None, [], []
    for begin in range(0, rows.shape[1], SEGMENT):
        part = slice(begin, begin + SEGMENT)
        head = SampleToken(temperature=0.0, targets=targets[:, part].to(device))
        output = model(rows[:, part].to(device), past_key_values=state, use_cache=True, head=head)
        state = output.past_key_values
        tokens.append(output.token.cpu())
        logprobs.append(output.logprob.float().cpu())
    model.train(was_training)
    return torch.cat(tokens, 1), torch.cat(logprobs, 1)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean: percentiles of 2,000 resamplings; None of a single value."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5]).tolist()
    return low, high


def draw_curves(
    recall: dict[int, tuple[float, tuple | None]], loss: dict[int, tuple[float, tuple | None]], path: Path
) -> bool:
    """A panel for recall over distance and one for loss by position, with their intervals.

    Args:
        recall: distance -> (accuracy, interval); may be empty.
        loss: behind a range's last position -> (nats per token, interval); may be empty.

    Returns whether there was anything to draw, and matplotlib to draw it with.
    """
    panels = [
        (curve, *labels)
        for curve, labels in (
            (recall, ("tokens between the two readings", "tokens recalled (%)", 100)),
            (loss, ("position, up to", "loss (nats per token)", 1)),
        )
        if curve
    ]
    if not panels:
        return False
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), dpi=140, squeeze=False)
    for axis, (curve, across, up, scale) in zip(axes[0], panels):
        places = list(range(len(curve)))
        middle = [scale * value for value, _ in curve.values()]
        around = [(value, value) if interval is None else interval for value, interval in curve.values()]
        axis.plot(places, middle, marker="o")
        axis.fill_between(
            places, [scale * low for low, _ in around], [scale * high for _, high in around], alpha=0.2
        )
        axis.set_xticks(places, [f"{place:,}" for place in curve], fontsize=7)
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        if scale == 100:
            axis.set_ylim(-2, 102)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True
