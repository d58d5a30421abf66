"""PEFT on every linear and on the head: the effective weights count, in every loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refine import RefineConfig, refine_step
from refine.models.head import NextTokenLoss, SampleToken, TokenLogprob
from tests.clients.families import FAMILIES, tiny_model
from tests.numerics import assert_close
from tests.refine.tiny import ragged_batch

peft = pytest.importorskip("peft")


def adapted(family: str, targets="all-linear", **settings):
    """A model with adapters whose B is no longer zero, so that they change the output."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": targets} | settings
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.double()


def cross_entropy(model, ids) -> torch.Tensor:
    """From the model's own logits, which call the head's module."""
    model.eval()
    logits = model(ids).logits
    model.train()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


HEADS = {
    "lora": {},
    "dropout 0": {"lora_dropout": 0.0},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "a copy": {"targets": ["o_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_is_that_of_the_models_own_logits(family, kind):
    settings = {"targets": ["lm_head"]} | HEADS[kind]
    model = adapted(family, **settings)
    ids, _ = ragged_batch(40, 40)
    if kind == "a copy":
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss, expected = model(ids, labels=ids).loss, cross_entropy(model, ids)
    assert_close(loss, expected, 1e-11, "loss")
    for a, b in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)):
        assert_close(a, b, 1e-10, "gradient")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains_every_adapter(family):
    """``all-linear`` leaves the head out; named, it is adapted as every other linear."""
    model = adapted(family, targets=["lm_head", "o_proj", "down_proj"])
    ids, _ = ragged_batch(90, 90)
    config = RefineConfig(num_chunks=2)
    output = refine_step(model, ids, config, seeds=torch.tensor([5, 6]))
    config = RefineConfig(num_chunks=2, step="per_prefix")
    slow = refine_step(model, ids, config, positions=output.positions, rollouts=output.rollouts)
    assert_close(output.loss, slow.loss, 1e-9, "loss")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    gradients = torch.autograd.grad(output.loss, list(trained.values()))
    expected = torch.autograd.grad(slow.loss, list(trained.values()))
    for name, a, b in zip(trained, gradients, expected):
        assert a.any(), name
        assert_close(a, b, 1e-8, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_give_the_same_logits(family):
    model = adapted(family, targets="all-linear").eval()
    ids, _ = ragged_batch(30, 30)
    before = model(ids).logits
    merged = model.merge_and_unload()
    assert_close(merged(ids).logits, before, 1e-11)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_a_disabled_adapter_is_the_base_model():
    model, base = adapted("delta_net", targets=["lm_head"]), tiny_model()
    ids, _ = ragged_batch(30)
    with model.disable_adapter():
        assert_close(model(ids, labels=ids).loss, base(ids, labels=ids).loss, 1e-12)


def test_dropout_before_an_adapter_is_that_of_the_heads_own_call():
    model = adapted("delta_net", targets=["lm_head"], lora_dropout=0.5).train()
    ids, _ = ragged_batch(30)
    head = model.base_model.model.lm_head
    hidden = model(ids, head=NextTokenLoss(ids, torch.ones(1, 30))).last_hidden_state
    torch.manual_seed(1)
    expected = head(hidden).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    torch.manual_seed(1)
    assert_close(model(hidden_states=hidden, head=TokenLogprob(ids)).logprob, expected, 1e-11)


# ---- other ways to wrap a head -----------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(model):
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Halved())


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)


def biased(model):
    old = model.lm_head
    model.lm_head = nn.Linear(old.in_features, old.out_features, bias=True).double()
    nn.init.normal_(model.lm_head.bias)


def overridden(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x) * 0.5


def two_linears(model):
    old = model.lm_head
    model.lm_head = nn.Sequential(
        nn.Linear(old.in_features, 7, bias=False), nn.Linear(7, old.out_features)
    ).double()


@pytest.mark.parametrize("wrap", [parametrized, hooked, biased, overridden, two_linears])
def test_a_wrapped_head_counts_as_it_is_called(wrap):
    model = tiny_model()
    wrap(model)
    ids, _ = ragged_batch(20, 20)
    loss, expected = model(ids, labels=ids).loss, cross_entropy(model, ids)
    assert_close(loss, expected, 1e-11, "loss")
    weights = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)):
        assert_close(a, b, 1e-10)
    logits = model.eval()(ids).logits
    greedy = model(ids, head=SampleToken(temperature=0.0))
    assert torch.equal(greedy.token, logits.argmax(-1))


def test_heads_that_no_weight_describes_are_refused():
    ids, _ = ragged_batch(8)
    model = tiny_model().train()
    model.lm_head.register_forward_hook(lambda module, inputs, output: F.dropout(output, 0.5))
    with pytest.raises(ValueError, match="lm_head is a Linear that is no linear map"):
        model(ids, labels=ids)
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(torch.ones(53, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="lm_head is a quantised Linear: leave it in floating point"):
        model(ids, labels=ids)
    model = tiny_model("lact")
    model.model.layers[0].attn.ttt_norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a RMSNorm with hooks"):
        model(ids)


def test_a_tuned_norm_inside_a_fused_operation_counts():
    model = peft.get_peft_model(
        tiny_model("lact"), peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["ttt_norm"])
    )
    ids, _ = ragged_batch(8)
    before = model(ids).logits
    for name, parameter in model.named_parameters():
        if "ttt_norm.modules_to_save" in name:
            parameter.data.mul_(2)
    assert (model(ids).logits - before).abs().max() > 1e-6
