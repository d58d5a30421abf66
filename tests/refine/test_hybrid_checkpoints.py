"""Hybrids load checkpoints as they are and save them under the same names."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from refine import load_model
from refine.models import MODELS, new_model
from tests.refine.hybrids import FAMILIES, VOCABULARY, config_of, hybrid, transformers_model

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_position_embeddings": 16,
}


def quietly(*args, **kwargs):
    """load_model where it has nothing to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(*args, **kwargs)


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(family, tied, tmp_path):
    """transformers saves (in shards), we load and save, transformers loads: the same names, the same values."""
    theirs = transformers_model(hybrid(family, torch.float32, tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    ours = quietly(tmp_path / "theirs")
    assert type(ours) is MODELS[family]
    ours.save_pretrained(tmp_path / "ours")
    first, second = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values()))


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A multimodal Qwen3.5 with a vision tower and a multi-token-prediction head."""
    folder = tmp_path_factory.mktemp("multimodal")
    config = config_of("qwen3_5_text").to_dict()
    vision = VISION | {"out_hidden_size": config["hidden_size"]}
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=config, vision_config=vision, tie_word_embeddings=True)
    )
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.norm.weight"] = torch.zeros(config["hidden_size"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_language_model_inside_a_multimodal_checkpoint(multimodal, tmp_path):
    with pytest.warns(
        UserWarning, match="only the language model is loaded, not the multi-token-prediction head"
    ) as told:
        ours = load_model(multimodal)
    assert len(told) == 1
    assert "the vision tower (" in str(told[0].message)
    assert ours.config.tie_word_embeddings and ours.config.model_type == "qwen3_5_text"
    stored = weights(multimodal)
    for name, value in ours.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(value, stored[name.replace("model.", "model.language_model.", 1)])

    with pytest.raises(ValueError, match="would be lost: save to another folder"):
        ours.save_pretrained(multimodal)
    ours.save_pretrained(tmp_path)
    ids = torch.randint(VOCABULARY, (1, 9))
    assert torch.equal(quietly(tmp_path)(ids).logits, ours(ids).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.Qwen3_5ForCausalLM
    assert torch.equal(theirs.model.norm.weight, ours.model.norm.weight)


def test_overrides_reach_the_language_models_part(multimodal):
    with pytest.warns(UserWarning):
        assert load_model(multimodal, rms_norm_eps=1e-3).model.norm.eps == 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
            r"layer_types\[1\] must be one of .*'sliding_attention'",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_type 'longrope' is not implemented",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented, only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not implemented"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantised"),
        ({"num_hidden_layers": 5}, "num_hidden_layers"),
        ({"hidden_size": "large"}, "hidden_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message, tmp_path):
    hybrid("qwen3_5_text", torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    hybrid("qwen3_5_text", torch.float32).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name: x for name, x in stored.items() if "A_log" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 missing keys.*layers\.0\.linear_attn\.A_log"):
        load_model(tmp_path)
    save_file(
        stored | {"model.extra": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"1 unexpected keys.*model\.extra"):
        load_model(tmp_path)


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="linear_num_key_heads"):
        new_model("qwen3_5", linear_num_key_head=2)
    with pytest.raises(ValueError, match="linear_num_value_heads must be a multiple of linear_num_key_heads"):
        MODELS["qwen3_next"](config_of("qwen3_next", linear_num_value_heads=3))
    with pytest.raises(ValueError, match="num_attention_heads must be a multiple of num_key_value_heads"):
        MODELS["qwen3_next"](config_of("qwen3_next", num_key_value_heads=3))


def test_transformers_own_classes_stay_what_they_are():
    config = transformers.Qwen3NextConfig(**config_of("qwen3_next").to_dict())
    assert type(AutoModelForCausalLM.from_config(config)) is transformers.Qwen3NextForCausalLM


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid"])
def test_a_new_model_starts_as_its_family_does(family):
    config = config_of(family if family in FAMILIES else f"{family}_text")
    not_settings = {"model_type", "transformers_version", "architectures", "dtype"}
    model = new_model(family, **{key: x for key, x in config.to_dict().items() if key not in not_settings})
    mixer = model.model.layers[0].linear_attn
    assert bool(torch.isfinite(mixer.A_log).all()) and bool((mixer.A_log <= 2.78).all())  # ln 16
    norm = model.model.norm.weight
    assert torch.equal(norm, torch.ones_like(norm) if family == "olmo_hybrid" else torch.zeros_like(norm))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "conv1d" not in name:
            assert 0.5 < float(parameter.std()) / model.config.initializer_range < 2, name
