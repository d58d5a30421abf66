"""Answers to a batch of prompts, greedy or drawn: one prefill, then one token a step from the cached state.

A prompt is read once, padded on the right, where padding reaches no fast weight; the state has a fixed size, so
neither time nor memory of a step depends on how much was read or written. A row that has ended leaves the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from refine.method.generation import sample_request
from refine.method.seeds import rollout_seeds
from refine.models.head import HiddenOnly, SampleToken

_GREEDY = SampleToken(temperature=0.0)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. A token follows from its prompt's seed and its place alone, whatever the batch.

    Attributes:
        seeds: int64, one per prompt.
        temperature: of the distribution, over 0.
        top_k: only the so many most likely tokens; None: all.
    """

    seeds: Sequence[int]
    temperature: float = 1.0
    top_k: int | None = None


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int | Sequence[int],
    end_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """A token at every step, until an end or the limit.

    Args:
        model: one of this project's models.
        prompts: token ids, at least one each; they may differ in length.
        max_new_tokens: at least 1; for all rows, or one a row.
        end_ids: tokens that end a row. They are not part of the answer.
        sampling: how tokens are drawn; None: the most likely one.

    Returns:
        New tokens, one list a prompt.

    Raises:
        ValueError: no prompts, an empty one, or a limit under 1.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(prompts, limits)
    was_training = model.training
    model.eval()
    try:
        return _generate(model, prompts, limits, end_ids, sampling)
    finally:
        model.train(was_training)


def _generate(model, prompts, limits: list[int], end_ids, sampling: Sampling | None) -> list[list[int]]:
    device = next(model.parameters()).device
    if sampling is None:

        def request(rows: list[int], step: int) -> SampleToken:
            return _GREEDY

    else:
        draw = sample_request(sampling.temperature, sampling.top_k)
        seeds = torch.tensor(sampling.seeds, dtype=torch.int64, device=device)
        seeds = rollout_seeds(seeds, 1, 1, max(limits)).view(len(prompts), -1)  # [B, T]

        def request(rows: list[int], step: int):
            return draw(seeds[rows, step : step + 1])

    ids, mask = _pad(prompts, device)
    ragged = len({len(prompt) for prompt in prompts}) > 1
    output = model(ids, attention_mask=mask if ragged else None, use_cache=True, head=HiddenOnly())
    last = mask.sum(1) - 1
    context = output.last_hidden_state[torch.arange(len(ids), device=device), last]  # [B, D]
    state = output.past_key_values
    del output, ids, mask
    rows = list(range(len(prompts)))  # which prompt each row of the batch answers
    token = model(hidden_states=context[:, None], head=request(rows, 0)).token  # [B, 1]

    if bool((token < 0).any()):
        raise ValueError(
            "the model predicts NaN: its weights, or what it computes from this prompt, are not finite"
        )
    answers: list[list[int]] = [[] for _ in prompts]
    for step in count(1):
        kept = []
        for place, (row, said) in enumerate(zip(rows, token[:, 0].tolist())):
            if said not in end_ids:
                answers[row].append(said)
                if step < limits[row]:
                    kept.append(place)
        if not kept:
            return answers
        if len(kept) < len(rows):
            index = torch.tensor(kept, device=device)
            state, token = state.select(index), token[index]
            rows = [rows[place] for place in kept]
        output = model(token, past_key_values=state, use_cache=True, head=request(rows, step))
        state, token = output.past_key_values, output.token


def _pad(prompts, device) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids padded on the right, and their mask."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.as_tensor(np.asarray(prompt, np.int64))
        mask[row, : len(prompt)] = 1
    return ids.to(device), mask.to(device)


def _check(prompts, limits: list[int]) -> None:
    if not len(prompts):
        raise ValueError("prompts: there are none")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts: number {row} has no token")
    if len(limits) != len(prompts) or min(limits) < 1:
        raise ValueError(
            f"max_new_tokens must be at least 1, for all {len(prompts)} prompts or one each, got {limits}"
        )
