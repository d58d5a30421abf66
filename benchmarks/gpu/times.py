"""Times of the ops beside the peers whose packages are there."""

# ruff: noqa: B023  (what is defined inside a loop here is called before the loop goes on)
from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.gpu.inputs import delta_inputs, delta_peers, lact_inputs, share_of_configurations
from benchmarks.gpu.measuring import CUDA, DEVICE, HALF, Row, launches, milliseconds, peak_gb, peer, row
from benchmarks.gpu.pool import Task
from refine_kernels import (
    chunk_delta_rule,
    chunk_lact,
    clock,
    linear_cross_entropy,
    linear_logprob,
    recurrent_delta_rule,
    reference,
)
from refine_kernels.delta_rule import triton_chunk, variants

HERE = "benchmarks.gpu.times:"
SHAPES = [(1, 4096), (1, 16384), (1, 65536), (4, 4096), (8, 16384)] if CUDA else [(1, 256)]
PARTS = 8  # processes that share the configurations of fla's autotuners


def compiling() -> list[Task]:
    """What has to run once in some process, so that what is timed below finds its kernels compiled."""
    if not CUDA:
        return []
    few = {"shapes": [(1, 4096), (8, 2048)]}

    def task(what: str, function: str, **arguments) -> Task:
        return Task("compiling", what, HERE + function, arguments, compiling=True)

    tasks = [task(f"fla {i}", "compile_fla", part=i) for i in range(PARTS)]
    tasks += [
        task(f"delta rule {gated}", "delta_times", gated=gated, peers=False, **few) for gated in (False, True)
    ]
    return [
        *tasks,
        task("decode", "decode_times"),
        task("head", "head_times", shapes=[(2048, 2048, 32000)]),
        task("LaCT", "lact_times", shapes=[(1, 4096)]),
    ]


def compile_fla(part: int) -> Iterator[Row]:
    """Every kernel of fla's that :func:`delta_times` will try."""
    with share_of_configurations(part, PARTS):
        for gated, (b, t) in itertools.product((False, True), ((1, 4096), (4, 4096), (8, 4096))):
            yield from delta_times(gated, [(b, t)], ours=False)


def ceilings() -> Iterator[Row]:
    """What this machine reaches at all: one large product, one large copy."""
    n = 8192 if CUDA else 512
    a, b = (torch.randn(n, n, device=DEVICE, dtype=HALF) for _ in range(2))
    ms = milliseconds(lambda: a @ b)
    yield row(f"matrix product {n}^3", f"{2 * n**3 / ms / 1e9:.0f} TFLOP/s", tflops=2 * n**3 / ms / 1e9)
    x = torch.empty(2**30 if CUDA else 2**22, device=DEVICE, dtype=torch.int8)
    y = torch.empty_like(x)
    ms = milliseconds(lambda: y.copy_(x))
    yield row("copy", f"{2 * x.numel() / ms / 1e6:.0f} GB/s", gbs=2 * x.numel() / ms / 1e6)


def delta_times(
    gated: bool, shapes: list[tuple[int, int]] = SHAPES, ours: bool = True, peers: bool = True
) -> Iterator[Row]:
    """DeltaNet-1.3B's shape, plain and gated, beside fla and FlashQLA; and unsplit where we split a sequence."""
    heads, size = (16, 128) if CUDA else (2, 16)
    split = triton_chunk.span_tokens
    for b, t in shapes:
        inputs = delta_inputs(b, t, heads, size, size, HALF, gated=gated)
        names = [n for n in ("q", "k", "v", "beta", "g") if inputs[n] is not None]
        leaves = [inputs[n] for n in names]
        rules = {}
        if ours:
            rules |= {"ours": chunk_delta_rule} | ({"ours, unsplit": chunk_delta_rule} if b == 1 else {})
        if peers:
            rules |= delta_peers(gated)
        d_o = torch.randn_like(inputs["v"])
        times, kernels = {}, {}
        for name, rule in rules.items():

            def forward(rule=rule, leaves=leaves, inputs=inputs):
                return rule(*leaves[:4], g=inputs["g"], use_qk_l2norm_in_kernel=True)[0]

            def both(forward=forward, leaves=leaves, d_o=d_o):
                return torch.autograd.grad(forward(), leaves, d_o)

            if name == "ours, unsplit":
                triton_chunk.span_tokens = lambda *_: 0
            try:
                with torch.no_grad():
                    alone = milliseconds(forward)
                times[name] = (alone, milliseconds(both), peak_gb(both))
                kernels[name] = launches(both)
            except Exception as failure:
                if ours and name.startswith("ours"):
                    raise
                print(f"  {name} at {b} x {t}: {type(failure).__name__}: {failure}")
            finally:
                triton_chunk.span_tokens = split
        for name, (alone, whole, memory) in times.items():
            ratio = ""
            if name != "fla" and "fla" in times:
                ratio = f", {times['fla'][0] / alone:.2f}x / {times['fla'][1] / whole:.2f}x fla"
            device = sum(us for _, us in kernels[name].values()) / 1000
            yield row(
                f"{'gated ' * gated}delta rule {b} x {t}: {name}",
                f"{alone:.3f} / {whole:.3f} ms, kernels alone {device:.3f} ms of both, {memory:.2f} GB{ratio}",
                forward_ms=alone, both_ms=whole, gb=memory, kernels=kernels[name],
                **({"counted": counted(gated, b, t)} if name == "ours" and kernels[name] else {}),
            )  # fmt: skip


def counted(gated: bool, rows: int, tokens: int) -> dict[str, float]:
    """What the counted clock says of the same call, forward for training and backward: microseconds by kernel."""
    found: dict[str, float] = {}
    chip = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if chip not in clock.SPEEDS:
        return found
    _, forward, backward = variants.clock_call(rows, tokens, 16, 16, 128, 128, HALF, gated)
    for run in (forward, backward):
        for bound in clock.bounds(run, variants.turns, chip):
            name = f"{bound.kernel}_kernel"
            found[name] = found.get(name, 0.0) + bound.microseconds
    return found


def decode_times() -> Iterator[Row]:
    """Five tokens of 8 and 64 branches from shared states, beside cloning them for fla's recurrent kernel."""
    fla = peer("fla.ops.delta_rule") if CUDA else None
    heads, size = (16, 128) if CUDA else (2, 16)
    for branches in (8, 64):
        x = {
            n: y if y is None else y.detach()
            for n, y in delta_inputs(branches, 5, heads, size, size, HALF).items()
        }
        parents = torch.randn(4, heads, size, size, device=DEVICE)
        rows = torch.arange(branches, device=DEVICE) % 4
        arguments = [x[n] for n in ("q", "k", "v", "beta")]
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        with torch.no_grad():
            ours = milliseconds(
                lambda: recurrent_delta_rule(
                    *arguments,
                    initial_state=parents,
                    state_indices=rows,
                    **options,
                ),
                cold=True,
            )
            yield row(f"decode {branches} branches x 5: ours", f"{ours:.3f} ms", ms=ours)
            if fla is not None and hasattr(fla, "fused_recurrent_delta_rule"):
                theirs = milliseconds(
                    lambda: fla.fused_recurrent_delta_rule(
                        *arguments,
                        initial_state=parents[rows],
                        **options,
                    ),
                    cold=True,
                )
                yield row(
                    f"decode {branches} branches x 5: clone, fla",
                    f"{theirs:.3f} ms ({theirs / ours:.2f}x)",
                    ms=theirs,
                )


def lact_times(
    shapes: list[tuple[int, int]] = ([(1, 16384), (4, 16384)] if CUDA else [(1, 256)]),
) -> Iterator[Row]:
    """760M's shape beside its plain computation under autocast."""
    for (batch, length), muon in itertools.product(shapes, (False, True)):
        n, size, chunk = (4 * batch, 384, 2048) if CUDA else (2, 16, 64)
        tensors, momentum = lact_inputs(n, length, size, HALF)
        for name, op in {"ours": chunk_lact, "plain, autocast": reference.chunk_lact}.items():
            given = tensors if name == "ours" else [x.detach().float().requires_grad_() for x in tensors]

            def forward(op=op, given=given, momentum=momentum, muon=muon, chunk=chunk, plain=name != "ours"):
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=plain and CUDA):
                    return op(*given, momentum=momentum, chunk_size=chunk, use_muon=muon)

            def both(forward=forward, given=given, momentum=momentum):
                o = forward()
                return torch.autograd.grad(o, [*given, momentum], torch.ones_like(o))

            with torch.no_grad():
                alone = milliseconds(forward, repeats=5)
            whole = milliseconds(both, repeats=5)
            flop = 6 * size * size * n * (length + 2 * (length - chunk))
            yield row(
                f"LaCT {batch} x {length}{' Muon' * muon}: {name}",
                f"{alone:.2f} / {whole:.2f} ms, {peak_gb(both):.2f} GB, forward {flop / alone / 1e9:.0f} TFLOP/s",
                forward_ms=alone, both_ms=whole, kernels=launches(both, 1) if name == "ours" else {},
            )  # fmt: skip


def head_times(
    shapes: list[tuple[int, int, int]] = (
        [(16384, 2048, 32000), (8192, 4096, 131072)] if CUDA else [(64, 16, 97)]
    ),
) -> Iterator[Row]:
    """Forward with entropy, dense loss, general gradients, in units of one logits product (G)."""
    for n, d, v in shapes:
        x = torch.randn(n, d, device=DEVICE, dtype=HALF).requires_grad_()
        w = (torch.randn(v, d, device=DEVICE, dtype=HALF) * d**-0.5).requires_grad_()
        y = torch.randint(v, (n,), device=DEVICE)
        part = x.detach()[: max(1, n // 8)]
        one = (8 if CUDA else 1) * milliseconds(lambda part=part, w=w: part @ w.detach().T)

        def general(x=x, w=w, y=y):
            out = linear_logprob(x, w, y, return_entropy=True)
            return torch.autograd.grad((out.logprob + out.entropy).sum(), (x, w))

        def dense(x=x, w=w, y=y):
            return torch.autograd.grad(linear_cross_entropy(x, w, y, return_entropy=True)[0], (x, w))

        ways = {"dense loss + entropies, gradients": dense, "log-prob + entropy, gradients": general}
        if hasattr(F, "linear_cross_entropy"):
            ways["F.linear_cross_entropy"] = lambda x=x, w=w, y=y: torch.autograd.grad(
                F.linear_cross_entropy(x, w, y), (x, w)
            )
        if CUDA and (liger := peer("liger_kernel.transformers")) is not None:
            loss = liger.LigerFusedLinearCrossEntropyLoss()
            ways["Liger"] = lambda x=x, w=w, y=y, loss=loss: torch.autograd.grad(loss(w, x, y), (x, w))
        if CUDA and (cce := peer("cut_cross_entropy")) is not None:
            ways["cut-cross-entropy"] = lambda x=x, w=w, y=y, cce=cce: torch.autograd.grad(
                cce.linear_cross_entropy(x, w, y), (x, w)
            )
        with torch.no_grad():
            forward = lambda x=x, w=w, y=y: linear_logprob(x, w, y, return_entropy=True)  # noqa: E731
            ms = milliseconds(forward)
            draw = lambda x=x, w=w: linear_logprob(x[:64], w, sample=True, seed=7)  # noqa: E731
            yield row(
                f"head {n} x {d} x {v}: forward with entropy", f"{ms:.2f} ms = {ms / one:.2f} G",
                ms=ms, g_ms=one, kernels=launches(forward, 2),
            )  # fmt: skip
            drawn = milliseconds(draw)
            yield row(f"head 64 x {d} x {v}: drawing tokens", f"{drawn:.3f} ms", ms=drawn)
        for name, function in ways.items():
            try:
                ms, memory = milliseconds(function, repeats=5), peak_gb(function)
            except Exception as failure:
                if "entrop" in name:
                    raise
                print(f"  {name}: {type(failure).__name__}: {failure}")
                continue
            yield row(
                f"head {n} x {d} x {v}: {name}",
                f"{ms:.2f} ms = {ms / one:.2f} G, {memory:.2f} GB",
                ms=ms, gb=memory, kernels=launches(function, 1),
            )  # fmt: skip
        if CUDA:
            torch.cuda.empty_cache()
