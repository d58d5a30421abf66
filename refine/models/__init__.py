"""Fast-weight language models: DeltaNet, Gated DeltaNet and LaCT."""

from refine.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from refine.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
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
    "StateTrace",
    "load_model",
    "new_model",
    "register_auto_classes",
    "register_model",
    "registered_class",
]
