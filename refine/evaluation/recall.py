"""In-context recall: does a model still know, at the end of a document, what its beginning said?

Two measures. *Copying*: random tokens that come a second time, the purest form (what is asked can be known from
the first reading alone). *Questions*: a word that a document stated once, early, amid other text.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from refine.data.recall_documents import RecallItem
from refine.models.head import SampleToken


@torch.no_grad()
def evaluate_recall(model, tokenizer, items: Iterable[RecallItem], batch_size: int = 8) -> dict[str, float]:
    """Ask each item's question; right when the model's greedy continuation begins with the answer.

    The answer is fed along with the prompt: greedy decoding gives it exactly when every one of its tokens is
    the most likely one after those before it.

    Returns:
        ``recall_accuracy`` and ``recall_chance`` (what guessing among the document's values scores), means
        over items; ``recall_accuracy_<format>`` for each format; ``recall_items`` and ``recall_tokens``, how
        many and how long on average.
    """
    items = list(items)
    if not items:
        raise ValueError("there are no recall items to evaluate on")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = []  # (prompt ids, answer ids)
    for item in items:
        rows.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in item[:2]])
    right: list[bool] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)  # padded on the right, which is never read
        for i, (prompt, answer) in enumerate(batch):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        ids = ids.to(device)
        greedy = model(ids, use_cache=False, head=SampleToken(temperature=0.0)).token
        for i, (prompt, answer) in enumerate(batch):
            said = greedy[i, len(prompt) - 1 : len(prompt) + len(answer) - 1]
            right.append(said.tolist() == answer)
    model.train(was_training)

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
