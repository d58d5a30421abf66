"""Kernels for fast-weight language models, importable into anybody's training code.

Layouts follow the field's habit: ``[B, T, H, D]`` activations, ``cu_seqlens`` for packed sequences,
float32 states ``[N, H, K, V]``. ``refine_kernels.reference`` holds the same functions as plain,
sequential PyTorch: the definition that every backend is tested against.
"""

from refine_kernels.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    delta_net_decode,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    recurrent_delta_rule,
)
from refine_kernels.lact import LaCTState, chunk_lact
from refine_kernels.linear_logprob import (
    LinearCrossEntropy,
    LinearLogprob,
    LinearLogprobOutput,
    linear_cross_entropy,
    linear_logprob,
)

__version__ = "0.1.0"

__all__ = [
    "LaCTState",
    "LinearCrossEntropy",
    "LinearLogprob",
    "LinearLogprobOutput",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_lact",
    "delta_net_decode",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "linear_cross_entropy",
    "linear_logprob",
    "recurrent_delta_rule",
]
