"""Full-prefix recomputation, as in the paper's code: every position runs its whole prefix again, twice without a
gradient (sampling, old log-probs) and once with one. Slow and plain: the reference that the other readings are
compared with.
"""

from __future__ import annotations

import torch

from refine.method.config import RefineConfig
from refine.method.reading import Branches
from refine.method.sampling import sample_rollouts
from refine.method.seeds import rollout_seeds
from refine.method.sequences import Sequences
from refine.models.head import HiddenOnly, NextTokenLoss, TokenLogprob


class FullPrefix:
    """See :class:`~refine.method.reading.Reading`."""

    def __init__(self, model: torch.nn.Module, sequences: Sequences, config: RefineConfig):
        self._model, self._sequences, self._config = model, sequences.padded(), config
        input_ids, targets, row_weight = self._sequences.labelled()
        head = NextTokenLoss(targets, row_weight)
        with torch.no_grad():
            truth = model(input_ids, use_cache=False, head=head)
        self._true_hidden = truth.last_hidden_state  # [S, L, D]
        self.entropy = truth.entropy
        self.ntp_loss = model(input_ids, use_cache=False, head=head).loss

    def branch(self, positions: torch.Tensor, tokens: torch.Tensor | None, seeds: torch.Tensor) -> Branches:
        """Position by position."""
        config = self._config
        n, k = config.num_rollouts, config.rollout_length
        seed = rollout_seeds(seeds, config.num_chunks, n, k)
        each = []  # of every position: tokens, log-probs, old log-probs, hidden states, entropies
        for s, row in enumerate(positions.tolist()):
            for j, p in enumerate(row):
                prefix = self._sequences.input_ids[s : s + 1, :p]
                drawn = self._sample(prefix, seed[s, j]) if tokens is None else tokens[s, j]
                text = torch.cat([prefix.expand(n, -1), drawn], dim=1)  # [n, p + k]
                with torch.no_grad():
                    old_logprobs = self._score(text, drawn)[0]
                logprobs, hidden, entropy = self._score(text, drawn)
                each.append((drawn, logprobs, old_logprobs, hidden.detach(), entropy))

        shape = positions.shape
        drawn, logprobs, old_logprobs, predicted, entropy = (
            None if parts[0] is None else torch.stack(parts).unflatten(0, shape) for parts in zip(*each)
        )
        true = self._sequences.take(self._true_hidden, positions, k)
        return Branches(drawn, logprobs, old_logprobs, predicted, true, entropy)

    @torch.no_grad()
    def _sample(self, prefix: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """[1, p] -> [n, k]."""
        read = self._model(prefix, use_cache=True, head=HiddenOnly())
        state = read.past_key_values.select(torch.zeros(len(seeds), dtype=torch.int64, device=prefix.device))
        context = read.last_hidden_state[:, -1].expand(len(seeds), -1)
        return sample_rollouts(self._model, state, context, seeds, self._config.temperature)

    def _score(self, text: torch.Tensor, drawn: torch.Tensor) -> tuple:
        """Log-probs [n, k] of the last k tokens of ``text`` [n, p + k], their hidden states [n, k, D], and the
        entropies [n, k] of their predictions where they are needed."""
        k = drawn.shape[1]
        hidden = self._model(text, use_cache=False, head=HiddenOnly()).last_hidden_state[:, -k - 1 :]
        head = TokenLogprob(drawn, self._config.temperature, self._config.needs_entropy)
        scored = self._model(hidden_states=hidden[:, :-1], head=head)
        entropy = scored.entropy.detach() if head.entropy else None
        return scored.logprob, hidden[:, 1:], entropy
