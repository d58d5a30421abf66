"""Prompts that are read once and branch into n completions, against n separate reads."""

from __future__ import annotations

import pytest
import torch

from refine.method.completions import branch_logprobs
from tests.numerics import assert_close, assert_gradients_close
from tests.refine.tiny import FAMILIES, VOCABULARY, tiny_model

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TEMPERATURE = 0.8


def make_group(prompts: tuple[int, ...], n: int, tokens: int, side: str = "both"):
    """Ragged prompts with padding on a side, and ragged completions; the longest has all ``tokens``."""
    torch.manual_seed(5)
    width = max(prompts) + (0 if side == "none" else 3)
    ids = torch.randint(VOCABULARY, (len(prompts), width))
    before = {"none": 0, "right": 0, "left": 3, "both": 2}[side]
    column = torch.arange(width)
    start = torch.tensor([width - p if side == "left" else min(before, width - p) for p in prompts])
    mask = (column >= start[:, None]) & (column < (start + torch.tensor(prompts))[:, None])
    completions = torch.randint(VOCABULARY, (len(prompts), n, tokens))
    lengths = torch.randint(1, tokens + 1, (len(prompts), n))
    lengths[0, -1] = tokens
    counted = torch.arange(tokens) < lengths[..., None]
    return ids, mask.long(), completions, counted.long()


def separately(model, ids, mask, completions, counted):
    """The definition: every completion behind its own copy of the prompt, by the model's own logits."""
    logprobs = torch.zeros(completions.shape, dtype=model.dtype)
    entropy = torch.zeros_like(logprobs)
    for b, j in [(b, j) for b in range(len(ids)) for j in range(completions.shape[1])]:
        prompt, answer = ids[b][mask[b].bool()], completions[b, j][counted[b, j].bool()]
        logits = model(torch.cat([prompt, answer])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        table = (logits / TEMPERATURE).log_softmax(-1)
        at = (b, j, slice(0, len(answer)))
        logprobs[at] = table.gather(1, answer[:, None])[:, 0]
        entropy[at] = -(table.exp() * table).sum(-1)
    return logprobs, entropy


def gradients(model, logprobs, entropy) -> dict[str, torch.Tensor]:
    """Of a fixed mixture of log-probs and entropies, also where nothing counts."""
    weight = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype)
    loss = (logprobs.flatten() * weight).sum() + 0.3 * (entropy.flatten() * weight.flip(0)).sum()
    found = torch.autograd.grad(loss / logprobs.numel(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found))


def compare(model, group, tolerance, **options):
    """Log-probs, entropies and gradients of both ways."""
    expected = separately(model, *group)
    found = branch_logprobs(model, *group, TEMPERATURE, entropy=True, **options)
    assert_close(found.logprobs, expected[0], tolerance, "logprobs")
    assert_close(found.entropy, expected[1], tolerance, "entropy")
    behind = ~group[3].bool()
    assert not found.logprobs[behind].any() and not found.entropy[behind].any()
    assert_gradients_close(gradients(model, *found), gradients(model, *expected), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (4, 1), (1, 5), (4, 5), (16, 5), (4, 70)])
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_equal_separate_reads(family, n, tokens, dtype):
    """Ragged on both sides; LaCT's chunks of 32 end inside prompts and completions."""
    model = tiny_model(family, dtype, initializer_range=0.15)
    compare(model, make_group((70, 41, 64), n, tokens), TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_long_completions_over_many_chunks(family):
    model = tiny_model(family, torch.float64, initializer_range=0.15)
    compare(model, make_group((33, 50), 2, 300), 1e-10, max_branches=3)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_padded_on_any_side(family, side):
    model = tiny_model(family, torch.float64, initializer_range=0.15)
    prompts = (40, 40) if side == "none" else (40, 7)
    compare(model, make_group(prompts, 3, 9, side), 1e-10)


@pytest.mark.parametrize("segment_length", [64, 100, 500])
@pytest.mark.parametrize("max_branches", [1, 4, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_branches_and_segments_change_nothing(family, max_branches, segment_length):
    """A prompt that ends in the first segment, on a border and in the last one."""
    model = tiny_model(family, torch.float64, initializer_range=0.15)
    group = make_group((230, 64, 30), 2, 7)
    compare(model, group, 1e-10, max_branches=max_branches, segment_length=segment_length)
