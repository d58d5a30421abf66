"""The Triton path: a streaming forward, and gradients panel by panel.

*Forward*: `triton_forward.py`; no logits at all.
*Gradients*, panel by panel: logits come from one matrix product in float32, a chunk of rows at a time;
`triton_rows.py` turns each chunk into dz in the dtype of x and writes the rows' statistics where they belong; then
one product gives the panel's dx and one adds to dW in float32. A chunk has at least 512 rows, so that a product is
not bound by reading W; a panel is several chunks, because every addition to dW reads and writes all of it.

*Rows without a gradient* are left out, for which the host has to know how many there are. It waits for that one
number while the device fills dW and dx with zeros. Where nearly all rows have a gradient, all are worked on as they
lie in memory: no index is made, nothing is gathered.

Scratch at N = 16384, D = 2048, V = 32000 in bfloat16: chunk 66 MB, panel 96 MB with its rows of x (where they are
gathered), dW 262 MB, dx (dense only) 134 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from refine_kernels.linear_logprob import triton_forward, triton_rows
from refine_kernels.linear_logprob.chunked import Gradients, Head, Upstream
from refine_kernels.linear_logprob.partials import VocabGroup, combine, finish

CHUNK_BYTES = 64 << 20  # of float32 logits
CHUNK_ROWS = 512  # or these, where they are more: a product of fewer is bound by reading W
PANEL_BYTES = 88 << 20  # of dz; or a quarter of dW where that is more
ROW_MULTIPLE = 128  # of a chunk and a panel: whole tiles of a product
NEARLY_ALL = 15 / 16  # of the rows: from here on leaving rows out costs more than working on them


def head_of(
    x: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    softcap: float | None,
    temperature: float = 1.0,
) -> Head:
    """The head in the dtype that x and the weight are multiplied in."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.float().contiguous()
    return Head(weight.to(dtype).contiguous(), bias, softcap, temperature)


def forward(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor | None,  # [N]; None: the drawn token
    seed: torch.Tensor | None,  # [N]
    *,
    ignore_index: int,
    need_logprob: bool,
    need_entropy: bool,
    need_lse: bool,
    sample: bool,
    greedy: bool,
    group: VocabGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob, entropy, lse and token of every row, each ``[N]``, or ``[0]`` where not needed."""
    if x.shape[0] == 0:
        empty = x.new_empty(0, dtype=torch.float32)
        return empty, empty.clone(), empty.clone(), empty.long()
    x = x.to(head.weight.dtype).contiguous()
    target = None if target is None else target.contiguous()
    seed = None if greedy or seed is None else seed.contiguous()
    ask = {"need_logprob": need_logprob, "need_entropy": need_entropy, "sample": sample}
    if group is None:
        return triton_forward.outputs(
            x, head, target, seed, ignore_index=ignore_index, need_lse=need_lse, **ask
        )
    part = triton_forward.partials(x, head, target, seed, first_column=group.start, **ask)
    part = combine(group.gather(part), drawn=target is None)
    return finish(part, target, ignore_index, need_lse)


def backward(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor | None,  # [N]
    upstream: Upstream,
    *,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
    lse: torch.Tensor | None = None,  # [N], beside group
    group: VocabGroup | None = None,
) -> Gradients:
    """Gradients of the general path. Rows whose upstream gradients are all zero cost nothing."""
    target, upstream = _without_ignored(target, upstream, ignore_index)
    if group is not None:
        target = target - group.start
    within, scale = _within_range(upstream, head.weight.dtype)
    once = group is None and scale is None  # a row of dx is final when its product is
    live = upstream.live()
    count = _counted(live)
    gradients = Gradients(x, head, needs, torch.float32, x.dtype if once else None)
    _add(gradients, x, _work(live, count()), target, within, lse=None if group is None else lse)
    _scale_(gradients, scale)
    if group is not None and gradients.needs_x:
        group.sum_(gradients.x)
    return gradients


def loss_and_gradients(
    x: torch.Tensor,  # [N, D]
    head: Head,
    target: torch.Tensor,  # [N]
    row_scale: torch.Tensor,  # [N]
    *,
    ignore_index: int,
    need_entropy: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """``sum_r row_scale[r] * -log p_r[target[r]]``, the entropies ``[N]``, and the loss's gradients.

    Without gradients the streaming forward does it all, and it gives the entropies of rows without a loss.
    """
    target, upstream = _without_ignored(target, Upstream(-row_scale, None, None, None), ignore_index)
    ask = {
        "ignore_index": ignore_index,
        "need_entropy": need_entropy,
        "need_lse": False,
        "sample": False,
        "greedy": False,
    }
    live = upstream.live()
    if not any(needs):
        rows = None if need_entropy else _work(live, _counted(live)()).rows
        if rows is None:
            logprob, entropy, *_ = forward(x, head, target, None, need_logprob=True, **ask)
            logprob = logprob.masked_fill(~live, 0.0)
        else:
            logprob = torch.zeros_like(upstream.logprob)
            logprob[rows], entropy, *_ = forward(x[rows], head, target[rows], None, need_logprob=True, **ask)
        return (upstream.logprob * logprob).sum(), entropy, Gradients(x, head, needs, torch.float32)

    within, scale = _within_range(upstream, head.weight.dtype)
    count = _counted(live)
    gradients = Gradients(x, head, needs, torch.float32)
    logprob = torch.zeros_like(upstream.logprob)  # [N]
    entropy = torch.empty_like(logprob) if need_entropy else logprob.new_empty(0)
    work = _work(live, count())
    _add(gradients, x, work, target, within, logprob=logprob, entropy=entropy if need_entropy else None)
    _scale_(gradients, scale)
    if need_entropy and work.others is not None:
        entropy[work.others] = forward(x[work.others], head, None, None, need_logprob=False, **ask)[1]
    return (upstream.logprob * logprob).sum(), entropy, gradients


def rows_of(nbytes: int, row_bytes: int) -> int:
    """How many rows of ``row_bytes`` a chunk or panel of about ``nbytes`` holds."""
    return max(nbytes // row_bytes // ROW_MULTIPLE, 1) * ROW_MULTIPLE


def chunk_and_panel(V: int, D: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a chunk of logits and of a panel of dz, for a weight ``[V, D]`` and products in ``dtype``."""
    chunk = max(rows_of(CHUNK_BYTES, V * 4), CHUNK_ROWS)
    return chunk, max(rows_of(max(PANEL_BYTES, V * D), V * dtype.itemsize), chunk)


def _without_ignored(
    target: torch.Tensor | None,  # [N]
    upstream: Upstream,
    ignore_index: int,
) -> tuple[torch.Tensor, Upstream]:
    """Ignored rows get target 0 and a log-prob gradient of zero; all ``[N]`` become contiguous."""
    upstream = Upstream(*(None if g is None else g.contiguous() for g in upstream))
    if target is None:
        return torch.zeros_like(upstream.logprob, dtype=torch.int64), upstream
    ignored = target == ignore_index
    g = upstream.logprob.masked_fill(ignored, 0.0)
    return target.masked_fill(ignored, 0).contiguous(), upstream._replace(logprob=g)


def _within_range(upstream: Upstream, dtype: torch.dtype) -> tuple[Upstream, torch.Tensor | None]:
    """Upstream gradients whose dz ``dtype`` can hold, and what the results must be multiplied by.

    The gradient of a mean over 16384 rows is below what float16 has digits for, and a loss scale comes too late for
    gradients that are taken in the forward pass: the largest upstream gradient is made one.
    """
    if dtype != torch.float16 or upstream.logprob.numel() == 0:
        return upstream, None
    there = [g for g in upstream[:3] if g is not None]
    largest = torch.stack([g.abs().amax() for g in there]).amax()
    scale = torch.where(largest > 0, largest, 1.0)  # one for nan, too
    return Upstream(*(None if g is None else g / scale for g in upstream[:3]), upstream.row_entropy), scale


def _scale_(gradients: Gradients, scale: torch.Tensor | None) -> None:
    if scale is not None:
        for gradient in (gradients.x, gradients.weight, gradients.bias):
            gradient.mul_(scale)


def _counted(
    live: torch.Tensor,  # [N] bool
) -> Callable[[], int]:
    """How many rows are live. The device writes the number into the host's memory without being waited for; who
    calls the result waits until it is there, and not for what the device was given since."""
    count = live.sum()
    if not live.is_cuda:
        return lambda: int(count)
    stream = torch.cuda.current_stream(live.device)
    there = torch.empty((), dtype=count.dtype, device="cpu", pin_memory=True)
    there.copy_(count, non_blocking=True)
    done = stream.record_event()

    def wait() -> int:
        done.synchronize()
        return int(there)

    return wait


class Work(NamedTuple):
    """The rows of a call that are worked on."""

    rows: torch.Tensor | None  # [n] which of the N, ascending; None: all
    others: torch.Tensor | None  # [N - n]; None: none
    dead: (
        torch.Tensor | None
    )  # [N] bool, those without a gradient that are worked on all the same; None: none


def _work(
    live: torch.Tensor,  # [N] bool
    count: int,
) -> Work:
    if count and count >= NEARLY_ALL * len(live):
        return Work(None, None, None if count == len(live) else ~live)
    order = live.to(torch.uint8).sort(descending=True, stable=True).indices  # `nonzero` would wait
    return Work(order[:count], order[count:], None)


def _add(
    gradients: Gradients,
    x: torch.Tensor,  # [N, D]
    work: Work,
    target: torch.Tensor,  # [N]
    upstream: Upstream,
    *,
    lse: torch.Tensor | None = None,  # [N]
    logprob: torch.Tensor | None = None,  # [N] out
    entropy: torch.Tensor | None = None,  # [N] out
) -> None:
    """The rows' dx, dW and db, and what is asked for of their statistics."""
    head, rows = gradients.head, work.rows
    V, dtype = head.weight.shape[0], head.weight.dtype
    n = len(x) if rows is None else len(rows)
    R, P = (min(size, n) for size in chunk_and_panel(V, x.shape[1], dtype))
    dz = torch.empty(P, V, dtype=dtype, device=x.device)
    q = None if dtype == torch.float32 else dz.new_empty(R, V, dtype=torch.float32)
    R = P if q is None else R  # the logits of a chunk take room of their own, or none
    statistics = {
        "target": target, "g_logprob": upstream.logprob, "g_entropy": upstream.entropy, "g_lse": upstream.lse,
        "lse": lse, "row_entropy": None if lse is None else upstream.row_entropy,
        "logprob": logprob, "entropy": entropy,
    }  # fmt: skip
    for start in range(0, n, max(P, 1)):
        panel = slice(start, min(start + P, n))
        x_p = (x[panel] if rows is None else x[rows[panel]]).to(dtype).contiguous()
        dz_p = dz[: len(x_p)]
        for first in range(0, len(x_p), R):
            chunk = slice(first, min(first + R, len(x_p)))
            q_c = dz_p[chunk] if q is None else q[: chunk.stop - first]
            _product(x_p[chunk], head.weight.t(), q_c)
            triton_rows.gradient(q_c, dz_p[chunk], head, first=start + first, rows=rows, **statistics)
        dead = None if work.dead is None else work.dead[panel]
        _add_panel(gradients, dz_p, x_p, panel if rows is None else rows[panel], dead, q)


def _add_panel(
    gradients: Gradients,
    dz: torch.Tensor,  # [P, V]
    x: torch.Tensor,  # [P, D]
    rows: slice | torch.Tensor,  # [P]
    dead: torch.Tensor | None,  # [P] bool; None: none
    scratch: torch.Tensor | None,  # any contiguous tensor that is not needed any more
) -> None:
    """A panel's share of dx, dW and db."""
    if gradients.needs_x:
        dtype = dz.dtype if gradients.x.dtype == dz.dtype else torch.float32  # rounded once, by the product
        in_place = isinstance(rows, slice) and gradients.x.dtype == dtype
        dx = gradients.x[rows] if in_place else _room(x.shape, dtype, x.device, scratch)
        _product(dz, gradients.head.weight, dx)
        if not in_place:
            gradients.x[rows] = dx.to(gradients.x.dtype)
    if gradients.needs_weight:
        if dead is not None:  # 0 times what a padded row may hold, inf or nan, is not 0
            x = x.masked_fill(dead[:, None], 0.0)
        _product(dz.t(), x, gradients.weight, accumulate=True)
    if gradients.needs_bias:
        gradients.bias += dz.sum(0, dtype=torch.float32)


def _room(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, scratch: torch.Tensor | None
) -> torch.Tensor:
    """An uninitialised tensor, in ``scratch`` where it fits."""
    if scratch is None or scratch.nbytes < shape.numel() * dtype.itemsize:
        return torch.empty(shape, dtype=dtype, device=device)
    return scratch.view(-1).view(dtype)[: shape.numel()].view(shape)


def _product(
    a: torch.Tensor,  # [M, K]
    b: torch.Tensor,  # [K, N]
    out: torch.Tensor,  # [M, N] float32, or of the operands' dtype where nothing is accumulated
    accumulate: bool = False,
) -> None:
    """``a b``, or ``out + a b``, in float32 from operands of any dtype."""
    if a.dtype == out.dtype and not accumulate:
        torch.mm(a, b, out=out)
        return
    if a.device.type != "cuda":  # PyTorch has these products with a wider result for CUDA alone
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
