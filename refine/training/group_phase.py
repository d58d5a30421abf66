"""Phase grpo: groups of completions of prompts, rewards of the user's own, a policy loss on what was generated.

A draw samples ``num_generations`` completions of each prompt from one prefill and rewards them; each update reads
the prompts once and branches (:mod:`refine.method.completions`). Metrics have TRL's names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from refine.data.prompts import PromptBatch
from refine.method import branch_logprobs, generate_group
from refine.method.objective import (
    LossTerms,
    clip_ratios,
    group_advantages,
    kl_estimate,
    mean_where,
    of_whole_update,
    policy_objective,
)
from refine.models import load_model
from refine.models.adapters import WithoutAdapters, holds_adapters
from refine.prepare import load_model_and_tokenizer
from refine.training.parallel import World, unwrap
from refine.training.settings import TrainSettings
from refine.training.text_rewards import TextRewards
from refine.training.update import apply_update
from refine_kernels.linear_logprob import mix_seeds


class Group(NamedTuple):
    """n completions of each of B prompts, rewarded."""

    completion_ids: torch.Tensor  # [B, n, R] int64
    completion_mask: torch.Tensor  # [B, n, R] int64
    counted: torch.Tensor  # [B, n, R] bool: tokens that the loss counts
    old_logprobs: torch.Tensor  # [B, n, R] float32, under the policy that sampled
    ref_logprobs: torch.Tensor | None  # [B, n, R] float32, with beta
    rewards: torch.Tensor  # [B, n] float32
    advantages: torch.Tensor  # [B, n] float32
    texts: list[str]  # B n completions
    metrics: dict[str, float]  # of the draw


class GroupPhase:
    """The updates and measures of phase grpo (see :class:`refine.training.phases.Phase`)."""

    holds_out_text = False

    def __init__(self, settings: TrainSettings, model, optimizer, world: World, tokenizer):
        self.settings, self.model, self.optimizer, self.world = settings, model, optimizer, world
        self.tokenizer = tokenizer
        self.rewards = TextRewards(settings.reward_funcs, settings.reward_weights)
        self.reference = load_reference(settings, world, model) if settings.beta else None
        self.on_policy = settings.num_mini_batches * settings.num_iterations == 1

    def draw(self, mini_batches: list[list[PromptBatch]], step: int) -> list[list[Group]]:
        """The completions of every mini-batch by the policy as it is now."""
        with torch.no_grad(), self.precision():
            drawn = [
                [self._draw(batch, step + number) for batch in mini_batch]
                for number, mini_batch in enumerate(mini_batches)
            ]
        if self.settings.scale_rewards == "batch":
            std = self._std_of_rewards([group.rewards for groups in drawn for group in groups])
            drawn = [
                [group._replace(advantages=group.advantages / (std + 1e-6)) for group in groups]
                for groups in drawn
            ]
        return drawn

    def update(
        self, mini_batch: list[PromptBatch], draws: list[Group], step: int
    ) -> tuple[dict[str, float], Group | None]:
        """One update over a mini-batch: its metrics, and its last groups."""
        world, count = self.world, len(mini_batch)
        tokens = world.total(sum(int(group.completion_mask.sum()) for group in draws))
        counted = max(1, world.total(sum(int(group.counted.sum()) for group in draws)))

        def loss_of(batch: PromptBatch, group: Group) -> tuple[torch.Tensor, dict[str, Any]]:
            loss, found = self._loss(batch, group, counted / world.size)
            loss = loss if of_whole_update(self.settings.objective) else loss / count
            return loss, {name: value.detach() / count for name, value in found.items()} | {
                "loss": loss.detach()
            }

        losses = [
            lambda batch=batch, group=group: loss_of(batch, group) for batch, group in zip(mini_batch, draws)
        ]
        metrics = apply_update(
            self.model, self.optimizer, losses, max_grad_norm=self.settings.max_grad_norm,
            bf16=self.settings.bf16, world=world,
        )  # fmt: skip
        drawn = [group.metrics for group in draws]
        metrics |= world.mean({name: sum(m[name] for m in drawn) / count for name in drawn[0]})
        prompts = world.total(sum(int(batch.attention_mask.sum()) for batch in mini_batch))
        return metrics | {"tokens": prompts + tokens}, draws[-1]

    @torch.no_grad()
    def measure(self, held_out: Iterable[PromptBatch]) -> dict[str, float]:
        """The rewards of completions of held-out prompts, drawn as in training but with the run's seed alone;
        ``_low`` and ``_high`` are the ends of the 95 % interval of the mean over prompts."""
        found = [self._complete(batch.to(self.world.device), 0)[1] for batch in held_out]
        each = torch.stack([self.rewards.total(rewards).mean() for rewards in found]).double()  # [prompts]
        rewards, mean = torch.cat(found), each.mean().item()
        measured = {"eval_reward": mean, "eval_sequences": len(found)}
        if len(each) > 1:
            reach = 1.96 * each.std().item() / len(each) ** 0.5
            measured |= {"eval_reward_low": mean - reach, "eval_reward_high": mean + reach}
        for name, column in zip(self.rewards.names, rewards.unbind(1)):
            measured[f"eval_rewards/{name}/mean"] = column.nanmean().item()
        return measured

    def precision(self):
        """Autocast as the settings say."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _complete(self, batch: PromptBatch, step: int) -> tuple[Any, torch.Tensor, list[str]]:
        """Completions, their rewards [B n, functions], and their texts."""
        settings, n = self.settings, self.settings.num_generations
        end = self.tokenizer.eos_token_id
        drawn = generate_group(
            self.model, batch.input_ids, n, prompt_mask=batch.attention_mask,
            max_new_tokens=settings.max_completion_length, temperature=settings.temperature,
            top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p, stop_ids=end,
            seeds=mix_seeds(settings.seed, step, batch.keys), segment_length=settings.segment_length,
        )  # fmt: skip
        lengths = drawn.completion_mask.sum(-1).flatten().tolist()
        ids = [row[:length] for row, length in zip(drawn.completion_ids.flatten(0, 1).tolist(), lengths)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)

        def each(values: list) -> list:
            return [value for value in values for _ in range(n)]

        columns = {name: each(values) for name, values in batch.columns.items()}
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(each(batch.prompts), texts)
        ]
        return drawn, self.rewards(each(batch.prompts), completions, ids, columns), texts

    def _std_of_rewards(self, rewards: list[torch.Tensor]) -> float:
        """The unbiased standard deviation of the rewards of a draw, over all processes."""
        x = torch.cat([x.flatten() for x in rewards]).double()
        sums = {"count": float(x.numel()), "sum": x.sum().item(), "squares": x.square().sum().item()}
        count, total, squares = (value * self.world.size for value in self.world.mean(sums).values())
        return max(0.0, (squares - total**2 / count) / (count - 1)) ** 0.5

    def _draw(self, batch: PromptBatch, step: int) -> Group:
        settings = self.settings
        drawn, each, texts = self._complete(batch, step)
        shape = drawn.completion_mask.shape[:2]
        rewards = self.rewards.total(each).view(shape).to(batch.input_ids.device)
        advantages = group_advantages(rewards[:, None])[:, 0]
        if settings.scale_rewards != "group":
            advantages = rewards - rewards.mean(1, keepdim=True)
        reference = None
        if self.reference is not None:
            reference = self._logprobs(
                self.reference, batch, drawn.completion_ids, drawn.completion_mask
            ).logprobs
        lengths = drawn.completion_mask.sum(-1).float()
        whole = (
            drawn.completion_ids.gather(2, lengths.long()[..., None] - 1)[..., 0]
            == self.tokenizer.eos_token_id
        )
        counted = drawn.completion_mask.bool()
        if settings.mask_truncated_completions:
            counted = counted & whole[..., None]
        metrics = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(1).mean().item(),
            "frac_reward_zero_std": (rewards.std(1) == 0).float().mean().item(),
            "completions/mean_length": lengths.mean().item(),
            "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": 1 - whole.float().mean().item(),
        }
        for name, column in zip(self.rewards.names, each.unbind(1)):
            said = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"] = said.mean().item() if len(said) else 0.0
            metrics[f"rewards/{name}/std"] = said.std().item() if len(said) > 1 else 0.0
        return Group(
            drawn.completion_ids, drawn.completion_mask, counted, drawn.logprobs, reference, rewards, advantages,
            texts, metrics,
        )  # fmt: skip

    def _logprobs(self, model, batch: PromptBatch, ids, mask, entropy: bool = False):
        settings = self.settings
        return branch_logprobs(
            model, batch.input_ids, batch.attention_mask, ids, mask, settings.temperature, entropy,
            max_branches=settings.max_branches, segment_length=settings.segment_length,
        )  # fmt: skip

    def _loss(
        self, batch: PromptBatch, group: Group, total: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one micro-batch: every completion is a sequence of one rollout to the objective."""
        settings, counted = self.settings, group.counted.flatten(0, 1)  # [M, R]
        found = self._logprobs(self.model, batch, group.completion_ids, group.completion_mask, entropy=True)
        logprobs = found.logprobs.flatten(0, 1)
        old = logprobs.detach() if self.on_policy else group.old_logprobs.flatten(0, 1)
        advantages, rows = group.advantages.flatten(), (len(logprobs), 1, 1, logprobs.shape[1])
        reference = None if group.ref_logprobs is None else group.ref_logprobs.flatten(0, 1)
        loss, clipped = policy_objective(
            logprobs.view(rows), old.view(rows), advantages.view(-1, 1, 1), settings, counted.sum(1).view(-1, 1, 1),
            LossTerms(
                ref_logprobs=None if reference is None else reference.view(rows),
                entropy=found.entropy.view(rows), total_tokens=total, longest=settings.max_completion_length,
            ),
        )  # fmt: skip
        measures = {"entropy": mean_where(found.entropy.flatten(0, 1), counted)}
        measures |= clip_ratios(logprobs - old, advantages, counted, settings, clipped)
        if reference is not None:
            measures["kl"] = mean_where(kl_estimate(logprobs, reference), counted)
        return loss, measures


def load_reference(settings: TrainSettings, world: World, model: torch.nn.Module) -> torch.nn.Module:
    """The model that a run begins from, frozen: what ``beta`` keeps the policy near to. With new adapters it is the
    policy without them."""
    named = settings.model_name_or_path
    if settings.use_peft and (named is None or not holds_adapters(named)):
        return WithoutAdapters(unwrap(model))
    if settings.use_peft:  # adapters that are trained on: merged into a copy
        reference = load_model(named, dtype=torch.float32)
    else:
        reference, _ = load_model_and_tokenizer(settings, settings)
    return reference.to(world.device).requires_grad_(False).eval()


def write_completions(path, step: int, batch: PromptBatch, group: Group, shown: int = 200) -> None:
    """The completions of a batch's first prompt, best reward first."""
    path.mkdir(exist_ok=True)
    n = group.rewards.shape[1]
    blocks = [f"step {step}: {n} completions of ...{batch.texts[0][-shown:]!r}\n"]
    for place in group.rewards[0].argsort(descending=True).tolist():
        blocks.append(
            f"--- reward {group.rewards[0, place]:.4f}  advantage {group.advantages[0, place]:+.2f}\n"
            f"{group.texts[place]!r}\n"
        )
    (path / f"step-{step:06d}.txt").write_text("\n".join(blocks), encoding="utf-8", errors="replace")
