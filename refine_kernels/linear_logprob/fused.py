"""The Triton path: a streaming forward, and gradients panel by panel.

*Forward*: `triton_forward.py`; no logits at all.
*Gradients*: the rows that have one are compacted. For a panel of them, logits come from one matrix product in
float32, a chunk that stays in L2 at a time; `triton_rows.py` turns each chunk into dz in the dtype of x; then one
product gives the panel's dx and one adds to dW in float32. A panel is several chunks, because every addition to dW
reads and writes all of it.

Scratch at N = 16384, D = 2048, V = 32000 in bfloat16: chunk 33 MB, panel 117 MB with
its rows of x and dx, dW 262 MB, dx (dense only) 134 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from refine_kernels.linear_logprob import triton_forward, triton_rows
from refine_kernels.linear_logprob.chunked import Gradients, Head, Upstream, without_ignored
from refine_kernels.linear_logprob.partials import VocabGroup, combine, finish

CHUNK_BYTES = 32 << 20  # of float32 logits: they stay in the L2 of a large GPU
PANEL_BYTES = 96 << 20  # of dz; or a quarter of dW where that is more
ROW_MULTIPLE = 128  # of a chunk and a panel: whole tiles of a product


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
    part = triton_forward.partials(
        x.to(head.weight.dtype).contiguous(),
        head,
        None if target is None else target.contiguous(),
        None if greedy or seed is None else seed.contiguous(),
        first_column=0 if group is None else group.start,
        need_logprob=need_logprob,
        need_entropy=need_entropy,
        sample=sample,
    )
    if group is not None:
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
    target, upstream = without_ignored(target, upstream, ignore_index)
    if group is not None:
        target = target - group.start
    live, (upstream, scale) = upstream.live(), _within_range(upstream, head.weight.dtype)
    once = group is None and scale is None  # a row of dx is final when its product is
    gradients = Gradients(x, head, needs, torch.float32, x.dtype if once else None)
    for rows, x_p, dz in _panels(x, head, live.nonzero()[:, 0], head.weight.dtype):
        for chunk, q in _chunks(x_p, head, dz):
            at = rows[chunk]
            g = upstream.at(at)
            triton_rows.gradient(
                q, dz[chunk], head,
                target=target[at], g_logprob=g.logprob, g_entropy=g.entropy, g_lse=g.lse,
                lse=None if group is None else lse[at],
                row_entropy=None if group is None else g.row_entropy,
            )  # fmt: skip
        _add(gradients, dz, x_p, rows)
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
    target, upstream = without_ignored(target, Upstream(-row_scale, None, None, None), ignore_index)
    ask = {
        "ignore_index": -1,
        "need_entropy": need_entropy,
        "need_lse": False,
        "sample": False,
        "greedy": False,
    }
    gradients = Gradients(x, head, needs, torch.float32)
    if not any(needs):
        if need_entropy:
            logprob, entropy, *_ = forward(x, head, target, None, need_logprob=True, **ask)
            logprob = torch.where(upstream.logprob != 0, logprob, 0.0)
        else:
            rows = (upstream.logprob != 0).nonzero()[:, 0]
            logprob = torch.zeros_like(upstream.logprob)
            logprob[rows], entropy, *_ = forward(x[rows], head, target[rows], None, need_logprob=True, **ask)
        return (upstream.logprob * logprob).sum(), entropy, gradients

    live, (within, scale) = upstream.live(), _within_range(upstream, head.weight.dtype)
    logprob = torch.zeros_like(upstream.logprob)  # [N]
    entropy = torch.empty_like(logprob) if need_entropy else logprob.new_empty(0)
    for rows, x_p, dz in _panels(x, head, live.nonzero()[:, 0], head.weight.dtype):
        logprob_p = torch.empty_like(rows, dtype=torch.float32)
        entropy_p = torch.empty_like(logprob_p) if need_entropy else None
        for chunk, q in _chunks(x_p, head, dz):
            at = rows[chunk]
            triton_rows.gradient(
                q, dz[chunk], head,
                target=target[at], g_logprob=within.logprob[at],
                logprob=logprob_p[chunk], entropy=None if entropy_p is None else entropy_p[chunk],
            )  # fmt: skip
        logprob[rows] = logprob_p
        if need_entropy:
            entropy[rows] = entropy_p
        _add(gradients, dz, x_p, rows)
    _scale_(gradients, scale)
    if need_entropy and not live.all():
        entropy[~live] = forward(x[~live], head, None, None, need_logprob=False, **ask)[1]
    return (upstream.logprob * logprob).sum(), entropy, gradients


def rows_of(nbytes: int, row_bytes: int) -> int:
    """How many rows of ``row_bytes`` a chunk or panel of about ``nbytes`` holds."""
    return max(nbytes // row_bytes // ROW_MULTIPLE, 1) * ROW_MULTIPLE


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


def _panels(
    x: torch.Tensor,  # [N, D]
    head: Head,
    rows: torch.Tensor,  # [n] ascending
    dtype: torch.dtype,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each panel its rows [P], their x [P, D], and room for dz [P, V]."""
    V = head.weight.shape[0]
    nbytes = max(PANEL_BYTES, head.weight.numel())
    P = min(rows_of(nbytes, V * dtype.itemsize), len(rows))
    dz = torch.empty(P, V, dtype=dtype, device=x.device)
    for start in range(0, len(rows), max(P, 1)):
        panel = rows[start : start + P]
        x_p = x[start : start + P] if len(rows) == len(x) else x[panel]
        yield panel, x_p.to(dtype).contiguous(), dz[: len(panel)]


def _chunks(
    x: torch.Tensor,  # [P, D]
    head: Head,
    dz: torch.Tensor,  # [P, V]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each chunk of a panel its place and its logits [R, V], float32: in dz itself where that is float32."""
    P, V = dz.shape
    R = min(rows_of(CHUNK_BYTES, V * 4), P)
    q = None if dz.dtype == torch.float32 else dz.new_empty(R, V, dtype=torch.float32)
    for start in range(0, P, R):
        place = slice(start, min(start + R, P))
        q_c = dz[place] if q is None else q[: place.stop - start]
        _product(x[place], head.weight.t(), q_c)
        yield place, q_c


def _add(
    gradients: Gradients,
    dz: torch.Tensor,  # [P, V]
    x: torch.Tensor,  # [P, D]
    rows: torch.Tensor,  # [P]
) -> None:
    """A panel's share of dx, dW and db."""
    if gradients.needs_x:
        if gradients.x.dtype == dz.dtype:  # rounded once, by the product
            gradients.x[rows] = dz @ gradients.head.weight
        else:
            dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            _product(dz, gradients.head.weight, dx)
            gradients.x[rows] = dx.to(gradients.x.dtype)
    if gradients.needs_weight:
        _product(dz.t(), x, gradients.weight, accumulate=True)
    if gradients.needs_bias:
        gradients.bias += dz.sum(0, dtype=torch.float32)


def _product(
    a: torch.Tensor,  # [M, K]
    b: torch.Tensor,  # [K, N]
    out: torch.Tensor,  # [M, N] float32
    accumulate: bool = False,
) -> None:
    """``a b``, or ``out + a b``, in float32 from operands of any dtype."""
    if a.device.type != "cuda":  # PyTorch has these products with a wider result for CUDA alone
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=int(accumulate), out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
