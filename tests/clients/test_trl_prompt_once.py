"""TRL's own GRPOTrainer and the one that reads prompts once: the same losses, gradients, metrics and steps."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import assert_gradients_close
from tests.refine.tiny import FAMILIES, VOCABULARY, tiny_model

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from refine import load_model  # noqa: E402
from refine.integrations.trl_grpo import PromptOnceGRPOTrainer, shuffle_groups  # noqa: E402

PROMPTS = [
    " ".join(f"t{(7 * i + j * j) % 40 + 3}" for j in range(length))
    for i, length in enumerate((40, 9, 70, 33))
]


def count_t5(prompts, completions, **_):
    """A reward: how many t5."""
    return [float(text.split().count("t5")) + 0.1 * (len(text) % 7) for text in completions]


def make_trainer(kind, folder, family: str = "delta_net", **settings):
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
    # TRL reads the reference
    tiny_model(family, torch.float32, initializer_range=0.1).save_pretrained(folder)
    trainer = kind(
        model=load_model(folder),
        reward_funcs=count_t5,
        args=trl.GRPOConfig(output_dir=str(folder), **given),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = given["gradient_accumulation_steps"]  # as inside train()
    return trainer


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


def clear_quantile(folder, family, batch, settings) -> float:
    """A share of tokens by entropy whose bound lies in a wide gap between two of them. Completions of a prompt have
    the entropy of their first token in common: rounding would decide where the bound falls on it."""
    entropies = []

    class Watched(trl.GRPOTrainer):
        def get_high_entropy_mask(self, entropy, mask, threshold):
            entropies.append(entropy[mask.bool()])
            return super().get_high_entropy_mask(entropy, mask, threshold)

    trainer = make_trainer(Watched, folder, family, **settings, top_entropy_quantile=0.7)
    trainer._compute_loss(trainer.model, batch)
    ordered = entropies[0].sort().values
    count = len(ordered)
    gaps = ordered.diff()[count // 5 : count // 2]
    return 1 - (count // 5 + gaps.argmax().item() + 0.5) / (count - 1)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradient_and_metrics_equal_trl(family, loss_type, tmp_path):
    batch = make_batch()
    found = []
    settings = {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.05}
    settings["top_entropy_quantile"] = clear_quantile(tmp_path, family, batch, settings)
    for kind in (trl.GRPOTrainer, PromptOnceGRPOTrainer):
        trainer = make_trainer(kind, tmp_path, family, **settings)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        found.append((loss.item(), gradients, {k: v[-1] for k, v in trainer._metrics["train"].items()}))
    (expected, right, metrics), (loss, gradients, ours) = found
    assert abs(loss - expected) < 1e-6 * batch["advantages"].abs().mean()  # of a sum that may nearly cancel
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


def test_groups_stay_together():
    """A shuffle of groups of three, one of them cut in two by another process; everything moves along."""
    prompts = torch.tensor([5, 5, 5, 2, 2, 9, 9, 9])
    batch = {
        "prompt_ids": torch.stack([prompts, prompts], 1),
        "prompt_mask": torch.ones(8, 2, dtype=torch.int64),
        "advantages": torch.arange(8),
        "extra": list(range(8)),
        "num_items_in_batch": torch.tensor(4),
        "none": None,
    }
    orders = set()
    for _ in range(40):
        found = shuffle_groups(batch)
        order = found["advantages"].tolist()
        assert found["extra"] == order and torch.equal(found["prompt_ids"][:, 0], prompts[order])
        assert found["num_items_in_batch"] == 4 and found["none"] is None
        groups = [found["prompt_ids"][i, 0].item() for i in range(8)]
        assert groups.count(5) == 3 and len(torch.tensor(groups).unique_consecutive()) == 3
        orders.add(tuple(order))
    assert len(orders) == 6


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "num_iterations": 2, "beta": 0.1}]
)
def test_training_reads_each_prompt_once_and_logs_what_trl_logs(settings, tmp_path):
    """Two steps: the sampler and the update see the prompt's columns for every group once."""
    trainer = make_trainer(PromptOnceGRPOTrainer, tmp_path, **settings)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    body, seen = trainer.model.model, []
    forward = body.forward

    def watched(input_ids=None, *args, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids, *args, **kwargs)

    body.forward = watched
    trainer.train()
    assert any((p != before[name]).any() for name, p in trainer.model.named_parameters())
    log = trainer.state.log_history[0]
    for name in (
        "loss",
        "reward",
        "reward_std",
        "entropy",
        "clip_ratio/region_mean",
        "completions/mean_length",
    ):
        assert torch.isfinite(torch.tensor(log[name])), name
    prompts = [shape for shape in seen if shape[1] > 12]
    assert prompts and all(rows <= 4 for rows, _ in prompts)  # 16 completions of 4 prompts


def test_sampler_follows_the_trainers_settings(tmp_path):
    """Stop tokens end completions, equal prompts draw differently, and what is not ours goes TRL's way."""
    trainer = make_trainer(PromptOnceGRPOTrainer, tmp_path)
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6, 7]]
    completions, logprobs = trainer._generate_single_turn(prompts, None, {}, 4)
    assert logprobs is None and len({tuple(completions[i]) for i in (0, 1, 3)}) == 3
    ends = trainer.eos_token_ids
    for tokens in completions:
        assert 1 <= len(tokens) <= 12 and not set(tokens[:-1]) & set(ends)
        assert tokens[-1] in ends or len(tokens) == 12
    greedy = make_trainer(PromptOnceGRPOTrainer, tmp_path, temperature=1e-7)  # draws what leads by 1e-6
    ours, _ = greedy._generate_single_turn(prompts, None, {}, 4)
    greedy.repetition_penalty = 1.0000001
    theirs, _ = greedy._generate_single_turn(prompts, None, {}, 4)
    assert ours == theirs


def test_what_does_not_fit_is_named(tmp_path):
    trainer = make_trainer(PromptOnceGRPOTrainer, tmp_path)
    ids = torch.ones(2, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="pixel_values: PromptOnceGRPOTrainer reads text alone"):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 3, pixel_values=ids)
