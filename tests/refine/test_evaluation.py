"""Held-out measures and recall, against numbers computed by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import refine.eval
from refine import RefineConfig
from refine.data.recall_documents import RecallItem
from refine.data.stream import Batch
from refine.evaluation.held_out import evaluate_held_out, held_out_by_document
from refine.evaluation.recall import (
    answered_greedily,
    evaluate_copying,
    evaluate_recall,
    needle_rows,
)
from refine.prepare import packaged_model
from tests.refine.tiny import ragged_batch, tiny_model


def test_held_out_numbers_by_hand():
    model = tiny_model()
    ids, mask = ragged_batch(150, 100)
    batches = [Batch(ids[i : i + 1], mask[i : i + 1], torch.tensor([i])) for i in (0, 1)]
    result = evaluate_held_out(model, batches, RefineConfig(num_chunks=2), seed=1)
    loss = right = count = 0.0
    for i, length in enumerate((150, 100)):
        logprobs = model(ids[i : i + 1, :length]).logits[0, :-1].log_softmax(-1)
        targets = ids[i, 1:length]
        loss -= logprobs.gather(1, targets[:, None]).sum().item()
        right += (logprobs.argmax(-1) == targets).sum().item()
        count += length - 1
    assert result["eval_loss"] == pytest.approx(loss / count, rel=1e-6)
    assert result["eval_accuracy"] == pytest.approx(right / count)
    assert result["eval_tokens"] == count and result["eval_sequences"] == 2
    assert evaluate_held_out(model, batches, RefineConfig(num_chunks=2), seed=1) == result
    both = [Batch(ids, mask, torch.tensor([0, 1]))]
    together = evaluate_held_out(model, both, RefineConfig(num_chunks=2), seed=1)
    for name, value in result.items():
        assert together[name] == pytest.approx(value, rel=1e-5), name
    each = [evaluate_held_out(model, [batch], RefineConfig(num_chunks=2), seed=1) for batch in batches]
    by_document, intervals = held_out_by_document(model, batches, RefineConfig(num_chunks=2), seed=1)
    assert by_document["eval_cosine_by_sequence"] == [one["eval_cosine"] for one in each]
    assert by_document["eval_cosine"] == pytest.approx(result["eval_cosine"])
    assert intervals["eval_cosine"][0] <= by_document["eval_cosine"] <= intervals["eval_cosine"][1]
    with pytest.raises(ValueError, match="no held-out text"):
        evaluate_held_out(model, [], RefineConfig())


class WordTokenizer:
    """One id a word."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_recall_counts_the_items_whose_whole_answer_is_most_likely():
    model = tiny_model()
    prompt = "1 5 2 9 7"
    greedy = model.generate(
        torch.tensor([[1, 5, 2, 9, 7]]), max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    a, b = greedy[0, 5:].tolist()
    wrong = (b + 1) % 50
    items = [
        RecallItem(prompt, f"{a} {b}", "facts", 0.5, 1),
        RecallItem(prompt, f"{a} {wrong}", "facts", 0.3, 1),
        RecallItem("3 3", f"{(a + 1) % 50} 4 4 4", "names", 0.1, 1),
    ]
    result = evaluate_recall(model, WordTokenizer(), items, batch_size=2)
    assert result["recall_accuracy_facts"] == 0.5
    assert result["recall_chance"] == pytest.approx(0.3)
    assert result["recall_items"] == 3


def test_copying_counts_the_second_reading_alone():
    class Copier(torch.nn.Module):
        """Says the token that followed the last earlier place of this one."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, use_cache, head):
            guess = torch.zeros_like(ids)
            for b, row in enumerate(ids.tolist()):
                for t, token in enumerate(row):
                    before = [s for s in range(t) if row[s] == token]
                    guess[b, t] = row[before[-1] + 1] if before else 0
            return SimpleNamespace(token=guess)

    found = evaluate_copying(Copier(), 10_000, 12, 10)
    assert found["copy_accuracy"] > 0.95  # a token drawn twice can mislead it
    assert found["copy_chance"] == 1 / 12
    assert evaluate_copying(tiny_model(), 53, 20, 4)["copy_accuracy"] < 0.2


def test_eval_command_prints_and_writes(tmp_path, capsys):
    arguments = ["--samples", "2", "--max_length", "400", "--recall_tokens", "128", "300"]
    assert refine.eval.main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert "recall_300_accuracy" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["eval_sequences"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "reecall"], "there is no task 'reecall': did you mean 'recall'"),
        (["--model", "no/model"], "no/model"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--recall_tokens", "8"], "recall_tokens must be at least 64"),
        (["--max_length", "10"], "max_length must be at least"),
    ],
)
def test_eval_says_what_is_wrong(arguments, message, capsys):
    assert refine.eval.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_packaged_model_is_small_and_finds_needles():
    folder = packaged_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    model = refine.load_model(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = evaluate_copying(model, len(tokenizer), 48, 16)
    assert found["copy_accuracy"] > 2 * found["copy_chance"]
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_1"):
        assert sum(answered_greedily(model, needle_rows(tokenizer, task, 512, 8))) > 4, task
    text = "The grass is green and the sky is blue. " * 10
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert model(ids, labels=ids).loss < 3
