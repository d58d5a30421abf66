"""How good is a rollout, against the true continuation? (Eqs. 9, 11 and 12.)

A reward is a function of (predicted ids [R, k], true ids [R, k], predicted hidden [R, k, D], true hidden
[R, k, D]) that returns one number per rollout, [R] float32. It carries no gradient. Hidden states arrive in
float32: in bfloat16 a thousand cosines have about five distinct values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from refine.plugins import find_function

DISCOUNT = 0.8  # gamma of discounted_cosine: the fifth token weighs 0.41 of the first

Reward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cosine(predicted_ids, true_ids, predicted_hidden, true_hidden) -> torch.Tensor:
    """Eq. 9: the mean over the k tokens of the cosine between predicted and true hidden state."""
    return F.cosine_similarity(predicted_hidden, true_hidden, dim=-1).mean(-1)


def binary(predicted_ids, true_ids, predicted_hidden, true_hidden) -> torch.Tensor:
    """Eq. 11: the share of the k tokens that are the true ones."""
    return (predicted_ids == true_ids).float().mean(-1)


def hybrid(predicted_ids, true_ids, predicted_hidden, true_hidden) -> torch.Tensor:
    """Eq. 12: the sum of the two."""
    arguments = (predicted_ids, true_ids, predicted_hidden, true_hidden)
    return cosine(*arguments) + binary(*arguments)


def edit(predicted_ids, true_ids, predicted_hidden, true_hidden) -> torch.Tensor:
    """Edit similarity over tokens: 1 - Levenshtein distance / k, in [0, 1].

    A rollout that is right but one token late loses at most 2 / k here, and nearly everything under ``binary``.
    """
    k = predicted_ids.shape[-1]
    # row[j]: the distance between the first i predicted and the first j true tokens, of every rollout
    row = [torch.full(predicted_ids.shape[:-1], j, device=predicted_ids.device) for j in range(k + 1)]
    for i in range(k):
        above, row = row, [torch.full_like(row[0], i + 1)]
        for j in range(k):
            replaced = above[j] + (predicted_ids[..., i] != true_ids[..., j]).long()
            row.append(torch.minimum(replaced, torch.minimum(above[j + 1], row[j]) + 1))
    return 1 - row[k].float() / k


def discounted_cosine(predicted_ids, true_ids, predicted_hidden, true_hidden) -> torch.Tensor:
    """Eq. 9 with weights in place of the plain mean: token j counts ``DISCOUNT ** j``, normalised to sum 1.

    Late tokens of a rollout that has left the true text differ for that reason alone; they weigh less here.
    """
    each = F.cosine_similarity(predicted_hidden, true_hidden, dim=-1)  # [R, k]
    weight = DISCOUNT ** torch.arange(each.shape[-1], dtype=each.dtype, device=each.device)
    return (each * (weight / weight.sum())).sum(-1)


REWARDS: dict[str, Reward] = {
    "cosine": cosine,
    "binary": binary,
    "hybrid": hybrid,
    "edit": edit,
    "discounted_cosine": discounted_cosine,
}


def find_reward(name: str) -> Reward:
    """A reward by its name, or by ``module:function`` for one that lives elsewhere.

    Raises:
        ValueError: there is no such reward.
    """
    return find_function("reward", name, REWARDS)
