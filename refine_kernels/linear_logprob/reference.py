"""The definition: log-probs, entropy, log-sum-exp and samples of a linear head, with materialised logits.

    z = softcap(x W^T + b)                   logits               [..., V]
    q = z / temperature
    lse     = log sum_v exp(q_v)
    log p_v = q_v - lse
    entropy = -sum_v p_v log p_v
    logprob = log p_target                   0, with zero gradient, where target == ignore_index
    token   = argmax_v (q_v + gumbel_v)      a draw from p; at temperature 0, argmax_v z_v

Plain autograd, any device, float32 arithmetic (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from refine_kernels.linear_logprob.philox import gumbel, row_seeds
from refine_kernels.precision import accumulation_dtype, no_autocast

NO_TOKEN = -1  # what a row without a distribution draws: no token of any vocabulary


class LinearLogprobOutput(NamedTuple):
    """What a linear head says about each row; ``None`` where not asked for. Leading shape of ``x``.

    Attributes:
        logprob: log-probability of the target, or of the drawn token where no target was given. float32.
        entropy: entropy of the distribution over the vocabulary, in nats. float32.
        lse: log-sum-exp of ``logits / temperature``. float32.
        token: the drawn token; -1 for a row that has no distribution (a logit is NaN or +inf). int64.
    """

    logprob: torch.Tensor | None
    entropy: torch.Tensor | None
    lse: torch.Tensor | None
    token: torch.Tensor | None


def linear_logprob(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    target: torch.Tensor | None = None,  # [...]
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_lse: bool = False,
    sample: bool = False,
    seed: int | torch.Tensor | None = None,  # [...] when a tensor
    bias: torch.Tensor | None = None,  # [V]
    logit_softcap: float | None = None,
    backend: str | None = None,
) -> LinearLogprobOutput:
    """The definition of ``refine_kernels.linear_logprob``: same arguments for a whole weight.

    ``backend`` is not looked at.
    """
    z = _logits(x, weight, bias, logit_softcap)  # [..., V]
    token = draw(z.detach(), temperature, seed) if sample else None
    q = z / (temperature or 1.0)
    log_p = q.log_softmax(-1)

    if target is not None:
        logprob = _at_target(log_p, target, ignore_index)
    else:  # a drawn token is never ignored, whatever its number
        logprob = log_p.gather(-1, token.clamp_min(0)[..., None]).squeeze(-1) if sample else None
    entropy = -(log_p.exp() * log_p).sum(-1) if return_entropy else None
    lse = q.logsumexp(-1) if return_lse else None
    return LinearLogprobOutput(logprob, entropy, lse, token)


def linear_cross_entropy(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # [...]
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    row_weight: torch.Tensor | None = None,  # [...]
    return_entropy: bool = False,
    bias: torch.Tensor | None = None,  # [V]
    logit_softcap: float | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The definition of ``refine_kernels.linear_cross_entropy``: same arguments for a whole weight."""
    out = linear_logprob(
        x,
        weight,
        target,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        bias=bias,
        logit_softcap=logit_softcap,
    )
    loss = -out.logprob if row_weight is None else -out.logprob * row_weight
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / (target != ignore_index).sum().clamp_min(1)
    return (loss, out.entropy.detach()) if return_entropy else loss


def draw(
    z: torch.Tensor,  # [..., V]
    temperature: float,
    seed: int | torch.Tensor | None,  # [...] when a tensor
) -> torch.Tensor:
    """One token per row from ``softmax(z / temperature)`` by the Gumbel-max trick; lowest index on ties.

    Row ``r`` uses ``seed[r]``, or ``row_seeds(seed, ...)[r]`` for an int; its noise at column ``v`` is
    ``gumbel(seed[r], v)``. Temperature 0 takes the arg-max and needs no seed. A row that has no
    distribution draws -1.
    """
    if temperature == 0:
        scores = z
    else:
        seeds = resolve_seeds(seed, z.shape[:-1], z.device)
        columns = torch.arange(z.shape[-1], device=z.device)
        scores = z / temperature + gumbel(seeds[..., None], columns)  # [..., V]
    return torch.where(z.logsumexp(-1).isfinite(), scores.argmax(-1), NO_TOKEN)


def resolve_seeds(
    seed: int | torch.Tensor | None, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:  # [...]
    """The seed of every row: as given, derived from one int, or from PyTorch's generator when ``None``."""
    if isinstance(seed, torch.Tensor):
        return seed
    if seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    return row_seeds(seed, shape, device)


def _logits(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    logit_softcap: float | None,
) -> torch.Tensor:  # [..., V]
    dtype = accumulation_dtype(x, weight)
    with no_autocast(x):
        z = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return z


def _at_target(
    log_p: torch.Tensor,  # [..., V]
    target: torch.Tensor,  # [...]
    ignore_index: int,
) -> torch.Tensor:  # [...]
    valid = target != ignore_index
    index = torch.where(valid, target, 0).long()
    logprob = log_p.gather(-1, index[..., None]).squeeze(-1)
    return torch.where(valid, logprob, 0.0)
