"""The delta rule of DeltaNet and Gated DeltaNet: see README.md for the derivation, reference.py for the definition."""

from refine_kernels.delta_rule.op import chunk_delta_rule, recurrent_delta_rule

__all__ = ["chunk_delta_rule", "recurrent_delta_rule"]
