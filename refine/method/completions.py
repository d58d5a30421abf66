"""n completions of one prompt at the cost of P + n R tokens: the prompt is read once, its state branches.

In reinforcement learning n completions of R tokens share a prompt of P tokens. A fast-weight model's state after
the prompt has a fixed size and can be branched inside the autograd graph. So the update reads P + n R tokens in
place of n (P + R), and one backward carries the gradient of all completions through the prompt: a prefix that is
read once and continued n times has the sum of the n gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from refine.method.reading import check_model
from refine.method.segmented_pass import MIN_SEGMENT, over_processes, segment_borders
from refine.method.sequences import Sequences
from refine.models.head import HiddenOnly, TokenLogprob
from refine.models.state import FastWeightState


class CompletionLogprobs(NamedTuple):
    """Of B prompts with n completions of up to R tokens; 0 where ``completion_mask`` is 0."""

    logprobs: torch.Tensor  # [B, n, R] float32 (float64 for a float64 model), with a gradient
    entropy: torch.Tensor | None  # likewise, of the distributions that predict the tokens, where asked for


class ReadPrompts(NamedTuple):
    """B prompts that have been read, inside the autograd graph."""

    state: FastWeightState  # of B rows, after each prompt's last token
    context: torch.Tensor  # [B, D], the hidden state that predicts the first token of a completion


def branch_logprobs(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor | None,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    *,
    max_branches: int | None = None,
    segment_length: int | None = None,
) -> CompletionLogprobs:
    """Log-probs of n completions of each prompt, with the exact gradient through the completions and the prompt.

    The numbers are those of n separate forwards over prompt + completion; every prompt is read once. Where several
    processes share the model's parameters (FSDP2), all must give equally many completions.

    Args:
        model: one of this package's models (bare, or wrapped by DDP, FSDP2 or PEFT).
        prompt_ids: [B, P] int64.
        prompt_mask: [B, P], 1 for tokens, 0 for padding on either side; None: no padding.
        completion_ids: [B, n, R] int64.
        completion_mask: [B, n, R], 1 for tokens, 0 for padding on the right; None: no padding.
        temperature: of the policy: log-probs and entropies are of ``softmax(logits / temperature)``.
        entropy: also return the entropies, in nats.
        max_branches: go through at most so many completions at a time, each such batch run again in the backward
            (one more forward over the completions): memory of so many completions. None: all at once.
        segment_length: read the prompts by segments of so many tokens (at least 64), likewise run again: memory of
            one segment. None: in one pass.

    Raises:
        TypeError: the model is of another kind.
        ValueError: a shape that does not fit, a mask with a hole, a completion without tokens, a limit under 1.
    """
    check_model(model, "branch_logprobs")
    lengths = completion_lengths(prompt_ids, completion_ids, completion_mask)
    if not bool((lengths > 0).all()):
        b, j = (lengths == 0).nonzero()[0].tolist()
        raise ValueError(f"completion_mask: completion {j} of prompt {b} has no token")
    batch, n, tokens = completion_ids.shape
    parent = torch.arange(batch, device=prompt_ids.device).repeat_interleave(n)
    prompts = read_prompts(model, Sequences.of(prompt_ids, prompt_mask), segment_length)
    found = score_branches(
        model, prompts, parent, completion_ids.reshape(-1, tokens), lengths.reshape(-1), temperature,
        entropy=entropy, max_branches=max_branches,
    )  # fmt: skip
    return CompletionLogprobs(*(None if x is None else x.view(batch, n, tokens) for x in found))


def read_prompts(
    model: torch.nn.Module, prompts: Sequences, segment_length: int | None = None
) -> ReadPrompts:
    """Read B prompts, one a row, in one pass or by segments that are run again in the backward.

    Raises:
        ValueError: ``segment_length`` is under 64.
    """
    ids, lengths = prompts.input_ids, prompts.lengths
    column = torch.arange(ids.shape[1], device=ids.device)
    mask = column < lengths[:, None]  # the rows begin with their first token
    rows = torch.arange(len(ids), device=ids.device)
    if segment_length is None:
        output = model(ids, attention_mask=mask.long(), use_cache=True, head=HiddenOnly())
        return ReadPrompts(output.past_key_values, output.last_hidden_state[rows, lengths - 1])
    if segment_length < MIN_SEGMENT:
        raise ValueError(f"segment_length must be at least {MIN_SEGMENT} or None, got {segment_length}")
    longest = int(over_processes(torch.tensor(ids.shape[1], device=ids.device), "MAX"))
    ids, mask = (torch.nn.functional.pad(x, (0, longest - ids.shape[1])) for x in (ids, mask.long()))
    borders = segment_borders(longest, segment_length)

    def read(model, state: FastWeightState | None, start: int, end: int):
        output = model(
            ids[:, start:end],
            attention_mask=mask[:, start:end],
            past_key_values=state,
            use_cache=True,
            head=HiddenOnly(),
        )
        last = (lengths - 1 - start).clamp(0, end - start - 1)
        return output.past_key_values, output.last_hidden_state[rows, last]

    state, context = None, None
    for start, end in itertools.pairwise(borders):
        state, at_end = run_again_in_backward(model, read, state, start, end)
        context = at_end if context is None else torch.where((lengths > start)[:, None], at_end, context)
    return ReadPrompts(state, context)


def score_branches(
    model: torch.nn.Module,
    prompts: ReadPrompts,
    parent: torch.Tensor,  # [M], which prompt each completion continues
    tokens: torch.Tensor,  # [M, R]
    lengths: torch.Tensor,  # [M], tokens of each completion, at least 1
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    max_branches: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [M, R] and, where asked for, entropies [M, R] of completions; 0 behind their ends.

    Completions of about equal length go together, so that short ones are not padded to the longest.
    """
    if max_branches is not None and not (isinstance(max_branches, int) and max_branches >= 1):
        raise ValueError(f"max_branches must be a whole number of at least 1 or None, got {max_branches!r}")
    branches, width = tokens.shape

    def score(model, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = lengths[rows]
        longest = int(length.max())
        counted = torch.arange(longest, device=tokens.device) < length[:, None]  # [m, longest]
        targets = tokens[rows, :longest].masked_fill(~counted, -100)
        fed = targets[:, : max(longest - 1, 1)].clamp_min(
            0
        )  # at least one: all processes make the same calls
        hidden = model(
            fed, past_key_values=prompts.state.select(parent[rows]), use_cache=False, head=HiddenOnly()
        ).last_hidden_state
        predicting = torch.cat([prompts.context[parent[rows], None], hidden], dim=1)[:, :longest]
        scored = model(hidden_states=predicting, head=TokenLogprob(targets, temperature, entropy))
        found = (scored.logprob, torch.where(counted, scored.entropy, 0)) if entropy else (scored.logprob,)
        return tuple(torch.nn.functional.pad(x, (0, width - longest)) for x in found)

    if max_branches is None or branches <= max_branches:
        found = score(model, torch.arange(branches, device=tokens.device))
    else:
        order = lengths.argsort(stable=True)
        parts = [run_again_in_backward(model, score, rows) for rows in order.split(max_branches)]
        back = order.argsort()
        found = tuple(torch.cat(columns)[back] for columns in zip(*parts))
    return found[0], found[1] if entropy else None


def run_again_in_backward(model: torch.nn.Module, function: Callable, *arguments):
    """``function(model, *arguments)``, whose activations are not kept but computed again in the backward.

    DDP takes each of its forward calls for a new step, which must not begin inside a backward: the second run calls
    the module in it.
    """
    first = iter([model])
    bare = model.module if isinstance(model, DistributedDataParallel) else model

    def run(*arguments):
        return function(next(first, bare), *arguments)

    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


def completion_lengths(
    prompt_ids: torch.Tensor,  # [B, P]
    completion_ids: torch.Tensor,  # [B, n, R]
    completion_mask: torch.Tensor | None,  # [B, n, R]
) -> torch.Tensor:  # [B, n] int64
    """Tokens of each completion.

    Raises:
        ValueError: a shape that does not fit, or a mask with a hole.
    """
    shape = tuple(completion_ids.shape)
    if completion_ids.ndim != 3 or not completion_ids.numel() or shape[0] != len(prompt_ids):
        raise ValueError(
            "completion_ids must be [prompts, completions per prompt, tokens], at least one of each, for "
            f"{len(prompt_ids)} prompts, got shape {shape}"
        )
    if completion_mask is None:
        return torch.full(shape[:2], shape[2], device=completion_ids.device)
    if tuple(completion_mask.shape) != shape:
        raise ValueError(
            f"completion_mask must have completion_ids' shape {shape}, got {tuple(completion_mask.shape)}"
        )
    mask = completion_mask.bool()
    lengths = mask.sum(-1)
    wrong = (mask != (torch.arange(shape[2], device=mask.device) < lengths[..., None])).any(-1)
    if bool(wrong.any()):
        b, j = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"completion_mask has a hole in completion {j} of prompt {b}: padding (0) comes behind the tokens (1)"
        )
    return lengths
