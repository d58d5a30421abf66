"""Where the sequences of a batch lie (padding on either side, packed rows), and that no number depends on it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refine import RefineConfig, refine_step
from refine.method import Sequences, next_token_loss, next_token_targets
from tests.numerics import assert_close
from tests.refine.tiny import FAMILIES, ragged_batch, tiny_model

LENGTHS = (150, 101, 128)
CONFIG = RefineConfig(num_chunks=3, reward="hybrid", lambda_rl=1.0)
SEEDS = torch.tensor([3, 4, 5])


def moved(
    ids: torch.Tensor, mask: torch.Tensor, left: list[int], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row ``left[b]`` columns further to the right, in rows of ``width`` columns; padding is some token."""
    rows, marks = torch.full((len(ids), width), 7), torch.zeros(len(ids), width, dtype=torch.int64)
    for b, (start, length) in enumerate(zip(left, mask.sum(1).tolist())):
        rows[b, start : start + length], marks[b, start : start + length] = ids[b, :length], 1
    return rows, marks


def step_gradients(model, ids, seeds=SEEDS, config=CONFIG, **where):
    """A step's output and its gradient for every parameter."""
    model.zero_grad()
    output = refine_step(model, ids, config, seeds=seeds, **where)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10**6))
def test_packed_and_padded_rows_hold_the_same_sequences(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(50, (1, total), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = Sequences.of(ids, cu_seqlens=cu_seqlens)
    padded = packed.padded()
    assert packed.lengths.tolist() == padded.lengths.tolist() == lengths
    for s, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        assert torch.equal(padded.input_ids[s, : lengths[s]], ids[0, begin:end])
    assert torch.equal(packed.in_rows(padded.input_ids), ids)
    positions = torch.stack([torch.tensor([0, length - 1]) for length in lengths])
    assert torch.equal(packed.take(ids, positions, 1), padded.take(padded.input_ids, positions, 1))
    # the loss is a mean over a sequence's targets, then over sequences, however the rows are made
    values = torch.rand(1, total, generator=generator)
    labelled = packed.labelled()
    targets, weight = next_token_targets(padded.input_ids, padded.lengths)
    assert torch.equal(labelled.targets, packed.in_rows(targets))
    right = (packed.by_sequence(values) * weight).sum()
    torch.testing.assert_close((values * labelled.row_weight).sum(), right)


@pytest.mark.parametrize("how", ["right", "left", "both sides", "packed", "segments", "per_prefix"])
def test_weights_of_tokens_weigh_the_next_token_loss_alone(how):
    model = tiny_model("delta_net", initializer_range=0.15)
    ids, mask = ragged_batch(*LENGTHS)
    weight = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)) * (ids % 3 > 0)
    logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected_loss = -(logprobs * (weight * mask)[:, 1:]).sum()
    model.zero_grad()
    expected_loss.backward()
    of_text = {name: p.grad.clone() for name, p in model.named_parameters()}
    options = {"lambda_sft": 0.5, "lambda_rl": 1.0}
    policy = RefineConfig(**vars(CONFIG) | options | {"lambda_sft": 0.0})
    _, of_rollouts = step_gradients(model, ids, config=policy, attention_mask=mask)

    options |= {"segments": {"segment_length": 64}, "per_prefix": {"step": "per_prefix"}}.get(how, {})
    where, rows = {"attention_mask": mask}, ids
    if how == "packed":
        rows, weight = ids[mask.bool()][None], weight[mask.bool()][None]
        where = {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0)}
    elif how in ("left", "both sides"):
        left = [150 - n for n in LENGTHS] if how == "left" else [0, 9, 31]
        rows, marks = moved(ids, mask, left, 181)
        weighed = torch.full(rows.shape, 9.0)
        weighed[marks.bool()], where = weight[mask.bool()], {"attention_mask": marks}
        weight = weighed
    sequences = Sequences.of(rows, **where, loss_weight=weight)
    output, got = step_gradients(model, sequences, config=RefineConfig(**vars(CONFIG) | options))
    assert_close(output.ntp_loss, expected_loss, 1e-6, "loss")
    for name, grad in got.items():
        assert_close(grad, 0.5 * of_text[name] + of_rollouts[name], 1e-6, name)


@pytest.mark.parametrize("segment_length", [None, 64])
def test_packed_and_padded_sequences_have_the_same_next_token_loss(segment_length):
    model = tiny_model("delta_net", initializer_range=0.15)
    ids, mask = ragged_batch(*LENGTHS)
    padded = Sequences.of(ids, mask)
    expected = next_token_loss(model, padded)
    assert_close(next_token_loss(model, padded.labelled()), expected, 1e-11, "labelled")
    for sequences in (padded, padded.packed()):
        assert_close(next_token_loss(model, sequences, segment_length), expected, 1e-11, "loss")


def test_weights_that_do_not_fit_are_named():
    ids, mask = ragged_batch(*LENGTHS)
    for weight, message in (
        (torch.ones(3, 149), r"loss_weight must have input_ids' shape \(3, 150\), got \(3, 149\)"),
        (torch.full(ids.shape, -1.0), "loss_weight must be finite and at least 0"),
        (torch.full(ids.shape, float("nan")), "loss_weight must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Sequences.of(ids, mask, loss_weight=weight)
    with pytest.raises(ValueError, match="given twice: Sequences hold their own"):
        refine_step(tiny_model("delta_net"), Sequences.of(ids, mask), CONFIG, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["left", "both sides", "segments"])
def test_padding_on_either_side_changes_nothing(family, how):
    model = tiny_model(family, initializer_range=0.15)
    ids, mask = ragged_batch(*LENGTHS)
    config = CONFIG if how != "segments" else RefineConfig(**vars(CONFIG) | {"segment_length": 64})
    right, expected = step_gradients(model, ids, attention_mask=mask)
    left = [150 - n for n in LENGTHS] if how == "left" else [0, 9, 31]
    rows, marks = moved(ids, mask, left, 150 if how == "left" else 170)
    got, gradients = step_gradients(model, rows, config=config, attention_mask=marks)
    assert torch.equal(got.positions, right.positions)
    assert torch.equal(got.rollouts, right.rollouts)
    assert_close(got.loss, right.loss, 1e-11, "loss")
    for b, n in enumerate(LENGTHS):
        assert_close(got.entropy[b, left[b] : left[b] + n], right.entropy[b, :n], 1e-6, "entropy")
    for name, grad in expected.items():
        assert_close(gradients[name], grad, 1e-11, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["shared_prefix", "per_prefix", "segments"])
def test_a_packed_row_gives_the_step_of_its_sequences(family, how):
    """Loss, draws, rewards and gradients, with documents that end inside a chunk and beside a stride."""
    model = tiny_model(family, initializer_range=0.15)
    ids, mask = ragged_batch(*LENGTHS)
    right, expected = step_gradients(model, ids, attention_mask=mask)
    packed = torch.cat([row[:n] for row, n in zip(ids, LENGTHS)])[None]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    change = {"segment_length": 64} if how == "segments" else {"step": how}
    config = RefineConfig(**vars(CONFIG) | change)
    got, gradients = step_gradients(model, packed, config=config, cu_seqlens=cu_seqlens)
    assert torch.equal(got.positions, right.positions)
    assert torch.equal(got.rollouts, right.rollouts)
    assert_close(got.loss, right.loss, 1e-11, "loss")
    assert_close(got.rewards, right.rewards, 1e-6, "rewards")
    for b, n in enumerate(LENGTHS):
        assert_close(got.entropy[0, cu_seqlens[b] : cu_seqlens[b + 1]], right.entropy[b, :n], 1e-6, "entropy")
    for name, grad in expected.items():
        assert_close(gradients[name], grad, 1e-10 if how == "per_prefix" else 1e-11, name)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"cu_seqlens": [0, 70, 60, 200]}, "cu_seqlens must rise from 0 to the 200 tokens of a single row"),
        ({"cu_seqlens": [0, 70]}, "cu_seqlens must rise"),
        ({"cu_seqlens": [10, 200]}, "cu_seqlens must rise"),
        ({"cu_seqlens": [0, 200], "attention_mask": torch.ones(1, 200)}, "exclude each other"),
        (
            {"attention_mask": torch.tensor([[1] * 90 + [0] + [1] * 109])},
            "attention_mask has a hole in row 0",
        ),
    ],
)
def test_what_cannot_be_is_named(where, message):
    with pytest.raises(ValueError, match=message):
        Sequences.of(torch.zeros(1, 200, dtype=torch.int64), **where)


def test_next_token_loss_takes_padding_on_either_side():
    model = tiny_model()
    ids, mask = ragged_batch(40, 31)
    loss = next_token_loss(model, Sequences.of(ids, mask).labelled())
    rows, marks = moved(ids, mask, [3, 5], 48)
    assert_close(next_token_loss(model, Sequences.of(rows, marks).labelled()), loss, 1e-12)
