"""Random weights from which in-context recall is learnt quickly: a mimetic initialisation for the delta rule.

A layer that recalls does one thing: at token b it looks for the place where b stood before and brings back what
followed. From independent random weights small models take very long to find this; a state-space model that
begins near it learns recall at once (Trockman et al., "Mimetic Initialization Helps State Space Models Learn to
Recall", arXiv 2410.11135). For the delta rule, beginning near it means:

- queries and keys look at tokens the same way: ``W_q = W_k``;
- the keys' convolution takes the token before, the queries' and the values' the token itself, so that the value
  of a token is stored under its predecessor;
- the output brings a value back as what it was: ``W_v`` orthogonal and ``W_o`` its transpose;
- where the state decays, it does so slowly: over hundreds of tokens instead of a handful.
"""

from __future__ import annotations

import torch
from torch import nn

from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.delta_net import DeltaNetAttention
from refine.models.gated_delta_net import GatedDeltaNetAttention


@torch.no_grad()
def mimetic_init_(model: FastWeightForCausalLM, strength: float = 4.0) -> FastWeightForCausalLM:
    """Put every token mixer of ``model`` near recall, in place; embeddings and MLPs stay as they are.

    Args:
        model: a freshly initialised model whose layers are delta-rule layers.
        strength: how much of what is recalled a layer adds to the residual stream, in units of an embedding.

    Raises:
        ValueError: a layer is of another kind, its convolution is narrower than two tokens, or it has an output
            gate (which at the start multiplies all that is recalled by a random sign).
    """
    for layer in model.model.layers:
        attention = getattr(layer, "attn", None)
        if not isinstance(attention, DeltaNetAttention) or attention.conv_size < 2:
            raise ValueError("mimetic_init needs delta-rule layers with convolutions of at least two tokens")
        if attention.g_proj is not None:
            raise ValueError("mimetic_init needs use_gate=false: a random output gate hides what is recalled")
        nn.init.orthogonal_(attention.k_proj.weight)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        attention.o_proj.weight.mul_(strength * model.config.initializer_range)
        for convolution, tap in (
            (attention.q_conv1d, -1),
            (attention.k_conv1d, -2),
            (attention.v_conv1d, -1),
        ):
            nn.init.normal_(convolution.weight, std=0.02)
            convolution.weight[:, 0, tap] += 1.0
        if isinstance(attention, GatedDeltaNetAttention):
            attention.reset_decay(largest_rate=1.0, steps=(1e-4, 1e-2))
    return model
