"""Hybrid language models: gated-delta layers with full attention every few layers.

Qwen3.5 (dense and mixture of experts), Qwen3-Next and OLMo-hybrid, under transformers' own configurations and
parameter names, so that their checkpoints load and save as they are. ``layer_types`` says what each layer is. A
state of such a model is the fast weights of its delta layers and a place in the keys and values of its attention
layers, so rollouts branch without a copy of their prefix.

What differs from family to family is in its body's ``mixers``, norms and MLP.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import OlmoHybridConfig as TransformersOlmoHybridConfig
from transformers import Qwen3NextConfig as TransformersQwen3NextConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig as TransformersQwen3_5Config
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import (
    Qwen3_5MoeTextConfig as TransformersQwen3_5MoeConfig,
)

from refine.models.attention import OlmoHybridAttention, QwenAttention
from refine.models.blocks import GatedMLP, RMSNorm, ZeroCentredRMSNorm, is_loaded
from refine.models.body import FastWeightModel
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.config import _TRANSFORMERS_KEYS, FastWeightConfig, check_numbers, check_sizes
from refine.models.grouped_delta import OlmoHybridGatedDelta, Qwen3_5GatedDelta, Qwen3NextGatedDelta
from refine.models.layout import BatchLayout
from refine.models.registry import register_model

LAYER_TYPES = ("full_attention", "linear_attention")
_SIZES = (  # settings that must be whole numbers of at least 1, where a family has them
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "linear_conv_kernel_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "moe_intermediate_size",
    "shared_expert_intermediate_size", "num_experts_per_tok", "decoder_sparse_step",
)  # fmt: skip
_ROTARY_NUMBERS = (  # of rope_parameters, above 0 where they are given
    "rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
)  # fmt: skip

# ---- configurations: transformers' own, with what this project asks of one


class HybridConfig:
    """Mixed into a configuration of transformers; what is in ``config.json`` stays as it was."""

    only_implemented: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0,),
        "output_router_logits": (False,),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = FastWeightConfig.keys_to_ignore_at_inference

    def __post_init__(self, **settings):
        super().__post_init__(**settings)
        if getattr(self, "quantization_config", None) is not None:
            raise ValueError(
                f"{self.model_type}: the checkpoint's weights are quantised (quantization_config); take one in "
                "bfloat16, float16 or float32"
            )
        check_sizes(self.model_type, **{name: getattr(self, name, None) for name in _SIZES})
        check_numbers(self.model_type, least=0, initializer_range=self.initializer_range)
        positions = self.rope_parameters or {}
        check_numbers(self.model_type, **{name: positions.get(name) for name in _ROTARY_NUMBERS})
        check_numbers(
            self.model_type, least=0, most=1, partial_rotary_factor=positions.get("partial_rotary_factor")
        )
        experts, chosen = getattr(self, "num_experts", 0), getattr(self, "num_experts_per_tok", 0)
        if 0 < experts < chosen:
            raise ValueError(
                f"{self.model_type} config: num_experts_per_tok must be at most num_experts, "
                f"got {chosen} and {experts}"
            )
        for key, implemented in self.only_implemented.items():
            if (value := getattr(self, key, None)) not in (None, *implemented):
                allowed = " or ".join(map(repr, implemented))
                raise ValueError(
                    f"{self.model_type} config: {key}={value!r} is not implemented, only {allowed} is"
                )
        for i, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(
                    f"{self.model_type}: layer_types[{i}] must be one of {', '.join(LAYER_TYPES)}, got {kind!r}"
                )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"{self.model_type} config: num_hidden_layers is {self.num_hidden_layers}, but layer_types names "
                f"{len(self.layer_types)} layers"
            )

    @classmethod
    def settings(cls) -> frozenset[str]:
        """Names that this configuration takes."""
        own = (field.name for field in dataclasses.fields(cls))
        return (
            frozenset(own)
            | {"full_attention_interval", "partial_rotary_factor", "rope_theta"}
            | _TRANSFORMERS_KEYS
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Of a dictionary as ``config.json`` holds it; of a multimodal checkpoint's, the language model's part."""
        if "text_config" in config_dict:
            outer, inner = config_dict, dict(config_dict["text_config"])
            own = {field.name for field in dataclasses.fields(cls)} | {"quantization_config"}
            config_dict = inner | {
                key: value for key, value in outer.items() if key in own and value is not None
            }
            tied = "tie_word_embeddings"
            config_dict[tied] = bool(outer.get(tied) or inner.get(tied))
            config_dict["model_type"] = cls.model_type
        return super().from_dict(config_dict, **kwargs)

    check_settings = classmethod(FastWeightConfig.check_settings.__func__)

    @property
    def mixer_types(self) -> list[str]:
        """The kind of each layer's token mixer, one name a layer."""
        return self.layer_types

    @property
    def norm_eps(self) -> float:
        """Of the norms on the residual stream."""
        return self.rms_norm_eps


def _with_value_errors(config_class: type) -> type:
    """A class decorator: what the configuration's own check of types finds becomes a ValueError."""
    construct = config_class.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **settings):
        try:
            construct(self, *args, **settings)
        except StrictDataclassError as error:
            raise ValueError(f"{config_class.model_type} config: {error}") from error

    config_class.__init__ = __init__
    return config_class


@_with_value_errors
class Qwen3_5Config(HybridConfig, TransformersQwen3_5Config):
    """Of the language model of a dense Qwen3.5."""


@_with_value_errors
class Qwen3_5MoeConfig(HybridConfig, TransformersQwen3_5MoeConfig):
    """Of the language model of a Qwen3.5 with a mixture of experts."""

    def __post_init__(self, **settings):
        super().__post_init__(**settings)
        check_sizes(self.model_type, num_experts=self.num_experts)


@_with_value_errors
class Qwen3NextConfig(HybridConfig, TransformersQwen3NextConfig):
    """Of a Qwen3-Next."""


@_with_value_errors
class OlmoHybridConfig(HybridConfig, TransformersOlmoHybridConfig):
    """Of an OLMo-hybrid."""

    def __post_init__(self, **settings):
        super().__post_init__(**settings)
        for what in ("linear_a_log", "linear_dt"):  # a new model's decays are drawn between them
            low, high = f"{what}_min", f"{what}_max"
            bounds = {name: getattr(self, name) for name in (low, high)}
            check_numbers(self.model_type, least=0, **bounds)
            if bounds[low] > bounds[high] or not bounds[high]:
                raise ValueError(
                    f"{self.model_type} config: {low} must be at most {high}, which must be above 0: got {bounds}"
                )
        check_numbers(self.model_type, linear_dt_min=self.linear_dt_min)
        check_numbers(self.model_type, least=0, linear_dt_init_floor=self.linear_dt_init_floor)


# ---- layers


class HybridBlock(GradientCheckpointingLayer):
    """``h += mixer(norm(h))``, then ``h += mlp(norm(h))``; the mixer under the name that checkpoints give it."""

    def __init__(self, config, mixer: nn.Module, layer: int):
        super().__init__()
        self.attends = config.mixer_types[layer] == "full_attention"
        if self.attends:
            self.self_attn = mixer
        else:
            self.linear_attn = mixer
        self.mlp = self.make_mlp(config, layer)
        self.input_layernorm = self.norm_class(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = self.norm_class(config.hidden_size, config.norm_eps)

    norm_class: ClassVar[type[RMSNorm]] = ZeroCentredRMSNorm

    def make_mlp(self, config, layer: int) -> nn.Module:
        """The feed-forward part of one layer."""
        return GatedMLP(config.hidden_size, config.intermediate_size)

    def mix(self, x: torch.Tensor, *arguments) -> tuple:
        """The token mixer's output, new state and trace."""
        return (self.self_attn if self.attends else self.linear_attn)(x, *arguments)

    def forward(self, hidden, state, layout: BatchLayout, keep_state=False, state_stride=None):
        mixed, *rest = self.mix(self.input_layernorm(hidden), state, layout, keep_state, state_stride)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), *rest


class Qwen3_5MoeBlock(HybridBlock):
    """With transformers' own mixture of experts in every layer."""

    def make_mlp(self, config, layer: int) -> nn.Module:
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

        return Qwen3_5MoeSparseMoeBlock(config)


class Qwen3NextBlock(HybridBlock):
    """With transformers' own mixture of experts in the layers that the configuration names."""

    def make_mlp(self, config, layer: int) -> nn.Module:
        sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        if layer in config.mlp_only_layers or not sparse:
            return super().make_mlp(config, layer)
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

        return Qwen3NextSparseMoeBlock(config)


class OlmoHybridBlock(HybridBlock):
    """Attention layers norm what they add: ``h += norm(mixer(h))``, then ``h += norm(mlp(h))``."""

    norm_class = RMSNorm

    def __init__(self, config, mixer: nn.Module, layer: int):
        super().__init__(config, mixer, layer)
        if self.attends:
            del self.input_layernorm
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden, state, layout: BatchLayout, keep_state=False, state_stride=None):
        if not self.attends:
            return super().forward(hidden, state, layout, keep_state, state_stride)
        mixed, *rest = self.mix(hidden, state, layout, keep_state, state_stride)
        hidden = hidden + self.post_attention_layernorm(mixed)
        return hidden + self.post_feedforward_layernorm(self.mlp(hidden)), *rest


# ---- models


class _LoadsAsTransformers:
    """What body and model share: they read and write checkpoints of transformers' own classes."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers' renamings of these families' checkpoints apply."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for a decorator in this file; its own expert modules carry it

    def _init_weights(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("transformers."):  # the parts of a mixture of experts
            for weight in module.parameters(recurse=False):
                if not is_loaded(weight):
                    nn.init.normal_(weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class HybridModel(_LoadsAsTransformers, FastWeightModel):
    """A hybrid without a head."""

    embeddings_name = "embed_tokens"
    norm_class = ZeroCentredRMSNorm
    _no_split_modules = ("HybridBlock", "Qwen3_5MoeBlock", "Qwen3NextBlock", "OlmoHybridBlock")

    def __init__(self, config):
        super().__init__(config)
        pad = config.pad_token_id
        if pad is not None and pad < config.vocab_size:
            self.embed_tokens.padding_idx = pad  # which gets no gradient


class HybridForCausalLM(_LoadsAsTransformers, FastWeightForCausalLM):
    """A hybrid with a language-model head. See :class:`FastWeightForCausalLM` for what ``forward`` takes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = HybridModel._no_split_modules
    skipped_weights: ClassVar[dict[str, str]] = {
        "mtp.": "the multi-token-prediction head",
        "model.visual.": "the vision tower",
    }

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As ``transformers`` does it, under the names of the family's checkpoints.

        Raises:
            ValueError: the folder holds the checkpoint that this model was loaded from, and that has parts which
                are not in this model and would be lost.
        """
        if self.left_in_checkpoint is not None:
            origin, parts = self.left_in_checkpoint
            if Path(origin).resolve() == Path(save_directory).resolve():
                raise ValueError(
                    f"save_directory {str(save_directory)!r} holds the checkpoint that was loaded, with {parts}, "
                    "which would be lost: save to another folder"
                )
        return super().save_pretrained(save_directory, *args, **kwargs)


class Qwen3_5TextModel(HybridModel):
    """Qwen3.5, dense, without a head."""

    config_class = Qwen3_5Config
    mixers: ClassVar = {"linear_attention": Qwen3_5GatedDelta, "full_attention": QwenAttention}
    block_class = HybridBlock


class Qwen3_5MoeTextModel(HybridModel):
    """Qwen3.5 with a mixture of experts, without a head."""

    config_class = Qwen3_5MoeConfig
    mixers: ClassVar = {"linear_attention": Qwen3_5GatedDelta, "full_attention": QwenAttention}
    block_class = Qwen3_5MoeBlock


class Qwen3NextModel(HybridModel):
    """Qwen3-Next without a head."""

    config_class = Qwen3NextConfig
    mixers: ClassVar = {"linear_attention": Qwen3NextGatedDelta, "full_attention": QwenAttention}
    block_class = Qwen3NextBlock


class OlmoHybridModel(HybridModel):
    """OLMo-hybrid without a head."""

    config_class = OlmoHybridConfig
    mixers: ClassVar = {"linear_attention": OlmoHybridGatedDelta, "full_attention": OlmoHybridAttention}
    block_class = OlmoHybridBlock
    norm_class = RMSNorm


_TINY: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 48,
    "tie_word_embeddings": True,
}
_TINY_EXPERTS: dict[str, Any] = _TINY | {
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


@register_model(tiny=_TINY | {"head_dim": 64}, model_types=("qwen3_5_text", "qwen3_5"), auto=False)
class Qwen3_5ForCausalLM(HybridForCausalLM):
    """Qwen3.5, dense: a language model alone, or the one inside a multimodal checkpoint."""

    config_class = Qwen3_5Config
    body_class = Qwen3_5TextModel


@register_model(
    tiny={key: value for key, value in _TINY_EXPERTS.items() if key != "intermediate_size"},
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    auto=False,
)
class Qwen3_5MoeForCausalLM(HybridForCausalLM):
    """Qwen3.5 with a mixture of experts: a language model alone, or the one inside a multimodal checkpoint."""

    config_class = Qwen3_5MoeConfig
    body_class = Qwen3_5MoeTextModel


@register_model(tiny=_TINY_EXPERTS, auto=False)
class Qwen3NextForCausalLM(HybridForCausalLM):
    """Qwen3-Next."""

    config_class = Qwen3NextConfig
    body_class = Qwen3NextModel


@register_model(tiny=_TINY, auto=False)
class OlmoHybridForCausalLM(HybridForCausalLM):
    """OLMo-hybrid."""

    config_class = OlmoHybridConfig
    body_class = OlmoHybridModel


HYBRIDS: dict[str, type[HybridForCausalLM]] = {
    model.config_class.model_type: model
    for model in (Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3NextForCausalLM, OlmoHybridForCausalLM)
}
