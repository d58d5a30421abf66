"""Every public op as plain, sequential PyTorch: the definition. Any device, any float dtype, plain autograd."""

from refine_kernels.delta_rule.reference import chunk_delta_rule, recurrent_delta_rule
from refine_kernels.lact.reference import chunk_lact
from refine_kernels.linear_logprob.reference import linear_cross_entropy, linear_logprob

__all__ = ["chunk_delta_rule", "chunk_lact", "linear_cross_entropy", "linear_logprob", "recurrent_delta_rule"]
