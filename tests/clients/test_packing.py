"""Packed rows: every document gives what it gives alone, by whichever name its bounds are told."""

from __future__ import annotations

import pytest
import torch

from refine.models.head import HiddenOnly
from tests.clients.families import FAMILIES, tiny_model
from tests.numerics import assert_close
from tests.refine.tiny import VOCABULARY

LENGTHS = (37, 1, 70, 5, 64)


def documents() -> list[torch.Tensor]:
    return [torch.randint(VOCABULARY, (1, n)) for n in LENGTHS]


def bounds(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def positions(lengths=LENGTHS) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def numbers(lengths=LENGTHS) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].int()


def flash_names() -> dict:
    cu = bounds().int()
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 70, "max_length_k": 70}


WAYS = {
    "cu_seqlens": lambda: {"cu_seqlens": bounds()},
    "cu_seqlens list": lambda: {"cu_seqlens": bounds().tolist()},
    "position_ids": lambda: {"position_ids": positions()},
    "flash-attn": flash_names,
    "seq_idx": lambda: {"seq_idx": numbers()},
    "all": lambda: {"position_ids": positions(), "seq_idx": numbers(), **flash_names()},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_of_the_documents_apart(family, way):
    model = tiny_model(family).eval()
    texts = documents()
    packed = model(torch.cat(texts, 1), **WAYS[way]()).logits
    apart = torch.cat([model(text).logits for text in texts], 1)
    assert_close(packed, apart, 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_documents_apart(family):
    model = tiny_model(family)
    texts = documents()
    row = torch.cat(texts, 1)
    count = sum(n - 1 for n in LENGTHS)
    packed = model(row, labels=row, cu_seqlens=bounds()).loss
    apart = sum(model(text, labels=text, num_items_in_batch=count).loss for text in texts)
    assert_close(packed, apart, 1e-11, "loss")
    weights = list(model.parameters())
    for (name, _), a, b in zip(
        model.named_parameters(),
        torch.autograd.grad(packed, weights, allow_unused=True),
        torch.autograd.grad(apart, weights, allow_unused=True),
    ):
        assert (a is None) == (b is None), name
        if a is not None and (a.any() or b.any()):
            assert_close(a, b, 1e-10, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_traces_and_what_follows_are_those_of_the_documents(family):
    """``use_cache`` gives the state of N documents; another packed row goes on from it; the trace counts inside."""
    model = tiny_model(family)
    texts, more = documents(), [torch.randint(VOCABULARY, (1, n)) for n in (3, 66, 1, 2, 40)]
    packed = model(torch.cat(texts, 1), cu_seqlens=bounds(), use_cache=True, state_stride=64)
    state = packed.past_key_values
    assert state.position.tolist() == list(LENGTHS)
    then = bounds(tuple(x.shape[1] for x in more))
    together = model(torch.cat(more, 1), past_key_values=state, cu_seqlens=then, use_cache=True)
    apart = [model(torch.cat(pair, 1)).logits[:, -pair[1].shape[1] :] for pair in zip(texts, more)]
    assert_close(together.logits, torch.cat(apart, 1), 1e-11, "going on, packed")
    rows = torch.randint(VOCABULARY, (len(texts), 2))
    going_on = model(rows, past_key_values=together.past_key_values).logits
    whole = [model(torch.cat([a, b, r[None]], 1)).logits[:, -2:] for a, b, r in zip(texts, more, rows)]
    assert_close(going_on, torch.cat(whole), 1e-11, "going on, as rows")

    document = torch.tensor([2, 0, 4, 4, 2, 1, 3, 2])
    place = torch.tensor([65, 37, 64, 1, 3, 1, 4, 70])
    branch = torch.randint(VOCABULARY, (len(place), 3))
    branches = packed.trace.gather(document, place)
    assert branches.position.tolist() == place.tolist()
    hidden = model(branch, past_key_values=branches, head=HiddenOnly()).last_hidden_state
    cotangent = torch.randn_like(hidden)
    expected = torch.cat(
        [
            model(torch.cat([texts[d][:, :p], b[None]], 1), head=HiddenOnly()).last_hidden_state[:, -3:]
            for d, p, b in zip(document.tolist(), place.tolist(), branch)
        ]
    )
    assert_close(hidden, expected, 1e-10, "branches")
    weights = list(model.model.layers.parameters())
    got = torch.autograd.grad((hidden * cotangent).sum(), weights, allow_unused=True)
    wanted = torch.autograd.grad((expected * cotangent).sum(), weights, allow_unused=True)
    for a, b in zip(got, wanted):
        if b is not None:  # a router of experts computes in float32
            assert_close(a, b, 1e-7 if family == "qwen3_next" else 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_documents_with_padding(family):
    """Several rows, each with restarting positions, padded left and right."""
    model = tiny_model(family).eval()
    lengths = [[20, 7], [33], [4, 4, 9]]
    texts = [[torch.randint(VOCABULARY, (n,)) for n in row] for row in lengths]
    ids, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    position = torch.ones(3, 40, dtype=torch.int64)
    for r, (row, left) in enumerate(zip(texts, (0, 5, 11))):
        used = slice(left, left + sum(len(x) for x in row))
        ids[r, used], mask[r, used] = torch.cat(row), 1
        position[r, used] = torch.cat([torch.arange(len(x)) for x in row])
    output = model(ids, attention_mask=mask, position_ids=position, use_cache=True)
    apart = [model(x[None]).logits[0] for row in texts for x in row]
    assert_close(output.logits[mask.bool()], torch.cat(apart), 1e-11)
    assert output.past_key_values.position.tolist() == [20, 7, 33, 4, 4, 9]


def test_positions_of_plain_rows_change_nothing():
    model = tiny_model().eval()
    ids = torch.randint(VOCABULARY, (2, 12))
    plain = model(ids, use_cache=True)
    counted = model(ids, position_ids=torch.arange(12)[None], use_cache=True)
    assert torch.equal(plain.logits, counted.logits)
    more = model(ids[:, :3], past_key_values=plain.past_key_values).logits
    counted = model(
        ids[:, :3], past_key_values=plain.past_key_values, position_ids=torch.arange(12, 15)[None]
    )
    assert torch.equal(more, counted.logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": [0, 5, 11]}, r"cu_seqlens must be whole numbers from 0 to T = 12"),
        ({"cu_seqlens": [1, 12]}, r"cu_seqlens must be whole numbers from 0"),
        ({"cu_seqlens": [0, 5, 5, 12]}, "cu_seqlens must increase, got 5 then 5 at entry 2"),
        ({"cu_seq_lens_q": [0, 5, 12], "cu_seq_lens_k": [0, 6, 12]}, "cu_seq_lens_k must be cu_seq_lens_q"),
        ({"max_length_q": 5}, "max_length_q must come with cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": [0, 5, 12], "max_length_q": 5},
            "max_length_q must be at least the longest document, 7",
        ),
        (
            {"position_ids": torch.tensor([[*range(5), *range(6, 13)]])},
            "position_ids must count.*row 0 has 6",
        ),
        (
            {"position_ids": torch.arange(3, 15)[None]},
            "position_ids must count.*has 3 at column 0, after nothing",
        ),
        ({"position_ids": torch.arange(12.0)[None]}, "position_ids must be whole numbers"),
        ({"position_ids": torch.arange(11)[None]}, r"position_ids must be \[1, 12\]"),
        ({"position_ids": torch.arange(12)[None], "cu_seqlens": [0, 5, 12]}, "position_ids must count"),
        ({"seq_idx": torch.zeros(1, 12).long(), "cu_seqlens": [0, 5, 12]}, "seq_idx does not change where"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(1, 12, dtype=torch.int64), **arguments)


def test_a_mixer_that_does_not_say_it_reads_packed_rows_is_given_none(monkeypatch):
    model, ids = tiny_model(), torch.zeros(1, 12, dtype=torch.int64)
    monkeypatch.delattr(type(model.model.layers[0].attn), "takes_cu_seqlens")
    with pytest.raises(ValueError, match="DeltaNetAttention does not say takes_cu_seqlens"):
        model(ids, cu_seqlens=[0, 6, 12])
    model(ids)


def test_other_misfits_of_packed_rows_are_refused():
    model, ids = tiny_model(), torch.zeros(2, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input_ids must be \[1, T\], got \[2, 12\]"):
        model(ids, cu_seqlens=[0, 12])
    state = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, but the batch is packed with 3"):
        model(ids[:1], past_key_values=state, cu_seqlens=[0, 3, 5, 12])
    mask = torch.ones(1, 12)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="attention_mask must leave one run of ones"):
        model(ids[:1], attention_mask=mask, cu_seqlens=[0, 6, 12])
