"""Fast-weight language models: DeltaNet, Gated DeltaNet and LaCT."""

from refine.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from refine.models.gated_delta_net import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine.models.lact import LaCTConfig, LaCTForCausalLM
from refine.models.loading import MODELS, load_model, new_model, register_auto_classes
from refine.models.state import FastWeightState, StateTrace

register_auto_classes()

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
]
