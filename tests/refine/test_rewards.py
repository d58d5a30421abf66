"""Rewards, advantages and the policy loss, against hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch

from refine import RefineConfig
from refine.method.objective import group_advantages, policy_loss
from refine.method.rewards import DISCOUNT, binary, cosine, discounted_cosine, edit, find_reward, hybrid


def length_of_run(predicted_ids, true_ids, predicted_hidden, true_hidden):
    """A reward of one's own: how many tokens are right before the first wrong one."""
    return (predicted_ids == true_ids).long().cumprod(-1).sum(-1).float()


def test_rewards_by_hand():
    predicted_ids = torch.tensor([[1, 2, 3, 4], [1, 9, 9, 9]])
    true_ids = torch.tensor([[1, 2, 3, 5], [1, 2, 3, 4]])
    predicted = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 2.0]] * 4])
    true = torch.tensor([[[3.0, 0.0]] * 2 + [[0.0, 1.0]] * 2, [[0.0, -1.0]] * 4])
    arguments = (predicted_ids, true_ids, predicted, true)
    assert binary(*arguments).tolist() == [0.75, 0.25]
    assert cosine(*arguments).tolist() == pytest.approx([0.5, -1.0])
    assert hybrid(*arguments).tolist() == pytest.approx([1.25, -0.75])
    assert length_of_run(*arguments).tolist() == [3.0, 1.0]


def _distance(a: tuple, b: tuple) -> int:
    """Levenshtein by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return _distance(a[1:], b[1:])
    return 1 + min(_distance(a[1:], b), _distance(a, b[1:]), _distance(a[1:], b[1:]))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_edit_similarity_against_its_definition(k):
    generator = torch.Generator().manual_seed(k)
    predicted, true = torch.randint(0, 3, (2, 40, k), generator=generator)
    hidden = torch.zeros(40, k, 1)
    expected = [1 - _distance(tuple(a), tuple(b)) / k for a, b in zip(predicted.tolist(), true.tolist())]
    found = edit(predicted, true, hidden, hidden)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected)


def test_edit_similarity_forgives_a_shift():
    predicted, true = torch.tensor([[9, 1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4, 5]])
    hidden = torch.zeros(1, 5, 1)
    assert edit(predicted, true, hidden, hidden).tolist() == pytest.approx([0.6])
    assert binary(predicted, true, hidden, hidden).tolist() == [0]


def test_discounted_cosine_weighs_early_tokens_more():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    true = torch.tensor([[1.0, 0.0]]).expand(2, 3, 2)
    wrong = torch.tensor([0.0, 1.0])
    predicted = true.clone()
    predicted[0, 0] = predicted[1, 2] = wrong  # early and late
    total = 1 + DISCOUNT + DISCOUNT**2
    found = discounted_cosine(ids, ids, predicted, true)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([(DISCOUNT + DISCOUNT**2) / total, (1 + DISCOUNT) / total])
    assert cosine(ids, ids, predicted, true).tolist() == pytest.approx([2 / 3, 2 / 3])


def test_rewards_are_found_by_name_or_path():
    assert find_reward("hybrid") is hybrid
    assert find_reward("tests.refine.test_rewards:length_of_run").__name__ == "length_of_run"
    with pytest.raises(ValueError, match="hybrid, edit, discounted_cosine or module:function, got 'cosin'"):
        find_reward("cosin")
    with pytest.raises(ValueError, match="cannot be imported"):
        find_reward("refine.method.rewards:nothing")


def test_one_rollout_is_compared_with_the_other_positions():
    rewards = torch.tensor([[[1.0], [2.0], [3.0]], [[5.0], [5.0], [5.0]]])
    advantages = group_advantages(rewards)
    assert advantages[0, :, 0].tolist() == pytest.approx([-1, 0, 1], abs=1e-5)
    assert advantages[1].abs().max() == 0


def test_several_rollouts_are_compared_within_their_position():
    rewards = torch.tensor([[[1.0, 3.0], [10.0, 10.0]]])
    advantages = group_advantages(rewards)
    assert advantages[0, 0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-5)
    assert advantages[0, 1].tolist() == [0, 0]


def test_a_group_of_one_has_no_advantage():
    assert group_advantages(torch.tensor([[[2.0]]])).tolist() == [[[0.0]]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: the plain policy gradient
        (1.1, 2.0, -2.2, -2.2),  # inside the clip
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # a good token that has become rare is not held back
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),  # a bad token that has become likely is pushed down
        (9.0, -2.0, 6.0, 0.0),  # the dual clip at 3
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient):
    old = torch.tensor([[[[-1.0]]]], dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    value, clipped = policy_loss(logprob, old, torch.tensor([[[advantage]]]).double(), RefineConfig())
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprob.grad.item() == pytest.approx(gradient)
    assert clipped.item() == (gradient == 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_chunks": 0}, "num_chunks must be a whole number of at least 1, got 0"),
        ({"rollout_length": -1}, "rollout_length must be"),
        ({"num_rollouts": 1.5}, "num_rollouts must be"),
        ({"reward": "length"}, "reward must be one of"),
        (
            {"selection": "random"},
            "selection must be one of entropy, uniform, argmax, argmin or module:function",
        ),
        ({"objective": "ppo"}, "objective must be one of grpo, .* or module:function, got 'ppo'"),
        ({"objective": "no.such:thing"}, "objective 'no.such:thing' cannot be imported"),
        ({"lambda_sft": float("inf")}, "lambda_sft must be at least 0 and finite"),
        ({"step": "fast"}, "step must be one of shared_prefix, per_prefix"),
        ({"temperature": 0.0}, "temperature must be over 0"),
        ({"lambda_rl": float("nan")}, "lambda_rl must be at least 0"),
        ({"state_stride": 100}, "multiple of 64"),
        ({"dual_clip": 1.0}, "dual_clip must be over 1"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        RefineConfig(**setting)
