"""A reward for phase grpo: does the completion say what the document said?

``python -m refine.train --config examples/needle.yaml`` lets the package's tiny model learn, by this reward alone, to
answer with the fact that stands far above the question (docs/prompt_once.md shows the curve).
"""

from __future__ import annotations

import os.path


def recalled(prompts, completions, answer, **_) -> list[float]:
    """The share of the answer's characters with which the completion begins; 1 is the whole answer."""
    pairs = zip(completions, (text.strip() for text in answer))
    return [len(os.path.commonprefix([said.lstrip(), right])) / len(right) for said, right in pairs]


def exact(prompts, completions, answer, **_) -> list[float]:
    """1 where the completion begins with the whole answer."""
    return [float(said.lstrip().startswith(right.strip())) for said, right in zip(completions, answer)]
