"""A reading of a document of any length in the memory of one segment: the same gradient as in one pass.

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
from dataclasses import dataclass

import torch
import torch.distributed as dist

from refine.method.config import RefineConfig
from refine.method.context_parallel import ContextParallel
from refine.method.reading import Branches, read_branches
from refine.method.sampling import sample_rollouts
from refine.method.seeds import rollout_seeds
from refine.method.sequences import LabelledTokens
from refine.models.head import HiddenOnly, NextTokenLoss, TokenLogprob
from refine.models.state import FastWeightState, float_tensors, map_state

MIN_SEGMENT = 64


class SegmentedPass:
    """See :class:`~refine.method.reading.Reading`.

    Args:
        labelled: rows padded on the right. All processes of a group must get rows of about equal length: they read
            as many segments as the longest needs, so that their module calls agree.
        segment_length: tokens per segment, at least 64.
        config: of the rollouts; None: next-token loss alone, without entropies.
        context: the processes that share each row, every one with a run of its segments; None: this one has all.

    Raises:
        ValueError: segments that are too short, or fewer than the processes that share a row.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        labelled: LabelledTokens,
        segment_length: int,
        config: RefineConfig | None = None,
        context: ContextParallel | None = None,
    ):
        if segment_length < MIN_SEGMENT:
            raise ValueError(f"segment_length must be at least {MIN_SEGMENT}, got {segment_length}")
        tokens, device = labelled.input_ids.shape[1], labelled.input_ids.device
        longest = int(over_processes(torch.tensor(tokens, device=device), "MAX"))
        if longest > tokens:
            fill = zip(labelled, (0, -100, 0))
            labelled = LabelledTokens(
                *(torch.nn.functional.pad(x, (0, longest - tokens), value=value) for x, value in fill)
            )
        borders = segment_borders(longest, segment_length)
        if context is not None and len(borders) - 1 < context.size:
            raise ValueError(
                f"segment_length {segment_length} cuts {longest} tokens into {len(borders) - 1} segments, "
                f"fewer than the {context.size} processes that share the document"
            )
        self._model, self._labelled, self._config, self._context = model, labelled, config, context
        self._borders = borders  # 0, S, 2 S, ..., T
        self._count = len(borders) - 1
        self._ours = range(self._count) if context is None else context.share(self._count)
        self._states: list[FastWeightState | None] = []  # at the starts of our segments
        self._branched: _Branched | None = None
        ntp_loss, entropy = self._sweep()
        self.entropy = entropy[:, :tokens]
        self.ntp_loss, self._thread = ntp_loss, None
        if torch.is_grad_enabled():
            anchor = torch.zeros((), device=device, requires_grad=True)
            self.ntp_loss, self._thread = _InReverse.apply(self, _autocast_of(device), anchor, ntp_loss)

    def branch(self, positions: torch.Tensor, tokens: torch.Tensor | None, seeds: torch.Tensor) -> Branches:
        """Read those segments again that hold a position, and roll out from there."""
        config = self._config
        shape = (*positions.shape, config.num_rollouts, config.rollout_length)
        sequences, c, n, k = shape
        row = torch.arange(sequences, device=positions.device).repeat_interleave(c * n)
        start = positions.flatten().repeat_interleave(n)
        given = torch.zeros(len(row), k, dtype=torch.int64, device=row.device)
        if tokens is not None:
            given = tokens.reshape(-1, k).clone()
        self._branched = branched = _Branched(row, start, given)
        seed = rollout_seeds(seeds, c, n, k).view(-1, k)
        logprobs, predicted, true, entropy = self._roll_out(seed, sample=tokens is None)
        old_logprobs = logprobs
        if self._thread is not None and torch.is_grad_enabled():
            logprobs = _OfBranches.apply(branched, self._thread, logprobs)
        return Branches(
            tokens=branched.tokens.view(shape),
            logprobs=logprobs.view(shape),
            old_logprobs=old_logprobs.view(shape),
            predicted=predicted.view(*shape, -1),
            true=true.view(*shape, -1)[:, :, 0],
            entropy=entropy.view(shape) if config.needs_entropy else None,
        )

    # ---- reading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sweep(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read from front to back; keep the states at the borders; the loss and the entropies [B, T]."""
        context, (input_ids, targets, row_weight) = self._context, self._labelled
        state, loss = None, torch.zeros((), device=input_ids.device)
        want_entropy = self._config is not None
        entropies = torch.zeros(input_ids.shape if want_entropy else (0, 0), device=loss.device)
        if self._ours.start > 0:
            state = context.receive_state(loss.device)
        for s in self._ours:
            self._states.append(state)
            at = self._inside(s)
            output = self._model(
                input_ids[:, at],
                past_key_values=state,
                use_cache=s + 1 < self._count,
                head=NextTokenLoss(targets[:, at], row_weight[:, at], want_entropy),
            )
            state = output.past_key_values
            loss = loss + output.loss
            if want_entropy:
                entropies = entropies.to(output.entropy.dtype)
                entropies[:, at] = output.entropy
        if self._ours.stop < self._count:
            context.send_state(state)
        if context is not None:
            context.sum(loss), context.sum(entropies)
        return loss, entropies

    @torch.no_grad()
    def _roll_out(self, seed: torch.Tensor, sample: bool) -> tuple[torch.Tensor, ...]:
        """Sample where asked, and the log-probs [M, k], hidden states [M, k, D], true hidden states [M, k, D] and
        entropies [M, k] (zero unless needed) of all branches. Only segments that hold a position are read; where
        any process has one, all read.
        """
        branched, config, model = self._branched, self._config, self._model
        k = config.rollout_length
        found: tuple[torch.Tensor, ...] | None = None
        for s in self._ours:
            mine = self._branches_of(s)
            if not self._anyone_has(len(mine)):
                continue
            start, end = self._borders[s], self._borders[s + 1]
            output = model(
                self._labelled.input_ids[:, start : end + k],  # the true continuation may cross the border
                past_key_values=self._state_at(s),
                use_cache=False,
                head=HiddenOnly(),
                state_stride=config.state_stride,
            )
            hidden = output.last_hidden_state
            if found is None:
                found = _room(branched, hidden)
            row, inside = branched.places(mine, start)
            state, context = output.trace.gather(row, inside), hidden[row, inside - 1]
            tokens = branched.tokens[mine] if len(mine) else branched.tokens[:1]
            if sample:
                seeds = seed[mine] if len(mine) else seed[:1]
                tokens = sample_rollouts(model, state, context, seeds, config.temperature)
            head = TokenLogprob(tokens, config.temperature, config.needs_entropy)
            predicted, logprob, entropy = read_branches(model, state, context, tokens, head)
            if len(mine):
                branched.tokens[mine] = tokens
                logprobs, predictions, true, entropies = found
                logprobs, entropies = logprobs.to(logprob.dtype), entropies.to(logprob.dtype)
                logprobs[mine], predictions[mine] = logprob, predicted
                if entropy is not None:
                    entropies[mine] = entropy
                true[mine] = hidden[row[:, None], inside[:, None] + torch.arange(k, device=row.device)]
                found = logprobs, predictions, true, entropies
        if self._context is None:
            return found
        width = self._context.largest(0 if found is None else found[1].shape[-1], seed.device)
        if found is None:
            found = _room(branched, torch.zeros(0, width, dtype=_dtype_of(model), device=seed.device))
        if sample:
            self._context.sum(branched.tokens)
        return tuple(self._context.sum(x) for x in found)

    def _state_at(self, s: int) -> FastWeightState | None:
        """The state at the start of one of our segments."""
        return self._states[s - self._ours.start]

    def _inside(self, s: int) -> slice:
        """The tokens of segment s."""
        return slice(self._borders[s], self._borders[s + 1])

    def _branches_of(self, s: int) -> torch.Tensor:
        """Indices of the branches that start in segment s: ``start < p <= end``."""
        start = self._branched.start
        return ((start > self._borders[s]) & (start <= self._borders[s + 1])).nonzero()[:, 0]

    def _anyone_has(self, count: int) -> bool:
        """Whether to make a call: where calls must agree among processes, all make it or none."""
        if self._context is not None:
            return count > 0
        return int(over_processes(torch.tensor(count, device=self._labelled.input_ids.device), "MAX")) > 0

    # ---- the gradient ---------------------------------------------------------------------------------------

    def backward(self, d_ntp: torch.Tensor, autocast: Callable) -> None:
        """Accumulate into the parameters' ``grad``: the segments in reverse."""
        d_logprobs = None if self._branched is None else self._branched.gradient
        carry: list[torch.Tensor | None] | None = None
        with torch.enable_grad(), autocast():
            for s in reversed(self._ours):
                with _reduced_once(self._model, last=s == 0):
                    carry = self._segment_backward(s, d_ntp, d_logprobs, carry)
                self._states.pop()
            if self._ours.start > 0:
                self._context.send_gradients(carry)

    def _segment_backward(self, s: int, d_ntp, d_logprobs, carry) -> list[torch.Tensor | None]:
        """Run segment s with a gradient, send back what came from its loss, its branches and the segments behind
        it; the gradient of the state at its start.
        """
        model, config, branched = self._model, self._config, self._branched
        at, last = self._inside(s), s + 1 == self._count
        input_ids, targets, row_weight = self._labelled
        start, leaves = self._state_at(s), []
        if start is not None:
            start = map_state(start, lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
            leaves = float_tensors(start)
        output = model(
            input_ids[:, at],
            past_key_values=start,
            use_cache=not last,
            head=NextTokenLoss(targets[:, at], row_weight[:, at], entropy=False),
            state_stride=config.state_stride if branched is not None else None,
        )
        roots, gradients = [output.loss], [d_ntp.to(output.loss.dtype)]
        if branched is not None:
            mine = self._branches_of(s)
            if self._anyone_has(len(mine)):
                row, inside = branched.places(mine, self._borders[s])
                tokens = branched.tokens[mine] if len(mine) else branched.tokens[:1]
                state = output.trace.gather(row, inside)
                context = output.last_hidden_state[row, inside - 1]
                head = TokenLogprob(tokens, config.temperature)
                _, logprob, _ = read_branches(model, state, context, tokens, head)
                roots.append(logprob)
                known = d_logprobs is not None and len(mine)
                gradients.append(d_logprobs[mine].to(logprob.dtype) if known else torch.zeros_like(logprob))
        if not last:
            if s + 1 == self._ours.stop:
                carry = self._context.receive_gradients(output.past_key_values)
            for tensor, gradient in zip(float_tensors(output.past_key_values), carry):
                if gradient is not None and tensor.requires_grad:
                    roots.append(tensor)
                    gradients.append(gradient)
        torch.autograd.backward(roots, gradients)
        return [leaf.grad for leaf in leaves]


def segment_borders(tokens: int, segment_length: int) -> list[int]:
    """0, S, 2 S, ..., T; a rest that is shorter than 64 tokens goes to the segment before it."""
    borders = list(range(0, tokens, segment_length))
    if len(borders) > 1 and tokens - borders[-1] < min(MIN_SEGMENT, segment_length):
        borders.pop()
    return [*borders, tokens]


@dataclass
class _Branched:
    """The rollouts of a step, by place: M = S c n branches, in the order of ``[S, c, n]``."""

    row: torch.Tensor  # [M] sequence
    start: torch.Tensor  # [M] position
    tokens: torch.Tensor  # [M, k]
    gradient: torch.Tensor | None = None  # [M, k], of the log-probs, once it is known

    def places(self, mine: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence and position inside a segment of each branch; a first place that goes unused where there is
        none."""
        if not len(mine):
            zero = torch.zeros(1, dtype=torch.int64, device=mine.device)
            return zero, zero + 1
        return self.row[mine], self.start[mine] - start


def _room(branched: _Branched, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros for the log-probs, hidden states, true hidden states and entropies of all branches."""
    shape = branched.tokens.shape
    numbers, vectors = (
        hidden.new_zeros(shape, dtype=torch.float32),
        hidden.new_zeros(*shape, hidden.shape[-1]),
    )
    return numbers, vectors, vectors.clone(), numbers.clone()


class _InReverse(torch.autograd.Function):
    """The next-token loss, and a thread that :class:`_OfBranches` hangs on, so that its backward comes first. The
    backward accumulates into the parameters' ``grad`` itself, like a checkpoint."""

    @staticmethod
    def forward(ctx, reading, autocast, anchor, ntp_loss):
        ctx.reading, ctx.autocast = reading, autocast
        return ntp_loss.clone(), ntp_loss.new_zeros(())

    @staticmethod
    def backward(ctx, d_ntp, _):
        if ctx.reading is None:
            raise RuntimeError("a segmented step has no second backward: its states have been given up")
        reading, ctx.reading = ctx.reading, None
        reading.backward(d_ntp, ctx.autocast)
        return None, None, None, None


class _OfBranches(torch.autograd.Function):
    """Log-probs of the branches; their gradient is kept for the segments' own backward."""

    @staticmethod
    def forward(ctx, branched, thread, logprobs):
        ctx.branched = branched
        return logprobs.clone()

    @staticmethod
    def backward(ctx, d_logprobs):
        ctx.branched.gradient = d_logprobs
        return None, d_logprobs.new_zeros(()), None


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    """The dtype of its hidden states."""
    parameter = next(model.parameters())
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


def _autocast_of(device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """A context that brings back the autocast of now, for the backward."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled=enabled)


def _reduced_once(model: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Under DDP gradients are reduced once, with the last segment that is run."""
    if last or not hasattr(model, "no_sync"):
        return contextlib.nullcontext()
    return model.no_sync()


def over_processes(value: torch.Tensor, operation: str) -> torch.Tensor:
    """The value over all processes, where there are several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, getattr(dist.ReduceOp, operation))
    return value
