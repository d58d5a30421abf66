"""Small hybrids for tests, and transformers' own model of the same weights, also in float64."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from refine.models import MODELS

VOCABULARY = 61
FAMILIES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def config_of(family: str, **settings):
    """A few layers, value heads in groups of two, a part of the layers attending."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "initializer_range": 0.2, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config_class = MODELS[family].config_class
    if family == "olmo_hybrid":
        del sizes["head_dim"]
    sizes = {key: value for key, value in sizes.items() if key in config_class.settings()}
    config = config_class(**sizes | settings)
    config._experts_implementation = "eager"  # the others have no float64
    return config


def hybrid(family: str, dtype: torch.dtype = torch.float64, **settings):
    """One of our models, its norms and decays moved away from where they start."""
    torch.manual_seed(3)
    model = MODELS[family](config_of(family, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype)


def transformers_model(ours) -> PreTrainedModel:
    """transformers' own model with the weights of ``ours``, to be run under :func:`on_this_processor`."""
    config = ours.config
    own_class = next(c for c in type(config).__mro__ if c.__module__.startswith("transformers.models."))
    own = own_class(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    own._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(own).to(ours.dtype).train(ours.training)
    assert type(model).__module__.startswith("transformers.")
    model.load_state_dict(ours.state_dict())
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return model


class _Torch:
    """``torch`` with float64 where a module says float32."""

    exact = True

    def __getattr__(self, name: str):
        if self.exact and name in ("float32", "float"):
            return torch.float64
        return getattr(torch, name)


@contextlib.contextmanager
def on_this_processor(theirs: PreTrainedModel, monkeypatch, exact: bool) -> Iterator[None]:
    """transformers' plain PyTorch delta rule, whatever else is installed; with ``exact`` also its norms, gates and
    routers in float64 (angles of rotary positions stay in float32, as they are here).
    """
    module = sys.modules[type(theirs).__module__]
    with monkeypatch.context() as patch:
        for name in _RULES:
            patch.setattr(module, name, getattr(module, name).__wrapped__)
        if exact:
            proxy, to_float32 = _Torch(), torch.Tensor.float

            def to_float(x: torch.Tensor) -> torch.Tensor:
                return x if proxy.exact and x.dtype == torch.float64 else to_float32(x)

            def angles(forward):
                def rotary(*args, **kwargs):
                    proxy.exact = False
                    try:
                        return forward(*args, **kwargs)
                    finally:
                        proxy.exact = True

                return rotary

            patch.setattr(module, "torch", proxy)
            patch.setattr(torch.Tensor, "float", to_float)
            if theirs.model.rotary_emb is not None:
                patch.setattr(theirs.model.rotary_emb, "forward", angles(theirs.model.rotary_emb.forward))
        yield
