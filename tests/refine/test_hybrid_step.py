"""The REFINE step on hybrids: the shared prefix gives the gradient of full-prefix recomputation."""

from __future__ import annotations

import sys

import pytest
import torch

from refine import RefineConfig, refine_step
from tests.numerics import assert_close
from tests.refine.hybrids import FAMILIES, VOCABULARY, _Torch, hybrid

LENGTHS = (300, 229)


def make_batch():
    ids = torch.randint(VOCABULARY, (2, max(LENGTHS)))
    return ids, (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()


def step(model, config: dict, **options):
    model.zero_grad()
    ids, mask = make_batch()
    shared = {"num_chunks": 4, "rollout_length": 5, "state_stride": 64}
    config = RefineConfig(**shared | config)
    generator = torch.Generator().manual_seed(1)
    output = refine_step(model, ids, config, attention_mask=mask, generator=generator, **options)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def exact_router(monkeypatch) -> None:
    """transformers' routers compute their softmax in float32; here in float64, or rounding would be all we see."""
    for family in ("qwen3_5_moe", "qwen3_next"):
        __import__(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(sys.modules[f"transformers.models.{family}.modeling_{family}"], "torch", _Torch())


def compare(model, first: dict, second: dict, tolerance: float, **options) -> None:
    torch.manual_seed(0)
    output, expected = step(model, first, **options)
    torch.manual_seed(0)
    again, got = step(model, second, positions=output.positions, rollouts=output.rollouts)
    assert_close(again.loss, output.loss, tolerance)
    assert_close(again.logprobs, output.logprobs, tolerance)
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= tolerance * size, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rollouts", [1, 2])
def test_shared_prefix_is_full_prefix(family, rollouts, monkeypatch):
    exact_router(monkeypatch)
    both = {"num_rollouts": rollouts}
    compare(hybrid(family).train(), both, both | {"step": "per_prefix"}, 1e-10)


def test_at_both_clamps_and_beside_strides():
    positions = torch.tensor([[20, 63, 64, 280], [65, 127, 128, 209]])
    compare(hybrid("qwen3_5_text").train(), {}, {"step": "per_prefix"}, 1e-10, positions=positions)


def test_in_float32():
    # weights that magnify rounding little: at 0.1 float32 itself is 1e-5 and more from float64
    model = hybrid("qwen3_5_text", torch.float32, initializer_range=0.05).train()
    compare(model, {}, {"step": "per_prefix"}, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_give_the_gradient_of_one_pass(family, monkeypatch):
    exact_router(monkeypatch)
    compare(hybrid(family).train(), {}, {"segment_length": 64}, 1e-10)


def test_both_draw_the_same():
    model = hybrid("qwen3_next").train()
    outputs = []
    for config in ({}, {"segment_length": 100}, {"step": "per_prefix"}):
        torch.manual_seed(0)
        outputs.append(step(model, config)[0])
    for other in outputs[1:]:
        assert torch.equal(other.positions, outputs[0].positions)
        assert torch.equal(other.rollouts, outputs[0].rollouts)


def test_gradient_reaches_the_parents_keys():
    """Rollouts alone (no next-token loss) train the keys and values of the prefix that they attend to."""
    model = hybrid("qwen3_5_text", layer_types=["full_attention"], num_hidden_layers=1).train()
    _, gradients = step(model, {"lambda_sft": 0.0})
    assert gradients["model.layers.0.self_attn.k_proj.weight"].norm() > 0
    assert gradients["model.layers.0.self_attn.v_proj.weight"].norm() > 0
