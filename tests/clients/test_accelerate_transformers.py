"""transformers' own hybrids on our delta rule: the same numbers, reversible, also where theirs fails."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from refine import accelerate_transformers
from tests.numerics import assert_close
from tests.refine.hybrids import FAMILIES, VOCABULARY, hybrid, on_this_processor, transformers_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_tokens(family, monkeypatch):
    # weights that magnify rounding little: at 0.2 transformers' own float32 is 1e-5 and more from float64
    theirs = transformers_model(hybrid(family, torch.float32, initializer_range=0.1).eval())
    faster = accelerate_transformers(copy.deepcopy(theirs))
    ids = torch.randint(VOCABULARY, (2, 150))
    options = {"max_new_tokens": 20, "do_sample": False}
    logits, tokens = faster(ids).logits, faster.generate(ids[:, :9], **options)  # whatever else is installed
    with on_this_processor(theirs, monkeypatch, exact=False):
        assert_close(logits, theirs(ids).logits, 1e-5)
        assert torch.equal(tokens, theirs.generate(ids[:, :9], **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_layer_are_those_of_float64(family, monkeypatch):
    # weights as above
    theirs = transformers_model(hybrid(family, initializer_range=0.1).float().double().train())
    with on_this_processor(theirs, monkeypatch, exact=True):
        exact = _layer_gradients(theirs)
    got = _layer_gradients(accelerate_transformers(theirs.float()))
    size = sum(g.norm().square() for g in exact.values()).sqrt()
    for name, expected in exact.items():
        assert (got[name].double() - expected).norm() <= 1e-5 * size, name


def _layer_gradients(model) -> dict[str, torch.Tensor]:
    layer, dtype = model.model.layers[0].linear_attn, model.dtype
    torch.manual_seed(0)
    x, direction = (
        torch.randn(1, 200, 32, dtype=torch.float64).to(torch.float32).to(dtype) for _ in range(2)
    )
    parameters = dict(layer.named_parameters())
    x.requires_grad_()
    gradients = torch.autograd.grad(layer(x), (x, *parameters.values()), direction)
    return dict(zip(("x", *parameters), gradients))


def test_it_can_be_undone_and_done_twice():
    theirs = transformers_model(hybrid("qwen3_5_text", torch.float32))
    classes = [type(module) for module in theirs.modules()]
    names = list(theirs.state_dict())
    assert accelerate_transformers(accelerate_transformers(theirs)) is theirs
    assert type(theirs.model.layers[0].linear_attn) not in classes
    assert list(theirs.state_dict()) == names
    assert accelerate_transformers(theirs, undo=True) is theirs
    assert [type(module) for module in theirs.modules()] == classes


def test_other_models_of_the_process_stay_as_they_are():
    first = transformers_model(hybrid("qwen3_next", torch.float32))
    second = copy.deepcopy(first)
    forward = type(second.model.layers[0].linear_attn).forward
    accelerate_transformers(first)
    assert type(second.model.layers[0].linear_attn).forward is forward
    assert type(copy.deepcopy(first).model.layers[0].linear_attn).forward is not forward


ON_A_CPU = """
import torch
from refine import accelerate_transformers
from tests.refine.hybrids import hybrid, transformers_model
model, ids = transformers_model(hybrid("qwen3_5_text", torch.float32)), torch.arange(20)[None]
try:
    model(ids)
except RuntimeError as error:
    print("theirs:", error)
print("ours:", bool(torch.isfinite(accelerate_transformers(model)(ids).logits).all()))
"""


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there, flash-linear-attention works")
def test_where_flash_linear_attention_fails_on_a_cpu():
    """In a process of its own: under the tests' Triton interpreter it cannot be imported."""
    run = subprocess.run([sys.executable, "-c", ON_A_CPU], capture_output=True, text=True, check=True)
    assert "theirs: 0 active drivers" in run.stdout
    assert "ours: True" in run.stdout


def test_left_padding_reaches_nothing():
    model = accelerate_transformers(transformers_model(hybrid("olmo_hybrid", torch.float32).eval()))
    ids = torch.randint(VOCABULARY, (1, 30))
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 30, dtype=torch.int64)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
    assert_close(got, model(ids).logits, 1e-5)


def test_inside_an_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["in_proj_qkv", "q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers_model(hybrid("qwen3_5_text", torch.float32)), config)
    ids = torch.randint(VOCABULARY, (1, 20))
    accelerate_transformers(model)(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients and all(g.norm() > 0 for g in gradients)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="Linear has no gated-delta layer of transformers'"):
        accelerate_transformers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Qwen3_5ForCausalLM has no gated-delta layer of transformers'"):
        accelerate_transformers(hybrid("qwen3_5_text"))  # ours already


def test_layers_of_newer_families_are_found():
    """Families that call the rule under the same name are accelerated without a list of them."""
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    from refine.integrations.accelerate import _accelerated

    layers = [
        c for c in vars(module).values() if isinstance(c, type) and c.__name__.endswith("GatedDeltaNet")
    ]
    assert layers and all(_accelerated(layer) is not None for layer in layers)
    assert sys.modules[module.__name__] is module
