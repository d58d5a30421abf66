"""What a reading of a batch offers, whatever way it is done.

A *reading* takes sequences through the model once and offers their next-token loss, the entropies of the model's
predictions, and, by :meth:`Reading.branch`, rollouts that go on from any position. The loss and the rollouts'
log-probs have a gradient. Four readings give the same numbers:

- :mod:`~refine.method.one_pass`: one forward, branches from the states inside its graph;
- :mod:`~refine.method.segmented_pass`: the same segment by segment, in memory of one segment;
- the same over several processes (:mod:`~refine.method.context_parallel` hands states and gradients on);
- :mod:`~refine.method.full_prefix`: the prefix is run again for every position. The reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from refine.models import MODELS
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.head import HiddenOnly, TokenLogprob
from refine.models.state import FastWeightState


@dataclass
class Branches:
    """What a reading finds of n rollouts of k tokens at c positions of S sequences."""

    tokens: torch.Tensor  # [S, c, n, k] int64
    logprobs: torch.Tensor  # [S, c, n, k] float32, with a gradient
    old_logprobs: torch.Tensor  # [S, c, n, k] float32, without one
    predicted: torch.Tensor  # [S, c, n, k, D], hidden states after each rollout token
    true: torch.Tensor  # [S, c, k, D], hidden states after the true tokens in the same places
    entropy: torch.Tensor | None  # [S, c, n, k] float32, of the rollout tokens' predictions, where needed


class Reading(Protocol):
    """A batch that has been read."""

    ntp_loss: torch.Tensor  # scalar with a gradient: next-token loss, mean over tokens, then over sequences
    entropy: torch.Tensor  # [S, L] float32, of the prediction made at each position of each sequence

    def branch(self, positions: torch.Tensor, tokens: torch.Tensor | None, seeds: torch.Tensor) -> Branches:
        """Roll out.

        Args:
            positions: [S, c] int64, where the first token of a rollout stands.
            tokens: [S, c, n, k] int64, or None: sampled from the model.
            seeds: [S] int64, what sampling depends on.
        """


def check_model(model: torch.nn.Module, caller: str) -> None:
    """Only states of this package's models can be branched.

    Raises:
        TypeError: the model is of another kind.
    """
    if not any(isinstance(module, FastWeightForCausalLM) for module in model.modules()):
        raise TypeError(
            f"{caller} needs a fast-weight model of this package ({', '.join(sorted(MODELS))}; see "
            f"refine.load_model), whose state can be branched; got {type(model).__name__}"
        )


def read_branches(
    model: torch.nn.Module,
    state: FastWeightState,  # of M branches, before their first token
    context: torch.Tensor,  # [M, D], the hidden state that predicts the first token
    tokens: torch.Tensor,  # [M, k]
    head: TokenLogprob,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One short pass over all branches.

    Returns:
        Hidden states [M, k, D] after each token, the tokens' log-probs [M, k], and the entropies [M, k] of their
        predictions if ``head`` asks for them.
    """
    predicted = model(tokens, past_key_values=state, use_cache=False, head=HiddenOnly()).last_hidden_state
    predicting = torch.cat([context[:, None], predicted[:, :-1]], dim=1)  # [M, k, D]
    scored = model(hidden_states=predicting, head=head)
    return predicted, scored.logprob, scored.entropy.detach() if head.entropy else None
