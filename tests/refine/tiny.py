"""Small models for tests: a few thousand parameters, every feature of the large ones."""

from __future__ import annotations

import torch

from refine.models import DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM

VOCABULARY = 53
FAMILIES = ("delta_net", "gated_deltanet")


def tiny_model(family: str = "delta_net", dtype: torch.dtype = torch.float64, **settings):
    """A two-layer model with random weights large enough that its predictions are not uniform."""
    torch.manual_seed(3)
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    common |= {"intermediate_size": 32, "initializer_range": 0.3} | settings
    if family == "delta_net":
        model = DeltaNetForCausalLM(DeltaNetConfig(**common))
    else:
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(head_dim=12, expand_v=1.5, **common))
    return model.to(dtype)


def ragged_batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens padded on the right, and their mask."""
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
