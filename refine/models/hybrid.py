"""Hybrid language models: gated-delta layers with full attention every few layers.

Qwen3.5 (dense and mixture of experts), Qwen3-Next and OLMo-hybrid, under transformers' own configurations and
parameter names, so that their checkpoints load and save as they are. ``layer_types`` says what each layer is. A
state of such a model is the fast weights of its delta layers and a place in the keys and values of its attention
layers, so rollouts branch without a copy of their prefix.

Everything that differs from family to family is in its subclass of :class:`HybridForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import OlmoHybridConfig, PretrainedConfig, PreTrainedModel, Qwen3NextConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from refine.models.attention import FullAttention, Rotary
from refine.models.blocks import GatedMLP, RMSNorm
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.grouped_delta import (
    GroupedGatedDelta,
    OlmoHybridGatedDelta,
    Qwen3_5GatedDelta,
    Qwen3NextGatedDelta,
)

LAYER_TYPES = ("linear_attention", "full_attention")


class ZeroCentredRMSNorm(RMSNorm):
    """``x / rms(x) * (1 + weight)`` over the last dimension, in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = 1.0 + self.weight.to(exact)
        if x.device.type == "cuda":
            from fla.modules.layernorm import rms_norm

            return rms_norm(x, weight, None, eps=self.eps)
        return F.rms_norm(x.to(exact), weight.shape, weight, self.eps).to(x.dtype)


class HybridBlock(GradientCheckpointingLayer):
    """``h += mixer(norm(h))``, then ``h += mlp(norm(h))``; or, with ``post_norm``, ``h += norm(mixer(h))`` ...

    The mixer is called as its checkpoints call it: ``linear_attn`` or ``self_attn``.
    """

    def __init__(
        self, layer_type: str, mixer: nn.Module, mlp: nn.Module, norms: Iterable[nn.Module], post_norm: bool
    ):
        super().__init__()
        self.mixer_name = "linear_attn" if layer_type == "linear_attention" else "self_attn"
        self.add_module(self.mixer_name, mixer)
        self.mlp = mlp
        self.norm_names = (
            ("post_attention_layernorm", "post_feedforward_layernorm")
            if post_norm
            else ("input_layernorm", "post_attention_layernorm")
        )
        for name, norm in zip(self.norm_names, norms):
            self.add_module(name, norm)
        self.post_norm = post_norm

    def forward(self, hidden, state=None, lengths=None, keep_state=False, state_stride=None):
        mixer = getattr(self, self.mixer_name)
        first, second = (getattr(self, name) for name in self.norm_names)
        before, after = (_as_it_is, first) if self.post_norm else (first, _as_it_is)
        mixed, new_state, trace = mixer(before(hidden), state, lengths, keep_state, state_stride)
        hidden = hidden + after(mixed)
        before, after = (_as_it_is, second) if self.post_norm else (second, _as_it_is)
        return hidden + after(self.mlp(before(hidden))), new_state, trace


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class HybridModel(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: PretrainedConfig, blocks: Iterable[HybridBlock], norm: nn.Module):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm

    @property
    def embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.embed_tokens

    def forward(self, inputs_embeds, state=None, lengths=None, keep_state=False, state_stride=None):
        hidden, states, traces = inputs_embeds, [], []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[i]
            hidden, new_state, trace = layer(hidden, layer_state, lengths, keep_state, state_stride)
            states.append(new_state)
            traces.append(trace)
        return self.norm(hidden), states, traces


class HybridForCausalLM(FastWeightForCausalLM):
    """A hybrid language model; a family's subclass says what its layers are made of."""

    config_class: type[PretrainedConfig]
    delta_class: type[GroupedGatedDelta]
    norm_class: type[RMSNorm] = ZeroCentredRMSNorm
    # key -> the values that this project implements; another would load and silently be another model
    only_implemented: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0, 0.0, None),
        "output_router_logits": (False, None),
        "quantization_config": (None,),
    }
    # what published checkpoints hold beside the language model
    skipped_weights: ClassVar[dict[str, str]] = {
        "mtp.": "the multi-token-prediction head",
        "model.visual.": "the vision tower",
    }
    _supports_sdpa = True
    _no_split_modules = ("HybridBlock",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig):
        PreTrainedModel.__init__(self, config)
        self._check_config(config)
        blocks = (self._block(config, i, kind) for i, kind in enumerate(config.layer_types))
        self.model = HybridModel(config, blocks, self._norm(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _check_config(cls, config: PretrainedConfig) -> None:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{config.model_type}: the checkpoint's weights are quantised (quantization_config); "
                "load one in bfloat16, float16 or float32"
            )
        for key, implemented in cls.only_implemented.items():
            value = getattr(config, key, None)
            if hasattr(config, key) and value not in implemented:
                allowed = " or ".join(repr(x) for x in implemented if x is not None)
                raise ValueError(
                    f"{config.model_type} config: {key}={value!r} is not implemented, only {allowed} is"
                )
        if len(config.layer_types) != config.num_hidden_layers:
            raise ValueError(
                f"{config.model_type} config: layer_types names {len(config.layer_types)} layers, "
                f"num_hidden_layers is {config.num_hidden_layers}"
            )
        for i, kind in enumerate(config.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(
                    f"{config.model_type} config: layer type {kind!r} (layer {i}) is not implemented, "
                    f"only {' and '.join(LAYER_TYPES)} are"
                )

    def _norm(self, config: PretrainedConfig, size: int | None = None) -> nn.Module:
        return self.norm_class(config.hidden_size if size is None else size, config.rms_norm_eps)

    def _block(self, config: PretrainedConfig, index: int, layer_type: str) -> HybridBlock:
        attends = layer_type == "full_attention"
        mixer = self._attention(config) if attends else self.delta_class(config)
        norms = (self._norm(config), self._norm(config))
        return HybridBlock(layer_type, mixer, self._mlp(config, index), norms, post_norm=False)

    def _attention(self, config: PretrainedConfig) -> FullAttention:
        """Norms over each head, rotary positions on a part of it, an output gate."""
        head_dim = config.head_dim
        rotary = Rotary(int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)), config)
        return FullAttention(
            config, self._norm(config, head_dim), self._norm(config, head_dim), rotary, gated=True
        )

    def _mlp(self, config: PretrainedConfig, index: int) -> nn.Module:
        return GatedMLP(config.hidden_size, config.intermediate_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroCentredRMSNorm):
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight)
        elif type(module).__module__.startswith("transformers."):  # the parts of a mixture of experts
            for weight in module.parameters(recurse=False):
                if not getattr(weight, "_is_hf_initialized", False):
                    nn.init.normal_(weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for a decorator in this file; its own expert modules carry it

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.model.embed_tokens = value


class Qwen3_5ForCausalLM(HybridForCausalLM):
    """Qwen3.5, dense: the language model alone or the one inside a multimodal checkpoint."""

    config_class = Qwen3_5TextConfig
    delta_class = Qwen3_5GatedDelta


class Qwen3_5MoeForCausalLM(HybridForCausalLM):
    """Qwen3.5 with a mixture of experts in every layer, transformers' own module."""

    config_class = Qwen3_5MoeTextConfig
    delta_class = Qwen3_5GatedDelta

    def _mlp(self, config: PretrainedConfig, index: int) -> nn.Module:
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

        return Qwen3_5MoeSparseMoeBlock(config)


class Qwen3NextForCausalLM(HybridForCausalLM):
    """Qwen3-Next: a mixture of experts in the layers that the configuration names, transformers' own module."""

    config_class = Qwen3NextConfig
    delta_class = Qwen3NextGatedDelta

    def _mlp(self, config: PretrainedConfig, index: int) -> nn.Module:
        sparse = config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
        if index in config.mlp_only_layers or not sparse:
            return super()._mlp(config, index)
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

        return Qwen3NextSparseMoeBlock(config)


class OlmoHybridForCausalLM(HybridForCausalLM):
    """OLMo-hybrid: attention layers norm what they add, queries and keys are normed over all heads together, and
    positions are told only where the configuration has a ``rope_theta``.
    """

    config_class = OlmoHybridConfig
    delta_class = OlmoHybridGatedDelta
    norm_class = RMSNorm

    def _block(self, config: PretrainedConfig, index: int, layer_type: str) -> HybridBlock:
        block = super()._block(config, index, layer_type)
        if layer_type == "linear_attention":
            return block
        norms = (self._norm(config), self._norm(config))
        return HybridBlock(layer_type, block.self_attn, block.mlp, norms, post_norm=True)

    def _attention(self, config: PretrainedConfig) -> FullAttention:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        told = config.rope_parameters is not None and config.rope_parameters.get("rope_theta") is not None
        return FullAttention(
            config,
            self._norm(config, config.num_attention_heads * head_dim),
            self._norm(config, config.num_key_value_heads * head_dim),
            Rotary(head_dim, config) if told else None,
            gated=False,
        )


HYBRIDS: dict[str, type[HybridForCausalLM]] = {
    model.config_class.model_type: model
    for model in (Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3NextForCausalLM, OlmoHybridForCausalLM)
}
