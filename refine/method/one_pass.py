"""The shared prefix: each sequence is read once, and every rollout goes on from a state inside the graph.

A prefix that is read once and continued c times has the sum of the c gradients. So one backward carries the
rollouts' gradient through the prefixes that they continue, as if each prefix had been run by itself.
"""

from __future__ import annotations

import torch

from refine.method.config import RefineConfig
from refine.method.reading import Branches, read_branches
from refine.method.sampling import sample_rollouts
from refine.method.seeds import rollout_seeds
from refine.method.sequences import Sequences
from refine.models.head import NextTokenLoss, TokenLogprob


class OnePass:
    """See :class:`~refine.method.reading.Reading`."""

    def __init__(self, model: torch.nn.Module, sequences: Sequences, config: RefineConfig):
        self._model, self._sequences, self._config = model, sequences, config
        labelled = sequences.labelled()
        output = model(
            labelled.input_ids,
            use_cache=False,
            head=NextTokenLoss(labelled.targets, labelled.row_weight),
            state_stride=config.state_stride,
            **sequences.places,
        )
        self._hidden = output.last_hidden_state  # [B, T, D]
        self._trace = output.trace
        self.ntp_loss = output.loss
        self.entropy = sequences.by_sequence(output.entropy)

    def branch(self, positions: torch.Tensor, tokens: torch.Tensor | None, seeds: torch.Tensor) -> Branches:
        """One batched pass over all branches of all sequences."""
        config, sequences = self._config, self._sequences
        shape = (*positions.shape, config.num_rollouts, config.rollout_length)
        sequence = torch.arange(len(sequences), device=positions.device)[:, None].expand_as(positions)
        parent = torch.arange(positions.numel(), device=positions.device)
        parent = parent.repeat_interleave(config.num_rollouts)  # [M], M = S c n
        state = self._trace.gather(sequence.flatten(), positions.flatten()).select(parent)
        context = sequences.take(self._hidden, positions - 1, 1)[:, :, 0].flatten(0, 1)[parent]  # [M, D]
        if tokens is None:
            seed = rollout_seeds(seeds, *shape[1:]).view(-1, shape[-1])
            flat = sample_rollouts(self._model, state.detach(), context.detach(), seed, config.temperature)
        else:
            flat = tokens.reshape(-1, shape[-1])
        head = TokenLogprob(flat, config.temperature, config.needs_entropy)
        predicted, logprobs, entropy = read_branches(self._model, state, context, flat, head)
        logprobs = logprobs.view(shape)
        return Branches(
            tokens=flat.view(shape),
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            predicted=predicted.detach().view(*shape, -1),
            true=sequences.take(self._hidden.detach(), positions, shape[-1]),
            entropy=None if entropy is None else entropy.view(shape),
        )
