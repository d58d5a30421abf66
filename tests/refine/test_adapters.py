"""LoRA in every phase and in test-time training: only adapters are trained, saved, resumed and restored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refine import RefineConfig, load_model
from refine.evaluation.prompt_training import PromptTrainer
from refine.evaluation.settings import EvalSettings
from refine.models.adapters import WithoutAdapters, add_adapters
from refine.prepare import load_model_and_tokenizer, packaged_model
from refine.settings import SettingsError
from refine.shared_settings import OptimizerSettings
from refine.training.settings import TrainSettings
from refine.training.tracking import read_metrics
from tests.numerics import assert_close
from tests.refine.test_group_phase import GRPO
from tests.refine.test_train import run
from tests.refine.test_train_parallel import torchrun
from tests.refine.tiny import tiny_model

peft = pytest.importorskip("peft")

LORA = {
    "model_type": None,
    "config_overrides": None,
    "model_name_or_path": packaged_model(),
    "use_peft": True,
}
LORA |= {"lora_r": 4, "learning_rate": 1e-2, "max_steps": 2, "eval_samples": 0, "sample_steps": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": f"Number {i}. " + "Grass is green. " * 40 + "Which?", "answer": str(i)} for i in range(9)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def adapters(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


PHASES = {
    "mid": {"beta": 0.1},
    "sft": {"packing": True},
    "post": {"phase": "post"},
    "grpo": GRPO | {"beta": 0.1, "max_steps": 2, "eval_samples": 0},
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_trains_and_saves_adapters_alone(tmp_path, text_file, rows, phase):
    data = text_file if phase in ("mid", "sft") else rows
    assert run(tmp_path, data, **LORA | {"phase": phase} | PHASES[phase]) == 0
    final = tmp_path / "final"
    assert {p.name for p in final.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (final / "model.safetensors").exists() and not (final / "README.md").exists()
    trained = adapters(final)
    assert all("lora_" in name for name in trained)
    assert all(bool(value.any()) for name, value in trained.items() if "lora_B" in name)
    if "beta" in PHASES[phase] and phase == "grpo":  # the reference is the policy without adapters
        lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "kl" in line]
        assert abs(lines[0]["kl"]) < 1e-6 < lines[1]["kl"]

    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        by_peft = peft.PeftModel.from_pretrained(load_model(packaged_model(), dtype=torch.float32), final)
        expected = by_peft.eval()(ids).logits
        merged = load_model(final, dtype=torch.float32).eval()
        assert_close(merged(ids).logits, expected, 1e-5, "merged")
        assert not torch.equal(load_model(packaged_model(), dtype=torch.float32).eval()(ids).logits, expected)
    assert not hasattr(merged, "peft_config")


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_same_run(tmp_path, text_file):
    changes = LORA | {"max_steps": 4, "save_steps": 2, "lora_dropout": 0.1, "lora_modules_to_save": "norm"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, text_file, **changes) == 0
    assert run(parts, text_file, **changes | {"max_steps": 2}) == 0
    assert run(parts, text_file, **changes, resume_from_checkpoint="auto") == 0
    expected, found = adapters(whole / "final"), adapters(parts / "final")
    assert expected.keys() == found.keys() and any("lora" not in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_training_goes_on_with_the_adapters_of_a_folder(tmp_path, text_file, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(first, text_file, **LORA) == 0
    other = LORA | {"lora_r": 8, "model_name_or_path": str(first / "final")}
    assert run(second, text_file, **other) == 2
    assert "lora_r is 8, but the adapters" in capsys.readouterr().err and not second.exists()
    assert run(second, text_file, **other | {"lora_r": 4, "beta": 0.1}) == 0
    config = json.loads((second / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(packaged_model())


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_head_is_merged_without_changing_the_embeddings(tmp_path, tied):
    base = tiny_model("gated_deltanet", tie_word_embeddings=tied).float()
    base.save_pretrained(tmp_path / "base")
    model = add_adapters(
        load_model(tmp_path / "base"), tmp_path / "base", r=2, target_modules=["lm_head", "q_proj"]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapters")
    merged, ids = load_model(tmp_path / "adapters").eval(), torch.arange(40)[None]
    with torch.no_grad():
        assert_close(merged(ids).logits, model.eval()(ids).logits, 1e-5, "logits")
        assert torch.equal(merged.model.embeddings.weight, base.model.embeddings.weight)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, merged(ids).logits)


def test_test_time_training_touches_and_restores_adapters_alone():
    settings = EvalSettings(use_peft=True, lora_r=2, ttt="refine")
    model, _ = load_model_and_tokenizer(settings)
    trainer = PromptTrainer(
        model, RefineConfig(num_chunks=2, rollout_length=2), optimizer=OptimizerSettings(learning_rate=1e-2)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompt = np.arange(40, dtype=np.int64)
    with trainer.adapted([prompt], ["a"]) as count:
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert count == 1 and changed and all("lora_" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_reference_of_adapters_is_the_model_without_them():
    model = add_adapters(tiny_model("delta_net").float(), packaged_model(), r=2)
    ids = torch.arange(30)[None]
    plain = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        expected = plain(ids).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        assert torch.equal(WithoutAdapters(model)(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_r": 4}, "lora_r is about LoRA adapters: it needs use_peft"),
        ({"use_peft": True, "model_type": "lact"}, "use_peft trains adapters of a model that is there"),
        ({"use_peft": True, "lora_target_modules": ["all-linear", "q_proj"]}, "goes without other names"),
        ({"use_peft": True, "lora_r": 0}, "lora_r"),
    ],
)
def test_settings_that_cannot_be(given, said):
    with pytest.raises(SettingsError, match=said):
        TrainSettings(**given)


def test_names_that_are_not_there(tmp_path, text_file, capsys):
    assert run(tmp_path / "a", text_file, **LORA, lora_target_modules="q_prj") == 2
    assert "no linear map 'q_prj'; it has" in capsys.readouterr().err
    assert run(tmp_path / "a", text_file, **LORA, lora_modules_to_save="nrm") == 2
    assert "lora_modules_to_save: the model has no module 'nrm'" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="use_peft is about test-time training"):
        EvalSettings(use_peft=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_end_where_one_ends(tmp_path, text_file, mode):
    changes = LORA | {"max_steps": 3}
    assert run(tmp_path / "one", text_file, **changes | {"gradient_accumulation_steps": 2}) == 0
    torchrun(tmp_path / "two", text_file, **changes, parallel=mode)
    expected = adapters(tmp_path / "one" / "final")
    found = adapters(tmp_path / "two" / "final")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, 1e-3, name)
