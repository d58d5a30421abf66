"""The fused LM head: log-probs, entropy, log-sum-exp and sampling from hidden states, without logits."""

from refine_kernels.linear_logprob.modules import LinearCrossEntropy, LinearLogprob
from refine_kernels.linear_logprob.op import linear_cross_entropy, linear_logprob
from refine_kernels.linear_logprob.philox import mix_seeds, row_seeds
from refine_kernels.linear_logprob.reference import LinearLogprobOutput

__all__ = [
    "LinearCrossEntropy",
    "LinearLogprob",
    "LinearLogprobOutput",
    "linear_cross_entropy",
    "linear_logprob",
    "mix_seeds",
    "row_seeds",
]
