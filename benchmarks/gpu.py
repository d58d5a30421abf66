"""One visit to a GPU: ``python -m benchmarks.gpu [--minutes 9]``.

Environment, the machine's own ceilings, numbers of every kernel configuration in bf16, timings beside the peers
whose packages are there, training steps of both published models (random weights), rollouts, the largest batch
that fits. Each part is apart: one that fails is noted and the next begins; parts that no longer fit the time are
skipped and named. A compact table comes last; everything goes into one file in ``benchmarks/results/``.

On a CPU it goes through the same motions at sizes of a few hundred tokens (``--part`` picks some), so that a visit
does not find the mistakes of the script.
"""

# ruff: noqa: B023  (what is defined inside a loop here is called before the loop goes on)
from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.results import machine, record, versions
from refine import RefineConfig, refine_step
from refine.method import next_token_targets
from refine.method.sampling import sample_rollouts
from refine.models import DeltaNetConfig, DeltaNetForCausalLM, LaCTConfig, LaCTForCausalLM
from refine.models.head import HiddenOnly, NextTokenLoss
from refine_kernels import (
    chunk_delta_rule,
    chunk_lact,
    linear_cross_entropy,
    linear_logprob,
    recurrent_delta_rule,
    reference,
)
from refine_kernels.delta_rule import triton_chunk
from tests.numerics import relative_error

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16 if CUDA else torch.float32  # what a CPU can check at all
Row = dict[str, object]  # what, value; and whatever a later reader may want


def row(what: str, value: str, **more) -> Row:
    """One line of a part's table."""
    return {"what": what, "value": value, **more}


def milliseconds(function: Callable[[], object], repeats: int = 10, cold: bool = False) -> float:
    """Median time of a call by device events (wall clock on a CPU), after two calls; ``cold`` empties L2 first."""
    for _ in range(2 if CUDA else 1):
        function()
    if not CUDA:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE) if cold else None
    times = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        function()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def peak_gb(function: Callable[[], object]) -> float:
    """Memory of one call beyond what was allocated before it (0 on a CPU)."""
    if not CUDA:
        function()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def peer(name: str):
    """A peer's module, or None with the reason on the screen."""
    try:
        return __import__(name, fromlist=["_"])
    except Exception as error:
        print(f"  {name} is not here: {type(error).__name__}: {error}")
        return None


# ---- parts -------------------------------------------------------------------------------------------------


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


def delta_inputs(b, t, h, k, v, dtype, gated=False, states=False):
    """As a model makes them: unit keys, rates in (0, 1), decays of some per cent."""
    make = functools.partial(torch.randn, device=DEVICE)
    inputs = {
        "q": make(b, t, h, k).to(dtype),
        "k": F.normalize(make(b, t, h, k), dim=-1).to(dtype),
        "v": make(b, t, h, v).to(dtype),
        "beta": make(b, t, h).sigmoid().to(dtype),
        "g": F.logsigmoid(make(b, t, h) + 3) if gated else None,
        "initial_state": make(b, h, k, v) if states else None,
    }
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def run_delta(rule, inputs, through: int, **options):
    """Outputs and gradients of a call; ``through``: how many of its outputs send a gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    positional = [leaves[n] for n in ("q", "k", "v", "beta")]
    outputs = rule(
        *positional,
        g=leaves.get("g"),
        initial_state=leaves.get("initial_state"),
        output_final_state=True,
        **options,
    )
    total = sum(
        (x.float() * torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)).sum()
        for x in outputs[:through]
    )
    return dict(zip(("o", "final", "states"), outputs)), dict(
        zip(leaves, torch.autograd.grad(total, list(leaves.values())))
    )


def delta_peers(gated: bool) -> dict[str, Callable]:
    """What others call for the same rule, with our arguments; those that are here."""
    if not CUDA:
        return {}

    def ordered(function):
        return lambda q, k, v, beta, g, **options: function(q, k, v, g, beta, **options)

    if not gated:
        fla = peer("fla.ops.delta_rule")
        return {} if fla is None else {"fla": lambda *x, g=None, **o: fla.chunk_delta_rule(*x, **o)}
    fla, qla = peer("fla.ops.gated_delta_rule"), peer("flash_qla")
    found = {"fla": fla, "FlashQLA": qla}
    return {name: ordered(x.chunk_gated_delta_rule) for name, x in found.items() if x is not None}


def worst_error(found, gradients, right, expected) -> tuple[float, str]:
    """Over outputs, states and gradients that both sides have, with its name."""
    pairs = {n: (x, right[n]) for n, x in found.items() if x is not None}
    pairs |= {f"d{n}": (x, expected[n]) for n, x in gradients.items()}
    return max((relative_error(x, y), n) for n, (x, y) in pairs.items())


def delta_numbers() -> Iterator[Row]:
    """Every configuration's worst error against float64, beside fla's on the same input where it can."""
    sizes = [(128, 128), (64, 64), (60, 100), (96, 96), (256, 256), (128, 256)] if CUDA else [(16, 16)]
    # at 4,000 tokens sequences are split over programs; float64 by the chunkwise path, as the definition takes long
    lengths = (1, 63, 300, 1000, 4000) if CUDA else (70,)
    for (k, v), gated in itertools.product(sizes, (False, True)):
        peers = {n: f for n, f in delta_peers(gated).items() if n == "fla" and k == v and k in (64, 128, 256)}
        worst = dict.fromkeys(("ours", *peers), (0.0, ""))
        for t, stride in itertools.product(lengths, (None, 64)):
            inputs = delta_inputs(2, t, 2, k, v, HALF, gated, states=True)
            exact = {n: None if x is None else x.detach().double() for n, x in inputs.items()}
            through = 3 if stride else 2
            options = {"use_qk_l2norm_in_kernel": True}
            expected = run_delta(
                chunk_delta_rule, exact, through, **options, state_stride=stride, backend="torch"
            )
            ours = run_delta(chunk_delta_rule, inputs, through, **options, state_stride=stride)
            error, name = worst_error(*ours, *expected)
            worst["ours"] = max(worst["ours"], (error, f"{name}, T={t}, stride {stride}"))
            for name, rule in peers.items() if stride is None else ():
                try:
                    error, where = worst_error(*run_delta(rule, inputs, through, **options), *expected)
                except Exception as failure:
                    print(f"  {name} at K {k}, T {t}: {type(failure).__name__}: {failure}")
                    continue
                worst[name] = max(worst[name], (error, f"{where}, T={t}"))
        ratio = f"; {worst['ours'][0] / worst['fla'][0]:.2f} of fla's" if worst.get("fla", (0,))[0] else ""
        yield row(
            f"K {k} V {v} {'gated' if gated else 'plain'}: worst error",
            ", ".join(f"{name} {error:.1e} ({where})" for name, (error, where) in worst.items()) + ratio,
            error=worst["ours"][0], peers={n: e for n, (e, _) in worst.items() if n != "ours"},
        )  # fmt: skip


def delta_times() -> Iterator[Row]:
    """DeltaNet-1.3B's shape, plain and gated, beside fla and FlashQLA; and unsplit where we split a sequence."""
    shapes = [(1, 4096), (1, 16384), (1, 65536), (4, 4096), (4, 16384)] if CUDA else [(1, 256)]
    heads, size = (16, 128) if CUDA else (2, 16)
    split = triton_chunk.span_tokens

    def unsplit(*arguments, **options):
        triton_chunk.span_tokens = lambda *_: 0
        try:
            return chunk_delta_rule(*arguments, **options)
        finally:
            triton_chunk.span_tokens = split

    for gated, (b, t) in itertools.product((False, True), shapes):
        inputs = delta_inputs(b, t, heads, size, size, HALF, gated)
        names = [n for n in ("q", "k", "v", "beta", "g") if inputs[n] is not None]
        leaves = [inputs[n] for n in names]
        rules = {"ours": chunk_delta_rule} | ({"ours, unsplit": unsplit} if b == 1 else {})
        d_o = torch.randn_like(inputs["v"])
        times = {}
        for name, rule in (rules | delta_peers(gated)).items():

            def forward(rule=rule):
                return rule(*leaves[:4], g=inputs["g"], use_qk_l2norm_in_kernel=True)[0]

            def both(forward=forward, name=name):
                o = forward()
                if name == "ours, unsplit":
                    triton_chunk.span_tokens = lambda *_: 0
                try:
                    return torch.autograd.grad(o, leaves, d_o)
                finally:
                    triton_chunk.span_tokens = split

            try:
                with torch.no_grad():
                    alone = milliseconds(forward)
                times[name] = (alone, milliseconds(both), peak_gb(both))
            except Exception as failure:
                print(f"  {name} at {b} x {t}: {type(failure).__name__}: {failure}")
        for name, (alone, whole, memory) in times.items():
            ratio = ""
            if name != "fla" and "fla" in times:
                ratio = f", {times['fla'][0] / alone:.2f}x / {times['fla'][1] / whole:.2f}x fla"
            yield row(
                f"{'gated ' * gated}delta rule {b} x {t}: {name}",
                f"{alone:.3f} / {whole:.3f} ms, {memory:.2f} GB{ratio}",
                forward_ms=alone, both_ms=whole, gb=memory,
            )  # fmt: skip


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
                    *arguments, initial_state=parents, state_indices=rows, **options
                ),
                cold=True,
            )
            yield row(f"decode {branches} branches x 5: ours", f"{ours:.3f} ms", ms=ours)
            if fla is not None and hasattr(fla, "fused_recurrent_delta_rule"):
                theirs = milliseconds(
                    lambda: fla.fused_recurrent_delta_rule(
                        *arguments, initial_state=parents[rows], **options
                    ),
                    cold=True,
                )
                yield row(
                    f"decode {branches} branches x 5: clone, fla",
                    f"{theirs:.3f} ms ({theirs / ours:.2f}x)",
                    ms=theirs,
                )


def lact_inputs(n, length, size, dtype, use_momentum=True):
    """N rows of a layer."""
    make = functools.partial(torch.randn, device=DEVICE)
    tensors = [make(n, size, size) * size**-0.5 for _ in range(3)]
    tensors += [F.normalize(make(n, length, size), dim=-1).to(dtype) for _ in range(2)] + [
        make(n, length, size).to(dtype)
    ]
    tensors += [F.softplus(make(n, length, 1) - 5) for _ in range(3)]
    momentum = make(n, length, 1).sigmoid() if use_momentum else None
    return [x.requires_grad_() for x in tensors], None if momentum is None else momentum.requires_grad_()


def lact_numbers() -> Iterator[Row]:
    """All options against float64."""
    sizes = (384, 100) if CUDA else (16,)
    for size, muon, prenorm in itertools.product(sizes, (False, True), (False, True)):
        tensors, momentum = lact_inputs(2, 1300 if CUDA else 90, size, HALF)
        chunk = 512 if CUDA else 32
        options = {"chunk_size": chunk, "use_muon": muon, "prenorm": prenorm}
        results = []
        for op, dtype in ((chunk_lact, None), (reference.chunk_lact, torch.float64)):
            xs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*tensors, momentum)]
            o = op(*xs[:-1], momentum=xs[-1], **options)
            weight = torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o)
            results.append((o, torch.autograd.grad((o.to(weight.dtype) * weight).sum(), xs)))
        (o, gradients), (right, expected) = results
        worst = max(relative_error(a, b) for a, b in zip(gradients, expected))
        yield row(
            f"LaCT {size}{' Muon' * muon}{' pre-norm' * prenorm}",
            f"output {relative_error(o, right):.1e}, gradients {worst:.1e}",
            error=worst,
        )  # fmt: skip


def lact_times() -> Iterator[Row]:
    """760M's shape beside a compiled reference."""
    for batch, length in [(1, 16384), (4, 16384), (1, 32768)] if CUDA else [(1, 256)]:
        n, size, chunk = (4 * batch, 384, 2048) if CUDA else (2, 16, 64)
        tensors, momentum = lact_inputs(n, length, size, HALF)
        ways = {"ours": chunk_lact}
        if CUDA:
            ways["compiled reference"] = torch.compile(reference.chunk_lact)
        for name, op in ways.items():

            def both(op=op):
                o = op(*tensors, momentum=momentum, chunk_size=chunk)
                return torch.autograd.grad(o, [*tensors, momentum], torch.ones_like(o))

            with torch.no_grad():
                forward = milliseconds(
                    lambda op=op: op(*tensors, momentum=momentum, chunk_size=chunk), repeats=5
                )
            whole = milliseconds(both, repeats=5)
            flop = 6 * size * size * n * (length + 2 * (length - chunk))
            yield row(
                f"LaCT {batch} x {length}: {name}",
                f"{forward:.2f} / {whole:.2f} ms, {peak_gb(both):.2f} GB, "
                f"forward {flop / forward / 1e9:.0f} TFLOP/s",
                forward_ms=forward, both_ms=whole,
            )  # fmt: skip


def head_numbers() -> Iterator[Row]:
    """The LM head in bf16 against float64, beside a plain computation that accumulates in float32."""
    for n, d, v in [(1000, 2048, 32000), (257, 60, 997), (5, 1536, 50257)] if CUDA else [(20, 16, 97)]:
        x, w = (
            torch.randn(n, d, device=DEVICE, dtype=HALF),
            torch.randn(v, d, device=DEVICE, dtype=HALF) * 3 * d**-0.5,
        )
        y = torch.randint(v, (n,), device=DEVICE)
        out = linear_logprob(x, w, y, return_entropy=True, return_lse=True)
        right = linear_logprob(
            x.double(), w.double(), y, return_entropy=True, return_lse=True, backend="torch"
        )
        plain = (x @ w.T).float().log_softmax(-1)
        entropy = -(plain.exp() * plain).sum(-1)
        yield row(
            f"head {n} x {d} x {v}: entropy, log-prob",
            f"{relative_error(out.entropy, right.entropy):.1e} "
            f"(plain {relative_error(entropy, right.entropy):.1e}), "
            f"{relative_error(out.logprob, right.logprob):.1e} "
            f"(plain {relative_error(plain.gather(1, y[:, None])[:, 0], right.logprob):.1e})",
        )


def head_times() -> Iterator[Row]:
    """Forward with entropy, dense loss, general gradients, in units of one logits product (G)."""
    for n, d, v in [(16384, 2048, 32000), (8192, 4096, 131072)] if CUDA else [(64, 16, 97)]:
        x = torch.randn(n, d, device=DEVICE, dtype=HALF).requires_grad_()
        w = (torch.randn(v, d, device=DEVICE, dtype=HALF) * d**-0.5).requires_grad_()
        y = torch.randint(v, (n,), device=DEVICE)
        part = x.detach()[: max(1, n // 8)]
        one = (
            8 * milliseconds(lambda: part @ w.detach().T)
            if CUDA
            else milliseconds(lambda: x.detach() @ w.detach().T)
        )

        def general():
            out = linear_logprob(x, w, y, return_entropy=True)
            return torch.autograd.grad((out.logprob + out.entropy).sum(), (x, w))

        def dense():
            return torch.autograd.grad(linear_cross_entropy(x, w, y, return_entropy=True)[0], (x, w))

        ways = {"dense loss + entropies, gradients": dense, "log-prob + entropy, gradients": general}
        if hasattr(F, "linear_cross_entropy"):
            ways["F.linear_cross_entropy"] = lambda: torch.autograd.grad(
                F.linear_cross_entropy(x, w, y), (x, w)
            )
        if CUDA and (liger := peer("liger_kernel.transformers")) is not None:
            loss = liger.LigerFusedLinearCrossEntropyLoss()
            ways["Liger"] = lambda: torch.autograd.grad(loss(w, x, y), (x, w))
        if CUDA and (cce := peer("cut_cross_entropy")) is not None:
            ways["cut-cross-entropy"] = lambda: torch.autograd.grad(cce.linear_cross_entropy(x, w, y), (x, w))
        with torch.no_grad():
            ms = milliseconds(lambda: linear_logprob(x, w, y, return_entropy=True))
        yield row(
            f"head {n} x {d} x {v}: forward with entropy", f"{ms:.2f} ms = {ms / one:.2f} G", ms=ms, g_ms=one
        )
        for name, function in ways.items():
            ms, memory = milliseconds(function, repeats=5), peak_gb(function)
            yield row(
                f"head {n} x {d} x {v}: {name}",
                f"{ms:.2f} ms = {ms / one:.2f} G, {memory:.2f} GB",
                ms=ms,
                gb=memory,
            )


def models() -> Iterator[tuple[str, torch.nn.Module]]:
    """The published sizes with random weights, bf16."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 32}
    delta = (
        {"hidden_size": 2048, "num_heads": 16, "intermediate_size": 5632}
        if CUDA
        else small | {"num_heads": 2}
    )
    lact = (
        {"w0_w2_low_rank": 32, "rope_theta": 1e6}
        if CUDA
        else small | {"num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 64, "window_size": 64}
    )
    for name, make in (
        ("DeltaNet-1.3B", lambda: DeltaNetForCausalLM(DeltaNetConfig(**delta))),
        ("LaCT-760M", lambda: LaCTForCausalLM(LaCTConfig(**lact))),
    ):
        with torch.device(DEVICE):
            model = make().to(HALF).train()
        yield name, model
        del model
        if CUDA:
            torch.cuda.empty_cache()


def step_times() -> Iterator[Row]:
    """One training step, forward and backward: SFT beside REFINE, time and memory; rollouts; the largest batch."""
    for name, model in models():
        vocabulary = model.config.vocab_size
        for tokens, checkpointing in ((4096, False), (16384, True)) if CUDA else ((256, False),):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            ids = torch.randint(vocabulary, (1, tokens), device=DEVICE)
            lengths = torch.tensor([tokens], device=DEVICE)
            seeds = torch.tensor([1], device=DEVICE)

            def sft(ids=ids, lengths=lengths, model=model):
                model.zero_grad()
                head = NextTokenLoss(*next_token_targets(ids, lengths), entropy=False)
                model(ids, use_cache=False, head=head).loss.backward()

            def refine(ids=ids, seeds=seeds, model=model):
                model.zero_grad()
                refine_step(model, ids, RefineConfig(), seeds=seeds).loss.backward()

            times = {way: milliseconds(f, repeats=3) for way, f in (("sft", sft), ("refine", refine))}
            memory = {way: peak_gb(f) for way, f in (("sft", sft), ("refine", refine))}
            yield row(
                f"{name}, T = {tokens}{', checkpointing' * checkpointing}: SFT, REFINE",
                f"{times['sft']:.0f}, {times['refine']:.0f} ms ({times['refine'] / times['sft']:.3f}x); "
                f"{memory['sft']:.1f}, {memory['refine']:.1f} GB",
                **times, gb=memory,
            )  # fmt: skip
        if checkpointing:
            model.gradient_checkpointing_disable()
        prefix, branches = (4096, 64) if CUDA else (128, 4)
        ids = torch.randint(vocabulary, (1, prefix), device=DEVICE)
        model.eval()
        with torch.no_grad():
            output = model(ids, use_cache=False, head=HiddenOnly(), state_stride=64)
            positions = prefix - torch.arange(branches, device=DEVICE) % 64
            state = output.trace.gather(torch.zeros_like(positions), positions)
            context = output.last_hidden_state[0, positions - 1]
            draws = torch.arange(branches * 5, device=DEVICE).view(branches, 5)
            ms = milliseconds(lambda: sample_rollouts(model, state, context, draws, 1.0), repeats=5)
            once = milliseconds(lambda: model(ids, use_cache=True, head=HiddenOnly()), repeats=3)
        yield row(
            f"{name}: {branches} rollouts of 5 at {prefix}",
            f"{ms:.1f} ms; reading {branches} prefixes: {branches * once:.0f} ms "
            f"({branches * once / ms:.0f}x)",
            ms=ms,
        )  # fmt: skip
        model.train()
        if CUDA:
            yield row(
                f"{name}: largest batch of 4,096 tokens that fits a REFINE step",
                str(_largest(model, vocabulary)),
            )


def _largest(model, vocabulary: int) -> int:
    fits = 0
    for batch in (1, 2, 4, 8, 16, 32):
        try:
            ids = torch.randint(vocabulary, (batch, 4096), device=DEVICE)
            refine_step(model, ids, RefineConfig(), seeds=torch.arange(batch, device=DEVICE)).loss.backward()
            fits = batch
        except torch.OutOfMemoryError:
            break
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()
    return fits


PARTS = {
    "ceilings": ceilings,
    "delta rule, numbers": delta_numbers,
    "LaCT, numbers": lact_numbers,
    "LM head, numbers": head_numbers,
    "delta rule, times": delta_times,
    "decode, times": decode_times,
    "LM head, times": head_times,
    "LaCT, times": lact_times,
    "steps": step_times,
}


def main() -> int:
    """Run the parts, print the table, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after this")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--no_record", action="store_true", help="write no results file")
    options = parser.parse_args()
    began, table, failed = time.time(), {}, 0
    print(machine(), versions(), sep="\n")
    torch.manual_seed(0)
    for name in options.part:
        rows = table[name] = []
        if time.time() - began > 60 * options.minutes:
            rows.append(row(name, "skipped: no time left"))
            continue
        print(f"{name} ({time.time() - began:.0f} s)", flush=True)
        try:
            for found in PARTS[name]():
                rows.append(found)
                print(f"  {found['what']}: {found['value']}", flush=True)
                if time.time() - began > 60 * options.minutes + 30:
                    rows.append(row(name, "cut short: no time left"))
                    break
        except Exception as error:
            failed += 1
            traceback.print_exc()
            rows.append(
                row(
                    name,
                    f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                )
            )
        if CUDA:
            torch.cuda.empty_cache()
    width = max(len(str(r["what"])) for rows in table.values() for r in rows)
    print(f"\n{time.time() - began:.0f} s, {failed} parts failed")
    for rows in table.values():
        for r in rows:
            print(f"{r['what']:<{width}}  {r['value']}")
    if not options.no_record:
        print(f"written to {record('gpu', table)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
