"""Rollouts beside the true continuation: the configured reward, and the paper's two measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine.method.config import RefineConfig
from refine.method.reading import Branches
from refine.method.rewards import REWARDS, Reward, binary, find_reward
from refine.method.sequences import Sequences


class Scores(NamedTuple):
    """How good each rollout is, without a gradient."""

    rewards: torch.Tensor  # [S, c, n] float32, by ``config.reward``
    cosine: torch.Tensor  # [S, c, n] float32, Eq. 9
    exact_match: torch.Tensor  # [S, c, n] float32, Eq. 11
    similarity: torch.Tensor  # [S, c, n, k] float32: per token, the cosine whose mean Eq. 9 takes


@torch.no_grad()
def score_rollouts(
    sequences: Sequences,
    positions: torch.Tensor,  # [S, c]
    branches: Branches,
    lengths: torch.Tensor | None,  # [S, c, n], tokens of each rollout that count; None: all
    config: RefineConfig,
) -> Scores:
    """Compare the first ``lengths`` tokens of every rollout with the truth.

    Raises:
        ValueError: a reward of the user's own returned something else than one finite number per rollout.
    """
    shape, k = branches.tokens.shape[:3], branches.tokens.shape[3]
    n = shape[2]
    dtype = torch.promote_types(branches.predicted.dtype, torch.float32)
    true_ids = sequences.take(sequences.input_ids, positions, k)[:, :, None].expand(-1, -1, n, -1)
    true_hidden = branches.true.to(dtype)[:, :, None].expand(-1, -1, n, -1, -1)
    arguments = (
        branches.tokens.reshape(-1, k),
        true_ids.reshape(-1, k),
        branches.predicted.to(dtype).flatten(0, 2),
        true_hidden.flatten(0, 2),
    )
    similarity = F.cosine_similarity(arguments[2], arguments[3], dim=-1)  # [R, k]
    functions = (find_reward(config.reward), binary)
    if lengths is None:
        found = [_reward(function, config.reward, arguments) for function in functions]
        cosine = similarity.mean(-1)
    else:  # a reward function sees rollouts of one length at a time
        found = [arguments[2].new_empty(shape.numel()) for _ in functions]
        cosine = torch.empty_like(found[0])
        for count in lengths.unique().tolist():
            rows = (lengths.flatten() == count).nonzero()[:, 0]
            shortened = tuple(argument[rows, :count] for argument in arguments)
            for values, function in zip(found, functions):
                values[rows] = _reward(function, config.reward, shortened).to(values.dtype)
            cosine[rows] = similarity[rows, :count].mean(-1)
    rewards, exact_match = found
    each = {"rewards": rewards, "cosine": cosine, "exact_match": exact_match}
    return Scores(
        **{name: values.detach().view(shape).to(torch.float32) for name, values in each.items()},
        similarity=similarity.view(branches.tokens.shape).to(torch.float32),
    )


def _reward(function: Reward, name: str, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One number per rollout, or an error that says what a reward has to return."""
    count = len(arguments[0])
    if function in REWARDS.values():
        return function(*arguments)
    rewards = function(*(argument.clone() for argument in arguments))  # it may write into what it gets
    if not isinstance(rewards, torch.Tensor):
        raise ValueError(
            f"reward {name!r} must return a tensor of one number per rollout, shape ({count},), got "
            f"{type(rewards).__name__}"
        )
    if rewards.shape != (count,):
        raise ValueError(
            f"reward {name!r} must return one number per rollout, shape ({count},), got {tuple(rewards.shape)}"
        )
    if not bool(rewards.isfinite().all()) and bool(arguments[2].isfinite().all()):
        bad = int((~rewards.isfinite()).sum())
        raise ValueError(f"reward {name!r} returned NaN or infinity for {bad} of {count} rollouts")
    return rewards
