"""Both published checkpoints at their full size: their own tensor names, random weights, loaded and read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import refine

COMMON = {"num_hidden_layers": 24, "vocab_size": 32000, "tie_word_embeddings": False}
DELTA_NET = COMMON | {
    "model_type": "delta_net", "architectures": ["DeltaNetForCausalLM"], "hidden_size": 2048, "num_heads": 16,
    "intermediate_size": 5632, "norm_eps": 1e-6,
}  # fmt: skip
LACT = COMMON | {
    "model_type": "lact_swiglu", "architectures": ["LaCTForCausalLM"], "hidden_size": 1536, "num_attn_heads": 24,
    "num_lact_heads": 4, "intermediate_size": 4096, "w0_w2_low_rank": 32, "rope_theta": 1e6, "norm_eps": 1e-6,
    "use_momentum": True, "learnable_ttt_scale": True,
}  # fmt: skip


def delta_net_layer() -> dict[str, tuple[int, ...]]:
    names = {f"attn.{x}_proj.weight": (2048, 2048) for x in "qkvo"}
    names |= {f"attn.{x}_conv1d.weight": (2048, 1, 4) for x in "qkv"}
    return names | {"attn.b_proj.weight": (16, 2048), "attn.o_norm.weight": (128,)}


def lact_layer() -> dict[str, tuple[int, ...]]:
    names = {"attn.qkv.weight": (4608, 1536), "attn.o_proj.weight": (1536, 1536), "attn.w1": (4, 384, 384)}
    names |= {f"attn.{w}.{side}": shape for w in ("w0", "w2")
              for side, shape in (("w_left", (4, 384, 32)), ("w_right", (4, 32, 384)))}  # fmt: skip
    for projection, rows in (("lr_proj", 12), ("ttt_scale_proj", 4), ("momentum_proj.0", 4)):
        names |= {f"attn.{projection}.weight": (rows, 1536), f"attn.{projection}.bias": (rows,)}
    names |= {"attn.qk_scale": (1536, 2), "attn.qk_offset": (1536, 2)}
    return names | {"attn.ttt_norm.weight": (384,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "layer", "tensors", "parameters"),
    [(DELTA_NET, delta_net_layer(), 339, 1_365_677_056), (LACT, lact_layer(), 507, 797_625_312)],
    ids=["DeltaNet-1.3B", "LaCT-760M"],
)
def test_a_published_checkpoint_loads_by_its_own_names(tmp_path, config, layer, tensors, parameters):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layer = layer | {"attn_norm.weight": (hidden,), "mlp_norm.weight": (hidden,)}
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, inner)}
    shapes = {"model.embeddings.weight": (32000, hidden), "model.norm.weight": (hidden,)}
    shapes |= {"lm_head.weight": (32000, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(24) for name, shape in layer.items()}
    assert len(shapes) == tensors
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        for name, shape in shapes.items()
    }
    assert sum(x.numel() for x in weights.values()) == parameters
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = refine.load_model(tmp_path).eval()
    loaded = dict(model.named_parameters())
    assert {name: x.dtype for name, x in loaded.items()} == dict.fromkeys(weights, torch.bfloat16)
    for name in ("lm_head.weight", "model.layers.23.mlp.down_proj.weight", *shapes):
        assert torch.equal(loaded[name].flatten()[:64], weights[name].flatten()[:64]), name
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 7, 11]])).logits
    assert logits.shape == (1, 4, 32000) and logits.isfinite().all()
