"""Rewards for phase grpo: does the completion say what the document said?

``python -m refine.train --config examples/needle.yaml`` lets the tiny model of the package learn by reward alone to
answer with the fact that stands above the question (docs/prompt_once.md shows the curve).
"""

from __future__ import annotations

from itertools import takewhile


def recalled(prompts, completions, answer, **_) -> list[float]:
    """The share of the answer's characters with which the completion begins; 1 is the whole answer."""
    rewards = []
    for said, right in zip(completions, map(str.strip, answer)):
        same = takewhile(lambda pair: pair[0] == pair[1], zip(said.lstrip(), right))
        rewards.append(sum(1 for _ in same) / len(right))
    return rewards


def exact(prompts, completions, answer, **_) -> list[float]:
    """1 where the completion begins with the whole answer."""
    return [float(said.lstrip().startswith(right.strip())) for said, right in zip(completions, answer)]
