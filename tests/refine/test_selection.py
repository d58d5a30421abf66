"""Positions: where they may lie, and how often each is drawn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refine import RefineConfig
from refine.method.seeds import Stream, rollout_seeds, sequence_seeds, uniform
from refine.method.selection import select_positions


def one_sequence(entropy: torch.Tensor, config: RefineConfig, seed: int = 0) -> list[int]:
    return select_positions(entropy[None], torch.tensor([len(entropy)]), config, torch.tensor([seed]))[
        0
    ].tolist()


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 12),
    length=st.integers(1, 30),
    extra=st.integers(0, 300),
    pad=st.integers(0, 40),
    selection=st.sampled_from(["entropy", "uniform", "argmax", "argmin"]),
    seed=st.integers(0, 2**31),
)
def test_positions_are_in_their_chunks_and_between_the_margins(chunks, length, extra, pad, selection, seed):
    config = RefineConfig(num_chunks=chunks, rollout_length=length, selection=selection)
    tokens = config.min_tokens + extra
    entropy = torch.rand(2, tokens + pad, generator=torch.Generator().manual_seed(seed)) * 5
    lengths = torch.tensor([tokens, tokens + pad])
    positions = select_positions(entropy, lengths, config, torch.tensor([seed, seed + 1]))
    for b in range(2):
        size = int(lengths[b]) // chunks
        last = int(lengths[b]) - max(20, length)
        for j, p in enumerate(positions[b].tolist()):
            assert 20 <= p <= last
            assert min(max(j * size + 1, 20), last) <= p <= min(max((j + 1) * size, 20), last)


def test_padding_changes_nothing():
    config = RefineConfig(num_chunks=4)
    entropy = torch.rand(1, 130) * 4
    padded = torch.cat([entropy, torch.full((1, 30), 9.0)], 1)
    seeds = torch.tensor([3])
    a = select_positions(entropy, torch.tensor([130]), config, seeds)
    b = select_positions(padded, torch.tensor([130]), config, seeds)
    assert torch.equal(a, b)


def test_draws_follow_the_softmax_of_the_smoothed_entropies():
    config = RefineConfig(num_chunks=2, rollout_length=4)  # smoothed over 5
    entropy = torch.rand(100) * 3
    draws = 20_000
    positions = select_positions(
        entropy.expand(draws, -1), torch.full((draws,), 100), config, torch.arange(draws)
    )
    smooth = F.avg_pool1d(entropy[None], 5, stride=1, padding=2)[0]
    for j, (start, stop) in enumerate([(0, 50), (50, 100)]):
        probability = smooth[start:stop].softmax(0).double()
        expected = torch.zeros(101, dtype=torch.float64)
        expected.index_add_(0, (torch.arange(start, stop) + 1).clamp(20, 80), probability)
        counts = torch.bincount(positions[:, j], minlength=101).double()
        likely = expected * draws > 5
        chi_square = ((counts - expected * draws) ** 2 / (expected * draws))[likely].sum()
        assert chi_square < likely.sum() + 5 * (2 * likely.sum()) ** 0.5
        assert counts[expected == 0].sum() == 0


def test_argmax_and_argmin_take_the_extremes_unsmoothed():
    entropy = torch.ones(160)
    entropy[[40, 100]] = 5.0
    entropy[[60, 130]] = 0.1
    assert one_sequence(entropy, RefineConfig(num_chunks=2, selection="argmax")) == [41, 101]
    assert one_sequence(entropy, RefineConfig(num_chunks=2, selection="argmin")) == [61, 131]


def test_uniform_ignores_entropy():
    config = RefineConfig(num_chunks=3, selection="uniform")
    assert one_sequence(torch.rand(120), config, 5) == one_sequence(torch.zeros(120), config, 5)


def test_a_low_temperature_finds_the_peak():
    entropy = torch.zeros(100)
    entropy[48:53] = 4.0
    config = RefineConfig(num_chunks=1, rollout_length=5, selection_temperature=0.01)
    assert one_sequence(entropy, config) == [51]


def test_seeds_depend_on_content_alone():
    ids = torch.randint(1000, (3, 50))
    lengths = torch.tensor([50, 40, 50])
    base = sequence_seeds(ids, lengths, torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[1, 40:] += 1  # padding
    changed[2, 3] += 1
    again = sequence_seeds(changed, lengths, torch.Generator().manual_seed(1))
    assert base[:2].tolist() == again[:2].tolist()
    assert base[2] != again[2]
    assert rollout_seeds(base, 4, 3, 5).unique().numel() == 3 * 4 * 3 * 5


def test_uniform_numbers_are_uniform():
    u = uniform(torch.arange(50_000), Stream.POSITION, 3)
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.002)
    v = uniform(torch.arange(50_000), Stream.POSITION, 4)
    assert torch.corrcoef(torch.stack([u, v]))[0, 1].abs() < 0.02
