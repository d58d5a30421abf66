"""What the phases of training do: which data they read, how they take an update, what they measure.

The one place where phases differ: ``mid`` takes REFINE steps on text, ``sft`` next-token steps; ``post`` takes
one of these, or none, on the prompts of a batch of pairs, and then a step on the answers. ``grpo`` stands in
:mod:`refine.training.group_phase`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from refine.data.curriculum import Curriculum
from refine.data.pairs import PairBatch, PairColumns, PairStream, held_out_pairs, training_pairs
from refine.data.prompts import PromptBatch, held_out_prompts, training_prompts
from refine.data.stream import Batch, DataStream, held_out_stream, training_stream
from refine.method import LabelledTokens, RefineStepOutput, Sequences, next_token_loss, refine_step
from refine.prepare import data_config
from refine.training.group_phase import GroupPhase, load_reference
from refine.training.parallel import World
from refine.training.settings import TrainSettings
from refine.training.update import apply_update
from refine_kernels.linear_logprob import mix_seeds

Draws = list[RefineStepOutput | None]  # one a micro-batch; None: rollouts are drawn in the update itself


def open_streams(
    settings: TrainSettings, tokenizer, world: World
) -> tuple[DataStream | Curriculum | PairStream, list[Batch | PairBatch | PromptBatch]]:
    """The endless stream to train on, and what is held out, a sequence or pair each.

    Raises:
        DataError: something is wrong with the data.
    """
    config, (rank, readers) = data_config(settings), world.readers
    held_out = None
    if settings.phase == "grpo":
        stream = training_prompts(config, settings.prompt_column, tokenizer, rank=rank, world_size=readers)
        if settings.eval_samples:
            held_out = held_out_prompts(config, settings.prompt_column, tokenizer)
    elif settings.phase == "post":
        columns = PairColumns(
            settings.prompt_column, settings.answer_column, settings.question_column, settings.passages_column,
            tuple(settings.pair_lengths),
        )  # fmt: skip
        stream = training_pairs(config, columns, tokenizer, rank=rank, world_size=readers)
        if settings.eval_samples:
            held_out = held_out_pairs(config, columns, tokenizer)
    else:
        if settings.length_schedule:
            batches = settings.gradient_accumulation_steps
            lengths = {update * batches: tokens for update, tokens in settings.length_schedule.items()}
            stream = Curriculum(config, lengths, tokenizer, rank=rank, world_size=readers)
        else:
            stream = training_stream(config, tokenizer, rank=rank, world_size=readers)
        if settings.eval_samples:
            held_out = held_out_stream(config, tokenizer)
    return stream, list(islice(held_out.batches(1), settings.eval_samples)) if held_out else []


def make_phase(settings: TrainSettings, model, optimizer, world: World, tokenizer) -> Phase | GroupPhase:
    """The updates and measures of a run's phase."""
    if settings.phase == "grpo":
        return GroupPhase(settings, model, optimizer, world, tokenizer)
    return Phase(settings, model, optimizer, world)


class Phase:
    """The updates and measures of the phases mid, sft and post."""

    holds_out_text = True  # held-out data is text, whose next tokens and rollouts are measured too

    def __init__(self, settings: TrainSettings, model, optimizer, world: World):
        self.settings, self.model, self.optimizer, self.world = settings, model, optimizer, world
        self.answers = settings.phase == "post"
        self.reference = (
            load_reference(settings, world, model) if settings.beta and settings.draws_rollouts else None
        )
        self.waiting: list[PairBatch] = []  # pairs whose answers are learned once the draw's updates are done
        self.updates_left = 0  # of the draw
        self.on_text = {"mid": "refine", "sft": "sft", "post": settings.prompt_step}[settings.phase]

    def draw(self, mini_batches: list[list[Batch]], step: int) -> list[Draws]:
        """Off-policy: the rollouts of every mini-batch by the policy as it is now. On-policy: none."""
        self.waiting, self.updates_left = [], len(mini_batches)
        if self.on_text != "refine" or self.settings.num_mini_batches == 1:
            return [[None] * len(mini_batch) for mini_batch in mini_batches]
        with torch.no_grad(), self.precision():
            return [
                [self._refine(batch, step + number) for batch in mini_batch]
                for number, mini_batch in enumerate(mini_batches)
            ]

    def update(
        self, mini_batch: list[Batch], draws: Draws, step: int
    ) -> tuple[dict[str, float], RefineStepOutput | None]:
        """One update over a mini-batch: its metrics, and the last REFINE step if there was one."""
        metrics, last = {}, None
        if self.on_text != "none":
            metrics, last = self._update_on_text(mini_batch, draws, step)
        if self.answers:
            self.waiting += mini_batch
            self.updates_left -= 1
            if self.settings.answer_updates == "each" or self.updates_left == 0:
                metrics = self._update_on_answers(self.waiting, metrics)
                self.waiting = []
        return metrics, last

    @torch.no_grad()
    def measure(self, held_out: Iterable[Batch | PairBatch]) -> dict[str, float]:
        """What is measured of held-out data besides its text: the answers' loss, in nats per token."""
        if not self.answers:
            return {}
        total, tokens = 0.0, 0
        for batch in held_out:
            batch = batch.to(self.world.device)
            weight = (batch.full_targets != -100).float()
            answers = LabelledTokens(batch.full_ids, batch.full_targets, weight)
            total += next_token_loss(self.model, answers).item()
            tokens += int(weight.sum())
        return {"eval_answer_loss": total / tokens}

    def precision(self):
        """Autocast as the settings say."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _refine(self, batch: Batch, step: int, draw=None, context=None, total=None) -> RefineStepOutput:
        """A REFINE step; its draws follow from the run's seed, the step and each sequence's key alone. ``draw``:
        the rollouts of an earlier policy; ``total``: as for :meth:`_sequences`."""
        return refine_step(
            self.model, self._sequences(batch, total), self.settings, context=context, reference=self.reference,
            seeds=mix_seeds(self.settings.seed, step, batch.keys), rollouts=draw.drawn if draw else None,
        )  # fmt: skip

    def _sequences(self, batch: Batch, total: float | None) -> Sequences:
        """A micro-batch's sequences, with tokens that count by their weights over ``total`` where it is given."""
        ids, mask, weight = batch.input_ids, batch.attention_mask, None
        if total is not None:
            weight = _weights(batch) / max(total, 1e-9)
        sequences = Sequences(ids, mask.sum(1), loss_weight=weight)
        return sequences.packed() if self.settings.packing else sequences

    def _update_on_text(
        self, mini_batch: list[Batch], draws: Draws, step: int
    ) -> tuple[dict[str, float], RefineStepOutput | None]:
        world, settings, count = self.world, self.settings, len(mini_batch)
        total = self._total_weight(mini_batch) / count if settings.weighs_answers else None
        output = None

        def loss_of(batch: Batch, draw: RefineStepOutput | None) -> tuple[torch.Tensor, dict[str, Any]]:
            nonlocal output
            if self.on_text == "sft":
                sequences = self._sequences(batch, total)
                loss = next_token_loss(self.model, sequences, settings.segment_length, world.context)
                found = {"loss": loss, "ntp_loss": loss}
            else:
                output = self._refine(batch, step, draw, world.context, total)
                loss, found = output.loss, _measures(output, batch, settings.packing)
            return loss / count, {name: value.detach() / count for name, value in found.items()}

        losses = [
            lambda batch=batch, draw=draw: loss_of(batch, draw) for batch, draw in zip(mini_batch, draws)
        ]
        metrics = apply_update(
            self.model, self.optimizer, losses, max_grad_norm=self.settings.max_grad_norm,
            bf16=self.settings.bf16, world=world,
        )  # fmt: skip
        tokens, skipped = sum(int(batch.attention_mask.sum()) for batch in mini_batch), metrics.pop("skipped")
        tokens = tokens if world.context is not None else world.total(tokens)
        return metrics | {"tokens": tokens, "skipped": skipped}, output

    def _total_weight(self, mini_batch: list[Batch]) -> float:
        """The weights of all tokens of an update that are predicted, the mean over processes."""
        local = sum(float(_weights(batch)[:, 1:].sum()) for batch in mini_batch)
        return self.world.mean({"weight": local})["weight"]

    def _update_on_answers(self, mini_batch: list[PairBatch], metrics: dict[str, float]) -> dict[str, float]:
        """The second update of a post-training step: next-token loss on the answers, every answer token of the
        batch (over micro-batches and processes) with the same weight. ``metrics`` are those of the first.
        """
        world, settings = self.world, self.settings
        answer_tokens = world.total(sum(int((batch.full_targets != -100).sum()) for batch in mini_batch))

        def loss_of(batch: PairBatch) -> tuple[torch.Tensor, dict[str, Any]]:
            weight = (batch.full_targets != -100).float() * (world.size / answer_tokens)
            answers = LabelledTokens(batch.full_ids, batch.full_targets, weight)
            loss = next_token_loss(self.model, answers, settings.segment_length)
            return loss, {"loss": loss.item()}

        losses = [lambda batch=batch: loss_of(batch) for batch in mini_batch]
        answer = apply_update(
            self.model, self.optimizer, losses, max_grad_norm=settings.max_grad_norm, bf16=settings.bf16,
            world=world,
        )  # fmt: skip
        loss, norm = answer["loss"], answer["grad_norm"]
        if not metrics:
            prompt_tokens = world.total(sum(int(batch.attention_mask.sum()) for batch in mini_batch))
            metrics = {
                "loss": loss,
                "ntp_loss": loss,
                "grad_norm": norm,
                "tokens": prompt_tokens,
                "skipped": 0,
            }
        return metrics | {
            "answer_loss": loss,
            "answer_grad_norm": norm,
            "tokens": metrics["tokens"] + answer_tokens,
            "skipped": metrics["skipped"] + answer["skipped"],
        }


def _weights(batch: Batch) -> torch.Tensor:
    """[B, T] float32: what each token counts, padding nothing."""
    return batch.attention_mask.float() if batch.weight is None else batch.weight * batch.attention_mask


def _measures(output: RefineStepOutput, batch: Batch, packed: bool) -> dict[str, torch.Tensor]:
    """What a REFINE step reports."""
    return {
        "loss": output.loss,
        "ntp_loss": output.ntp_loss,
        "nsp_loss": output.nsp_loss,
        "reward": output.rewards.mean(),
        "reward_std": output.reward_std,
        "cosine": output.cosine.mean(),
        "exact_match": output.exact_match.mean(),
        "entropy": (output.entropy if packed else output.entropy[batch.attention_mask.bool()]).mean(),
        "chosen_entropy": output.chosen_entropy.mean(),
        "clip_fraction": output.clip_fraction,
        "rollout_length": output.rollout_lengths.float().mean(),
    }
