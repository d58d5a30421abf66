"""TRL's own GRPOTrainer and the one that reads prompts once: the same losses, gradients, metrics and steps."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.numerics import assert_gradients_close
from tests.refine.tiny import FAMILIES, VOCABULARY, tiny_model

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from refine.integrations.trl_grpo import PromptOnceGRPOTrainer, shuffle_groups  # noqa: E402

PROMPTS = [
    " ".join(f"t{(7 * i + j * j) % 40 + 3}" for j in range(length))
    for i, length in enumerate((40, 9, 70, 33))
]


def count_t5(prompts, completions, **_):
    """A reward: how many t5."""
    return [float(text.split().count("t5")) + 0.1 * (len(text) % 7) for text in completions]


def make_trainer(kind, folder, family: str = "delta_net", model=None, **settings):
    """A trainer over four prompts, 4 completions each, in float32 on the CPU."""
    words = {f"t{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", eos_token="t1", unk_token="t2")
    given = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4,
        "max_completion_length": 12, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1,
        "temperature": 0.9, "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True,
    } | settings  # fmt: skip
    return kind(
        model=model or tiny_model(family, torch.float32, initializer_range=0.15),
        reward_funcs=count_t5,
        args=trl.GRPOConfig(output_dir=str(folder), **given),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )


def make_batch() -> dict[str, torch.Tensor]:
    """What TRL hands to its loss: two prompts padded on the left, rows out of order, one masked out as a whole."""
    torch.manual_seed(8)
    prompts = torch.randint(3, VOCABULARY, (2, 45))
    mask = (torch.arange(45) >= torch.tensor([[0], [14]])).long()
    row = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1])
    lengths = torch.tensor([12, 3, 1, 7, 12, 5, 0, 9])
    completion_mask = (torch.arange(12) < lengths[:, None]).long()
    return {
        "prompt_ids": (prompts * mask)[row],
        "prompt_mask": mask[row],
        "completion_ids": torch.randint(3, VOCABULARY, (8, 12)) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.randn(8),
        "old_per_token_logps": -4 + 0.3 * torch.randn(8, 12),
        "ref_per_token_logps": -4 + 0.3 * torch.randn(8, 12),
        "num_items_in_batch": lengths.sum() * 2,
    }


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradient_and_metrics_equal_trl(family, loss_type, tmp_path):
    batch = make_batch()
    found = []
    settings = {"loss_type": loss_type, "beta": 0.1, "top_entropy_quantile": 0.7, "entropy_coef": 0.05}
    for kind in (trl.GRPOTrainer, PromptOnceGRPOTrainer):
        trainer = make_trainer(kind, tmp_path, family, **settings)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        found.append((loss.item(), gradients, {k: v[-1] for k, v in trainer._metrics["train"].items()}))
    (expected, right, metrics), (loss, gradients, ours) = found
    assert abs(loss - expected) < 1e-5 * abs(expected)
    assert_gradients_close(gradients, right, 1e-5)
    assert metrics.keys() == ours.keys()
    assert all(
        abs(ours[name] - metrics[name]) <= 1e-5 * max(1, abs(metrics[name]))
        for name in metrics
        if metrics[name] == metrics[name]
    )


@pytest.mark.parametrize("options", [{"max_branches": 3}, {"max_branches": 2, "segment_length": 64}])
def test_less_memory_changes_nothing(options, tmp_path):
    losses = []
    for given in ({}, options):
        trainer = make_trainer(PromptOnceGRPOTrainer, tmp_path)
        trainer.max_branches, trainer.segment_length = given.get("max_branches"), given.get("segment_length")
        trainer.model.train()
        losses.append(trainer._compute_loss(trainer.model, make_batch()).item())
    assert abs(losses[0] - losses[1]) < 1e-6
