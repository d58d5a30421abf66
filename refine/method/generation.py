"""n samples of each prompt from one prefill, with log-probs under the weights that sampled them.

Draws go by counter (:mod:`refine.method.seeds`): a token depends on its prompt, the number of its completion and
its place, and not on the batch or on which other completions have ended. A completion that has ended leaves the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from refine.method.completions import read_prompts
from refine.method.reading import check_model
from refine.method.seeds import rollout_seeds, sequence_seeds, uniform
from refine.method.segmented_pass import over_processes
from refine.method.sequences import Sequences
from refine.models.head import SampleToken
from refine_kernels.linear_logprob import mix_seeds


class GeneratedGroup(NamedTuple):
    """n completions of each of B prompts, R the longest of them; 0 behind a completion's end in all three."""

    completion_ids: torch.Tensor  # [B, n, R] int64; a stop token is part of its completion
    completion_mask: torch.Tensor  # [B, n, R] int64
    logprobs: torch.Tensor  # [B, n, R] float32, under softmax(logits / temperature), whatever filters were on


@torch.no_grad()
def generate_group(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    n: int,
    *,
    prompt_mask: torch.Tensor | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_ids: int | Collection[int] = (),
    seeds: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    segment_length: int | None = None,
) -> GeneratedGroup:
    """Sample n completions of each prompt; every prompt is read once.

    Args:
        model: one of this package's models (bare, or wrapped by DDP, FSDP2 or PEFT).
        prompt_ids: [B, P] int64. Equal prompts get completions of their own.
        n: completions per prompt.
        prompt_mask: [B, P], 1 for tokens, 0 for padding on either side; None: no padding.
        max_new_tokens: a completion's longest length.
        temperature: of the policy; 0 takes the most likely token (and log-probs at temperature 1).
        top_k, top_p, min_p: filters of the distribution that is drawn from, as in ``transformers``; None: off.
        stop_ids: a token, or several, that end a completion.
        seeds: [B] int64, one per prompt, in place of ``generator``.
        generator: gives the base of the draws (default: torch's global one).
        segment_length: read the prompts by segments of so many tokens.

    Raises:
        TypeError: the model is of another kind.
        ValueError: an argument does not fit; the message names it.
    """
    check_model(model, "generate_group")
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")
    draw = sample_request(temperature, top_k, top_p, min_p)
    prompts = Sequences.of(prompt_ids, prompt_mask)
    if seeds is None:
        seeds = sequence_seeds(prompts.input_ids, prompts.lengths, generator)
    elif seeds.shape != (len(prompts),):
        raise ValueError(f"seeds must hold one per prompt, [{len(prompts)}], got shape {tuple(seeds.shape)}")
    read = read_prompts(model, prompts, segment_length)
    device = prompt_ids.device
    parent = torch.arange(len(prompts), device=device).repeat_interleave(n)
    seed = rollout_seeds(mix_seeds(seeds, _occurrence(seeds)), 1, n, max_new_tokens).view(len(parent), -1)
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else sorted(stop_ids)
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)

    rows = parent.numel()
    ids = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=device)
    logprobs, lengths = torch.zeros(ids.shape, device=device), torch.zeros_like(parent)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    going = torch.arange(rows, device=device)  # completions in the batch
    state = read.state.select(parent)
    output = model(hidden_states=read.context[parent, None], head=draw(seed[:, :1]))
    for step in range(max_new_tokens):
        token = output.token.clamp_min(0)  # [m, 1]; a policy that is not finite draws -1 and NaN log-probs
        ids[going, step] = token[:, 0]
        logprobs = logprobs.to(output.logprob.dtype)
        logprobs[going, step] = output.logprob[:, 0]
        lengths[going] += ~ended[going]
        ended[going] |= torch.isin(token[:, 0], stops)
        if step + 1 == max_new_tokens or not _anyone_goes_on(model, ended):
            break
        places = (~ended[going]).nonzero()[:, 0]
        if not len(places):  # another process goes on, and calls of the model are made together
            places = torch.zeros(1, dtype=torch.int64, device=device)
        if len(places) < len(going):
            going, token, state = going[places], token[places], state.select(places)
        request = draw(seed[going, step + 1 : step + 2])
        output = model(token, past_key_values=state, use_cache=True, head=request)
        state = output.past_key_values
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    found = (x[:, :longest].masked_fill(~mask, 0) for x in (ids, mask.long(), logprobs))
    return GeneratedGroup(*(x.view(len(prompts), n, longest) for x in found))


@dataclass(frozen=True)
class SampleFiltered:
    """A request of the head (see :mod:`refine.models.head`): ``token`` [B, T] drawn from what the filters leave,
    and its ``logprob`` [B, T] without them. Materialises the logits of the positions that it is given.
    """

    seeds: torch.Tensor  # [B, T] int64
    temperature: float
    filters: LogitsProcessorList

    needs_weight: ClassVar[bool] = True

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden, weight).flatten(0, 1)  # [B T, V]
        table = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).log_softmax(
            -1
        )
        kept = self.filters(None, table).double().softmax(-1).cumsum(-1)
        drawn = uniform(self.seeds).view(-1, 1) * kept[:, -1:]
        token = torch.searchsorted(kept, drawn, right=True).clamp_max(kept.shape[1] - 1)
        shape = self.seeds.shape
        return {"token": token.view(shape), "logprob": table.gather(1, token).view(shape)}


def sample_request(
    temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Callable[[torch.Tensor], SampleFiltered | SampleToken]:
    """What to ask the head for, as a function of the seeds."""
    kinds = (("top_k", TopKLogitsWarper, top_k), ("top_p", TopPLogitsWarper, top_p))
    filters = LogitsProcessorList()
    for name, kind, value in (*kinds, ("min_p", MinPLogitsWarper, min_p)):
        if value is None:
            continue
        try:
            filters.append(kind(value))
        except ValueError as error:
            raise ValueError(f"{name}={value!r}: {error}") from error
    if filters and temperature:  # the most likely token passes every filter
        return lambda seeds: SampleFiltered(seeds, temperature, filters)
    return lambda seeds: SampleToken(seeds, temperature)


def _occurrence(seeds: torch.Tensor) -> torch.Tensor:
    """How often each seed has come before: equal prompts draw differently. [B] -> [B] int64."""
    return (seeds[:, None] == seeds).tril(-1).sum(1)


def _anyone_goes_on(model: torch.nn.Module, ended: torch.Tensor) -> bool:
    """Whether a completion goes on, here or, where parameters are shared out (FSDP2), in any process."""
    going = (~ended).any().long()
    return bool(over_processes(going, "MAX") if isinstance(model, FSDPModule) else going)
