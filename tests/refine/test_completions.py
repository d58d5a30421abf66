"""Prompts that are read once and branch into n completions, against n separate reads."""

from __future__ import annotations

import pytest
import torch

from refine import branch_logprobs, generate_group
from tests.numerics import assert_close, assert_gradients_close
from tests.refine import hybrids
from tests.refine.test_hybrid_step import exact_router
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


@pytest.mark.parametrize(
    ("n", "tokens", "dtype"),
    [
        *((n, tokens, torch.float64) for n, tokens in ((1, 1), (4, 1), (1, 5), (4, 5), (4, 70))),
        *((n, tokens, torch.float32) for n, tokens in ((1, 1), (16, 5), (4, 70))),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_equal_separate_reads(family, n, tokens, dtype):
    """Ragged on both sides; LaCT's chunks of 32 end inside prompts and completions."""
    model = tiny_model(family, dtype, initializer_range=0.15)
    compare(model, make_group((70, 41, 64), n, tokens), TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_long_completions_over_many_chunks(family):
    model = tiny_model(family, torch.float64, initializer_range=0.15)
    compare(model, make_group((33, 50), 2, 300), 1e-10, max_branches=3)


@pytest.mark.parametrize("options", [{}, {"max_branches": 3, "segment_length": 64}], ids=str)
@pytest.mark.parametrize("family", hybrids.FAMILIES)
def test_hybrids_equal_separate_reads(family, options, monkeypatch):
    """Attention layers have keys and values of their own."""
    exact_router(monkeypatch)
    compare(hybrids.hybrid(family), make_group((70, 41), 2, 9), 1e-10, **options)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_padded_on_any_side(family, side):
    model = tiny_model(family, torch.float64, initializer_range=0.15)
    prompts = (40, 40) if side == "none" else (40, 7)
    compare(model, make_group(prompts, 3, 9, side), 1e-10)


@pytest.mark.parametrize(("max_branches", "segment_length"), [(1, 100), (4, 64), (100, 500)])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_branches_and_segments_change_nothing(family, max_branches, segment_length):
    """A prompt that ends in the first segment, on a border and in the last one."""
    model = tiny_model(family, torch.float64, initializer_range=0.15)
    group = make_group((230, 64, 30), 2, 7)
    compare(model, group, 1e-10, max_branches=max_branches, segment_length=segment_length)


def test_memory_is_that_of_a_batch_of_branches_and_of_a_segment():
    """Bytes kept for the backward: 8 completions of 60 tokens, 1 at a time; a prompt of 640 tokens by 64."""
    model = tiny_model()
    few, long = make_group((20,), 8, 60, "none"), make_group((640,), 1, 1, "none")

    def kept(group, **options) -> int:
        found = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            result = branch_logprobs(model, *group, **options)
        assert result.logprobs.requires_grad
        return sum(found.values())

    assert kept(few, max_branches=1) < 0.3 * kept(few)
    assert kept(long, segment_length=64) < 0.3 * kept(long)


# ---- samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_trainer_agree(family):
    """The KL divergence between them before the first update, in float32; LaCT's chunks end on the way."""
    model = tiny_model(family, torch.float32, initializer_range=0.15)
    ids, mask, *_ = make_group((70, 41, 64), 1, 1)
    drawn = generate_group(model, ids, 4, prompt_mask=mask, max_new_tokens=50, temperature=0.7, stop_ids=[3])
    assert 0 < drawn.completion_mask[..., -1].sum() < 12  # ragged
    scored = branch_logprobs(model, ids, mask, drawn.completion_ids, drawn.completion_mask, temperature=0.7)
    counted = drawn.completion_mask.bool()
    ratio = (scored.logprobs - drawn.logprobs)[counted]
    assert (ratio.exp() - 1 - ratio).mean() < 1e-6
    assert ratio.abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_do_not_depend_on_the_batch(family):
    """A prompt by itself, and from a batch with another kind of padding, whatever else ends when."""
    model = tiny_model(family, torch.float64)
    ids, mask, *_ = make_group((40, 21), 1, 1, "left")
    options = {"max_new_tokens": 30, "stop_ids": [3, 4, 5]}
    both = generate_group(model, ids, 4, prompt_mask=mask, seeds=torch.tensor([7, 8]), **options)
    alone = generate_group(model, ids[1:, mask[1].bool()], 3, seeds=torch.tensor([8]), **options)
    width = min(both.completion_ids.shape[-1], alone.completion_ids.shape[-1])
    for a, b in zip(both, alone):
        assert torch.allclose(a[1, :3, :width], b[0, :, :width]) and not a[1, :3, width:].any()
    rows = {tuple(row.tolist()) for row in both.completion_ids[0]}
    assert len(rows) == 4


def test_samples_stop_and_are_padded():
    model = tiny_model()
    ids = torch.randint(VOCABULARY, (1, 30))
    drawn = generate_group(model, ids, 8, max_new_tokens=40, stop_ids={1, 2, 3, 4, 5, 6})
    for tokens, counted, logprobs in zip(*(x[0] for x in drawn)):
        length = int(counted.sum())
        ends = (tokens[:length] >= 1) & (tokens[:length] <= 6)
        assert counted[:length].all() and not ends[:-1].any() and (ends[-1] or length == 40)
        assert not tokens[length:].any() and not logprobs[length:].any() and (logprobs[:length] < 0).all()
    without = generate_group(model, ids, 2, max_new_tokens=9)
    assert without.completion_mask.shape == (1, 2, 9) and without.completion_mask.all()


def test_equal_prompts_draw_differently():
    model = tiny_model()
    ids = torch.randint(VOCABULARY, (1, 30)).expand(2, -1)
    drawn = generate_group(model, ids, 2, max_new_tokens=12).completion_ids.flatten(0, 1)
    assert len({tuple(row.tolist()) for row in drawn}) == 4


def test_draws_follow_the_distribution():
    """With and without filters, against the model's own table; temperature 0 takes the most likely."""
    model = tiny_model(initializer_range=0.5)
    ids = torch.randint(VOCABULARY, (1, 20))
    count, temperature = 4000, 1.5
    table = (model(ids).logits[0, -1] / temperature).softmax(-1)
    order = table.argsort(descending=True)

    def drawn(**filters):
        group = generate_group(model, ids, count, max_new_tokens=1, temperature=temperature, **filters)
        assert torch.allclose(group.logprobs[0, :, 0], table.log()[group.completion_ids[0, :, 0]])
        return torch.bincount(group.completion_ids.flatten(), minlength=VOCABULARY) / count

    nucleus = order[: int((table[order].cumsum(0) < 0.6).sum()) + 1]
    likely = (table >= 0.3 * table.max()).nonzero()[:, 0]
    for filters, kept in (
        ({}, order),
        ({"top_k": 3}, order[:3]),
        ({"top_p": 0.6}, nucleus),
        ({"min_p": 0.3}, likely),
    ):
        expected = torch.zeros_like(table).index_copy(0, kept, table[kept] / table[kept].sum())
        error = (drawn(**filters) - expected).abs()
        assert (error <= 5 * (expected * (1 - expected) / count).sqrt()).all(), filters
    greedy = generate_group(model, ids, 2, max_new_tokens=1, temperature=0.0, top_p=0.9)
    assert (greedy.completion_ids == order[0]).all()


# ---- what does not fit ------------------------------------------------------------------------------------


def scored(**changes):
    """A call that is right but for the changes."""
    ids, mask, completions, counted = make_group((30, 20), 2, 5)
    given = {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "completion_ids": completions,
        "completion_mask": counted,
    }
    model = changes.pop("model", None) or tiny_model()
    return branch_logprobs(model, **given | changes)


HOLE = torch.tensor([[[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"completion_ids": torch.zeros(2, 5, dtype=torch.int64)}, r"completion_ids must be .*\(2, 5\)"),
        ({"completion_ids": torch.zeros(3, 2, 5, dtype=torch.int64)}, "for 2 prompts"),
        ({"completion_ids": torch.zeros(2, 2, 0, dtype=torch.int64)}, "at least one of each"),
        ({"completion_mask": torch.ones(2, 2, 4)}, r"shape \(2, 2, 5\), got \(2, 2, 4\)"),
        ({"completion_mask": HOLE}, "hole in completion 0 of prompt 0"),
        ({"completion_mask": HOLE * 0}, "completion 0 of prompt 0 has no token"),
        ({"max_branches": 0}, "max_branches must be a whole number of at least 1 or None, got 0"),
        ({"segment_length": 63}, "segment_length must be at least 64 or None, got 63"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        scored(**changes)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="branch_logprobs needs a fast-weight model"):
        scored(model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number of at least 1, got 2.0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must hold one per prompt, \[1\]"),
    ],
)
def test_what_does_not_fit_the_sampler_is_named(changes, words):
    given = {"model": tiny_model(), "prompt_ids": torch.randint(VOCABULARY, (1, 9)), "n": 2} | changes
    with pytest.raises(ValueError, match=words):
        generate_group(**given)
