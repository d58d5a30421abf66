"""Parts of one's own, from outside the package: a reward, a selection, an objective, each one function.

(A data source and a model are registered in ``test_data.py`` and ``test_models.py``.)
"""

from __future__ import annotations

import pytest
import torch

from refine import RefineConfig, refine_step
from refine.method.objective import policy_loss
from tests.numerics import assert_close
from tests.refine.tiny import ragged_batch, tiny_model

HERE = "tests.refine.test_extending"


def first_token(predicted_ids, true_ids, predicted_hidden, true_hidden):
    """A reward: is the first token right? It overwrites what it gets, which must not reach the step."""
    right = (predicted_ids[:, 0] == true_ids[:, 0]).float()
    predicted_hidden.fill_(torch.nan), true_ids.zero_()
    return right + torch.arange(len(right)) / 10


def middle(entropy, lengths, config, seeds):
    """A selection: the middle of each chunk."""
    size = lengths[:, None] // config.num_chunks
    return torch.arange(config.num_chunks) * size + size // 2


def plain_policy_gradient(logprobs, old_logprobs, advantages, config, lengths):
    """An objective: no clip, no ratio."""
    return -(advantages[..., None] * logprobs).mean(), torch.zeros(())


def test_a_reward_a_selection_and_an_objective_of_ones_own():
    model = tiny_model()
    ids, mask = ragged_batch(130, 120)
    config = RefineConfig(
        num_chunks=3,
        reward=f"{HERE}:first_token",
        selection=f"{HERE}:middle",
        objective=f"{HERE}:plain_policy_gradient",
    )
    output = refine_step(model, ids, config, attention_mask=mask)
    assert output.positions.tolist() == [[21, 64, 107], [20, 60, 100]]
    right = output.rollouts[..., 0] == ids.gather(1, output.positions)[..., None]
    offset = torch.arange(6).view(2, 3, 1) / 10
    torch.testing.assert_close(output.rewards, right.float() + offset)
    assert output.cosine.isfinite().all()
    expected = -(output.advantages[..., None] * output.logprobs).mean()
    assert_close(output.nsp_loss, expected, 1e-6)
    # the gradient of the plain policy gradient is that of the clipped one where nothing is clipped
    model.zero_grad()
    output.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    again = refine_step(model, ids, RefineConfig(num_chunks=3), attention_mask=mask, rollouts=output.drawn)
    model.zero_grad()
    again.loss.backward()
    for name, p in model.named_parameters():
        assert_close(got[name], p.grad, 1e-9, name)


@pytest.mark.parametrize(
    ("setting", "function", "message"),
    [
        (
            "reward",
            lambda *_: None,
            "reward .* must return a tensor of one number per rollout, .* got NoneType",
        ),
        ("reward", lambda p, *_: p.float(), r"one number per rollout, shape \(6,\), got \(6, 5\)"),
        ("reward", lambda p, *_: torch.full((len(p),), torch.nan), "NaN or infinity for 6 of 6 rollouts"),
        (
            "selection",
            lambda e, *_: e,
            r"selection .* must return whole numbers of shape \(2, 3\), got \(2, 130\)",
        ),
        ("selection", lambda e, *_: torch.zeros(2, 3, dtype=torch.int64), "positions between 1 and length"),
        ("objective", lambda *_: torch.zeros(()), "objective .* must return two scalar tensors"),
        ("objective", lambda l, *_: (l, l.mean()), "objective .* must return two scalar tensors"),
    ],
)
def test_what_a_part_returns_wrongly_is_named(monkeypatch, setting, function, message):
    monkeypatch.setattr("tests.refine.test_extending.broken", function, raising=False)
    ids, mask = ragged_batch(130, 120)
    config = RefineConfig(num_chunks=3, **{setting: f"{HERE}:broken"})
    with pytest.raises(ValueError, match=message):
        refine_step(tiny_model(), ids, config, attention_mask=mask)


@pytest.mark.parametrize("name", ["nothing", "tests.refine.test_extending:nothing", "../x:y", ":x", "a b:c"])
def test_a_part_that_cannot_be_found_is_named(name):
    with pytest.raises(
        ValueError, match=r"reward (must be one of|'tests.refine.test_extending:nothing' cannot)"
    ):
        RefineConfig(reward=name)


def test_a_part_that_is_no_function_is_named():
    with pytest.raises(ValueError, match="must be a function, the module holds a str"):
        RefineConfig(reward=f"{HERE}:HERE")


def test_models_of_another_kind_are_refused():
    with pytest.raises(
        TypeError, match=r"refine_step needs a fast-weight model of this package .* got Linear"
    ):
        refine_step(torch.nn.Linear(2, 2), torch.zeros(1, 200, dtype=torch.int64), RefineConfig())


def test_the_built_in_objective_is_open_to_others():
    """An objective of one's own may build on the built-in one."""
    logprobs = torch.randn(1, 2, 1, 4)
    loss, share = policy_loss(logprobs, logprobs, torch.ones(1, 2, 1), RefineConfig())
    assert loss == -1 and share == 0
