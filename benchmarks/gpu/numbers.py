"""Numbers of every kernel configuration against float64, each a task of its own (:mod:`benchmarks.gpu.pool`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from benchmarks.gpu.inputs import KEYS, delta_inputs, delta_peers, lact_inputs, share_of_configurations
from benchmarks.gpu.measuring import CUDA, DEVICE, HALF, Row, row
from benchmarks.gpu.pool import Task
from refine_kernels import chunk_delta_rule, chunk_lact, linear_logprob, recurrent_delta_rule, reference
from tests.numerics import relative_error

HERE = "benchmarks.gpu.numbers:"


def tasks() -> list[Task]:
    """Everything, the most used first."""
    found = [
        _delta(f"{keys} keys", k=k, v=v, gated=gated, keys=keys)
        for k, v, keys in ([(128, 128, keys) for keys in KEYS] if CUDA else [(16, 16, "unit")])
        for gated in (False, True)
    ]  # fmt: skip
    sizes = [(64, 64), (64, 128), (60, 100), (96, 96), (256, 256), (128, 256)] if CUDA else []
    found += [_delta("", k=k, v=v, gated=gated) for (k, v), gated in itertools.product(sizes, (False, True))]
    for dtype, k, gated in itertools.product(
        ("float16", "float32") if CUDA else (), (64, 128), (False, True)
    ):
        found.append(_delta(dtype, k=k, v=k, gated=gated, dtype=dtype))
    if CUDA:
        found += [
            _delta("2 value heads a key head", k=128, v=128, gated=True, h=2, value_heads=4),
            _delta("64 rows x heads", k=64, v=64, gated=False, h=32, lengths=(300,)),
            _delta("64 rows x heads", k=64, v=64, gated=True, h=32, lengths=(300,)),
        ]  # fmt: skip
    for k, gated in itertools.product((128, 64) if CUDA else (16,), (False, True)):
        found.append(
            _task("delta rule", f"packed, K {k} {'gated' if gated else 'plain'}", "packed", k=k, gated=gated)
        )
    for dtype, gated in itertools.product(("bfloat16", "float32") if CUDA else ("float32",), (False, True)):
        what = f"one token at a time, {dtype} {'gated' if gated else 'plain'}"
        found.append(_task("delta rule", what, "recurrent", dtype=dtype, gated=gated))
    options = itertools.product(
        (384, 768, 100) if CUDA else (16,), (False, True), (False, True), (True, False)
    )
    for size, muon, prenorm, momentum in options:
        what = f"LaCT {size}{' Muon' * muon}{' pre-norm' * prenorm}{' momentum' * momentum}"
        arguments = {"size": size, "muon": muon, "prenorm": prenorm, "momentum": momentum}
        found.append(_task("LaCT", what, "lact", **arguments))
    if CUDA:
        for dtype in ("float16", "float32"):
            plain = {"muon": False, "prenorm": False, "momentum": True}
            found.append(_task("LaCT", f"LaCT 384 {dtype}", "lact", size=384, dtype=dtype, **plain))
    shapes = (
        [(1000, 2048, 32000), (257, 60, 997), (5, 1536, 50257), (40, 1024, 151936)]
        if CUDA
        else [(20, 16, 97)]
    )
    for n, d, v in shapes:
        for dtype in ("bfloat16", "float16", "float32") if CUDA and n < 1000 else (str(HALF)[6:],):
            found.append(
                _task("LM head", f"head {n} x {d} x {v} {dtype}", "head", n=n, d=d, v=v, dtype=dtype)
            )
    return found


def _delta(what: str, k: int, v: int, gated: bool, **arguments) -> Task:
    what = f"K {k} V {v} {'gated' if gated else 'plain'} {what}".rstrip()
    return _task("delta rule", what, "delta", k=k, v=v, gated=gated, **arguments)


def _task(part: str, what: str, function: str, **arguments) -> Task:
    return Task(f"{part}, numbers", what, HERE + function, {"what": what, **arguments})


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


def errors_of(found, gradients, right, expected) -> dict[str, float]:
    """Of every output and gradient that both sides have."""
    pairs = {n: (x, right[n]) for n, x in found.items() if x is not None}
    pairs |= {f"d{n}": (x, expected[n]) for n, x in gradients.items()}
    return {name: relative_error(x, y) for name, (x, y) in pairs.items()}


def double(inputs):
    return {n: None if x is None else x.detach().double() for n, x in inputs.items()}


def delta(
    what: str, k: int, v: int, gated: bool, keys: str = "unit", dtype: str = str(HALF)[6:], h: int = 2,
    value_heads: int | None = None, lengths: tuple[int, ...] = (1, 63, 300, 1000, 4000) if CUDA else (70,),
) -> Iterator[Row]:  # fmt: skip
    """Worst error over lengths (at 4,000 tokens sequences are split over programs), with and without states at
    strides. Beside fla's worst: of the calls that fla can make, too. float64 by the chunkwise path, as the
    definition takes long."""
    comparable = k == v and k in (64, 128, 256) and dtype == "bfloat16" and value_heads is None
    peers = {n: f for n, f in delta_peers(gated).items() if n == "fla" and comparable}
    worst: dict[str, dict[str, float]] = {name: {} for name in ("ours", *peers)}
    beside: dict[str, float] = {}  # ours, of the calls that fla made
    options = {"use_qk_l2norm_in_kernel": True}
    for t, stride in itertools.product(lengths, (None, 64)):
        inputs = delta_inputs(
            2, t, h, k, v, getattr(torch, dtype), gated=gated, states=2, value_heads=value_heads, keys=keys
        )
        through = 3 if stride else 2
        expected = run_delta(
            chunk_delta_rule, double(inputs), through, **options, state_stride=stride, backend="torch"
        )
        found = {"ours": run_delta(chunk_delta_rule, inputs, through, **options, state_stride=stride)}
        if stride is None:
            for name, rule in peers.items():
                try:
                    with share_of_configurations(0, 1000):
                        found[name] = run_delta(rule, inputs, through, **options)
                except RuntimeError as refusal:  # fla's gated rule before Triton 3.7.1 on Hopper, say
                    print(f"  {name}: {str(refusal).splitlines()[0]}")
        for name, result in found.items():
            errors = errors_of(*result, *expected)
            for column in (worst[name], *([beside] if name == "ours" and "fla" in found else [])):
                column |= {output: max(column.get(output, 0.0), error) for output, error in errors.items()}
    text = []
    for name, errors in worst.items():
        where = max(errors, key=errors.get)
        text.append(f"{name} {errors[where]:.1e} ({where})")
    ratios = {n: beside[n] / e for n, e in worst.get("fla", {}).items() if e}
    if ratios:
        largest = max(ratios, key=ratios.get)
        text.append(f"at most {ratios[largest]:.2f} of fla's ({largest})")
    yield row(what, ", ".join(text), errors=worst)


def packed(what: str, k: int, gated: bool) -> Iterator[Row]:
    """Sequences of odd lengths in one row."""
    lengths = (40, 65, 7, 0, 700, 1, 129) if CUDA else (40, 7, 65)
    inputs = delta_inputs(1, sum(lengths), 2, k, k, HALF, gated=gated, states=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens, "state_stride": 64}
    expected = run_delta(chunk_delta_rule, double(inputs), 3, **options, backend="torch")
    errors = errors_of(*run_delta(chunk_delta_rule, inputs, 3, **options), *expected)
    yield row(what, f"{max(errors.values()):.1e} ({max(errors, key=errors.get)})", errors={"ours": errors})


def recurrent(what: str, dtype: str, gated: bool) -> Iterator[Row]:
    """Few tokens from given states, with gradients; and from shared states without."""
    size = 128 if CUDA else 16
    inputs = delta_inputs(3, 6, 2, size, size, getattr(torch, dtype), gated=gated, states=3)
    options = {"use_qk_l2norm_in_kernel": True}
    expected = run_delta(recurrent_delta_rule, double(inputs), 2, **options, backend="torch")
    errors = errors_of(*run_delta(recurrent_delta_rule, inputs, 2, **options), *expected)
    with torch.no_grad():
        x, exact = inputs, double(inputs)
        rows = torch.tensor([2, 0, 2], device=DEVICE)
        call = lambda x, **more: recurrent_delta_rule(  # noqa: E731
            *(x[n] for n in ("q", "k", "v", "beta")), g=x["g"], initial_state=x["initial_state"],
            state_indices=rows, output_final_state=True, **options, **more,
        )  # fmt: skip
        for name, ours, right in zip(("o, shared", "final, shared"), call(x), call(exact, backend="torch")):
            errors[name] = relative_error(ours, right)
    yield row(what, f"{max(errors.values()):.1e} ({max(errors, key=errors.get)})", errors={"ours": errors})


def lact(
    what: str, size: int, muon: bool, prenorm: bool, momentum: bool, dtype: str = str(HALF)[6:]
) -> Iterator[Row]:
    """Output and gradients, beside a plain computation under autocast, as the authors' code is."""
    tensors, rates = lact_inputs(2, 1300 if CUDA else 90, size, getattr(torch, dtype), momentum)
    options = {"chunk_size": 512 if CUDA else 32, "use_muon": muon, "prenorm": prenorm}
    inputs = [*tensors, *([rates] if momentum else [])]
    names = ("dw0", "dw1", "dw2", "dq", "dk", "dv", "dlr0", "dlr1", "dlr2", "dmomentum")

    def run(op, convert) -> dict[str, torch.Tensor]:
        xs = [convert(x.detach()).requires_grad_() for x in inputs]
        o = op(*xs[: len(tensors)], momentum=xs[-1] if momentum else None, **options)
        weight = torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o)
        gradients = torch.autograd.grad((o.to(weight.dtype) * weight).sum(), xs)
        return {"o": o} | dict(zip(names, gradients))

    right = run(reference.chunk_lact, torch.Tensor.double)
    found = {"ours": run(chunk_lact, lambda x: x.clone())}
    if dtype == "bfloat16":
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found["plain autocast"] = run(reference.chunk_lact, lambda x: x.float())
    worst = {who: {n: relative_error(x, right[n]) for n, x in xs.items()} for who, xs in found.items()}
    text = [
        f"{who} o {e['o']:.1e}, gradients {max(v for n, v in e.items() if n != 'o'):.1e}"
        for who, e in worst.items()
    ]
    yield row(what, "; ".join(text), errors=worst)


def head(what: str, n: int, d: int, v: int, dtype: str) -> Iterator[Row]:
    """The LM head against float64, beside a plain computation that multiplies in its dtype."""
    kind = getattr(torch, dtype)
    x = torch.randn(n, d, device=DEVICE).to(kind)
    w = (torch.randn(v, d, device=DEVICE) * 3 * d**-0.5).to(kind)
    y = torch.randint(v, (n,), device=DEVICE)

    def run(convert, **backend) -> dict[str, torch.Tensor]:
        a, b = (convert(z).requires_grad_() for z in (x, w))
        out = linear_logprob(a, b, y, return_entropy=True, return_lse=True, **backend)
        weight = torch.linspace(-1, 1, n, device=DEVICE, dtype=out.logprob.dtype)
        total = (weight * out.logprob + weight.flip(0) * out.entropy + 0.3 * out.lse).sum()
        dx, dw = torch.autograd.grad(total, (a, b))
        return {"logprob": out.logprob, "entropy": out.entropy, "lse": out.lse, "dx": dx, "dw": dw}

    right, found = run(torch.Tensor.double, backend="torch"), run(lambda z: z.clone())
    errors = {name: relative_error(found[name], right[name]) for name in right}
    plain = (x @ w.T).float().log_softmax(-1)
    plainly = relative_error(plain.gather(1, y[:, None])[:, 0], right["logprob"])
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    yield row(
        what, f"{text} (plain log-prob {plainly:.1e})", errors={"ours": errors, "plain": {"logprob": plainly}}
    )
