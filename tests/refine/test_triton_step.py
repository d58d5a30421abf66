"""The step on the Triton kernels: same draws, loss and gradients as on the PyTorch path.

Without a GPU the kernels run in Triton's interpreter, so the models and sequences are very small.
"""

from __future__ import annotations

import pytest
import torch

from refine import RefineConfig, refine_step
from tests.numerics import assert_close, assert_gradients_close
from tests.refine.tiny import FAMILIES, ragged_batch, tiny_model

CONFIG = RefineConfig(num_chunks=2, rollout_length=3, lambda_rl=1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_the_kernels_is_the_step(family, interpreter, monkeypatch):
    results = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for backend in ("torch", "triton"):
        monkeypatch.setenv("REFINE_KERNELS_BACKEND", backend)
        model = tiny_model(family, torch.float32, initializer_range=0.15, num_hidden_layers=1).to(device)
        torch.manual_seed(0)
        ids, mask = (x.to(device) for x in ragged_batch(90, 71))
        output = refine_step(
            model, ids, CONFIG, attention_mask=mask, seeds=torch.tensor([3, 4], device=device)
        )
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}))
    (right, expected), (found, got) = results
    assert torch.equal(found.positions, right.positions)
    assert torch.equal(found.rollouts, right.rollouts)
    assert_close(found.loss, right.loss, 1e-5, "loss")
    assert_close(found.rewards, right.rewards, 1e-5, "rewards")
    assert_gradients_close(got, expected, 1e-5)
