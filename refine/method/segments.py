"""A step over a document of any length in constant memory: the same gradient as in one pass.

A fast-weight model goes from one segment of a document to the next through a state of fixed size. So the
document is read segment by segment without a gradient and only the states at the borders are kept; the
backward takes the segments in reverse, runs each again with a gradient, and hands the gradient of the state at
its start to the segment before. Activations of one segment are alive at a time. Rollouts continue states inside
a segment and belong to it.

Cost, in forwards of the document (a backward counts 2): SFT 1 + 1 + 2 = 4 beside 3 in one pass. A REFINE step
reads those segments that hold a position once more, as positions are known only when all entropies are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from refine.method.relay import Relay
from refine.method.rollout import sample_rollouts
from refine.method.seeds import rollout_seeds
from refine.method.selection import select_positions
from refine.models.head import HiddenOnly, NextTokenLoss, TokenLogprob
from refine.models.state import FastWeightState, float_tensors, map_state


@dataclass
class Branches:
    """The rollouts of a step, by place: R = B c n branches, in the order of ``[B, c, n]``."""

    row: torch.Tensor  # [R] sequence
    start: torch.Tensor  # [R] position
    tokens: torch.Tensor  # [R, k]
    temperature: float
    entropy: bool  # whether the entropies of their predictions are needed


@dataclass
class SegmentedPass:
    """One reading of a batch, whose gradient is taken segment by segment.

    ``ntp_loss`` and ``logprobs`` can be part of any loss; their backward runs the document in reverse.
    """

    ntp_loss: torch.Tensor  # scalar
    entropy: torch.Tensor  # [B, T]
    positions: torch.Tensor | None = None  # [B, c]
    tokens: torch.Tensor | None = None  # [R, k]
    logprobs: torch.Tensor | None = None  # [R, k]
    predicted: torch.Tensor | None = None  # [R, k, D]
    true: torch.Tensor | None = None  # [B c, k, D]
    sureness: torch.Tensor | None = None  # [R, k], entropies of the rollouts' predictions, where asked for


@dataclass
class _Reading:
    """A batch cut into segments, and the states at their starts."""

    model: torch.nn.Module
    input_ids: torch.Tensor  # [B, T]
    targets: torch.Tensor  # [B, T]
    row_weight: torch.Tensor  # [B, T]
    borders: list[int]  # 0, S, 2 S, ..., T
    state_stride: int
    relay: Relay | None  # the processes that share the document, where there are several
    states: list[FastWeightState | None] = field(default_factory=list)  # at the starts of our segments
    branches: Branches | None = None

    @property
    def count(self) -> int:
        """How many segments."""
        return len(self.borders) - 1

    @property
    def ours(self) -> range:
        """The segments that this process reads."""
        return range(self.count) if self.relay is None else self.relay.share(self.count)

    def state_at(self, s: int) -> FastWeightState | None:
        """The state at the start of one of our segments."""
        return self.states[s - self.ours.start]

    def someone_has(self, count: int) -> bool:
        """Whether to make a call: where calls must agree among processes, all make it or none."""
        if self.relay is not None:
            return count > 0
        return int(_over_processes(torch.tensor(count, device=self.input_ids.device), "MAX")) > 0

    def inside(self, s: int) -> slice:
        """The tokens of segment s."""
        return slice(self.borders[s], self.borders[s + 1])

    def branches_of(self, s: int) -> torch.Tensor:
        """Indices of the branches that start in segment s: ``start < p <= end``."""
        start = self.branches.start
        return ((start > self.borders[s]) & (start <= self.borders[s + 1])).nonzero()[:, 0]


def segment_borders(tokens: int, segment_length: int) -> list[int]:
    """0, S, 2 S, ..., T; a rest that is shorter than 64 tokens goes to the segment before it."""
    borders = list(range(0, tokens, segment_length))
    if len(borders) > 1 and tokens - borders[-1] < min(64, segment_length):
        borders.pop()
    return [*borders, tokens]


def read_next_tokens(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    targets: torch.Tensor,  # [B, T]
    row_weight: torch.Tensor,  # [B, T]
    segment_length: int,
    relay: Relay | None = None,
) -> SegmentedPass:
    """The next-token loss alone: an SFT step in constant memory."""
    reading = _start(model, input_ids, targets, row_weight, segment_length, 64, relay)
    ntp_loss, entropy = _sweep(reading, entropy=False)
    return SegmentedPass(_attach(reading, ntp_loss), entropy)


def read_with_rollouts(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, T]
    lengths: torch.Tensor,  # [B]
    targets: torch.Tensor,  # [B, T]
    row_weight: torch.Tensor,  # [B, T]
    config,  # RefineConfig
    segment_length: int,
    seeds: torch.Tensor,  # [B]
    positions: torch.Tensor | None,  # [B, c]
    rollouts: torch.Tensor | None,  # [B, c, n, k]
    relay: Relay | None = None,
) -> SegmentedPass:
    """Everything of a REFINE step that needs the model."""
    batch, c, n, k = len(input_ids), config.num_chunks, config.num_rollouts, config.rollout_length
    reading = _start(model, input_ids, targets, row_weight, segment_length, config.state_stride, relay)
    ntp_loss, entropy = _sweep(reading, entropy=True)
    entropy = entropy[:, : input_ids.shape[1]]
    if positions is None:
        positions = select_positions(entropy, lengths, config, seeds)
    row = torch.arange(batch, device=input_ids.device).repeat_interleave(c * n)
    start = positions.flatten().repeat_interleave(n)
    given = None if rollouts is None else rollouts.reshape(-1, k)
    seed = rollout_seeds(seeds, c, n, k).view(-1, k)
    empty = torch.zeros(len(row), k, dtype=torch.int64, device=input_ids.device)
    reading.branches = Branches(
        row, start, empty if given is None else given, config.temperature,
        config.rollout_stop_entropy is not None,
    )  # fmt: skip
    logprobs, predicted, true, sureness = _roll_out(reading, seed, given is None)
    ntp_loss, logprobs = _attach(reading, ntp_loss, logprobs)
    first_of_each = torch.arange(batch * c, device=row.device) * n
    return SegmentedPass(
        ntp_loss, entropy, positions, reading.branches.tokens, logprobs, predicted, true[first_of_each],
        sureness if reading.branches.entropy else None,
    )  # fmt: skip


def _start(model, input_ids, targets, row_weight, segment_length, state_stride, relay) -> _Reading:
    """Cut the batch. All processes of a group get equally many segments, so that their module calls agree."""
    if segment_length < 64:
        raise ValueError(f"segment_length must be at least 64, got {segment_length}")
    tokens = input_ids.shape[1]
    longest = _over_processes(torch.tensor(tokens, device=input_ids.device), "MAX")
    if missing := int(longest) - tokens:
        pad = torch.nn.functional.pad
        input_ids, row_weight = pad(input_ids, (0, missing)), pad(row_weight, (0, missing))
        targets = pad(targets, (0, missing), value=-100)
    borders = segment_borders(int(longest), segment_length)
    if relay is not None and len(borders) - 1 < relay.size:
        raise ValueError(
            f"segment_length {segment_length} cuts {int(longest)} tokens into {len(borders) - 1} segments, "
            f"fewer than the {relay.size} processes that share the document"
        )
    return _Reading(model, input_ids, targets, row_weight, borders, state_stride, relay)


@torch.no_grad()
def _sweep(reading: _Reading, entropy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read from front to back; keep the states at the borders, the loss and the entropies [B, T]."""
    relay, ours = reading.relay, reading.ours
    state, loss = None, torch.zeros((), device=reading.input_ids.device)
    entropies = torch.zeros(reading.input_ids.shape if entropy else 0, device=loss.device)
    if ours.start > 0:
        state = relay.receive_state(loss.device)
    for s in ours:
        reading.states.append(state)
        at = reading.inside(s)
        output = reading.model(
            reading.input_ids[:, at],
            past_key_values=state,
            use_cache=s + 1 < reading.count,
            head=NextTokenLoss(reading.targets[:, at], reading.row_weight[:, at], entropy),
        )
        state = output.past_key_values
        loss = loss + output.loss
        if entropy:
            entropies = entropies.to(output.entropy.dtype)
            entropies[:, at] = output.entropy
    if ours.stop < reading.count:
        relay.send_state(state)
    if relay is not None:
        relay.sum(loss), relay.sum(entropies)
    return loss, entropies


@torch.no_grad()
def _roll_out(reading: _Reading, seed: torch.Tensor, sample: bool) -> tuple[torch.Tensor, ...]:
    """Sample where asked, and the log-probs [R, k], hidden states [R, k, D], true hidden states [R, k, D] and
    entropies [R, k] (zero unless asked for) of all branches. Only segments that hold a position are read; where
    any process has one, all read.
    """
    branches, model = reading.branches, reading.model
    k = branches.tokens.shape[1]
    found: tuple[torch.Tensor, ...] | None = None
    for s in reading.ours:
        mine = reading.branches_of(s)
        if not reading.someone_has(len(mine)):
            continue
        start, end = reading.borders[s], reading.borders[s + 1]
        output = model(
            reading.input_ids[:, start : end + k],  # the true continuation may reach over the border
            past_key_values=reading.state_at(s),
            use_cache=False,
            head=HiddenOnly(),
            state_stride=reading.state_stride,
        )
        hidden = output.last_hidden_state
        if found is None:
            shape = (len(branches.row), k, hidden.shape[-1])
            found = (
                hidden.new_zeros(shape[:2], dtype=torch.float32),
                hidden.new_zeros(shape),
                hidden.new_zeros(shape),
                hidden.new_zeros(shape[:2], dtype=torch.float32),
            )
        row, inside = _places(branches, mine, start)
        state = output.trace.gather(row, inside)
        context = hidden[row, inside - 1]
        tokens = branches.tokens[mine] if len(mine) else branches.tokens[:1]
        if sample:
            seeds = seed[mine] if len(mine) else seed[:1]
            tokens = sample_rollouts(model, state, context, seeds, branches.temperature)
        predicted, logprob, entropy = _branch_pass(
            model, state, context, tokens, branches.temperature, branches.entropy
        )
        if len(mine):
            branches.tokens[mine] = tokens
            logprobs, predictions, true, sureness = found
            logprobs, sureness = logprobs.to(logprob.dtype), sureness.to(logprob.dtype)
            logprobs[mine], predictions[mine] = logprob, predicted
            if entropy is not None:
                sureness[mine] = entropy
            true[mine] = hidden[row[:, None], inside[:, None] + torch.arange(k, device=row.device)]
            found = logprobs, predictions, true, sureness
    return found if reading.relay is None else _gather(reading, found, sample)


def _gather(reading: _Reading, found: tuple | None, sample: bool) -> tuple[torch.Tensor, ...]:
    """What each process has found of its own branches, put together."""
    relay, branches = reading.relay, reading.branches
    width = relay.largest(0 if found is None else found[1].shape[-1], branches.row.device)
    if found is None:
        shape = branches.tokens.shape
        logprobs = torch.zeros(shape, device=branches.row.device)
        hidden = torch.zeros(*shape, width, device=branches.row.device, dtype=_dtype_of(reading.model))
        found = logprobs, hidden, hidden.clone(), logprobs.clone()
    if sample:
        relay.sum(branches.tokens)
    return tuple(relay.sum(x) for x in found)


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    """What its hidden states are in."""
    parameter = next(model.parameters())
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


def _places(branches: Branches, mine: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and position inside the segment of each branch; one that nobody reads where there is none."""
    if not len(mine):
        zero = torch.zeros(1, dtype=torch.int64, device=mine.device)
        return zero, zero + 1
    return branches.row[mine], branches.start[mine] - start


def _branch_pass(
    model, state, context, tokens, temperature, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden states [M, k, D] after each token of the branches, the tokens' log-probs [M, k], and the entropies
    [M, k] of what predicted them, if asked for."""
    predicted = model(tokens, past_key_values=state, use_cache=False, head=HiddenOnly()).last_hidden_state
    predicting = torch.cat([context[:, None], predicted[:, :-1]], dim=1)
    scored = model(hidden_states=predicting, head=TokenLogprob(tokens, temperature, entropy))
    return predicted, scored.logprob, scored.entropy if entropy else None


# ---- the gradient ------------------------------------------------------------------------------------------


def _attach(reading: _Reading, *values: torch.Tensor):
    """The values with a gradient: a backward into any of them runs the segments in reverse."""
    if not torch.is_grad_enabled():
        return values if len(values) > 1 else values[0]
    anchor = torch.zeros((), device=values[0].device, requires_grad=True)
    out = _InReverse.apply(reading, _autocast_of(values[0].device), anchor, *values)
    return out if len(values) > 1 else out[0]


class _InReverse(torch.autograd.Function):
    """Passes values on; its backward accumulates into the parameters' ``grad`` itself, like a checkpoint."""

    @staticmethod
    def forward(ctx, reading, autocast, anchor, *values):
        ctx.reading, ctx.autocast = reading, autocast
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx, d_ntp, d_logprobs=None):
        if ctx.reading is None:
            raise RuntimeError("a segmented step has no second backward: its states have been given up")
        reading, ctx.reading = ctx.reading, None
        carry: list[torch.Tensor | None] | None = None
        with torch.enable_grad(), ctx.autocast():
            for s in reversed(reading.ours):
                with _gradients_stay_here(reading.model, last=s == 0):
                    carry = _segment_backward(reading, s, d_ntp, d_logprobs, carry)
                reading.states.pop()
            if reading.ours.start > 0:
                reading.relay.send_gradients(carry)
        return (None,) * (3 + 1 + (d_logprobs is not None))


def _segment_backward(reading: _Reading, s: int, d_ntp, d_logprobs, carry) -> list[torch.Tensor | None]:
    """Run segment s with a gradient, send back what came from its loss, its branches and the segments behind
    it; the gradient of the state at its start.
    """
    model, at, last = reading.model, reading.inside(s), s + 1 == reading.count
    start, leaves = reading.state_at(s), []
    if start is not None:
        start = map_state(start, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
        leaves = float_tensors(start)
    branches = reading.branches
    output = model(
        reading.input_ids[:, at],
        past_key_values=start,
        use_cache=not last,
        head=NextTokenLoss(reading.targets[:, at], reading.row_weight[:, at], entropy=False),
        state_stride=reading.state_stride if branches is not None else None,
    )
    ends, gradients = [output.loss], [d_ntp.to(output.loss.dtype)]
    if branches is not None:
        mine = reading.branches_of(s)
        if reading.someone_has(len(mine)):
            row, inside = _places(branches, mine, reading.borders[s])
            tokens = branches.tokens[mine] if len(mine) else branches.tokens[:1]
            state = output.trace.gather(row, inside)
            context = output.last_hidden_state[row, inside - 1]
            _, logprob, _ = _branch_pass(model, state, context, tokens, branches.temperature)
            ends.append(logprob)
            known = d_logprobs is not None and len(mine)
            gradients.append(d_logprobs[mine].to(logprob.dtype) if known else torch.zeros_like(logprob))
    if not last:
        if s + 1 == reading.ours.stop:
            carry = reading.relay.receive_gradients(output.past_key_values)
        for tensor, gradient in zip(float_tensors(output.past_key_values), carry):
            if gradient is not None and tensor.requires_grad:
                ends.append(tensor)
                gradients.append(gradient)
    torch.autograd.backward(ends, gradients)
    return [leaf.grad for leaf in leaves]


def _autocast_of(device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """A context that brings back the autocast of now, for the backward."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled=enabled)


def _gradients_stay_here(model: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Under DDP gradients are reduced once, with the last segment that is run."""
    if last or not hasattr(model, "no_sync"):
        return contextlib.nullcontext()
    return model.no_sync()


def _over_processes(value: torch.Tensor, operation: str) -> torch.Tensor:
    """The value over all processes, where there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
    return value
