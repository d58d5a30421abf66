"""Every family for the tests of client code: those of ``tests.refine.tiny``, and the hybrids."""

from __future__ import annotations

import torch

from refine.models import MODELS
from tests.refine import tiny

HYBRIDS = ("qwen3_5", "qwen3_next", "olmo_hybrid")
FAMILIES = (*tiny.FAMILIES, *HYBRIDS)


def tiny_model(family: str = "delta_net", dtype: torch.dtype = torch.float64, **settings):
    """A small model with random weights large enough that its predictions are not uniform."""
    if family not in HYBRIDS:
        return tiny.tiny_model(family, dtype, **settings)
    torch.manual_seed(3)
    common = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": tiny.VOCABULARY,
        "intermediate_size": 32,
    }
    common |= {"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 2}
    common |= {"num_key_value_heads": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    common |= {"linear_key_head_dim": 12, "linear_value_head_dim": 8, "initializer_range": 0.3}
    common |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family != "olmo_hybrid":
        common |= {"head_dim": 16}
    else:
        common |= {"linear_num_key_heads": 2}
    if family == "qwen3_next":  # a mixture of experts in every layer
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        common |= {"shared_expert_intermediate_size": 16}
    model_class = MODELS[family]
    config = model_class.config_class(**common | settings)
    if family == "qwen3_next":
        config._experts_implementation = "eager"  # the others have no float64
    return model_class(config).to(dtype)
