"""Test-time training: it changes the model as told, and puts it back bit for bit whatever happens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from refine import RefineConfig, refine_step
from refine.data.document import stable_hash
from refine.evaluation.prompt_training import PromptTrainer, Snapshot
from refine.method import next_token_targets
from refine.models.head import NextTokenLoss
from refine.shared_settings import OptimizerSettings
from refine_kernels.linear_logprob import mix_seeds
from tests.refine.tiny import FAMILIES, VOCABULARY, tiny_model

CONFIG = RefineConfig(num_chunks=2, reward="binary", lambda_rl=0.4)


def prompts(*lengths: int) -> list[np.ndarray]:
    return [torch.randint(VOCABULARY, (length,)).numpy().astype(np.int32) for length in lengths]


def bits(model) -> dict[str, bytes]:
    return {name: x.detach().numpy().tobytes() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["refine", "sft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_optimizer_come_back_bit_for_bit(family, kind):
    model = tiny_model(family, torch.float32).eval()
    trainer = PromptTrainer(
        model, CONFIG, kind=kind, steps=2, optimizer=OptimizerSettings(learning_rate=1e-2)
    )
    before = bits(model)
    for _ in range(2):
        with trainer.adapted(prompts(90, 60), ["a", "b"]) as trained:
            assert trained == 2
            changed = bits(model)
            assert sum(changed[name] != before[name] for name in before) > len(before) / 2
            assert not model.training
            assert trainer.optimizer.state
        assert bits(model) == before
        assert not trainer.optimizer.state
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_they_come_back_after_an_exception(error):
    model = tiny_model(dtype=torch.float32).eval()
    trainer = PromptTrainer(model, CONFIG, optimizer=OptimizerSettings(learning_rate=1e-2))
    before = bits(model)
    with pytest.raises(error), trainer.adapted(prompts(80), ["a"]):
        assert bits(model) != before
        raise error
    assert bits(model) == before and not trainer.optimizer.state and not model.training


def test_they_come_back_when_training_itself_is_stopped(monkeypatch):
    model = tiny_model(dtype=torch.float32).eval()
    trainer = PromptTrainer(model, CONFIG, steps=3, optimizer=OptimizerSettings(learning_rate=1e-2))
    before, step, calls = bits(model), trainer.optimizer.step, []

    def step_then_stop(*arguments):
        step(*arguments)
        calls.append(bits(model) != before)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.optimizer, "step", step_then_stop)
    with pytest.raises(KeyboardInterrupt), trainer.adapted(prompts(80), ["a"]):
        pytest.fail("the prompts were not trained on to the end")
    assert calls == [True, True]
    assert bits(model) == before and not trainer.optimizer.state and not model.training


def test_they_come_back_when_restoring_is_stopped(monkeypatch):
    model = tiny_model(dtype=torch.float32).eval()
    trainer = PromptTrainer(model, CONFIG, optimizer=OptimizerSettings(learning_rate=1e-2))
    before, restore, calls = bits(model), Snapshot.restore, []

    def stop_first(self):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(Snapshot, "restore", stop_first)
    with pytest.raises(KeyboardInterrupt), trainer.adapted(prompts(80), ["a"]):
        pass
    assert bits(model) == before


def test_a_snapshot_brings_back_an_optimizer_that_has_worked():
    model = tiny_model(dtype=torch.float32)
    trainer = PromptTrainer(model, CONFIG, optimizer=OptimizerSettings(learning_rate=1e-2))
    trainer.train(prompts(80), ["a"])
    weights, state = bits(model), copy.deepcopy(trainer.optimizer.state_dict())
    snapshot = Snapshot(model, trainer.optimizer)
    trainer.train(prompts(80), ["b"])
    snapshot.restore()
    assert bits(model) == weights
    now = trainer.optimizer.state_dict()["state"]
    for number, values in state["state"].items():
        for name, value in values.items():
            assert torch.equal(now[number][name], value)
    trainer.train(prompts(80), ["c"])  # what was restored is not the snapshot's own
    snapshot.restore()
    assert bits(model) == weights


@pytest.mark.parametrize("kind", ["refine", "sft"])
def test_a_step_is_one_adamw_step_of_the_mean_loss(kind):
    model = tiny_model()
    batch, keys = prompts(90, 60), ["a", "b"]
    expected = copy.deepcopy(model)
    groups = [
        {"params": [p for p in expected.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in expected.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))
    for step in range(2):
        optimizer.zero_grad()
        ids = torch.zeros(2, 90, dtype=torch.int64)
        lengths = torch.tensor([90, 60])
        for row, prompt in enumerate(batch):
            ids[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
        if kind == "refine":
            mask = torch.arange(90) < lengths[:, None]
            numbers = torch.tensor([stable_hash(key) - 2**63 for key in keys])
            seeds = mix_seeds(7, step, numbers)
            loss = refine_step(expected, ids, CONFIG, attention_mask=mask, seeds=seeds).loss
        else:
            loss = expected(ids, use_cache=False, head=NextTokenLoss(*next_token_targets(ids, lengths))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
        optimizer.step()
    trainer = PromptTrainer(
        model, CONFIG, kind=kind, steps=2, seed=7,
        optimizer=OptimizerSettings(
            learning_rate=1e-2, adam_beta1=0.8, adam_beta2=0.9, weight_decay=0.1, max_grad_norm=0.05
        ),
    )  # fmt: skip
    assert trainer.train(batch, keys) == 2
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9, msg=name)


def test_a_step_by_segments_is_the_same():
    batch = prompts(200)
    weights = {}
    for kind in ("refine", "sft"):
        for length in (None, 64):
            model = tiny_model()
            config = RefineConfig(num_chunks=2, reward="binary", segment_length=length)
            PromptTrainer(model, config, kind=kind, optimizer=OptimizerSettings(learning_rate=1e-2)).train(
                batch, ["a"]
            )
            weights[kind, length] = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(weights[kind, None], weights[kind, 64], rtol=1e-6, atol=1e-8)


def test_short_prompts_are_left_out_and_bad_updates_skipped():
    model = tiny_model(dtype=torch.float32)
    trainer = PromptTrainer(model, CONFIG, optimizer=OptimizerSettings(learning_rate=1e-2))
    before = bits(model)
    assert trainer.least_tokens == CONFIG.min_tokens == 40
    assert trainer.train(prompts(39, 5), ["a", "b"]) == 0
    assert bits(model) == before
    assert trainer.train(prompts(39, 80), ["a", "b"]) == 1
    assert bits(model) != before
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    broken = bits(model)
    trainer.train(prompts(80), ["a"])
    assert trainer.skipped == 1 and bits(model) == broken
    with pytest.raises(ValueError, match="kind must be refine or sft, got 'none'"):
        PromptTrainer(model, CONFIG, kind="none")
