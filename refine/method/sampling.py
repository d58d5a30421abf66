"""Sampling k tokens from the policy, for all branches at once, each from its own state."""

from __future__ import annotations

import torch

from refine.models.cuda_graphs import run_captured
from refine.models.head import SampleToken
from refine.models.state import FastWeightState


@torch.no_grad()
def sample_rollouts(
    model: torch.nn.Module,
    state: FastWeightState,  # of R branches, before the first sampled token
    context: torch.Tensor,  # [R, D], the hidden state that predicts the first token
    seeds: torch.Tensor,  # [R, k] int64
    temperature: float,
) -> torch.Tensor:  # [R, k] int64
    """Exactly k tokens a branch from softmax(logits / temperature): no top-p, no top-k, no stop at end-of-text.

    k module calls: the head on the context, then k - 1 single-token steps. The last token is not fed: its
    hidden state comes out of the pass that takes the gradient. On CUDA all of them become one graph.
    """
    return run_captured(_sample, model, (state, context, seeds), (temperature,))


def _sample(model, state, context, seeds, temperature) -> torch.Tensor:
    # A policy that is not finite draws -1. Token 0 is read in its place: the loss is NaN, the update is skipped.
    request = SampleToken(seeds[:, :1], temperature)
    tokens = [model(hidden_states=context[:, None], head=request).token.clamp_min(0)]
    for j in range(1, seeds.shape[1]):
        request = SampleToken(seeds[:, j : j + 1], temperature)
        output = model(tokens[-1], past_key_values=state, use_cache=True, head=request)
        state = output.past_key_values
        tokens.append(output.token.clamp_min(0))
    return torch.cat(tokens, dim=1)
