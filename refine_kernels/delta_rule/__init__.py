"""The delta rule of DeltaNet and Gated DeltaNet: README.md derives it, reference.py defines it."""

from refine_kernels.delta_rule.decode import delta_net_decode
from refine_kernels.delta_rule.fla_names import (
    chunk_gated_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
)
from refine_kernels.delta_rule.op import chunk_delta_rule, recurrent_delta_rule

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "delta_net_decode",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "recurrent_delta_rule",
]
