"""transformers' Trainer on our models, and RefineTrainer: the numbers, and what is logged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import refine
from refine_kernels.linear_logprob import mix_seeds
from tests.clients.families import FAMILIES, tiny_model
from tests.numerics import assert_close
from tests.refine.tiny import VOCABULARY

pytest.importorskip("accelerate")


def rows(count: int, tokens: int) -> list[dict]:
    return [{"input_ids": x, "labels": x} for x in torch.randint(VOCABULARY, (count, tokens)).tolist()]


def arguments(folder, kind=TrainingArguments, **settings):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2} | settings
    settings = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True} | settings
    return kind(output_dir=str(folder), disable_tqdm=True, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_evaluate_and_predict(family, tmp_path):
    """Logits reach ``compute_metrics`` in evaluation, and only logits do; training makes none."""
    model, data = tiny_model(family, torch.float32), rows(4, 30)
    seen = {}

    def accuracy(prediction):
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": right.mean()}

    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=data, eval_dataset=data, compute_metrics=accuracy
    )
    trainer.train()
    metrics = trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in data])
    logits = model.eval()(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(metrics["eval_loss"] - expected) < 1e-5
    assert np.abs(seen["predictions"] - logits.detach().numpy()).max() < 1e-4
    assert metrics["eval_accuracy"] == (seen["predictions"][:, :-1].argmax(-1) == ids[:, 1:].numpy()).mean()
    assert trainer.predict(data).predictions.shape == (4, 30, VOCABULARY)


def test_label_smoothing_is_on_shifted_labels(tmp_path):
    model, data = tiny_model("delta_net", torch.float32), rows(2, 30)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=data)
    ids = torch.tensor([row["input_ids"] for row in data])
    loss = trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids})
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    assert_close(loss, expected, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extras", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_flattened_batches_are_the_documents_apart(family, extras):
    model = tiny_model(family)
    texts = [torch.randint(VOCABULARY, (n,)).tolist() for n in (21, 40, 3)]
    batch = DataCollatorWithFlattening(**extras)([{"input_ids": text} for text in texts])
    apart = [
        model(torch.tensor([text]), labels=torch.tensor([text]), num_items_in_batch=61).loss for text in texts
    ]
    assert_close(model(**batch).loss, sum(apart), 1e-11)


# ---- RefineTrainer -----------------------------------------------------------------------------------------

SETTINGS = {"num_chunks": 3, "rollout_length": 4, "reward": "hybrid", "lambda_rl": 0.5, "seed": 11}


def gradient(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_is_that_of_refine_train(family, tmp_path):
    """A training run takes ``refine_step`` with a seed from its own, the update's number and a document's key."""
    ids, mask, keys = torch.randint(VOCABULARY, (2, 90)), torch.ones(2, 90).long(), torch.tensor([5, 99])
    mask[1, 80:] = 0
    ours = tiny_model(family)
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    seeds = mix_seeds(SETTINGS["seed"], 0, keys)
    output = refine.refine_step(ours, ids, refine.RefineConfig(**settings), attention_mask=mask, seeds=seeds)
    output.loss.backward()
    model = tiny_model(family)
    trainer = refine.RefineTrainer(model, arguments(tmp_path, refine.RefineTrainingArguments, **SETTINGS))
    batch = {"input_ids": ids, "attention_mask": mask, "keys": keys}
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(model, batch)
    assert torch.equal(loss, output.loss.detach())
    for name, expected in gradient(ours).items():
        assert torch.equal(gradient(model)[name], expected), name


def test_accumulated_micro_batches_are_the_batch(tmp_path):
    data = rows(4, 90)
    logs, models = [], []
    for size, accumulated in ((4, 1), (1, 4)):
        model = tiny_model()
        settings = SETTINGS | {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
        }
        settings |= {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
        trainer = refine.RefineTrainer(
            model, arguments(tmp_path, refine.RefineTrainingArguments, **settings), train_dataset=data
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
        models.append(model)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert_close(a, b, 1e-10, name)
    for name in ("loss", "ntp_loss", "reward", "entropy", "rollout_length"):
        assert abs(logs[0][name] - logs[1][name]) < 1e-5, name


def test_lora_logs_samples_and_evaluates(tmp_path):
    peft = pytest.importorskip("peft")

    class Tokenizer:
        pad_token_id = 0

        def decode(self, ids):
            return " ".join(map(str, ids))

        def save_pretrained(self, *_, **__):
            pass

    lora = peft.LoraConfig(r=2, target_modules=["o_proj", "lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("gated_deltanet", torch.float32), lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = SETTINGS | {"learning_rate": 1e-2, "bf16": False}
    data = rows(4, 90)
    trainer = refine.RefineTrainer(
        model,
        arguments(tmp_path, refine.RefineTrainingArguments, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=Tokenizer(),
        data_collator=lambda batch: {
            name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")
        },
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert {"loss", "reward", "entropy", "ntp_loss", "clip_fraction", "grad_norm"} <= line.keys()
    assert "rollout" in (tmp_path / "samples" / "step-000002.txt").read_text()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert any("lm_head" in name for name in changed)
    assert 0 < trainer.evaluate()["eval_loss"] < 10


def test_packed_documents_in_a_batch(tmp_path):
    texts = [torch.randint(VOCABULARY, (n,)).tolist() for n in (90, 75)]
    batch = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    model = tiny_model()
    trainer = refine.RefineTrainer(model, arguments(tmp_path, refine.RefineTrainingArguments, **SETTINGS))
    packed = trainer.compute_loss(model.train(), dict(batch))
    apart = [trainer.compute_loss(model, {"input_ids": torch.tensor([text])}) for text in texts]
    assert_close(packed, sum(apart) / 2, 1e-10)


def test_what_a_refine_trainer_refuses(tmp_path):
    model = tiny_model()
    with pytest.raises(TypeError, match=r"args must be refine\.RefineTrainingArguments"):
        refine.RefineTrainer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="num_chunks must be a whole number"):
        arguments(tmp_path, refine.RefineTrainingArguments, num_chunks=0)
    trainer = refine.RefineTrainer(model, arguments(tmp_path, refine.RefineTrainingArguments, **SETTINGS))
    ids = torch.randint(VOCABULARY, (1, 90))
    labels = ids.clone()
    labels[0, :40] = -100
    with pytest.raises(ValueError, match="labels must be input_ids: 39 tokens are masked"):
        trainer.compute_loss(model.train(), {"input_ids": ids, "labels": labels})
