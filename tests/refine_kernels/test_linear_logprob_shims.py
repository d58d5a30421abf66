"""The fused head under other names: modules, and what RL trainers call theirs."""

from __future__ import annotations

import pytest
import torch

from refine_kernels import LinearCrossEntropy, LinearLogprob, linear_cross_entropy, linear_logprob
from refine_kernels.linear_logprob.integrations import ChunkedLogProbFunction, verl_linear_cross_entropy
from tests.numerics import assert_close

N, D, V = 24, 16, 50


@pytest.fixture
def head():
    x = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True)
    return x, weight, bias, torch.randint(V, (N,))


def plain(x, weight, targets, temperature, bias=None, softcap=None, scale=1.0):
    """Log-probs and entropies from materialised logits."""
    z = x @ weight.t()
    z = (z if bias is None else z + bias) * scale
    z = z if softcap is None else softcap * (z / softcap).tanh()
    log_p = (z / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def assert_same(results, expected, inputs):
    """Values, and gradients of both outputs together."""
    upstream = torch.randn(2, N)
    for value, e in zip(results, expected):
        assert value.shape == (N,) and value.dtype == torch.float32
        assert_close(value, e, 1e-5)
    gradients = (
        torch.autograd.grad(sum((v * g).sum() for v, g in zip(pair, upstream)), inputs)
        for pair in (results, expected)
    )
    for value, e in zip(*gradients):
        assert_close(value, e, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_verl(head, temperature):
    x, weight, _, labels = head
    for arguments in (
        (x, weight, labels, temperature),
        (x.view(4, 6, D), weight, labels.view(4, 6), temperature, "none", None),  # all of verl's arguments
    ):
        expected = plain(x, weight, labels, temperature)
        assert_same(verl_linear_cross_entropy(*arguments), expected, (x, weight))
    expected = plain(x, weight, labels, 1.0)
    assert_same(verl_linear_cross_entropy(x, weight, labels, None, None), expected, (x, weight))
    with pytest.raises(ValueError, match=r"^reduction must be.*got 'mean'"):
        verl_linear_cross_entropy(x, weight, labels, temperature, "mean")


def test_trl(head):
    x, weight, bias, targets = head
    inputs = (x, weight)
    shim = ChunkedLogProbFunction.apply
    assert_same(shim(x, weight, targets, 0.7, 32), plain(x, weight, targets, 0.7), inputs)
    assert_same(shim(x, weight, targets, 0.7, 32, 0.5), plain(x, weight, targets, 0.7, scale=0.5), inputs)
    assert_same(shim(x, weight, None, targets, 0.7, 32, None, 1.0), plain(x, weight, targets, 0.7), inputs)
    assert_same(
        shim(x, weight, bias, targets, 0.7, 32, 5.0, 0.25),
        plain(x, weight, targets, 0.7, bias, 5.0, 0.25),
        (*inputs, bias),
    )
    for bad in ((targets,), (None, None, targets, 1.0, 32), (bias.detach(), 1.0, 32)):
        with pytest.raises(ValueError, match=r"^arguments must be.*got"):
            shim(x, weight, *bad)
    with pytest.raises(ValueError, match=r"^scale must be.*got 0"):
        shim(x, weight, targets, 1.0, 32, 0)


def test_modules(head):
    x, _, _, target = head
    linear = torch.nn.Linear(D, V)
    logprob = LinearLogprob.tied_to(linear, temperature=0.5, return_entropy=True)
    loss = LinearCrossEntropy.tied_to(linear, reduction="sum")
    assert logprob.weight is linear.weight and loss.bias is linear.bias
    out = logprob(x, target)
    expected = linear_logprob(
        x, linear.weight, target, bias=linear.bias, temperature=0.5, return_entropy=True
    )
    assert torch.equal(out.logprob, expected.logprob) and torch.equal(out.entropy, expected.entropy)
    assert logprob(x, target, return_entropy=False).entropy is None
    assert torch.equal(logprob(x, sample=True, seed=3).token, logprob(x, sample=True, seed=3).token)
    assert_close(
        loss(x, target),
        linear_cross_entropy(x, linear.weight, target, bias=linear.bias, reduction="sum"),
        1e-6,
    )
    loss(x, target).backward()
    assert linear.weight.grad.norm() > 0 and linear.bias.grad.norm() > 0
    assert "temperature=0.5" in repr(logprob) and "in_features=16" in repr(logprob)


def test_a_module_has_the_state_of_linear():
    module = LinearLogprob(D, V, return_lse=True, dtype=torch.bfloat16)
    linear = torch.nn.Linear(D, V, bias=False, dtype=torch.bfloat16)
    module.load_state_dict(linear.state_dict())
    assert torch.equal(module.weight, linear.weight) and module.bias is None
    assert module(torch.randn(3, D, dtype=torch.bfloat16)).lse.shape == (3,)
