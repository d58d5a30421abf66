"""States of hybrids: attention in place, continuing anywhere, padding, packed rows, branches."""

from __future__ import annotations

import pytest
import torch

from refine.models import prefix_attention as tiles
from refine.models.attention_state import MAX_OWN_TOKENS
from refine.models.prefix_attention import prefix_attention
from tests.numerics import assert_close
from tests.refine.hybrids import FAMILIES, VOCABULARY, hybrid


def plain_attention(q, keys, values, rows, read, own_k, own_v):
    """One row at a time, every score at once."""
    all_k, all_v = torch.cat(keys, 2), torch.cat(values, 2)
    repeat = q.shape[1] // own_k.shape[1]
    outputs = []
    for n in range(len(q)):
        parent = n if rows is None else int(rows[n])
        seen = all_k.shape[2] if read is None else int(read[n])
        k = torch.cat([all_k[parent, :, :seen], own_k[n]], 1).repeat_interleave(repeat, 0)
        v = torch.cat([all_v[parent, :, :seen], own_v[n]], 1).repeat_interleave(repeat, 0)
        tokens, length = q.shape[2], k.shape[1]
        future = torch.ones(tokens, length, dtype=torch.bool).triu(length - tokens + 1)
        scores = (q[n] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return torch.stack(outputs)


@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (3, 5), (70, 99)])
@pytest.mark.parametrize(
    ("rows", "read"),
    [(None, None), ([2, 0, 2, 1, 2], [0, 5, 143, 80, 1]), (None, [3, 143, 0]), ([1, 1, 0], None)],
)
def test_attention_in_place_is_attention(rows, read, before, tokens, small_tiles, monkeypatch):
    if small_tiles:
        monkeypatch.setattr(tiles, "_QUERIES", 7)
        monkeypatch.setattr(tiles, "_TILE_ENTRIES", 1)
    rows, read = (None if x is None else torch.tensor(x) for x in (rows, read))
    count = 3 if rows is None else len(rows)

    def random(*shape):
        return torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)

    q, own_k, own_v = (
        random(count, 6, tokens),
        random(count, 2, before + tokens),
        random(count, 2, before + tokens),
    )
    keys, values = (tuple(random(3, 2, length) for length in (100, 43)) for _ in range(2))
    arguments = (keys, values, rows, read, own_k, own_v)
    got, expected = prefix_attention(q, *arguments), plain_attention(q, *arguments)
    assert_close(got, expected, 1e-12)
    inputs, direction = (q, own_k, own_v, *keys, *values), torch.randn_like(got)
    gradients = (torch.autograd.grad(x, inputs, direction) for x in (got, expected))
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-12 * direction.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_any_cuts_is_reading_at_once(family):
    model = hybrid(family).eval()
    ids = torch.randint(VOCABULARY, (2, 300))
    expected, state, at, parts = model(ids).logits, None, 0, []
    with torch.no_grad():
        for count in (1, 2, 70, 1, 1, 1, 64, 65, 3, 92):
            output = model(ids[:, at : at + count], past_key_values=state, use_cache=True)
            state, at = output.past_key_values, at + count
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), expected, 1e-11)


@pytest.mark.parametrize("family", ["qwen3_5_text", "olmo_hybrid"])
def test_rows_of_different_lengths_padded_on_either_side(family):
    model = hybrid(family).eval()
    ids = torch.randint(VOCABULARY, (3, 300))
    expected = model(ids).logits
    lengths, offsets = [100, 7, 64], [0, 40, 36]  # no padding, both sides, left
    batch, mask = torch.zeros(3, 100, dtype=torch.int64), torch.zeros(3, 100, dtype=torch.int64)
    for i, (length, offset) in enumerate(zip(lengths, offsets)):
        batch[i, offset : offset + length], mask[i, offset : offset + length] = ids[i, :length], 1
    output = model(batch, attention_mask=mask, use_cache=True)
    for i, length in enumerate(lengths):
        assert_close(output.logits[i][mask[i].bool()], expected[i, :length], 1e-11)
    at = list(lengths)
    for count in (1, 5, 70, 2, 100):
        more = torch.stack([ids[i, a : a + count] for i, a in enumerate(at)])
        output = model(more, past_key_values=output.past_key_values, use_cache=True)
        for i, a in enumerate(at):
            assert_close(output.logits[i], expected[i, a : a + count], 1e-11)
        at = [a + count for a in at]


def test_generation_from_a_padded_batch_is_that_of_each_row():
    model = hybrid("qwen3_5_text").eval()
    ids, mask = torch.randint(VOCABULARY, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    options = {"max_new_tokens": MAX_OWN_TOKENS + 9, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 5), (1, 0)):
        alone = model.generate(ids[row : row + 1, start:], **options)
        assert torch.equal(together[row, start:], alone[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_one_another(family):
    model = hybrid(family).eval()
    documents = [torch.randint(VOCABULARY, (1, length)) for length in (70, 1, 129, 13)]
    bounds = torch.tensor([0, 70, 71, 200, 213])
    output = model(torch.cat(documents, 1), cu_seqlens=bounds, use_cache=True, state_stride=64)
    assert_close(output.logits, torch.cat([model(x).logits for x in documents], 1), 1e-11)

    more = [torch.randint(VOCABULARY, (1, length)) for length in (3, 80, 1, 20)]
    bounds = torch.tensor([0, 3, 83, 84, 104])
    got = model(torch.cat(more, 1), cu_seqlens=bounds, past_key_values=output.past_key_values).logits
    alone = [model(torch.cat(both, 1)).logits[:, both[0].shape[1] :] for both in zip(documents, more)]
    assert_close(got, torch.cat(alone, 1), 1e-11)

    places = torch.tensor([2, 0, 2, 3]), torch.tensor([100, 70, 5, 1])
    tails = torch.randint(VOCABULARY, (4, 6))
    got = model(tails, past_key_values=output.trace.gather(*places)).logits
    for n, (document, position) in enumerate(zip(*(x.tolist() for x in places))):
        text = torch.cat([documents[document][:, :position], tails[n : n + 1]], 1)
        assert_close(got[n], model(text).logits[0, position:], 1e-11)


def test_a_branch_owns_its_tokens_and_shares_the_rest():
    model = hybrid("qwen3_5_text").eval()
    trace = model(torch.randint(VOCABULARY, (1, 200)), state_stride=64, use_cache=False).trace
    state = trace.gather(torch.zeros(8, dtype=torch.int64), torch.arange(8) * 20 + 20)
    attention = state.layers[1]
    assert attention.bytes_owned == 0
    assert attention.keys[0].data_ptr() == trace.layers[1].keys[0].data_ptr()
    after = model(torch.randint(VOCABULARY, (8, 5)), past_key_values=state, use_cache=True).past_key_values
    groups, size = 2, 16
    assert (
        after.layers[1].bytes_owned == 2 * groups * size * 5 * 8 * 8
    )  # keys and values, 8 branches, float64
    assert after.layers[1].keys[0].data_ptr() == attention.keys[0].data_ptr()


def test_states_of_one_document_share_its_keys():
    model = hybrid("qwen3_5_text").eval()
    state, blocks = None, []
    for _ in range(3):
        ids = torch.randint(VOCABULARY, (1, 1100))
        state = model(ids, past_key_values=state, use_cache=True).past_key_values
        blocks.append({k.data_ptr() for k in state.layers[1].keys})
    assert blocks[0] < blocks[1] < blocks[2]


def test_beam_search_reorders_states():
    model = hybrid("olmo_hybrid").eval()
    ids = torch.randint(VOCABULARY, (1, 9))
    expected = model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False), expected)
