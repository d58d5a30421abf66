"""Our models in EleutherAI's lm-eval: the batch size changes no answer, and the likelihoods are the model's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from refine.prepare import packaged_model
from tests.clients.families import FAMILIES, tiny_model

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

PAIRS = [
    ("The function returns", " a value"),
    ("x =", " 1"),
    ("import os\nimport sys\nprint(", "os.getcwd())"),
    ("def area(width, height):\n    return", " width * height\n"),
    ("", "alone"),
]
PROMPTS = ["def f(", "class Reader:\n    def read(self, name):\n        return", "x", "import json\n\nprint("]


def instances(kind: str, arguments: list) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def harness(model, tokenizer, batch_size: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_batch(family):
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    model = tiny_model(family, torch.float32, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    answers = {}
    for batch_size in (1, 4):
        lm = harness(model, tokenizer, batch_size)
        likelihoods = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
        asked = [(prompt, {"until": ["\n\n"], "max_gen_toks": 7}) for prompt in PROMPTS]
        texts = lm.generate_until(instances("generate_until", asked), disable_tqdm=True)
        answers[batch_size] = likelihoods, texts
    assert answers[1][1] == answers[4][1]
    for (one, greedy), (four, also), (context, continuation) in zip(answers[1][0], answers[4][0], PAIRS):
        assert abs(one - four) < 1e-5 * abs(one) and greedy == also
        before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
        ids = tokenizer(context + continuation)["input_ids"][len(tokenizer(context)["input_ids"]) :]
        logprobs = model(torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
        expected = sum(float(logprobs[len(before) - 1 + t, token].detach()) for t, token in enumerate(ids))
        assert abs(one - expected) < 1e-5 * abs(expected)
