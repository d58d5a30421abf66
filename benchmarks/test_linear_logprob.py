"""What the fused LM head costs on this machine, against itself and against PyTorch.

On a shared machine only the ratios mean anything: every round runs all providers once, and a ratio is the
median over rounds of the ratio within a round.

On a GPU (`pytest benchmarks/test_linear_logprob.py -k gpu --benchmark-only`) every provider is compared with one
logits product of the same shape, after its loss and gradients were compared with ours; peers that are not
installed are skipped by name. Times and peak memory are in the summary.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import add_ratio
from benchmarks.timing import compare, in_turns, paired_ratio, peak_memory
from refine_kernels.linear_logprob import linear_cross_entropy, linear_logprob
from tests.numerics import assert_close

SHAPES = {"wide": (512, 256, 32000), "narrow": (2048, 256, 4096)}  # N, D, V
ROUNDS = 3
CHUNKED = "torch: linear_cross_entropy, chunked"


def training_providers(N: int, D: int, V: int) -> tuple[dict[str, Callable[[], None]], list[torch.Tensor]]:
    """Loss, forward and backward with respect to x [N, D] and weight [V, D]; and x, weight, target [N]."""
    x = torch.randn(N, D, requires_grad=True)
    weight = (torch.randn(V, D) / D**0.5).requires_grad_()
    target = torch.randint(V, (N,))

    def trained(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            x.grad = weight.grad = None
            loss().backward()

        return step

    def general() -> torch.Tensor:
        out = linear_logprob(x, weight, target, return_entropy=True)
        return out.entropy.mean() - out.logprob.mean()

    providers = {
        "loss": lambda: linear_cross_entropy(x, weight, target),
        "loss + entropy": lambda: linear_cross_entropy(x, weight, target, return_entropy=True)[0],
        "log-prob and entropy with gradients": general,
        "torch: cross_entropy(linear)": lambda: F.cross_entropy(F.linear(x, weight), target),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        chunked = torch.nn.LinearCrossEntropyOptions()
        providers["torch: linear_cross_entropy"] = lambda: F.linear_cross_entropy(x, weight, target)
        providers[CHUNKED] = lambda: F.linear_cross_entropy(x, weight, target, options=chunked)
    return {name: trained(loss) for name, loss in providers.items()}, [x, weight, target]


def check_training(name: str) -> None:
    """Gradients at a small shape against autograd over the logits in float64."""
    providers, leaves = training_providers(100, 60, 997)
    if name not in providers:
        pytest.skip("this version of torch does not have it")
    providers[name]()
    x, weight, target = leaves
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    log_p = F.linear(*doubles).log_softmax(1)
    loss = -log_p.gather(1, target[:, None]).mean()
    if name == "log-prob and entropy with gradients":
        loss = loss - (log_p.exp() * log_p).sum(1).mean()
    for actual, expected in zip((x.grad, weight.grad), torch.autograd.grad(loss, doubles)):
        assert_close(actual, expected, 1e-5, f"gradient of {name}")


def rollout_providers(
    N: int, D: int, V: int
) -> tuple[dict[str, Callable[[], tuple[torch.Tensor, ...]]], torch.Tensor]:
    """One decoding step of N rows: a token, its log-prob and the entropy, [N] each; and the logits in float64."""
    x, weight = torch.randn(N, D), torch.randn(V, D) / D**0.5

    def materialised() -> tuple[torch.Tensor, ...]:
        log_p = (x @ weight.t()).log_softmax(1)
        p = log_p.exp()
        token = torch.multinomial(p, 1)
        return token[:, 0], log_p.gather(1, token)[:, 0], -(p * log_p).sum(1)

    def fused(**options) -> tuple[torch.Tensor, ...]:
        out = linear_logprob(x, weight, sample=True, return_entropy=True, **options)
        return out.token, out.logprob, out.entropy

    providers = {
        "sample + entropy": lambda: fused(seed=1),
        "greedy + entropy": lambda: fused(temperature=0),
        "torch: logits, multinomial, entropy": materialised,
    }
    return providers, x.double() @ weight.double().t()


TRAINING = [
    "loss",
    "loss + entropy",
    "log-prob and entropy with gradients",
    "torch: cross_entropy(linear)",
    "torch: linear_cross_entropy",
    CHUNKED,
    "Liger",
    "cut cross-entropy",
]
NEEDS_GPU = {"Liger": "liger_kernel", "cut cross-entropy": "cut_cross_entropy"}  # timed in test_gpu
ROLLOUT = ["sample + entropy", "greedy + entropy", "torch: logits, multinomial, entropy"]


@pytest.mark.parametrize("provider", TRAINING)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(benchmark, shape, provider):
    if provider in NEEDS_GPU:
        pytest.importorskip(NEEDS_GPU[provider], reason=f"{provider} is not installed")
        pytest.skip(f"{provider} has Triton kernels alone: it is timed by test_gpu")
    check_training(provider)
    providers, _ = training_providers(*SHAPES[shape])
    benchmark.group = f"forward + backward, {shape} {SHAPES[shape]}"
    rounds = {"rounds": 1} if provider == CHUNKED else {"rounds": ROUNDS, "warmup_rounds": 1}
    benchmark.pedantic(providers[provider], **rounds)


@pytest.mark.parametrize("provider", ROLLOUT)
@pytest.mark.parametrize("N", [8, 64])
def test_rollout(benchmark, N, provider):
    providers, logits = rollout_providers(N, 256, 4096)
    benchmark.group = f"one decoding step, {(N, 256, 4096)}"
    with torch.no_grad():
        token, logprob, entropy = providers[provider]()
        if not provider.startswith("greedy"):  # whose distribution is a single token
            log_p = logits.log_softmax(1)
            assert_close(logprob, log_p.gather(1, token[:, None])[:, 0], 1e-5, "log-prob")
            assert_close(entropy, -(log_p.exp() * log_p).sum(1), 1e-5, "entropy")
        else:
            assert torch.equal(token, logits.argmax(1))
        benchmark(providers[provider])


@pytest.mark.parametrize("shape", SHAPES)
def test_ratios(benchmark, shape, visit):
    """Every provider over our loss alone, and ours with entropies over PyTorch's without."""
    providers, _ = training_providers(*SHAPES[shape])
    if visit == 1:
        for name in providers:
            check_training(name)
    else:  # many times slower than the others: not again
        providers.pop(CHUNKED, None)
    times = benchmark.pedantic(in_turns, (providers, "loss"), {"least": 4}, rounds=1, iterations=1)
    for name in providers:
        if name != "loss":
            ratio = compare(times, name, "loss")
            goal = {"loss + entropy": "goal: at most 1.1"}.get(
                name, "goal: at least 1" if name.startswith("torch") else ""
            )
            add_ratio(f"{name}, {shape}", "linear_cross_entropy, fwd + bwd", ratio, goal)
    if (theirs := "torch: linear_cross_entropy") in times:
        ratio = compare(times, "loss + entropy", theirs)
        add_ratio(f"loss + entropy, {shape}", theirs, ratio, "goal: at most 1")
        if visit == 1:
            memory = peak_memory(providers[theirs]) / peak_memory(providers["loss + entropy"])
            add_ratio(f"memory of {theirs}, {shape}", "loss + entropy", memory)


# ---- on a GPU --------------------------------------------------------------------------------------------

GPU_SHAPES = {"16K x 2048 x 32000": (16384, 2048, 32000), "8K x 4096 x 131072": (8192, 4096, 131072)}
# What one bfloat16 logits product of the same shape may be exceeded by, and scratch in bytes at the first shape.
GPU_GOALS = {
    "log-prob + entropy, forward": "goal: at most 1.4",
    "loss + entropy, forward + backward": "goal: at most 3.8, scratch 600 MB",
    "log-prob + entropy, forward + backward": "goal: at most 5",
}


def gpu_steps(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> dict[str, Callable]:
    """The loss of every provider from x [N, D], weight [V, D], target [N]; one is without gradients."""

    def plain_with_entropy() -> torch.Tensor:
        log_p = (x @ weight.t()).float().log_softmax(1)
        return -log_p.gather(1, target[:, None]).mean() - 0 * (log_p.exp() * log_p).sum(1).mean()

    def general() -> torch.Tensor:
        out = linear_logprob(x, weight, target, return_entropy=True)
        return -out.logprob.mean() + 0 * out.entropy.mean()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return -linear_logprob(x, weight, target, return_entropy=True).logprob.mean()

    def peer(module: str, function: str, *arguments: torch.Tensor) -> Callable:
        return lambda: getattr(importlib.import_module(module), function)(*arguments)

    return {
        "log-prob + entropy, forward": forward,
        "loss + entropy, forward + backward": lambda: linear_cross_entropy(
            x, weight, target, return_entropy=True
        )[0],
        "log-prob + entropy, forward + backward": general,
        "torch: loss + entropy of logits": plain_with_entropy,
        "torch: linear_cross_entropy": lambda: F.linear_cross_entropy(x, weight, target),
        "Liger: fused linear cross entropy": peer(
            "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", x, weight, target
        ),
        "cut-cross-entropy": peer("cut_cross_entropy", "linear_cross_entropy", x, weight, target),
        "fla: fused linear cross entropy": peer(
            "fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss", x, target, weight
        ),
    }


GPU_PROVIDERS = [
    *GPU_GOALS,
    "torch: loss + entropy of logits",
    "torch: linear_cross_entropy",
    "Liger: fused linear cross entropy",
    "cut-cross-entropy",
    "fla: fused linear cross entropy",
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("provider", GPU_PROVIDERS)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_gpu(benchmark, shape, provider):
    """Numbers first, then time over one logits product, and peak memory beyond what was there before."""
    N, D, V = GPU_SHAPES[shape]
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, D, device="cuda") / D**0.5).bfloat16().requires_grad_()
    target = torch.randint(V, (N,), device="cuda")
    steps = gpu_steps(x, weight, target)

    def run() -> torch.Tensor:
        x.grad = weight.grad = None
        loss = steps[provider]()
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    try:
        loss = run()
    except (ImportError, AttributeError) as missing:
        pytest.skip(f"not here: {missing}")
    except torch.cuda.OutOfMemoryError:
        pytest.skip("out of memory")
    gradients = [t.grad for t in (x, weight)]
    expected = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss.float(), expected.detach(), rtol=2e-3, atol=2e-3)
    if gradients[0] is not None:
        ours = torch.autograd.grad(expected, (x, weight))
        assert all((a.float() - b.float()).norm() < 0.05 * b.float().norm() for a, b in zip(gradients, ours))
        del ours
    del expected, gradients, loss
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    grown = sum(t.grad.nbytes for t in (x, weight) if t.grad is not None)
    scratch = torch.cuda.max_memory_allocated() - before - grown

    def product() -> None:
        with torch.no_grad():
            x @ weight.t()

    def timed(step: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def measured() -> dict[str, list[float]]:  # by device events
        turns = [(timed(run), timed(product)) for _ in range(20)][5:]
        return dict(zip(("step", "product"), map(list, zip(*turns))))

    times = benchmark.pedantic(measured, rounds=1, iterations=1)
    what = f"{provider}, {shape}, {statistics.median(times['step']) * 1e3:.2f} ms, {scratch / 1e6:.0f} MB"
    add_ratio(what, "one logits product", compare(times, "step", "product"), GPU_GOALS.get(provider, ""))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_decoding(benchmark):
    """Tokens of 8 rows, over reading the weight once. Bound by memory."""
    N, D, V = 8, 2048, 32000
    x = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, D, device="cuda") / D**0.5).bfloat16()

    def step() -> None:
        linear_logprob(x, weight, sample=True, seed=seeds, return_entropy=True)

    seeds = torch.arange(N, device="cuda")
    found = benchmark.pedantic(paired_ratio, (step, weight.sum), rounds=1, iterations=1)
    add_ratio("token, log-prob, entropy of 8 rows", "sum of the weight", found)
