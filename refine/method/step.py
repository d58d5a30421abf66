"""One REFINE step: read -> select -> branch -> score -> objective.

The sequences are read once, with a gradient. Where the model's predictions are uncertain, rollouts branch off;
they are rewarded against the true continuation, and their policy gradient flows through the prefix that they
continue. How the reading is done (in one pass, by segments, over several processes, or prefix by prefix) changes
memory and time and not the numbers: see :mod:`refine.method.reading`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refine.method.config import RefineConfig
from refine.method.context_parallel import ContextParallel
from refine.method.full_prefix import FullPrefix
from refine.method.objective import LossTerms, group_advantages, policy_objective
from refine.method.one_pass import OnePass
from refine.method.reading import Reading, check_model
from refine.method.rollouts import Rollouts, rollout_lengths
from refine.method.scoring import score_rollouts
from refine.method.seeds import sequence_seeds
from refine.method.segmented_pass import SegmentedPass
from refine.method.selection import select_positions
from refine.method.sequences import LabelledTokens, Sequences
from refine.models.head import NextTokenLoss


@dataclass
class RefineStepOutput:
    """What a step found; ``loss.backward()`` gives its gradient.

    S sequences (one per row, or as many as are packed into a row), c positions each, n rollouts per position,
    k tokens per rollout.
    """

    loss: torch.Tensor  # scalar: lambda_sft * ntp_loss + lambda_rl * nsp_loss
    ntp_loss: (
        torch.Tensor
    )  # scalar, detached: next-token cross-entropy, mean over tokens, then sequences (or the
    # sum by their weights)
    nsp_loss: torch.Tensor  # scalar, detached: the objective over rollout tokens; about 0 on-policy, as the
    # advantages of a group have mean 0 and all ratios are 1: look at rewards instead
    entropy: torch.Tensor  # [B, T] float32, of the prediction made at each position of the input
    positions: torch.Tensor  # [S, c] int64, where rollouts start, counted from a sequence's first token
    rollouts: torch.Tensor  # [S, c, n, k] int64, the sampled tokens
    logprobs: torch.Tensor  # [S, c, n, k] float32, detached, of the sampled tokens
    old_logprobs: torch.Tensor  # [S, c, n, k] float32, under the policy that sampled them
    rewards: torch.Tensor  # [S, c, n] float32
    advantages: torch.Tensor  # [S, c, n] float32
    cosine: torch.Tensor  # [S, c, n] float32, the cosine reward whatever the configured one is
    exact_match: torch.Tensor  # [S, c, n] float32, the binary reward likewise
    similarity: (
        torch.Tensor
    )  # [S, c, n, k] float32, per token of a rollout: cosine of predicted and true state
    chosen_entropy: torch.Tensor  # [S, c] float32, of the prediction of each rollout's first token
    clip_fraction: torch.Tensor  # scalar: share of rollout tokens whose gradient is clipped
    rollout_lengths: torch.Tensor  # [S, c, n] int64, tokens that count; k unless rollout_stop_entropy is set
    drawn: (
        Rollouts  # positions, tokens, log-probs, advantages, lengths: for off-policy updates on the same draw
    )

    @property
    def reward_std(self) -> torch.Tensor:
        """Standard deviation of all rewards, a scalar; 0 where there is one."""
        return self.rewards.std(correction=min(1, self.rewards.numel() - 1))


def refine_step(
    model: torch.nn.Module,
    input_ids: torch.Tensor | Sequences,
    config: RefineConfig,
    *,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rollouts: torch.Tensor | Rollouts | None = None,
    context: ContextParallel | None = None,
    reference: torch.nn.Module | None = None,
) -> RefineStepOutput:
    """One forward of the REFINE loss (arXiv 2602.16704, Sec. 3) over a batch of sequences.

    Each sequence's loss is its own: next-token cross-entropy averaged over its valid targets, policy loss
    averaged over its rollout tokens; the batch's loss is the mean over sequences. Accumulating over
    micro-batches of equal size therefore gives the gradient of the large batch.

    Args:
        model: one of this project's models (bare, or wrapped by DDP, FSDP2 or PEFT).
        input_ids: [B, T] int64; or :class:`Sequences`, which hold their padding or packing, and may weigh the
            tokens' next-token loss (the policy loss is as without weights).
        config: see :class:`RefineConfig`.
        attention_mask: [B, T], 1 for tokens, 0 for padding on either side of a row; None: no padding.
        cu_seqlens: [S + 1] int, where the sequences of one packed row (B = 1) begin and end.
        generator: gives the base of the random draws (default: torch's global one). Two calls with
            generators in the same state draw the same.
        seeds: [S] int64, one per sequence, in place of ``generator``.
        positions: [S, c] int64, to take the step at given positions, counted from a sequence's first token.
        rollouts: [S, c, n, k] int64, to take it with given tokens (needs ``positions``); or a :class:`Rollouts`,
            such as :attr:`RefineStepOutput.drawn` of a step under ``torch.no_grad()``, for off-policy updates.
        context: the processes that share each sequence (context parallelism); needs ``config.segment_length``.
        reference: the model that ``config.beta`` keeps the policy near to; read without a gradient.

    Raises:
        TypeError: the model is of another kind.
        ValueError: a row with a hole between its tokens, a sequence shorter than ``config.min_tokens``, a shape
            that does not fit, rollouts without positions, or ``config.beta`` without a reference.
    """
    check_model(model, "refine_step")
    if config.beta and reference is None:
        raise ValueError(f"beta={config.beta} needs a reference model: refine_step(..., reference=...)")
    sequences = _sequences(input_ids, attention_mask, cu_seqlens)
    _check_lengths(sequences, config)
    given = Rollouts.given(positions, rollouts)
    given.check(sequences, config)
    if seeds is None:
        seeds = sequence_seeds(sequences.padded().input_ids, sequences.lengths, generator)

    reading = read(model, sequences, config, context)
    positions = given.positions
    if positions is None:
        positions = select_positions(reading.entropy, sequences.lengths, config, seeds)
    branches = reading.branch(positions, given.tokens, seeds)
    lengths = given.lengths
    if lengths is None and config.rollout_stop_entropy is not None:
        lengths = rollout_lengths(branches.entropy, config.rollout_stop_entropy)
    scores = score_rollouts(sequences, positions, branches, lengths, config)
    advantages = group_advantages(scores.rewards) if given.advantages is None else given.advantages
    old_logprobs = branches.old_logprobs if given.old_logprobs is None else given.old_logprobs
    terms = LossTerms(entropy=branches.entropy)
    if config.beta:
        with torch.no_grad():
            again = read(reference, sequences, config, context)
            terms.ref_logprobs = again.branch(positions, branches.tokens, seeds).logprobs
    nsp_loss, clip_fraction = policy_objective(
        branches.logprobs, old_logprobs, advantages, config, lengths, terms
    )
    logprobs = branches.logprobs.detach()
    return RefineStepOutput(
        loss=config.lambda_sft * reading.ntp_loss + config.lambda_rl * nsp_loss,
        ntp_loss=reading.ntp_loss.detach(),
        nsp_loss=nsp_loss.detach(),
        entropy=sequences.in_rows(reading.entropy),
        positions=positions,
        chosen_entropy=reading.entropy.gather(1, positions - 1).detach(),
        rollouts=branches.tokens,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        clip_fraction=clip_fraction,
        rollout_lengths=torch.full_like(scores.rewards, config.rollout_length, dtype=torch.int64)
        if lengths is None
        else lengths,
        drawn=Rollouts(
            positions=positions,
            tokens=branches.tokens,
            old_logprobs=logprobs,
            advantages=advantages,
            lengths=lengths,
        ),
        **scores._asdict(),
    )


def read(
    model: torch.nn.Module,
    sequences: Sequences,
    config: RefineConfig,
    context: ContextParallel | None = None,
) -> Reading:
    """Read a batch in the way that ``config`` says."""
    if config.segment_length is not None:
        return SegmentedPass(model, sequences.padded().labelled(), config.segment_length, config, context)
    if context is not None:
        raise ValueError("context parallelism shares a sequence by segments: set segment_length")
    reading = FullPrefix if config.step == "per_prefix" else OnePass
    return reading(model, sequences, config)


def next_token_loss(
    model: torch.nn.Module,
    text: Sequences | LabelledTokens,
    segment_length: int | None = None,
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """The weighted sum of next-token cross-entropies: an SFT step, in one pass or by segments.

    Args:
        model: one of this project's models.
        text: sequences, whose tokens have their weights or else the mean over tokens, then over sequences, as
            weight; or rows padded on the right with targets and weights of their own.
        segment_length: read by segments of so many tokens; None: in one pass.
        context: the processes that share each row; needs ``segment_length``.
    """
    if segment_length is not None:
        labelled = text.padded().labelled() if isinstance(text, Sequences) else text
        return SegmentedPass(model, labelled, segment_length, context=context).ntp_loss
    labelled, places = (text.labelled(), text.places) if isinstance(text, Sequences) else (text, {})
    head = NextTokenLoss(labelled.targets, labelled.row_weight, entropy=False)
    return model(labelled.input_ids, use_cache=False, head=head, **places).loss


def _sequences(
    given: torch.Tensor | Sequences, attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Sequences:
    if not isinstance(given, Sequences):
        return Sequences.of(given, attention_mask, cu_seqlens)
    if attention_mask is not None or cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens were given twice: Sequences hold their own")
    return given


def _check_lengths(sequences: Sequences, config: RefineConfig) -> None:
    shortest = int(sequences.lengths.min())
    if shortest < config.min_tokens:
        raise ValueError(
            f"a sequence has {shortest} tokens; num_chunks={config.num_chunks} with "
            f"rollout_length={config.rollout_length} needs at least {config.min_tokens}"
        )
