"""Fast-weight language models: DeltaNet, Gated DeltaNet, LaCT, and the hybrids Qwen3.5, Qwen3-Next, OLMo-hybrid."""

from refine.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from refine.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine.models.hybrid import (
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from refine.models.lact import LaCTConfig, LaCTForCausalLM
from refine.models.loading import load_model, new_model
from refine.models.registry import MODELS, register_auto_classes, register_model, registered_class
from refine.models.state import FastWeightState, StateTrace

__all__ = [
    "MODELS",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "FastWeightState",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "LaCTConfig",
    "LaCTForCausalLM",
    "OlmoHybridConfig",
    "OlmoHybridForCausalLM",
    "Qwen3NextConfig",
    "Qwen3NextForCausalLM",
    "Qwen3_5Config",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeConfig",
    "Qwen3_5MoeForCausalLM",
    "StateTrace",
    "load_model",
    "new_model",
    "register_auto_classes",
    "register_model",
    "registered_class",
]
