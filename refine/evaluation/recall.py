"""In-context recall: does a model still know, at the end of a document, what its beginning said?"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from refine.models.head import SampleToken
from refine.training.recall import RecallItem


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
