"""The fused head under other names: modules, and what RL trainers call theirs."""

from __future__ import annotations

import pytest
import torch

from refine_kernels import LinearCrossEntropy, LinearLogprob, linear_cross_entropy, linear_logprob
from refine_kernels.linear_logprob.integrations import (
    ChunkedLogProbFunction,
    install_in_trl,
    verl_linear_cross_entropy,
)
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


SETTINGS = [
    {"temperature": 0.7, "softcap": None, "scale": 1.0, "bias": False},
    {"temperature": 1.0, "softcap": 5.0, "scale": 0.25, "bias": True},
    {"temperature": 1.3, "softcap": None, "scale": 2.0, "bias": True},
]
STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def trl_arguments(head, setting):
    x, weight, bias, targets = head
    bias = bias if setting["bias"] else None
    return x, weight, bias, targets, setting["temperature"], 16, setting["softcap"], setting["scale"]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_trl(head, setting):
    x, weight, bias, targets = head
    arguments = trl_arguments(head, setting)
    z = x @ weight.t() + (bias if setting["bias"] else 0)
    z = z * setting["scale"]
    z = z if setting["softcap"] is None else setting["softcap"] * (z / setting["softcap"]).tanh()
    z = z / setting["temperature"]
    targets[:5] = z[:5].argmax(-1)
    p = z.softmax(-1)
    expected = plain(x, weight, targets, arguments[4], arguments[2], arguments[6], arguments[7])
    inputs = (x, weight, bias) if setting["bias"] else (x, weight)
    out = ChunkedLogProbFunction.apply(*arguments)
    assert_same(out[:2], expected, inputs)
    assert_close(out[2], p.square().sum(-1).log(), 1e-5)
    assert (out[3] - z.mean(-1)).abs().max() <= 1e-5 * z.abs().mean()
    assert torch.equal(out[4], z.argmax(-1) == targets) and out[4][:5].all()
    assert not any(value.requires_grad for value in out[2:])
    assert ChunkedLogProbFunction.apply(*arguments, ("log_probs",))[1:] == (None,) * 4
    for name, place in zip(STATISTICS, range(1, 5)):
        only = ChunkedLogProbFunction.apply(*arguments, ("log_probs", name))
        assert torch.equal(only[place], out[place]) and sum(value is not None for value in only) == 2
    with pytest.raises(ValueError, match=r"^logit_scale must be.*got 0"):
        ChunkedLogProbFunction.apply(*arguments[:7], 0)
    with pytest.raises(ValueError, match=r"^outputs must be those of TRL 1.16, got \['perplexity'\]"):
        ChunkedLogProbFunction.apply(*arguments, ("perplexity",))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_installed_trl_computes_the_same(head, setting):
    kernels = pytest.importorskip("trl.kernels")
    arguments = trl_arguments(head, setting)
    inputs = [x for x in arguments[:3] if x is not None]
    ours, theirs = (
        function.apply(*arguments, STATISTICS)
        for function in (ChunkedLogProbFunction, kernels.ChunkedLogProbFunction)
    )
    assert_same(ours[:2], theirs[:2], inputs)
    assert_close(ours[2], theirs[2], 1e-5)
    assert (ours[3] - theirs[3]).abs().max() < 1e-5
    assert torch.equal(ours[4], theirs[4])


def test_trl_calls_it_and_another_release_is_refused(monkeypatch):
    trl = pytest.importorskip("trl")
    utils = pytest.importorskip("trl.trainer.utils")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.randint(V, (2, 9))
    results = []
    for install in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        if install:
            install_in_trl()
            assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
        utils.add_fused_lm_head(model, outputs=("log_probs", *STATISTICS))
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        results.append([out.loss, out.entropy, torch.autograd.grad(out.loss, model.lm_head.weight)[0]])
    for ours, theirs in zip(results[1], results[0]):
        assert_close(ours, theirs, 1e-5)
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match=r"TRL 1\.16, got TRL 1\.17\.0"):
        install_in_trl()


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
