"""Hybrids in whole runs: training that resumes, test-time training, adapters."""

from __future__ import annotations

import json

import pytest
import torch

import refine
import refine.train as training
from refine import RefineConfig, refine_step
from refine.training.settings import parse_settings
from tests.refine.hybrids import VOCABULARY, hybrid

SIZES = (
    "hidden_size=16,num_hidden_layers=2,full_attention_interval=2,num_attention_heads=2,num_key_value_heads=1,"
    "head_dim=8,linear_num_key_heads=1,linear_num_value_heads=2,linear_key_head_dim=8,linear_value_head_dim=8,intermediate_size=24"
)


def run(folder, data, **changes) -> int:
    settings = {
        "model_type": "qwen3_5", "config_overrides": SIZES, "max_length": 200, "max_steps": 4, "save_steps": 2,
        "warmup_steps": 0, "eval_samples": 0, "shuffle_buffer": 4, "learning_rate": 1e-2,
        "save_total_limit": "none", "output_dir": folder, "dataset_name_or_path": data,
    } | changes  # fmt: skip
    return training.main([part for name, value in settings.items() for part in (f"--{name}", str(value))])


def test_a_run_resumes_bit_for_bit(tmp_path):
    data = tmp_path / "text.jsonl"
    lines = [
        {"text": f"Document {i}. " + "The grass is green and the sky is blue. " * (20 + i)} for i in range(12)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert run(tmp_path / "straight", data) == 0
    assert run(tmp_path / "resumed", data, resume_from_checkpoint=tmp_path / "straight" / "checkpoint-2") == 0
    first, second = (refine.load_model(tmp_path / name / "final") for name in ("straight", "resumed"))
    assert first.config.model_type == "qwen3_5_text"
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid"])
def test_a_type_without_a_size_is_a_small_model(model_type):
    settings = parse_settings(["--model_type", model_type])
    model = refine.models.new_model(model_type, vocab_size=4096, **settings.config_overrides)
    assert sum(p.numel() for p in model.parameters()) < 6e6
    assert set(model.config.layer_types) == {"linear_attention", "full_attention"}
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_step_through_low_rank_adapters():
    peft = pytest.importorskip("peft")
    targets = ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(hybrid("qwen3_5_text"), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.randint(VOCABULARY, (1, 250))
    gradients = []
    output = None
    for way in ("shared_prefix", "per_prefix"):
        model.zero_grad()
        given = {} if output is None else {"positions": output.positions, "rollouts": output.rollouts}
        config = RefineConfig(num_chunks=2, rollout_length=5, step=way)
        output = refine_step(model, ids, config, generator=torch.Generator().manual_seed(0), **given)
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    size = torch.stack([g.norm() for g in gradients[0].values()]).norm()
    assert all("lora" in name for name in gradients[0]) and size > 0
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-10 * size, name
