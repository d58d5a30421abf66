"""What the fused LM head costs on this machine, against itself and against PyTorch.

On a shared machine only the ratios mean anything: every round runs all providers once, and a ratio is the
median over rounds of the ratio within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.conftest import add_ratio
from refine_kernels.linear_logprob import linear_cross_entropy, linear_logprob

SHAPES = {"wide": (4096, 256, 32000), "narrow": (8192, 256, 4096)}  # N, D, V
ROUNDS = 5


def training_providers(N: int, D: int, V: int) -> dict[str, Callable[[], None]]:
    """Loss, forward and backward with respect to x [N, D] and weight [V, D]."""
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
        providers["torch: linear_cross_entropy, chunked"] = lambda: F.linear_cross_entropy(
            x, weight, target, options=chunked
        )
    return {name: trained(loss) for name, loss in providers.items()}


def rollout_providers(N: int, D: int, V: int) -> dict[str, Callable[[], None]]:
    """One decoding step of N rows: a token, its log-prob and the entropy."""
    x, weight = torch.randn(N, D), torch.randn(V, D) / D**0.5

    def materialised() -> None:
        log_p = (x @ weight.t()).log_softmax(1)
        p = log_p.exp()
        log_p.gather(1, torch.multinomial(p, 1))
        (p * log_p).sum(1)

    return {
        "sample + entropy": lambda: linear_logprob(x, weight, sample=True, seed=1, return_entropy=True),
        "greedy + entropy": lambda: linear_logprob(
            x, weight, sample=True, temperature=0, return_entropy=True
        ),
        "torch: logits, multinomial, entropy": materialised,
    }


TRAINING = [
    "loss",
    "loss + entropy",
    "log-prob and entropy with gradients",
    "torch: cross_entropy(linear)",
    "torch: linear_cross_entropy",
    "torch: linear_cross_entropy, chunked",
]
ROLLOUT = ["sample + entropy", "greedy + entropy", "torch: logits, multinomial, entropy"]


@pytest.mark.parametrize("provider", TRAINING)
@pytest.mark.parametrize("shape", SHAPES)
def test_training(benchmark, shape, provider):
    providers = training_providers(*SHAPES[shape])
    if provider not in providers:
        pytest.skip("this version of torch does not have it")
    benchmark.group = f"forward + backward, {shape} {SHAPES[shape]}"
    benchmark.pedantic(providers[provider], rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("provider", ROLLOUT)
@pytest.mark.parametrize("N", [8, 64])
def test_rollout(benchmark, N, provider):
    providers = rollout_providers(N, 256, 4096)
    benchmark.group = f"one decoding step, {(N, 256, 4096)}"
    with torch.no_grad():
        benchmark(providers[provider])


@pytest.mark.parametrize("shape", SHAPES)
def test_ratios(benchmark, shape):
    """Every provider over our loss alone. Goals: entropies at most 1.1, none of torch's under 1."""
    times = benchmark.pedantic(in_turns, (training_providers(*SHAPES[shape]), ROUNDS), rounds=1, iterations=1)
    for name, seconds in times.items():
        if name != "loss":
            ratio = statistics.median(a / b for a, b in zip(seconds, times["loss"]))
            goal = {"loss + entropy": "goal: at most 1.1"}.get(
                name, "goal: at least 1" if name.startswith("torch") else ""
            )
            add_ratio(f"{name}, {shape}", "linear_cross_entropy, fwd + bwd", ratio, goal)


def in_turns(providers: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every provider in every round; all of them run once in each round, after one warm-up."""
    times = {name: [] for name in providers}
    for run in providers.values():
        run()
    for _ in range(rounds):
        for name, run in providers.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times
