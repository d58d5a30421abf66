"""What is known of every row from a part of the vocabulary, and how the parts are put together.

The parts are slices of V: of one multiprocessor (`triton_forward.py` joins those itself) or of one rank of a
process group. O(N) numbers a part are all that is exchanged. With ``M = max m_r``:

    a_r   = m_r - M + log_s_r        log of the part's share, up to a constant
    log_s = logsumexp_r a_r          >= 0: the part that holds M has a_r = log_s_r >= 0
    e     = sum_r softmax(a)_r (e_r + m_r - M)          <= 0, a sum of non-positive terms
    lse = M + log_s        H = log_s - e        log p_y = q_y - M - log_s
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from refine_kernels.linear_logprob.reference import NO_TOKEN


class Partials(NamedTuple):
    """Of one part's scaled logits ``q``, per row; ``None`` where not needed. ``[N]``, or ``[S, N]`` for S parts.

    Attributes:
        m: max q.
        log_s: log sum exp(q - m).
        e: the mean of q - m under the part's own softmax.
        q_y: the target's q, or the drawn token's where there is no target; -inf where another part holds it.
        best: the largest score, q plus noise (q alone when greedy).
        token: its column in the whole vocabulary, int64.
    """

    m: torch.Tensor
    log_s: torch.Tensor
    e: torch.Tensor | None
    q_y: torch.Tensor | None
    best: torch.Tensor | None
    token: torch.Tensor | None


class VocabGroup(NamedTuple):
    """A vocabulary that is cut into contiguous slices, one for each rank of a process group."""

    name: str  # of the torch.distributed group
    start: int  # the first column of this rank's slice

    @property
    def process_group(self) -> torch.distributed.ProcessGroup:
        from torch.distributed.distributed_c10d import _resolve_process_group

        return _resolve_process_group(self.name)

    def sum_(
        self,
        tensor: torch.Tensor,  # [...]
    ) -> torch.Tensor:
        """The sum over the ranks, in place."""
        torch.distributed.all_reduce(tensor, group=self.process_group)
        return tensor

    def gather(self, part: Partials) -> Partials:
        """The parts of all ranks, ``[ranks, N]``, in the order of their slices."""
        there = [i for i, value in enumerate(part) if value is not None]
        packed = torch.stack([part[i].double() for i in there])  # [fields, N]; tokens are exact below 2^53
        parts = [torch.empty_like(packed) for _ in range(self.process_group.size())]
        torch.distributed.all_gather(parts, packed, group=self.process_group)
        fields: list[torch.Tensor | None] = [None] * len(part)
        for i, values in zip(there, torch.stack(parts, 1)):
            fields[i] = values.to(part[i].dtype)
        return Partials(*fields)


def vocab_slices(process_group: torch.distributed.ProcessGroup, size: int, device: torch.device) -> list[int]:
    """Exchange the sizes of the slices, and return where each begins and the last one ends, ``[ranks + 1]``."""
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(process_group.size())]
    torch.distributed.all_gather(sizes, mine, group=process_group)
    return [0, *torch.cat(sizes).cumsum(0).tolist()]


def combine(
    parts: Partials,  # [S, N] each
    drawn: bool,
) -> Partials:  # [N] each
    """One part from S parts in ascending order of columns. ``drawn``: q_y is the drawn token's."""
    m, log_s, e, q_y, best, token = parts
    top = m.amax(0)
    a = m - top + log_s
    if e is not None:
        e = (a.softmax(0) * (e + (m - top))).sum(0)
    winner = None if best is None else best.argmax(0, keepdim=True)  # the lowest columns on ties
    if q_y is not None:
        q_y = q_y.gather(0, winner)[0] if drawn else q_y.amax(0)
    if best is not None:
        best, token = best.amax(0), token.gather(0, winner)[0]
    return Partials(top, a.logsumexp(0), e, q_y, best, token)


def finish(
    part: Partials,  # [N] each, of the whole vocabulary
    target: torch.Tensor | None,  # [N]
    ignore_index: int,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy, lse and token, each ``[N]``, or ``[0]`` where not needed."""
    m, log_s, e, q_y, _, token = part
    logprob = m.new_empty(0) if q_y is None else q_y - m - log_s
    if token is not None:
        token = torch.where((m + log_s).isfinite(), token, NO_TOKEN)
    if q_y is not None and target is not None:
        logprob = torch.where(target != ignore_index, logprob, 0.0)
    return (
        logprob,
        m.new_empty(0) if e is None else log_s - e,
        m + log_s if need_lse else m.new_empty(0),
        m.new_empty(0, dtype=torch.int64) if token is None else token,
    )
