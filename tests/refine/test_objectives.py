"""The objectives against TRL's own loss on the same numbers, and against their definitions."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from refine import RefineConfig, refine_step
from refine.method.objective import OBJECTIVES, LossTerms, kl_estimate, policy_objective
from tests.refine.tiny import FAMILIES, ragged_batch, tiny_model

TOKENS = 9
LENGTHS = torch.tensor([9, 1, 4, 7, 9, 2])


def make_numbers(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Six completions whose ratios lie on both sides of every clip."""
    torch.manual_seed(6)
    old = -2 * torch.rand(6, TOKENS, dtype=dtype) - 0.1
    return {
        "logprobs": old + 0.7 * torch.randn(6, TOKENS, dtype=dtype),
        "old": old,
        "reference": old + 0.5 * torch.randn(6, TOKENS, dtype=dtype),
        "entropy": 3 * torch.rand(6, TOKENS, dtype=dtype),
        "advantages": torch.tensor([1.3, -0.4, -1.1, 0.8, -2.0, 0.0], dtype=dtype),
    }


def ours(objective: str, total: float | None = None, longest: int | None = None, **settings):
    """Loss, gradient and clipped share of completions as sequences of one rollout."""
    numbers = make_numbers()
    logprobs = numbers["logprobs"].requires_grad_()
    config = RefineConfig(objective=objective, **{"dual_clip": None} | settings)
    shape = (6, 1, 1, TOKENS)
    terms = LossTerms(
        ref_logprobs=numbers["reference"].view(shape),
        entropy=numbers["entropy"].view(shape),
        total_tokens=total,
        longest=longest,
    )
    loss, clipped = policy_objective(
        logprobs.view(shape), numbers["old"].view(shape), numbers["advantages"].view(6, 1, 1), config,
        LENGTHS.view(6, 1, 1), terms,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], clipped


def theirs(loss_type: str, level: str, total: float, **settings):
    """TRL's loss and gradient, of its own trainer's method without a model behind it."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    numbers = make_numbers()
    logprobs = numbers["logprobs"].requires_grad_()
    given = {
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
    } | settings
    high = given["epsilon"] if given["epsilon_high"] is None else given["epsilon_high"]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, numbers["entropy"], None),
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **_: x,
        ),
        args=SimpleNamespace(
            delta=given["delta"], use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        model=SimpleNamespace(training=True),
        beta=given["beta"], epsilon_low=given["epsilon"], epsilon_high=high, loss_type=loss_type,
        importance_sampling_level=level, top_entropy_quantile=given["top_entropy_quantile"],
        off_policy_mask_threshold=None,
        use_vllm=False, current_gradient_accumulation_steps=1, max_completion_length=TOKENS + 3,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer.get_high_entropy_mask = trainer_module.GRPOTrainer.get_high_entropy_mask.__get__(trainer)
    ids = torch.zeros(6, TOKENS, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": torch.ones(6, 2),
        "completion_ids": ids,
        "completion_mask": (torch.arange(TOKENS) < LENGTHS[:, None]).long(),
        "advantages": numbers["advantages"],
        "old_per_token_logps": numbers["old"],
        "ref_per_token_logps": numbers["reference"],
        "num_items_in_batch": torch.tensor(total),
    }
    loss = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], trainer._metrics["train"]


@pytest.mark.parametrize(
    ("settings", "their_settings"),
    [
        ({}, {}),
        ({"clip_range": 0.1, "clip_range_high": 0.28}, {"epsilon": 0.1, "epsilon_high": 0.28}),
        ({"dual_clip": 1.5}, {"delta": 1.5}),
        ({"beta": 0.3}, {"beta": 0.3}),
        ({"top_entropy_quantile": 0.4}, {"top_entropy_quantile": 0.4}),
        (
            {"beta": 0.1, "top_entropy_quantile": 0.7, "dual_clip": 2.0},
            {"beta": 0.1, "top_entropy_quantile": 0.7, "delta": 2.0},
        ),
    ],
    ids=["plain", "asymmetric", "dual clip", "beta", "entropy quantile", "all together"],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_equal_trl(objective, settings, their_settings):
    total = 41.0  # of the update; this batch has fewer
    if objective == "cispo" and "clip_range_high" not in settings:
        settings, their_settings = ({**s, name: 1.6} for s, name in (
            (settings, "clip_range_high"), (their_settings, "epsilon_high")
        ))  # fmt: skip
    level = "sequence" if objective == "gspo" else "token"
    expected = theirs("grpo" if objective == "gspo" else objective, level, total, **their_settings)
    found = ours(objective, total, TOKENS + 3, **settings)
    assert (found[0] - expected[0]).abs() < 1e-6
    assert (found[1] - expected[1]).abs().max() < 1e-6
    assert found[1].any() and not found[1][torch.arange(TOKENS) >= LENGTHS[:, None]].any()


def test_a_batch_by_itself_is_its_whole_update():
    for objective in ("dapo", "cispo"):
        settings = {"clip_range_high": 1.6}
        alone = ours(objective, **settings)[0]
        assert torch.allclose(alone, ours(objective, float(LENGTHS.sum()), **settings)[0])
    assert torch.allclose(ours("bnpo")[0], ours("dapo")[0])


def test_the_share_that_is_clipped():
    numbers = make_numbers()
    ratio = (numbers["logprobs"] - numbers["old"]).exp()
    gain = numbers["advantages"][:, None]
    counted = torch.arange(TOKENS) < LENGTHS[:, None]
    clipped = ((ratio > 1.2) & (gain > 0)) | ((ratio < 0.8) & (gain < 0))
    expected = ((clipped & counted).sum(1) / LENGTHS).mean()
    assert 0 < expected < 1
    for objective in ("grpo", "bnpo", "dr_grpo", "dapo"):
        assert torch.allclose(ours(objective)[2], expected)


# ---- in REFINE's own step ---------------------------------------------------------------------------------

CONFIG = RefineConfig(num_chunks=4, rollout_length=5, reward="hybrid", lambda_sft=0.0, lambda_rl=1.0)


def step(model, config, **given):
    """A step on a fixed batch."""
    torch.manual_seed(2)
    ids, mask = ragged_batch(120, 90)
    return refine_step(model, ids, config, attention_mask=mask, seeds=torch.tensor([3, 4]), **given)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_the_same_policy_gradient_on_policy(objective):
    """All ratios are 1 and all rollouts equally long: the objectives differ in nothing; sapo's gate has slope 1."""
    model = tiny_model()
    weight = model.lm_head.weight
    expected = torch.autograd.grad(step(model, CONFIG).loss, weight)[0]
    config = dataclasses.replace(CONFIG, objective=objective, clip_range_high=5.0)
    found = torch.autograd.grad(step(model, config).loss, weight)[0]
    assert expected.norm() > 1e-4 and torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"step": "per_prefix"}, {"segment_length": 64}], ids=str)
def test_a_reference_holds_the_policy_back(family, settings):
    """The loss with beta, every way of reading: of log-probs of the rollouts under both models."""
    model = tiny_model(family)
    reference = tiny_model(family)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    config = dataclasses.replace(CONFIG, beta=0.5, **settings)
    output = step(model, config, reference=reference)
    drawn = output.drawn
    of_reference = step(reference, CONFIG, positions=drawn.positions, rollouts=drawn.tokens).logprobs
    expected = 0.5 * kl_estimate(output.logprobs, of_reference).mean()
    plain = step(model, dataclasses.replace(config, beta=0.0)).nsp_loss
    assert expected > 1e-3 and torch.allclose(output.nsp_loss - plain, expected)
    assert all(p.grad is None for p in reference.parameters())
    output.loss.backward()
    assert all(p.grad is None for p in reference.parameters()) and model.lm_head.weight.grad.any()


def test_only_uncertain_tokens_enter_the_loss():
    """A share so small that one token of each batch is left."""
    model = tiny_model()
    output = step(model, dataclasses.replace(CONFIG, top_entropy_quantile=1e-6, lambda_rl=1.0))
    whole = step(model, dataclasses.replace(CONFIG, rollout_stop_entropy=1e-9))
    assert torch.equal(output.rollouts, whole.rollouts)
    gain = output.advantages.abs().flatten()
    assert output.nsp_loss.abs() > 0 and (output.nsp_loss.abs() * 40 - gain).abs().min() < 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "cispo"}, "cispo caps the ratio itself at clip_range_high, which is none"),
        (
            {"objective": "ppo"},
            "objective must be one of grpo, bnpo, dr_grpo, dapo, gspo, cispo, sapo or module",
        ),
        ({"clip_range_high": 0.0}, "clip_range_high must be over 0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile must be over 0 and at most 1, got 0.0"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be over 0"),
        (
            {"objective": "tests.refine.test_objectives:step", "beta": 0.1},
            "beta is for the built-in objectives",
        ),
    ],
)
def test_what_does_not_fit_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        RefineConfig(**settings)


def test_beta_needs_a_reference():
    with pytest.raises(ValueError, match=r"beta=0\.5 needs a reference model"):
        step(tiny_model(), dataclasses.replace(CONFIG, beta=0.5))
