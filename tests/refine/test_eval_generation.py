"""Greedy generation: the argmax of the full forward at every step, from one prefill, at the cost of its steps."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import pytest
import torch

from refine.evaluation.generation import generate
from refine.models.head import HiddenOnly, SampleToken
from refine.models.state import map_state
from tests.refine.tiny import FAMILIES, VOCABULARY, tiny_model


def prompts(*lengths: int) -> list[np.ndarray]:
    return [torch.randint(VOCABULARY, (length,)).numpy().astype(np.int32) for length in lengths]


@torch.no_grad()
def by_full_forwards(model, prompt, limit: int, end_ids=frozenset()) -> list[int]:
    """The definition: read everything again for each token."""
    ids, said = torch.from_numpy(prompt.astype(np.int64))[None], []
    for _ in range(limit):
        token = model(ids, use_cache=False).logits[0, -1].argmax()
        if int(token) in end_ids:
            break
        said.append(int(token))
        ids = torch.cat([ids, token[None, None]], 1)
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_full_forwards(family):
    model = tiny_model(family).train()
    ragged = prompts(70, 1, 33, 64)  # LaCT: before, on and beyond a chunk's end
    expected = [by_full_forwards(model.eval(), prompt, 40) for prompt in ragged]
    assert generate(model.train(), ragged, 40) == expected
    assert model.training
    assert (
        len({len(set(said)) for said in expected}) > 1 or len(set(expected[0])) > 2
    )  # not one token for ever


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_by_themselves(family):
    model = tiny_model(family).eval()
    ragged = prompts(40, 12, 25, 31, 7)
    free = generate(model, ragged, 24)
    end_ids = frozenset([free[0][5], free[1][0], free[3][17]])
    limits = [24, 24, 3, 24, 1]
    expected = [by_full_forwards(model, p, limit, end_ids) for p, limit in zip(ragged, limits)]
    assert generate(model, ragged, limits, end_ids) == expected
    assert expected[1] == [] and len(expected[2]) <= 3
    assert generate(model, ragged[1:2], 24, end_ids) == [[]]


def test_rows_that_have_ended_leave_the_batch():
    model = tiny_model().eval()
    ragged = prompts(30, 20, 10, 5)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(args[0].shape) if args else None, with_kwargs=True
    )
    generate(model, ragged, [2, 5, 5, 9])
    assert [shape[0] for shape in sizes] == [4, 4, 3, 3, 3, 1, 1, 1, 1]
    assert all(shape[1] == 1 for shape in sizes[1:])  # the prompts are read once


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_does_not_grow_with_the_tokens_generated(family):
    model = tiny_model(family).eval()
    sizes = []

    def note(module, args, kwargs, output):
        if output.past_key_values is not None:
            seen: dict[int, int] = {}

            def add(x):
                storage = x.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
                return x

            map_state(output.past_key_values, add)
            sizes.append(sum(seen.values()))

    model.register_forward_hook(note, with_kwargs=True)
    generate(model, prompts(100, 90), 160)
    assert len(sizes) == 160
    assert max(sizes[80:]) <= max(sizes[:80])


def test_bad_arguments_are_named():
    model = tiny_model()
    for arguments, message in (
        (([], 3), "prompts: there are none"),
        ((prompts(3, 0), 3), "prompts: number 1 has no token"),
        ((prompts(3), 0), "max_new_tokens must be at least 1"),
        ((prompts(3), [1, 2]), "max_new_tokens must be at least 1, for all 1 prompts or one each"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, *arguments)
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize("family", ["delta_net", "lact"])
def test_generation_costs_a_prefill_and_its_steps(family):
    """128 tokens after 4,096 against a prefill and 128 single-token steps, measured in turn."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    model = tiny_model(family, torch.float32, **sizes).eval()
    prompt = prompts(4096)
    greedy = SampleToken(temperature=0.0)
    ids = torch.from_numpy(prompt[0].astype(np.int64))[None]

    @torch.no_grad()
    def parts() -> float:
        began = time.perf_counter()
        output = model(ids, use_cache=True, head=HiddenOnly())
        state, token = output.past_key_values, ids[:, -1:]
        for _ in range(128):
            output = model(token, past_key_values=state, use_cache=True, head=greedy)
            state = output.past_key_values
        return time.perf_counter() - began

    def whole() -> float:
        began = time.perf_counter()
        assert len(generate(model, prompt, 128)[0]) == 128
        return time.perf_counter() - began

    whole(), parts()
    ratios = [whole() / parts() for _ in range(7)]
    assert median(ratios) <= 1.3, ratios
