"""In-context recall: does a model still know, at the end of a document, what its beginning said?

Two measures. *Copying*: random tokens that come a second time, the purest form (what is asked can be known from
the first reading alone). *Questions*: a word that a document stated once, early, amid other text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from refine.data.recall_documents import RecallItem, recall_items
from refine.evaluation.tasks.haystack import find_essay
from refine.evaluation.tasks.niah import NIAH_TASKS, NiahGenerator, TokenCounter
from refine.models.head import SampleToken


@torch.no_grad()
def answered_greedily(
    model, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 8
) -> list[bool]:
    """Whether greedy decoding goes on with the answer, for rows of (prompt ids, answer ids).

    The answer is fed along with the prompt: greedy decoding gives it exactly when every one of its tokens is the
    most likely one after those before it. So a row costs one forward pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    right: list[bool] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # padded on the right, which is never read
        for i, (prompt, answer) in enumerate(batch):
            ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        ids = ids.to(device)
        greedy = model(ids, use_cache=False, head=SampleToken(temperature=0.0)).token
        for i, (prompt, answer) in enumerate(batch):
            said = greedy[i, len(prompt) - 1 : len(prompt) + len(answer) - 1]
            right.append(said.tolist() == list(answer))
    model.train(was_training)
    return right


def needle_rows(
    tokenizer, task: str, length: int, samples: int, seed: int = 0
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of a needle task of one value, at ``length`` tokens with the answer."""
    counter, chosen = TokenCounter(tokenizer), NIAH_TASKS[task]
    essay = find_essay(None) if chosen.haystack == "essay" else None
    longest = len(tokenizer(" 9999999", add_special_tokens=False)["input_ids"])
    generator = NiahGenerator(chosen, counter, length, essay, seed, new_tokens=longest)
    prompts = [generator.make(index) for index in range(samples)]
    return [
        (prompt.ids.tolist(), tokenizer(f" {prompt.references[0]}", add_special_tokens=False)["input_ids"])
        for prompt in prompts
    ]


def questions_of_recall(
    tokenizer, length: int, samples: int, seed: int = 0
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """What a training run asks its model: ``samples`` rows of (prompt ids, answer ids), of about ``length`` tokens,
    for each of ``niah_single_1`` (a needle in noise), ``niah_single_2`` (in prose) and ``recall`` (words that a
    held-out document stated once).

    Raises:
        ValueError: no needle fits into the length.
    """
    asked = {
        task: needle_rows(tokenizer, task, length, samples, seed)
        for task in ("niah_single_1", "niah_single_2")
    }
    sample = [item.prompt for item in recall_items(seed, 8, 4 * length)]
    per_token = sum(map(len, sample)) / sum(len(tokenizer(text)["input_ids"]) for text in sample)
    items = recall_items(seed, samples, int(0.9 * per_token * length))
    asked["recall"] = [_row(tokenizer, item) for item in items]
    return asked


def _row(tokenizer, item: RecallItem) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids)"""
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in item[:2])
    return prompt, answer


def evaluate_recall(model, tokenizer, items: Iterable[RecallItem], batch_size: int = 8) -> dict[str, float]:
    """Ask each item's question; right when the model's greedy continuation begins with the answer.

    Returns:
        ``recall_accuracy`` and ``recall_chance`` (what guessing among the document's values scores), means
        over items; ``recall_accuracy_<format>`` for each format; ``recall_items`` and ``recall_tokens``, how
        many and how long on average.
    """
    items = list(items)
    if not items:
        raise ValueError("there are no recall items to evaluate on")
    rows = [_row(tokenizer, item) for item in items]
    right = answered_greedily(model, rows, batch_size)
    result = {
        "recall_accuracy": sum(right) / len(items),
        "recall_chance": sum(item.chance for item in items) / len(items),
        "recall_items": len(items),
        "recall_tokens": sum(len(prompt) for prompt, _ in rows) / len(items),
    }
    for name in sorted({item.format for item in items}):
        of_format = [ok for ok, item in zip(right, items) if item.format == name]
        result[f"recall_accuracy_{name}"] = sum(of_format) / len(of_format)
    return result


@torch.no_grad()
def evaluate_copying(
    model, vocabulary: int, distance: int, sequences: int, seed: int = 0
) -> dict[str, float]:
    """How often a model's best guess is right where ``distance`` random tokens come a second time.

    Args:
        vocabulary: tokens are drawn from ids under this.
        distance: tokens between the two readings, at least 2.
        sequences: how many are tried.
        seed: of the random tokens.

    Returns:
        ``copy_accuracy`` over all but the first token of the second reading, and ``copy_chance``, what guessing
        among the tokens of the first reading scores.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(vocabulary, (sequences, distance), generator=generator)
    right = 0
    for rows in once.split(8):
        rows = rows.to(device)
        greedy = model(torch.cat([rows, rows], 1), use_cache=False, head=SampleToken(temperature=0.0)).token
        right += (greedy[:, distance:-1] == rows[:, 1:]).sum().item()
    model.train(was_training)
    return {"copy_accuracy": right / (sequences * (distance - 1)), "copy_chance": 1 / distance}
