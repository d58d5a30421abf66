"""Small models for tests: a few thousand parameters, every feature of the large ones."""

from __future__ import annotations

import torch

from refine.models import (
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
    LaCTConfig,
    LaCTForCausalLM,
)

VOCABULARY = 53
DELTA_RULE = ("delta_net", "gated_deltanet")
FAMILIES = (*DELTA_RULE, "lact")


def tiny_model(family: str = "delta_net", dtype: torch.dtype = torch.float64, **settings):
    """A two-layer model with random weights large enough that its predictions are not uniform."""
    torch.manual_seed(3)
    common = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    common |= {"intermediate_size": 32, "initializer_range": 0.3}
    if family == "lact":
        common |= {"num_attn_heads": 4, "num_lact_heads": 2, "w0_w2_low_rank": 4}
        common |= {"lact_chunk_size": 32, "window_size": 24}
        model = LaCTForCausalLM(LaCTConfig(**common | settings))
        for layer in model.model.layers:  # rates at which one chunk changes the weights visibly
            torch.nn.init.constant_(layer.attn.lr_proj.bias, 4.0)
            if layer.attn.ttt_scale_proj is not None:
                torch.nn.init.normal_(layer.attn.ttt_scale_proj.bias)
        return model.to(dtype)
    common |= {"num_heads": 2} | settings
    if family == "delta_net":
        model = DeltaNetForCausalLM(DeltaNetConfig(**common))
    else:
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**{"head_dim": 12, "expand_v": 1.5} | common))
    return model.to(dtype)


def ragged_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens padded on the right, and their mask."""
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
