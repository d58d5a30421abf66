"""No logits: neither training nor rollouts make a tensor of tokens x vocabulary, whoever calls the model."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import refine
from refine_kernels.linear_logprob import chunked
from tests.clients.families import tiny_model

VOCABULARY, TOKENS = 1999, 80


def largest_allocation(call) -> int:
    """Bytes of the largest piece of memory that one operation allocates and keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    return max(event.self_cpu_memory_usage for event in seen.events())


@pytest.mark.parametrize("family", ["delta_net", "lact"])
def test_training_and_rollouts_make_no_logits(family, monkeypatch):
    # the head works through its tokens in tiles; small ones, so that a tensor of all of them would be seen
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    model = tiny_model(family, torch.float32, vocab_size=VOCABULARY).train()
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    logits = 2 * TOKENS * VOCABULARY * 4
    config = refine.RefineConfig(num_chunks=2, num_rollouts=4)

    def train():
        model(ids, labels=ids).loss.backward()
        refine.refine_step(model, ids, config).loss.backward()

    assert largest_allocation(train) < logits / 4
    assert largest_allocation(lambda: model(ids)) >= logits  # asked for: the measure sees them
