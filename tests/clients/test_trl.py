"""TRL's SFT, GRPO and DPO trainers on every family: they run, and their first numbers are right."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

import refine
from refine.prepare import packaged_model
from tests.clients.families import tiny_model
from tests.refine import tiny

trl = pytest.importorskip("trl", exc_type=ImportError)
datasets = pytest.importorskip("datasets")

TEXTS = [f"def f_{i}(x): return x + {i}\n" * (1 + i % 3) for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A model as users have it: loaded from a folder, which reference models are loaded from again."""

    def load(family):
        settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        tiny_model(family, torch.float32, **settings).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return refine.load_model(tmp_path / "model")

    return load


def arguments(kind, folder, **settings):
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
    } | settings
    settings |= {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    return kind(output_dir=str(folder / "out"), learning_rate=1e-3, **settings)


def train(trainer) -> dict[str, float]:
    """The first line that is logged; the step has changed the weights."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    return trainer.state.log_history[0]


@torch.no_grad()
def log_likelihood(model, ids: list[int], start: int = 1) -> float:
    """Of tokens ``start`` and on."""
    logprobs = model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids)))


WAYS = {
    "nll": {},
    "chunked_nll": {"loss_type": "chunked_nll"},
    "packing": {"packing": True, "max_length": 64, "per_device_train_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None},
}
FAMILIES = (*tiny.FAMILIES, "qwen3_5")


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in FAMILIES for way in WAYS if way != "chunked_nll" or family == "delta_net"],
)
def test_sft(family, way, saved, tmp_path, tokenizer):
    model = saved(family)
    trainer = trl.SFTTrainer(
        model,
        arguments(trl.SFTConfig, tmp_path, **WAYS[way]),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == (way in ("packing", "padding-free"))
    documents = _documents(batch)
    assert len(documents) >= 2
    expected = -sum(log_likelihood(model, ids) for ids in documents) / sum(len(ids) - 1 for ids in documents)
    model.train()
    assert abs(trainer.compute_loss(model, dict(batch)).item() - expected) < 1e-5 * expected
    assert math.isfinite(train(trainer)["grad_norm"])


def _documents(batch) -> list[list[int]]:
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        return [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"])]
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    return [ids[0, a:b].tolist() for a, b in zip(starts, [*starts[1:], ids.shape[1]])]


@pytest.mark.parametrize(("family", "beta"), [("delta_net", 0.0), *((family, 0.1) for family in FAMILIES)])
def test_grpo(family, beta, saved, tmp_path, tokenizer):
    """Sampler and trainer agree: at the first step the ratio is 1 and the reference model is no way off."""
    texts = []

    def reward(completions, **_):
        texts.extend(completions)
        return [float(i) for i in range(len(completions))]

    trainer = trl.GRPOTrainer(
        saved(family),
        reward_funcs=reward,
        args=arguments(trl.GRPOConfig, tmp_path, num_generations=2, max_completion_length=5, beta=beta),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )
    line = train(trainer)
    assert len(texts) == 2 and line["reward_std"] > 0 and line["grad_norm"] > 0
    assert abs(line["loss"]) < 1e-5 and line["clip_ratio/region_mean"] == 0
    if beta:
        assert abs(line["kl"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo(family, saved, tmp_path, tokenizer):
    model = saved(family)
    prompt, answers = TEXTS[0], {"chosen": ["yes, that is it"] * 2, "rejected": ["no"] * 2}
    data = datasets.Dataset.from_dict({"prompt": [prompt, prompt[:9]], **answers})
    trainer = trl.DPOTrainer(
        model, args=arguments(trl.DPOConfig, tmp_path), train_dataset=data, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    rows = []
    for row, mask, completion in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
        ids, start = row[mask.bool()].tolist(), int(mask.sum() - completion.sum())
        rows.append(log_likelihood(model, ids, start))
    expected = {"chosen": sum(rows[:2]) / 2, "rejected": sum(rows[2:]) / 2}
    line = train(trainer)
    assert abs(line["loss"] - math.log(2)) < 1e-5
    for kind, value in expected.items():
        assert abs(line[f"logps/{kind}"] - value) < 1e-4 * abs(value), kind
