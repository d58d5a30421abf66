"""Our hybrids compute what transformers' own models compute: logits, gradients, generated tokens."""

from __future__ import annotations

import math
import re

import pytest
import torch

from refine.models.body import checkpoint_activations
from tests.numerics import assert_close, relative_error
from tests.refine.hybrids import FAMILIES, VOCABULARY, hybrid, on_this_processor, transformers_model

LINEAR, FULL = "linear_attention", "full_attention"


def _layers(*types: str) -> dict:
    return {"layer_types": list(types), "num_hidden_layers": len(types)}


# groups of 1, 2 and 4 value heads, tied and untied, heads of 64 and 256, attention first, last, everywhere, nowhere
SHAPES = {
    "attention first": _layers(FULL, LINEAR)
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "tie_word_embeddings": True, "head_dim": 64},
    "attention last": _layers(LINEAR, LINEAR, FULL)
    | {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "head_dim": 256, "num_attention_heads": 2},
    "in between": _layers(LINEAR, FULL, LINEAR)
    | {"linear_num_key_heads": 1, "linear_num_value_heads": 4, "tie_word_embeddings": True},
    "attention everywhere": _layers(FULL, FULL),
    "attention nowhere": _layers(LINEAR, LINEAR),
}
NEEDS_BOTH = (
    "attention everywhere",
    "attention nowhere",
)  # layer types, which OLMo-hybrid's configuration demands
CASES = [
    (family, shape)
    for family in FAMILIES
    for shape in SHAPES
    if not (family == "olmo_hybrid" and shape in NEEDS_BOTH)
]


def _settings(family: str, shape: str) -> dict:
    settings = dict(SHAPES[shape])
    if family == "olmo_hybrid" and (size := settings.pop("head_dim", None)):
        settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * size}
    return settings


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_logits_and_gradients_are_those_of_transformers(family, shape, monkeypatch):
    ours = hybrid(family, **_settings(family, shape)).train()
    theirs = transformers_model(ours)
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 75))
    direction = torch.randn(2, 75, VOCABULARY, dtype=torch.float64)
    logits, gradients = {}, {}
    with on_this_processor(theirs, monkeypatch, exact=True):
        for name, model in (("ours", ours), ("theirs", theirs)):
            logits[name] = model(ids, use_cache=False).logits
            (logits[name] * direction).sum().backward()
            gradients[name] = {key: p.grad for key, p in model.named_parameters()}
    assert_close(logits["ours"], logits["theirs"], 1e-10, "logits")
    assert gradients["ours"].keys() == gradients["theirs"].keys()
    for key, expected in gradients["theirs"].items():
        assert_close(gradients["ours"][key], expected, 1e-10, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_logits_agree_as_far_as_it_goes(family, monkeypatch):
    """How far weights and tokens magnify rounding shows the error of transformers' own float32."""
    ours = hybrid(family, torch.float32).double().eval()  # weights that float32 holds
    theirs = transformers_model(ours)
    ids = torch.randint(VOCABULARY, (2, 75))
    with on_this_processor(theirs, monkeypatch, exact=False), torch.no_grad():
        expected = ours(ids).logits
        magnified = relative_error(theirs.float()(ids).logits, expected)
        assert_close(ours.float()(ids).logits, expected, 1e-5 + 2 * magnified)


@pytest.mark.parametrize("family", FAMILIES)
def test_40_greedy_tokens_are_those_of_transformers(family, monkeypatch):
    ours = hybrid(family).eval()
    theirs = transformers_model(ours)
    ids = torch.randint(VOCABULARY, (2, 9))
    options = {"max_new_tokens": 40, "do_sample": False}
    with on_this_processor(theirs, monkeypatch, exact=True):
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid"])
def test_in_bfloat16_the_error_is_that_of_transformers(family, monkeypatch):
    ours = hybrid(family).to(torch.bfloat16).double().eval()  # weights that bfloat16 holds
    theirs = transformers_model(ours)
    ids = torch.randint(VOCABULARY, (6, 90))
    expected = ours(ids).logits
    with on_this_processor(theirs, monkeypatch, exact=False), torch.no_grad():
        error = {
            name: (model.to(torch.bfloat16)(ids).logits.double() - expected).norm()
            for name, model in (("ours", ours), ("theirs", theirs))
        }
    assert error["ours"] <= 2 * error["theirs"]


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_scaled_rotary_positions_are_those_of_transformers(rope_type, monkeypatch):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope |= {"original_max_position_embeddings": 32} if rope_type == "yarn" else {}
    ours = hybrid(
        "qwen3_next", rope_parameters=rope, layer_types=[FULL] * 3, max_position_embeddings=128
    ).eval()
    theirs = transformers_model(ours)
    ids = torch.randint(VOCABULARY, (1, 100))
    with on_this_processor(theirs, monkeypatch, exact=True), torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, 1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rope_theta": math.nan}, "rope_theta must be a finite number above 0, got nan"),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor must be a finite number of at least 0 and at most 1",
        ),
        ({"factor": "4"}, "factor must be a finite number above 0, got '4'"),
        (
            {"original_max_position_embeddings": -1},
            "original_max_position_embeddings must be a finite number above 0",
        ),
        (
            {"rope_type": "llama3", "factor": None},
            "'llama3' needs factor, low_freq_factor, high_freq_factor in rope",
        ),
        ({"rope_theta": None}, "'yarn' needs rope_theta in rope_parameters"),
        (
            {"rope_type": "dynamic"},
            "rope_type 'dynamic' is not implemented, only default, linear, yarn, llama3 are",
        ),
    ],
    ids=str,
)
def test_rotary_positions_that_cannot_be_are_named(changed, message):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match=re.escape(message)):
        hybrid("qwen3_next", rope_parameters=rope | changed, max_position_embeddings=128)


def test_olmo_hybrid_without_positions(monkeypatch):
    ours = hybrid("olmo_hybrid", rope_parameters={"rope_theta": None, "rope_type": "default"}).eval()
    assert ours.model.layers[1].self_attn.rotary is None
    theirs = transformers_model(ours)
    ids = torch.randint(VOCABULARY, (1, 40))
    with on_this_processor(theirs, monkeypatch, exact=True), torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, 1e-10)


def test_gradient_checkpointing_changes_nothing():
    model = hybrid("qwen3_5_text").train()
    ids = torch.randint(VOCABULARY, (1, 70))
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    checkpoint_activations(model)
    for got, grad in zip(
        torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())), expected
    ):
        assert_close(got, grad, 1e-12)
