"""The mimetic start: a fresh model already copies better than one from plain random weights can."""

from __future__ import annotations

import pytest
import torch

from refine.models import new_model

SETTINGS = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "vocab_size": 512,
    "intermediate_size": 64,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}


def copy_accuracy(model) -> float:
    """How often the model's best guess is right where a random text comes a second time."""
    once = torch.randint(512, (8, 40), generator=torch.Generator().manual_seed(1))
    twice = torch.cat([once, once], 1)
    with torch.no_grad():
        guess = model(twice).logits[:, 40:-1].argmax(-1)
    return (guess == once[:, 1:]).float().mean().item()


@pytest.mark.parametrize("family", ["delta_net", "gated_deltanet"])
def test_a_fresh_model_copies(family):
    settings = SETTINGS | (
        {"head_dim": 64, "expand_v": 1.0, "use_gate": False} if family == "gated_deltanet" else {}
    )
    plain = copy_accuracy(new_model(family, **settings))
    mimetic = copy_accuracy(new_model(family, mimetic_init=True, **settings))
    assert plain < 0.02
    assert mimetic > 0.1


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "qwen3_5_moe", "olmo_hybrid"])
def test_a_fresh_hybrid_copies(family):
    settings = {
        "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 48,
        "linear_value_head_dim": 48, "vocab_size": 512, "intermediate_size": 64, "initializer_range": 0.07,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if family != "olmo_hybrid":
        settings["head_dim"] = 64
    if family == "qwen3_5_moe":
        del settings["intermediate_size"]
    if family in ("qwen3_next", "qwen3_5_moe"):
        settings |= {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }  # fmt: skip
    plain = copy_accuracy(new_model(family, **settings))
    mimetic = copy_accuracy(new_model(family, mimetic_init=True, **settings))
    assert plain < 0.02
    assert mimetic > 0.3


LACT = {
    "hidden_size": 192, "num_hidden_layers": 3, "num_attn_heads": 3, "num_lact_heads": 3, "rope_theta": 1e6,
    "vocab_size": 512, "intermediate_size": 64, "initializer_range": 0.07, "tie_word_embeddings": True,
    "ttt_nope": True, "lact_chunk_size": 16, "window_size": 48,
}  # fmt: skip


def test_a_fresh_lact_copies_within_its_window_and_looks_back_by_one():
    model = new_model("lact", mimetic_init=True, **LACT)
    assert copy_accuracy(new_model("lact", **LACT)) < 0.02
    assert copy_accuracy(model) > 0.3
    added = []
    model.model.layers[0].attn.register_forward_hook(
        lambda module, given, found: added.append((given, found))
    )
    ids = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(ids)
        (x, *_), (found, *_) = added[0]
        mixer = model.model.layers[0].attn
        expected = mixer.o_proj(mixer.qkv(x).chunk(3, dim=-1)[2])  # of the values in the same places
    alike = torch.nn.functional.cosine_similarity(found[:, 1:], expected[:, :-1], dim=-1)
    assert alike.mean() > 0.9


def test_the_common_component_changes_no_prediction():
    settings = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32, "tie_word_embeddings": True}
    plain = new_model("qwen3_5", mimetic_init=True, seed=3, **settings)
    head, hidden = (
        plain.lm_head.weight.detach(),
        torch.randn(5, 32, generator=torch.Generator().manual_seed(1)),
    )
    shared = head.mean(1, keepdim=True)
    assert float((shared - shared.mean()).abs().max()) < 1e-6
    assert torch.allclose((hidden @ head.T).softmax(-1), (hidden @ (head - shared).T).softmax(-1), atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"num_hidden_layers": 1}, {"attn_qk_norm": True}, {"learnable_ttt_scale": False}]
)
def test_a_lact_that_cannot_begin_there_is_refused(wrong):
    with pytest.raises(ValueError, match="mimetic_init needs a LaCT of at least two layers"):
        new_model("lact", mimetic_init=True, **LACT | wrong)


def test_new_models_follow_their_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    a, b = (new_model("delta_net", seed=4, mimetic_init=True, **SETTINGS) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    other = new_model("delta_net", seed=5, mimetic_init=True, **SETTINGS)
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)


def test_a_gate_is_refused():
    with pytest.raises(ValueError, match="needs use_gate=false"):
        new_model("delta_net", mimetic_init=True, **SETTINGS | {"use_gate": True})
