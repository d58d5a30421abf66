"""From items to scored answers: batches, test-time training around each, greedy generation, one line a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from refine.data.document import stable_hash
from refine.evaluation.generation import Sampling, generate
from refine.evaluation.predictions import Predictions
from refine.evaluation.prompt_training import PromptTrainer
from refine.evaluation.settings import EvalSettings
from refine.evaluation.tasks.item import Item, Prompt
from refine.settings import SettingsError
from refine.terminal import terminal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answer_items(
    model,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    settings: EvalSettings,
    predictions: Predictions,
) -> PromptTrainer | None:
    """Answer and score every item that has no prediction yet.

    Batches are of one task and length, in the items' order, and the same whatever was answered before. With
    ``ttt_restore=never`` the model is trained again on the batches that were answered, so that it stands where it
    stood.

    Returns:
        What did the test-time training, if anything.
    """
    trainer = prompt_trainer(model, settings) if settings.ttt != "none" else None
    end_ids = end_tokens(model, tokenizer)
    with terminal.progress("answers", len(items), unit="") as advance:
        for batch in _batches(items, settings):
            missing = [item for item in batch if item.key not in predictions.lines]
            if missing or settings.ttt_restore == "never":
                prompts = [item.make() for item in batch]
                with _adapted(trainer, batch, prompts, settings.ttt_restore):
                    if missing:
                        answers = _generate(model, batch, prompts, settings, end_ids)
                        lines = [
                            _line(item, prompt, answer, tokenizer, trainer, settings.answer_cut)
                            for item, prompt, answer in zip(batch, prompts, answers)
                        ]
                        predictions.add([line for line in lines if line["key"] not in predictions.lines])
            advance(len(batch), "")
    return trainer


def whole_batches(items: Sequence[Item], settings: EvalSettings) -> list[Item]:
    """The items without those of files that fill no batch of their task and length.

    Raises:
        SettingsError: nothing of a task is left.
    """
    kept = []
    for (task, length), group in groupby(items, key=lambda item: (item.task, item.length)):
        members, size = list(group), _batch_size(settings)
        whole = members[: len(members) - len(members) % size] if members[0].kind != "generated" else members
        if not whole:
            raise SettingsError(
                f"drop_last_batch leaves no row of {task}{'' if length is None else f' at {length}'}: there are "
                f"{len(members)}, and a batch has {size}"
            )
        kept += whole
    return kept


def prompt_trainer(model, settings: EvalSettings) -> PromptTrainer:
    """The test-time training that the settings ask for."""
    return PromptTrainer(
        model,
        settings,
        kind=settings.ttt,
        steps=settings.ttt_steps,
        optimizer=settings,
        bf16=settings.bf16,
        seed=settings.seed,
        mini_batches=settings.ttt_mini_batches,
    )


def end_tokens(model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends an answer: the end-of-text tokens of the tokenizer and of the model."""
    given = getattr(model.generation_config, "eos_token_id", None)
    given = given if isinstance(given, list) else [given]
    return frozenset(token for token in [tokenizer.eos_token_id, *given] if token is not None)


def _batch_size(settings: EvalSettings) -> int:
    if settings.ttt == "none":
        return settings.batch_size
    return 1 if settings.ttt_restore == "sample" else settings.ttt_batch_size


def _batches(items: Sequence[Item], settings: EvalSettings) -> Iterator[list[Item]]:
    size = _batch_size(settings)
    for _, group in groupby(items, key=lambda item: (item.task, item.length)):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]


@contextmanager
def _adapted(
    trainer: PromptTrainer | None, batch: list[Item], prompts: list[Prompt], restore: str
) -> Iterator[None]:
    """The model as trained on these prompts; with ``never`` it stays so."""
    ids, keys = [prompt.ids for prompt in prompts], [item.key for item in batch]
    if trainer is None:
        yield
    elif restore == "never":
        trainer.train(ids, keys)
        yield
    else:
        with trainer.adapted(ids, keys):
            yield


def _generate(
    model, batch: list[Item], prompts: list[Prompt], settings: EvalSettings, end_ids: frozenset[int]
) -> list[list[int]]:
    device = next(model.parameters()).device
    answers = []
    for start in range(0, len(batch), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        sampling = None
        if settings.do_sample and batch[0].kind != "generated":
            keys = [stable_hash(f"answer/{settings.seed}/{item.key}") - 2**63 for item in batch[part]]
            sampling = Sampling(keys, settings.temperature, settings.top_k)
        with torch.autocast(device.type, torch.bfloat16) if settings.bf16 else nullcontext():
            answers += generate(
                model,
                [prompt.ids for prompt in prompts[part]],
                [item.max_new_tokens for item in batch[part]],
                end_ids,
                sampling,
            )
    return answers


def _line(
    item: Item, prompt: Prompt, answer: list[int], tokenizer, trainer: PromptTrainer | None, cut: str
) -> dict[str, Any]:
    text = tokenizer.decode(answer, skip_special_tokens=True)
    counted = text.split("\n")[0] if cut == "line" and item.kind == "question" else text
    return {
        "key": item.key,
        "task": item.task,
        "length": item.length,
        "source": item.source,
        "score": item.score(counted, prompt.references),
        "prediction": text,
        "references": list(prompt.references),
        "prompt_tokens": len(prompt.ids),
        "new_tokens": len(answer),
        "cut": prompt.cut,
        "trained": trainer is not None and len(prompt.ids) >= trainer.least_tokens,
        "depths": None if prompt.depths is None else list(prompt.depths),
    }
