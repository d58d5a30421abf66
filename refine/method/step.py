"""One REFINE step: entropies -> positions -> rollouts -> rewards -> one loss.

Two ways to the same gradient. *shared_prefix* reads each sequence once, with a gradient; every rollout goes on
from the state at its position, inside the same autograd graph, so that one backward carries the rollouts'
gradient through the prefix that they continue. *per_prefix* is the paper's own way and our reference: it runs
the prefix again for every position, in generation, for the old log-probs and in the update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refine.method.config import RefineConfig
from refine.method.objective import group_advantages, policy_loss
from refine.method.relay import Relay
from refine.method.rewards import binary, cosine, find_reward
from refine.method.rollout import rollout_lengths as find_rollout_lengths
from refine.method.rollout import sample_rollouts
from refine.method.seeds import rollout_seeds, sequence_seeds
from refine.method.segments import read_with_rollouts
from refine.method.selection import select_positions
from refine.models.head import HiddenOnly, NextTokenLoss, TokenLogprob


@dataclass
class RefineStepOutput:
    """What a step found; ``loss.backward()`` gives its gradient.

    B sequences, c positions each, n rollouts a position, k tokens a rollout.
    """

    loss: torch.Tensor  # scalar: lambda_sft * ntp_loss + lambda_rl * nsp_loss
    ntp_loss: torch.Tensor  # scalar, detached: next-token cross-entropy, mean over tokens, then sequences
    nsp_loss: torch.Tensor  # scalar, detached: clipped policy gradient over rollout tokens
    entropy: torch.Tensor  # [B, T] float32, of the prediction made at each position
    positions: torch.Tensor  # [B, c] int64, where rollouts start
    rollouts: torch.Tensor  # [B, c, n, k] int64, the sampled tokens
    logprobs: torch.Tensor  # [B, c, n, k] float32, detached, of the sampled tokens
    old_logprobs: torch.Tensor  # [B, c, n, k] float32, under the policy that sampled them
    rewards: torch.Tensor  # [B, c, n] float32
    advantages: torch.Tensor  # [B, c, n] float32
    cosine: torch.Tensor  # [B, c, n] float32, the cosine reward whatever the configured one is
    exact_match: torch.Tensor  # [B, c, n] float32, the binary reward likewise
    clip_fraction: torch.Tensor  # scalar: share of rollout tokens whose gradient is clipped
    rollout_lengths: torch.Tensor  # [B, c, n] int64, tokens that count; k unless rollout_stop_entropy is set


@dataclass
class _Pass:
    """What either way of taking the step hands to the objective."""

    ntp_loss: torch.Tensor
    entropy: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, c]
    rollouts: torch.Tensor  # [B, c, n, k]
    logprobs: torch.Tensor  # [B, c, n, k], with a gradient
    old_logprobs: torch.Tensor  # [B, c, n, k]
    predicted: torch.Tensor  # [B, c, n, k, D], hidden states after each sampled token
    true: torch.Tensor  # [B, c, k, D], hidden states after the true tokens in their places
    sureness: torch.Tensor | None  # [B, c, n, k] entropies of the rollouts' predictions, where needed


def refine_step(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    config: RefineConfig,
    *,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rollouts: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    rollout_lengths: torch.Tensor | None = None,
    relay: Relay | None = None,
) -> RefineStepOutput:
    """One forward of the REFINE loss (arXiv 2602.16704, Sec. 3) over a batch of sequences.

    Each sequence's loss is its own: next-token cross-entropy averaged over its valid targets, policy loss
    averaged over its rollout tokens; the batch's loss is the mean over sequences. Accumulating over
    micro-batches of equal size therefore gives the gradient of the large batch.

    Args:
        model: one of this project's models (bare or wrapped by DDP or FSDP2).
        input_ids: [B, T] int64, padded on the right.
        config: see :class:`RefineConfig`.
        attention_mask: [B, T], 1 for tokens, 0 for padding on the right; None: no padding.
        generator: gives the base of the random draws (default: torch's global one). Two calls with
            generators in the same state draw the same.
        seeds: [B] int64, one a sequence, in place of ``generator``.
        positions: [B, c] int64, to take the step at given positions.
        rollouts: [B, c, n, k] int64, to take it with given tokens (needs ``positions``).
        old_logprobs: [B, c, n, k], of the policy that sampled ``rollouts``; default: this model's own, the
            on-policy step.
        advantages: [B, c, n], computed when the rollouts were; default: from the rewards of this call. A
            step under ``torch.no_grad()`` gives all of these for later off-policy updates.
        rollout_lengths: [B, c, n] int64, 1 to k, where the policy that sampled ended them; default: by
            ``config.rollout_stop_entropy`` under this model.
        relay: the processes that share each sequence (context parallelism); needs ``config.segment_length``.

    Raises:
        ValueError: padding on the left, a sequence shorter than ``config.min_tokens``, a shape that does not
            fit, or rollouts without positions.
    """
    lengths = _check_batch(input_ids, attention_mask, config)
    _check_draw(input_ids, lengths, config, positions, rollouts, old_logprobs, advantages, rollout_lengths)
    if seeds is None:
        seeds = sequence_seeds(input_ids, lengths, generator)
    if config.segment_length is not None:
        done = _by_segments(model, input_ids, lengths, config, seeds, positions, rollouts, relay)
    elif relay is not None:
        raise ValueError("relay shares a sequence by segments: set segment_length")
    else:
        take = _per_prefix if config.step == "per_prefix" else _shared_prefix
        done = take(model, input_ids, lengths, config, seeds, positions, rollouts)

    detached = done.logprobs.detach()
    old = done.old_logprobs if old_logprobs is None else old_logprobs
    ends = rollout_lengths
    if ends is None and config.rollout_stop_entropy is not None:
        ends = find_rollout_lengths(done.sureness, config.rollout_stop_entropy)
    scores = _score(input_ids, done, config, ends)
    advantages = group_advantages(scores["rewards"]) if advantages is None else advantages
    nsp_loss, clip_fraction = policy_loss(done.logprobs, old, advantages, config, ends)
    if ends is None:
        ends = find_rollout_lengths(detached, None)
    return RefineStepOutput(
        loss=config.lambda_sft * done.ntp_loss + config.lambda_rl * nsp_loss,
        ntp_loss=done.ntp_loss.detach(),
        nsp_loss=nsp_loss.detach(),
        entropy=done.entropy,
        positions=done.positions,
        rollouts=done.rollouts,
        logprobs=detached,
        old_logprobs=old,
        advantages=advantages,
        clip_fraction=clip_fraction,
        rollout_lengths=ends,
        **scores,
    )


def next_token_targets(
    input_ids: torch.Tensor,  # [B, T]
    lengths: torch.Tensor,  # [B]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [B, T] (-100 where there is none) and row weights [B, T] float32.

    The weights make the summed loss a mean over each sequence's valid targets, then over sequences. Padding
    never counts.
    """
    batch, tokens = input_ids.shape
    valid = torch.arange(1, tokens + 1, device=input_ids.device) < lengths[:, None]
    targets = input_ids.roll(-1, dims=1).masked_fill(~valid, -100)
    weight = valid / ((lengths - 1).clamp_min(1)[:, None] * batch)
    return targets, weight.float()


def _shared_prefix(model, input_ids, lengths, config, seeds, positions, rollouts) -> _Pass:
    """One pass over the true sequences, one short pass over all branches, from states inside the graph."""
    batch, c, n, k = len(input_ids), config.num_chunks, config.num_rollouts, config.rollout_length
    output = model(
        input_ids,
        use_cache=False,
        head=NextTokenLoss(*next_token_targets(input_ids, lengths)),
        state_stride=config.state_stride,
    )
    hidden = output.last_hidden_state  # [B, T, D]
    if positions is None:
        positions = select_positions(output.entropy, lengths, config, seeds)

    row = torch.arange(batch, device=input_ids.device)[:, None].expand(-1, c).flatten()  # [Bc]
    start = positions.flatten()  # [Bc]
    branch = torch.arange(batch * c, device=input_ids.device).repeat_interleave(n)  # [R], R = B c n
    state = output.trace.gather(row, start).select(branch)
    context = _tokens_of(hidden, positions - 1, 1)[:, :, 0].flatten(0, 1)[branch]  # [R, D]
    if rollouts is None:
        seed = rollout_seeds(seeds, c, n, k).view(-1, k)
        flat = sample_rollouts(model, state.detach(), context.detach(), seed, config.temperature)
    else:
        flat = rollouts.reshape(-1, k)

    predicted = model(flat, past_key_values=state, use_cache=False, head=HiddenOnly()).last_hidden_state
    predicting = torch.cat([context[:, None], predicted[:, :-1]], dim=1)  # [R, k, D]
    request = TokenLogprob(flat, config.temperature, config.rollout_stop_entropy is not None)
    scored = model(hidden_states=predicting, head=request)
    logprobs = scored.logprob.view(batch, c, n, k)
    return _Pass(
        ntp_loss=output.loss,
        entropy=output.entropy,
        positions=positions,
        rollouts=flat.view(batch, c, n, k),
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        predicted=predicted.detach().view(batch, c, n, k, -1),
        true=_tokens_of(hidden.detach(), positions, k),
        sureness=scored.entropy.view(batch, c, n, k) if request.entropy else None,
    )


def _by_segments(model, input_ids, lengths, config, seeds, positions, rollouts, relay) -> _Pass:
    """The shared prefix in constant memory: see :mod:`refine.method.segments`."""
    batch, c, n, k = len(input_ids), config.num_chunks, config.num_rollouts, config.rollout_length
    targets, weight = next_token_targets(input_ids, lengths)
    found = read_with_rollouts(
        model, input_ids, lengths, targets, weight, config, config.segment_length, seeds, positions, rollouts,
        relay,
    )  # fmt: skip
    logprobs = found.logprobs.view(batch, c, n, k)
    return _Pass(
        ntp_loss=found.ntp_loss,
        entropy=found.entropy,
        positions=found.positions,
        rollouts=found.tokens.view(batch, c, n, k),
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        predicted=found.predicted.view(batch, c, n, k, -1),
        true=found.true.view(batch, c, k, -1),
        sureness=None if found.sureness is None else found.sureness.view(batch, c, n, k),
    )


def _per_prefix(model, input_ids, lengths, config, seeds, positions, rollouts) -> _Pass:
    """The paper's own way: every position runs its whole prefix again, three times without a gradient and
    once with one. Slow, and obviously right.
    """
    batch, c, n, k = len(input_ids), config.num_chunks, config.num_rollouts, config.rollout_length
    head = NextTokenLoss(*next_token_targets(input_ids, lengths))
    with torch.no_grad():
        truth = model(input_ids, use_cache=False, head=head)
    if positions is None:
        positions = select_positions(truth.entropy, lengths, config, seeds)
    seed = rollout_seeds(seeds, c, n, k)

    tokens, logprobs, old_logprobs, predicted, sureness = [], [], [], [], []
    for b in range(batch):
        for j in range(c):
            p = int(positions[b, j])
            prefix = input_ids[b : b + 1, :p]
            if rollouts is None:
                with torch.no_grad():
                    read = model(prefix, use_cache=True, head=HiddenOnly())
                state = read.past_key_values.select(torch.zeros(n, dtype=torch.int64, device=prefix.device))
                context = read.last_hidden_state[:, -1].expand(n, -1)
                drawn = sample_rollouts(model, state, context, seed[b, j], config.temperature)
            else:
                drawn = rollouts[b, j]
            text = torch.cat([prefix.expand(n, -1), drawn], dim=1)  # [n, p + k]
            with torch.no_grad():
                old_logprobs.append(_branch(model, text, drawn, config)[0])
            logprob, hidden, entropy = _branch(model, text, drawn, config)
            sureness.append(entropy)
            tokens.append(drawn)
            logprobs.append(logprob)
            predicted.append(hidden.detach())

    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts).unflatten(0, (batch, c))

    return _Pass(
        ntp_loss=model(input_ids, use_cache=False, head=head).loss,
        entropy=truth.entropy,
        positions=positions,
        rollouts=stack(tokens),
        logprobs=stack(logprobs),
        old_logprobs=stack(old_logprobs),
        predicted=stack(predicted),
        true=_tokens_of(truth.last_hidden_state, positions, k),
        sureness=stack(sureness) if config.rollout_stop_entropy is not None else None,
    )


def _branch(model, text, drawn, config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs [n, k] of the last k tokens of ``text`` [n, p + k], their hidden states [n, k, D], and the
    entropies [n, k] of what predicted them where they are needed."""
    k = drawn.shape[1]
    hidden = model(text, use_cache=False, head=HiddenOnly()).last_hidden_state[:, -k - 1 :]
    request = TokenLogprob(drawn, config.temperature, config.rollout_stop_entropy is not None)
    scored = model(hidden_states=hidden[:, :-1], head=request)
    return scored.logprob, hidden[:, 1:], scored.entropy if request.entropy else None


def _tokens_of(x: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` entries from each position on: [B, T, ...], [B, c] -> [B, c, count, ...]."""
    index = positions[..., None] + torch.arange(count, device=x.device)
    row = torch.arange(len(x), device=x.device)[:, None, None]
    return x[row, index]


@torch.no_grad()
def _score(
    input_ids: torch.Tensor, done: _Pass, config: RefineConfig, ends: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Rewards [B, c, n] by the configured function, and the paper's two measures beside them; of the first
    ``ends`` [B, c, n] tokens of each rollout, where given."""
    batch, c, n, k = done.rollouts.shape
    dtype = torch.promote_types(done.predicted.dtype, torch.float32)
    true_ids = _tokens_of(input_ids, done.positions, k)[:, :, None].expand(-1, -1, n, -1)
    true_hidden = done.true.to(dtype)[:, :, None].expand(-1, -1, n, -1, -1)
    arguments = (
        done.rollouts.reshape(-1, k),
        true_ids.reshape(-1, k),
        done.predicted.to(dtype).flatten(0, 2),
        true_hidden.flatten(0, 2),
    )
    functions = {"rewards": find_reward(config.reward), "cosine": cosine, "exact_match": binary}
    if ends is None:
        found = {name: _reward(function, config, arguments) for name, function in functions.items()}
    else:  # a reward function sees rollouts of one length at a time
        found = {name: arguments[2].new_empty(batch * c * n) for name in functions}
        for count in ends.unique().tolist():
            rows = (ends.flatten() == count).nonzero()[:, 0]
            few = tuple(argument[rows, :count] for argument in arguments)
            for name, function in functions.items():
                found[name][rows] = _reward(function, config, few).to(found[name].dtype)
    return {name: value.detach().view(batch, c, n).to(torch.float32) for name, value in found.items()}


def _reward(function, config: RefineConfig, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """One number a rollout, or an error that says what a reward has to return."""
    rewards = function(*arguments)
    if rewards.shape != arguments[0].shape[:1]:
        raise ValueError(
            f"reward {config.reward!r} must return one number a rollout, shape ({len(arguments[0])},), "
            f"got {tuple(rewards.shape)}"
        )
    return rewards


def _check_batch(input_ids, attention_mask, config) -> torch.Tensor:
    """Valid tokens of each row, [B]; padding must be on the right and every row long enough."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
    batch, tokens = input_ids.shape
    if attention_mask is None:
        lengths = torch.full((batch,), tokens, device=input_ids.device)
    else:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        lengths = attention_mask.bool().sum(1)
        column = torch.arange(tokens, device=input_ids.device)
        if not torch.equal(attention_mask.bool(), column < lengths[:, None]):
            raise ValueError(
                "attention_mask: sequences must be padded on the right (the tokenizer's padding_side='right'); "
                "got padding on the left or inside"
            )
    shortest = int(lengths.min())
    if shortest < config.min_tokens:
        raise ValueError(
            f"a sequence has {shortest} tokens; num_chunks={config.num_chunks} with "
            f"rollout_length={config.rollout_length} needs at least {config.min_tokens}"
        )
    return lengths


def _check_draw(
    input_ids, lengths, config, positions, rollouts, old_logprobs, advantages, rollout_lengths
) -> None:
    """Given positions, rollouts and what was computed of them must fit the batch and each other."""
    groups = (len(input_ids), config.num_chunks)
    shapes = {
        "positions": (positions, groups),
        "rollouts": (rollouts, (*groups, config.num_rollouts, config.rollout_length)),
        "old_logprobs": (old_logprobs, (*groups, config.num_rollouts, config.rollout_length)),
        "advantages": (advantages, (*groups, config.num_rollouts)),
        "rollout_lengths": (rollout_lengths, (*groups, config.num_rollouts)),
    }
    for name, (value, shape) in shapes.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if rollouts is not None and positions is None:
        raise ValueError("rollouts were given without positions: give both")
    if rollouts is None and any(x is not None for x in (old_logprobs, advantages, rollout_lengths)):
        raise ValueError("old_logprobs, advantages and rollout_lengths belong to rollouts: give those too")
    if rollout_lengths is not None and not bool(
        ((rollout_lengths >= 1) & (rollout_lengths <= config.rollout_length)).all()
    ):
        raise ValueError(
            f"rollout_lengths must lie between 1 and rollout_length {config.rollout_length}, "
            f"got {rollout_lengths.tolist()}"
        )
    if positions is not None:
        last = (lengths - config.rollout_length)[:, None]
        if not bool(((positions >= 1) & (positions <= last)).all()):
            raise ValueError(
                f"positions must lie between 1 and length - rollout_length, got {positions.tolist()} "
                f"for lengths {lengths.tolist()}"
            )
