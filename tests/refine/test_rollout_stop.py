"""Rollouts that end where the policy is sure: what counts, what does not, and that every way agrees on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from refine import RefineConfig, refine_step
from refine.method.objective import group_advantages, policy_loss
from refine.method.rewards import binary, cosine
from refine.method.rollouts import Rollouts, rollout_lengths
from refine.settings import SettingsError
from refine.training.settings import parse_settings
from tests.numerics import assert_close
from tests.refine.tiny import FAMILIES, VOCABULARY, ragged_batch, tiny_model


def gradients(model, *arguments, **keywords):
    model.zero_grad()
    output = refine_step(model, *arguments, **keywords)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def middle_entropy(model, ids, mask, config) -> float:
    """A threshold that ends some rollouts and not others: the median entropy of the sequences' predictions."""
    with torch.no_grad():
        entropy = refine_step(model, ids, config, attention_mask=mask).entropy
    return float(entropy[mask.bool()].median())


def test_lengths_by_hand():
    entropy = torch.tensor(
        [[0.1, 3.0, 2.0, 1.0], [3.0, 0.5, 3.0, 3.0], [3.0, 3.0, 3.0, 0.4], [0.0, 1.0, 1.0, 1.0]]
    )
    # the first token always counts; a sure second one ends the rollout whatever comes behind
    assert rollout_lengths(entropy, 1.0).tolist() == [4, 1, 3, 4]
    assert rollout_lengths(entropy, 9.0).tolist() == [1] * 4
    assert rollout_lengths(entropy[:, :1], 9.0).tolist() == [1] * 4


def test_loss_is_the_mean_over_what_was_generated():
    logprobs = torch.randn(2, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() + 0.1 * torch.randn_like(logprobs)
    advantages = torch.randn(2, 3, 1)
    lengths = torch.tensor([[[4], [1], [2]], [[3], [3], [1]]])
    config = RefineConfig(clip_range=0.05)
    loss, clipped = policy_loss(logprobs, old, advantages, config, lengths)
    each, share = [], []
    for b in range(2):
        terms, hits = [], []
        for j in range(3):
            for t in range(int(lengths[b, j, 0])):
                ratio = float((logprobs - old).detach()[b, j, 0, t].exp())
                gain = float(advantages[b, j, 0])
                plain, bounded = -gain * ratio, -gain * min(max(ratio, 0.95), 1.05)
                terms.append(max(plain, bounded))
                hits.append(bounded > plain)
        each.append(sum(terms) / len(terms))
        share.append(sum(hits) / len(hits))
    assert float(loss) == pytest.approx(sum(each) / 2, rel=1e-6)
    assert float(clipped) == pytest.approx(sum(share) / 2, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert not gradient[0, 1, 0, 1:].any() and not gradient[1, 2, 0, 1:].any()
    full = torch.full_like(lengths, 4)
    torch.testing.assert_close(
        policy_loss(logprobs, old, advantages, config, full)[0],
        policy_loss(logprobs, old, advantages, config)[0],
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rollouts", [1, 2])
def test_every_way_ends_rollouts_alike(family, num_rollouts):
    model = tiny_model(family, initializer_range=0.15)
    ids, mask = ragged_batch(205, 160)
    config = RefineConfig(
        num_chunks=5, rollout_length=4, num_rollouts=num_rollouts, reward="hybrid", lambda_rl=1.0
    )
    config = dataclasses.replace(config, rollout_stop_entropy=middle_entropy(model, ids, mask, config))
    given = {
        "attention_mask": mask,
        "positions": torch.tensor([[20, 64, 65, 128, 185], [20, 63, 100, 127, 140]]),
        "rollouts": torch.randint(VOCABULARY, (2, 5, num_rollouts, 4)),
    }
    shared, got = gradients(model, ids, config, **given)
    assert len(shared.rollout_lengths.unique()) > 1
    for other in ({"step": "per_prefix"}, {"segment_length": 64}):
        output, expected = gradients(model, ids, dataclasses.replace(config, **other), **given)
        assert torch.equal(output.rollout_lengths, shared.rollout_lengths)
        assert_close(shared.loss, output.loss, 1e-10, "loss")
        assert_close(shared.rewards, output.rewards, 1e-6, "rewards")
        for name, grad in expected.items():
            assert_close(got[name], grad, 1e-10, name)


def test_rewards_and_advantages_are_of_what_was_generated():
    seen = []

    def keep(predicted, true, hidden, true_hidden):
        seen.append((predicted.shape, true.shape, hidden.shape, true_hidden.shape))
        return binary(predicted, true, hidden, true_hidden) + cosine(predicted, true, hidden, true_hidden)

    import refine.method.rewards as rewards

    rewards.REWARDS["test_keep"] = keep
    try:
        model = tiny_model()
        ids, mask = ragged_batch(160, 150)
        config = RefineConfig(num_chunks=4, reward="test_keep")
        config = dataclasses.replace(config, rollout_stop_entropy=middle_entropy(model, ids, mask, config))
        seen.clear()
        output = refine_step(model, ids, config, attention_mask=mask)
    finally:
        del rewards.REWARDS["test_keep"]
    assert {shape[0][1] for shape in seen} == set(output.rollout_lengths.unique().tolist())
    assert sum(shape[0][0] for shape in seen) == output.rollout_lengths.numel()
    for b in range(2):
        for j in range(4):
            p, count = int(output.positions[b, j]), int(output.rollout_lengths[b, j, 0])
            match = (output.rollouts[b, j, 0, :count] == ids[b, p : p + count]).float().mean()
            assert float(output.exact_match[b, j, 0]) == pytest.approx(float(match))
    torch.testing.assert_close(output.rewards, output.cosine + output.exact_match)
    torch.testing.assert_close(output.advantages, group_advantages(output.rewards))


def test_a_threshold_below_all_entropies_changes_nothing():
    model = tiny_model()
    ids, mask = ragged_batch(160, 120)
    config = RefineConfig(num_chunks=4)
    seeds = torch.tensor([1, 2])
    off, without = gradients(model, ids, config, attention_mask=mask, seeds=seeds)
    on, with_it = gradients(
        model, ids, dataclasses.replace(config, rollout_stop_entropy=1e-9), attention_mask=mask, seeds=seeds
    )
    assert torch.equal(on.rollouts, off.rollouts) and torch.equal(on.rollout_lengths, off.rollout_lengths)
    assert off.rollout_lengths.unique().tolist() == [5]
    for name, grad in without.items():
        assert_close(with_it[name], grad, 1e-12, name)


def test_ends_given_for_off_policy_updates_are_kept():
    model = tiny_model()
    ids, mask = ragged_batch(160, 150)
    config = RefineConfig(num_chunks=4, lambda_sft=0.0, lambda_rl=1.0)
    config = dataclasses.replace(config, rollout_stop_entropy=middle_entropy(model, ids, mask, config))
    with torch.no_grad():
        draw = refine_step(model, ids, config, attention_mask=mask)

    def again(rollouts: Rollouts):
        return refine_step(model, ids, config, attention_mask=mask, rollouts=rollouts)

    assert_close(again(draw.drawn).loss, draw.loss, 1e-10, "loss")
    ones = torch.ones_like(draw.rollout_lengths)
    shortest = dataclasses.replace(draw.drawn, lengths=ones)
    assert again(shortest).rollout_lengths.unique().tolist() == [1]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="between 1 and"):
            again(dataclasses.replace(draw.drawn, lengths=wrong * ones))
    with pytest.raises(ValueError, match="rollout lengths must have shape"):
        again(dataclasses.replace(draw.drawn, lengths=ones[:1]))
    with pytest.raises(ValueError, match="belong to rollouts"):
        again(Rollouts(positions=draw.positions, lengths=draw.rollout_lengths))


def test_the_setting():
    assert parse_settings(["--rollout_stop_entropy", "0.5"]).rollout_stop_entropy == 0.5
    assert parse_settings([]).rollout_stop_entropy is None
    with pytest.raises(SettingsError, match="rollout_stop_entropy must be over 0"):
        parse_settings(["--rollout_stop_entropy", "0"])
