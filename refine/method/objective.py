"""From rewards to a loss: advantages within a group, and the policy-gradient losses of the field.

An objective is a function of (logprobs [S, c, n, k] with a gradient, old_logprobs [S, c, n, k], advantages
[S, c, n], config, lengths [S, c, n] or None) that returns two scalars: the loss, and the share of tokens whose
gradient is clipped. S sequences have c positions with n rollouts of k tokens each; completions of prompts are M
sequences of one rollout, [M, 1, 1, R]. The built-in ones also take a :class:`LossTerms`.

A built-in objective is a loss per token and a mean over tokens:

=========  =====================================  =====================================================
objective  loss per token                         mean
=========  =====================================  =====================================================
grpo       clipped ratio (arXiv 2402.03300)       over each sequence's tokens, then over sequences
bnpo       the same                               over all tokens of the batch
dr_grpo    the same (arXiv 2503.20783)            sum over k tokens per rollout, whatever its length
dapo       the same (arXiv 2503.14476)            over all tokens of the update (``LossTerms.total_tokens``)
gspo       clipped ratio of the whole rollout     over each sequence's tokens, then over sequences
           (arXiv 2507.18071)
cispo      capped ratio as a weight               over all tokens of the update
           (arXiv 2506.13585)
sapo       soft gate on the ratio                 over each sequence's tokens, then over sequences
           (arXiv 2511.20347)
=========  =====================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refine.plugins import find_function

if TYPE_CHECKING:
    from refine.method.config import RefineConfig

Objective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(kw_only=True)
class LossTerms:
    """What a loss may need beside the log-probs of the policy."""

    ref_logprobs: torch.Tensor | None = None  # [S, c, n, k], of the reference, for ``config.beta``
    entropy: torch.Tensor | None = (
        None  # [S, c, n, k] of the predictions, for ``config.top_entropy_quantile``
    )
    total_tokens: torch.Tensor | float | None = (
        None  # tokens of the whole update, over its batches; None: of this one
    )
    longest: int | None = None  # tokens a rollout may have, for dr_grpo; None: k


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards [S, c, n] standardised within their group -> advantages [S, c, n] float32.

    With n = 1 a group is all c rollouts of one sequence; with n > 1 it is the n rollouts of one position.
    ``(r - mean) / (std + 1e-6)`` with the unbiased std; a group whose std is 0 (or that has one member) gets 0.
    """
    dim = 1 if rewards.shape[2] == 1 else 2
    if rewards.shape[dim] == 1:
        return torch.zeros_like(rewards, dtype=torch.float32)
    rewards = rewards.float()
    std = rewards.std(dim, keepdim=True)
    advantages = (rewards - rewards.mean(dim, keepdim=True)) / (std + 1e-6)
    return torch.where(std == 0, 0.0, advantages)


# ---- losses per token: ratio [S, c, n, k] (gspo: [S, c, n, 1]), gain [S, c, n, 1] -> loss, clipped ----


def _clipped_ratio(ratio, logprobs, gain, config: RefineConfig):
    """PPO's clip (arXiv 1707.06347, Eq. 7) with the dual clip for negative advantages (arXiv 1912.09729, Eq. 5)."""
    plain = -gain * ratio
    clipped = -gain * ratio.clamp(1 - config.clip_range, 1 + config.upper_clip_range)
    loss = torch.maximum(plain, clipped)
    if config.dual_clip is None:
        return loss, clipped > plain
    bound = -gain * config.dual_clip
    dual = (gain < 0) & (loss > bound)
    return torch.where(dual, bound, loss), (clipped > plain) | dual


def _capped_weight(ratio, logprobs, gain, config: RefineConfig):
    """A plain policy gradient, weighted by the ratio up to ``clip_range_high``."""
    cap = config.upper_clip_range
    return -ratio.clamp(max=cap).detach() * gain * logprobs, (ratio > cap) & (gain > 0)


def _soft_gate(ratio, logprobs, gain, config: RefineConfig):
    """A sigmoid of the ratio in place of a clip, with a temperature for each sign of the advantage."""
    tau = torch.where(gain > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -gain * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, torch.zeros_like(ratio, dtype=torch.bool)


# ---- means over tokens: x [S, c, n, k], counted of its shape or None for all ---------------------------------


def _mean_of_sequences(x, counted, terms: LossTerms) -> torch.Tensor:
    if counted is None:
        return x.mean()
    return (torch.where(counted, x, 0.0).sum((1, 2, 3)) / counted.sum((1, 2, 3)).clamp(min=1)).mean()


def _mean_of_tokens(x, counted, terms: LossTerms) -> torch.Tensor:
    return x.mean() if counted is None else torch.where(counted, x, 0.0).sum() / counted.sum().clamp(min=1)


def _mean_of_update(x, counted, terms: LossTerms) -> torch.Tensor:
    if terms.total_tokens is None:
        return _mean_of_tokens(x, counted, terms)
    return (x if counted is None else torch.where(counted, x, 0.0)).sum() / terms.total_tokens


def _mean_of_fixed_length(x, counted, terms: LossTerms) -> torch.Tensor:
    longest = x.shape[-1] if terms.longest is None else terms.longest
    total = (x if counted is None else torch.where(counted, x, 0.0)).sum()
    return total / (x[..., 0].numel() * longest)


@dataclass(frozen=True)
class PolicyLoss:
    """An objective made of a loss per token and a mean over tokens.

    Attributes:
        token_loss: function of (ratio, logprobs, gain, config): the loss per token, and where it is clipped.
        mean: function of (loss, counted, terms).
        of_rollouts: the ratio is that of a whole rollout, per token: the geometric mean of its tokens' ratios.
    """

    token_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    mean: Callable[..., torch.Tensor]
    of_rollouts: bool = False

    def __call__(
        self,
        logprobs: torch.Tensor,  # [S, c, n, k] float32, with a gradient
        old_logprobs: torch.Tensor,  # [S, c, n, k] float32, of the policy that sampled
        advantages: torch.Tensor,  # [S, c, n]
        config: RefineConfig,
        lengths: torch.Tensor
        | None = None,  # [S, c, n], tokens of each rollout that count (0: none); None: all k
        terms: LossTerms | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the share of tokens that are clipped, mean over a sequence's tokens, then sequences."""
        terms, counted = terms or LossTerms(), None
        if lengths is not None:
            counted = torch.arange(logprobs.shape[-1], device=logprobs.device) < lengths[..., None]
        log_ratio = logprobs - old_logprobs.detach()
        if self.of_rollouts:
            kept = log_ratio if counted is None else torch.where(counted, log_ratio, 0.0)
            count = kept.shape[-1] if counted is None else lengths[..., None].clamp(min=1)
            log_ratio = kept.sum(-1, keepdim=True) / count
        gain = advantages.to(logprobs.dtype)[..., None]
        loss, clipped = self.token_loss(log_ratio.exp(), logprobs, gain, config)
        loss, clipped = loss.expand_as(logprobs), clipped.to(loss.dtype).expand_as(logprobs)
        if config.top_entropy_quantile < 1:
            kept = high_entropy(terms.entropy, counted, config.top_entropy_quantile)
            loss = torch.where(kept, loss, 0.0)
        if config.beta:
            loss = loss + config.beta * kl_estimate(logprobs, terms.ref_logprobs)
        return self.mean(loss, counted, terms), _mean_of_sequences(clipped, counted, terms)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per token, the unbiased and never negative estimate of KL(policy || reference), from tokens of the policy:
    ``exp(d) - d - 1`` with ``d = ref_logprobs - logprobs`` (k3 of J. Schulman, "Approximating KL divergence").
    """
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def high_entropy(
    entropy: torch.Tensor,  # [...]
    counted: torch.Tensor | None,  # [...] bool
    share: float,
) -> torch.Tensor:  # [...] bool
    """The tokens with the highest entropies, as many as ``share`` of those that count (arXiv 2506.01939)."""
    counted = torch.ones_like(entropy, dtype=torch.bool) if counted is None else counted
    entropy = entropy.detach()
    if not counted.any():
        return counted
    return counted & (entropy >= torch.quantile(entropy[counted], 1 - share))


policy_loss = PolicyLoss(_clipped_ratio, _mean_of_sequences)  # GRPO's

OBJECTIVES: dict[str, Objective] = {
    "grpo": policy_loss,
    "bnpo": PolicyLoss(_clipped_ratio, _mean_of_tokens),
    "dr_grpo": PolicyLoss(_clipped_ratio, _mean_of_fixed_length),
    "dapo": PolicyLoss(_clipped_ratio, _mean_of_update),
    "gspo": PolicyLoss(_clipped_ratio, _mean_of_sequences, of_rollouts=True),
    "cispo": PolicyLoss(_capped_weight, _mean_of_update),
    "sapo": PolicyLoss(_soft_gate, _mean_of_sequences),
}


def of_whole_update(objective: str) -> bool:
    """Whether the loss is divided by the tokens of the whole update, so that batches' losses add up to it."""
    return objective in ("dapo", "cispo")


def clip_ratios(
    log_ratio: torch.Tensor,  # [M, R]
    advantages: torch.Tensor,  # [M]
    counted: torch.Tensor,  # [M, R] bool
    config: RefineConfig,
    clipped: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The share of tokens that are clipped, by TRL's names: below, above, and both; of gspo the completions.

    ``clipped`` is the share that the objective gave, where it is the only one (cispo, one of the user's own).
    """
    if config.objective == "cispo":
        return {"cispo_clip_ratio": clipped}
    if config.objective not in OBJECTIVES or config.objective == "sapo":
        return {"clip_ratio/region_mean": clipped}
    if config.objective == "gspo":
        length = counted.sum(1, keepdim=True)
        log_ratio = torch.where(counted, log_ratio, 0.0).sum(1, keepdim=True) / length.clamp(min=1)
        counted = length > 0
    ratio, gain = log_ratio.detach().exp(), advantages[:, None]
    low = mean_where((ratio < 1 - config.clip_range) & (gain < 0), counted)
    high = mean_where((ratio > 1 + config.upper_clip_range) & (gain > 0), counted)
    return {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}


def mean_where(x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean of ``x`` where ``counted`` [of its shape]; 0 where nothing is."""
    return torch.where(counted, x, 0).sum() / counted.sum().clamp(min=1)


def find_objective(name: str) -> Objective:
    """An objective by its name, or by ``module:function``.

    Raises:
        ValueError: there is no such objective.
    """
    return find_function("objective", name, OBJECTIVES)


def policy_objective(
    logprobs: torch.Tensor,  # [S, c, n, k] float32, with a gradient
    old_logprobs: torch.Tensor,  # [S, c, n, k] float32
    advantages: torch.Tensor,  # [S, c, n]
    config: RefineConfig,
    lengths: torch.Tensor | None = None,  # [S, c, n]
    terms: LossTerms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The configured objective's loss and clipped share.

    Raises:
        ValueError: an objective of the user's own returned something else than two scalars.
    """
    given = (terms,) if config.objective in OBJECTIVES else ()
    found = find_objective(config.objective)(logprobs, old_logprobs, advantages, config, lengths, *given)
    pair = found if isinstance(found, tuple) and len(found) == 2 else ()
    if not pair or any(not isinstance(x, torch.Tensor) or x.ndim for x in pair):
        raise ValueError(
            f"objective {config.objective!r} must return two scalar tensors (loss, share of tokens clipped), "
            f"got {found!r}"
        )
    return found
