"""Rewards of texts, functions of the user's own with TRL's signature.

A reward is called as ``function(prompts=, completions=, completion_ids=, **columns)``, all of them lists with one
entry per completion (``columns``: the other columns of the prompt's row), and returns a list of numbers; None where
it has nothing to say about a completion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from refine.plugins import find_function


class TextRewards:
    """Several reward functions, and the weight of each.

    Args:
        names: ``module:function`` each.
        weights: one per function; None: 1 each.

    Raises:
        ValueError: a function cannot be imported, or there are not as many weights as functions.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float] | None = None):
        if not names:
            raise ValueError("reward_funcs must name at least one function, as module:function")
        self._functions: list[Callable[..., Any]] = [
            find_function("reward_funcs", name, {}) for name in names
        ]
        self._specs = list(names)
        self.names = _short_names(names)
        if weights is not None and len(weights) != len(names):
            raise ValueError(
                f"reward_weights must hold one per reward function, {len(names)}, got {len(weights)}"
            )
        self.weights = torch.tensor([1.0] * len(names) if weights is None else list(weights))

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list],
    ) -> torch.Tensor:  # [M, functions] float32, NaN where a function said None
        """What every function says of M completions.

        Raises:
            ValueError: a function failed, or did not return one finite number or None per completion; or none said
                anything of a completion.
        """
        each = []
        for name, function in zip(self._specs, self._functions):
            try:
                found = function(
                    prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
                )
            except Exception as error:
                raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
            each.append(_checked(name, found, len(completions)))
        rewards = torch.stack(each, dim=1)
        if bool(silent := rewards.isnan().all(1).nonzero().numel()):
            place = int(rewards.isnan().all(1).nonzero()[0])
            raise ValueError(
                f"no reward function says anything of {silent} completions, such as {completions[place][:60]!r}: "
                "one must return a number for each"
            )
        return rewards

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        """[M, functions] -> [M], the weighted sum of what was said."""
        return (rewards.nan_to_num() * self.weights.to(rewards.device)).sum(1)


def _checked(name: str, found: Any, count: int) -> torch.Tensor:
    """One function's rewards, [count] float32."""
    if isinstance(found, torch.Tensor):
        found = found.detach().cpu().tolist()
    if not hasattr(found, "__len__") or isinstance(found, str | dict):
        raise ValueError(
            f"reward {name!r} must return a list of {count} numbers, got a {type(found).__name__}"
        )
    if len(found) != count:
        raise ValueError(f"reward {name!r} must return one number per completion, {count}, got {len(found)}")
    values = []
    for place, value in enumerate(found):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, str) or (value is not None and not math.isfinite(number)):
            raise ValueError(
                f"reward {name!r} must return finite numbers (or None), got {value!r} for completion {place}"
            )
        values.append(number)
    return torch.tensor(values, dtype=torch.float32)


def _short_names(names: Sequence[str]) -> list[str]:
    """The functions' own names, as TRL logs them; with their modules where two would be the same."""
    short = [name.rpartition(":")[2] for name in names]
    return [name if short.count(tail) > 1 else tail for name, tail in zip(names, short)]
