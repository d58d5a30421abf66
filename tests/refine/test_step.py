"""The step: two ways to one gradient, and everything that it promises about draws and shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from refine import RefineConfig, refine_step
from refine.method import Rollouts, next_token_targets
from refine.models.head import NextTokenLoss
from tests.numerics import assert_close, assert_gradients_close, relative_error
from tests.refine.tiny import FAMILIES, VOCABULARY, ragged_batch, tiny_model


def gradients(model, *arguments, **keywords):
    """A step's output and its gradient for every parameter."""
    model.zero_grad()
    output = refine_step(model, *arguments, **keywords)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rollouts", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_both_ways_give_the_same_gradient(family, num_rollouts, dtype, tolerance):
    model = tiny_model(family, dtype, initializer_range=0.15)
    ids, mask = ragged_batch(205, 160)
    # both clamps (20 and length - 20), on a boundary of the stride and just beside it
    positions = torch.tensor([[20, 64, 65, 128, 185], [20, 63, 100, 127, 140]])
    rollouts = torch.randint(VOCABULARY, (2, 5, num_rollouts, 4))
    rollouts[0, 1, 0] = ids[0, 64:68]
    if num_rollouts > 1:
        # one of each group is the text: rewards that nearly tie have advantages of rounding alone
        at = positions[:, :, None] + torch.arange(4)
        rollouts[:, :, 0] = ids[torch.arange(2)[:, None, None], at]
    config = RefineConfig(
        num_chunks=5, rollout_length=4, num_rollouts=num_rollouts, reward="hybrid", lambda_rl=1.0
    )
    given = {"attention_mask": mask, "positions": positions, "rollouts": rollouts}
    shared, got = gradients(model, ids, config, **given)
    slow, expected = gradients(model, ids, dataclasses.replace(config, step="per_prefix"), **given)
    assert_close(shared.loss, slow.loss, tolerance, "loss")
    assert_close(shared.logprobs, slow.logprobs, max(tolerance, 1e-6), "log-probs")
    assert_close(shared.rewards, slow.rewards, max(tolerance, 1e-6), "rewards")
    assert shared.advantages.abs().sum() > 0
    assert_gradients_close(got, expected, tolerance)
    if dtype == torch.float64:
        for name, grad in expected.items():
            assert_close(got[name], grad, tolerance, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rollouts_gradient_flows_through_the_prefix(family):
    """The next-sequence loss alone: both ways agree, and cutting the state out of the graph does not."""
    model = tiny_model(family)
    ids, _ = ragged_batch(120)
    config = RefineConfig(num_chunks=3, lambda_sft=0.0, lambda_rl=1.0)
    given = {
        "positions": torch.tensor([[25, 64, 90]]),
        "rollouts": torch.randint(VOCABULARY, (1, 3, 1, 5)),
    }
    _, got = gradients(model, ids, config, **given)
    _, expected = gradients(model, ids, dataclasses.replace(config, step="per_prefix"), **given)
    for name, grad in expected.items():
        assert_close(got[name], grad, 1e-10, name)
    from refine.models import state

    gather = state.StateTrace.gather
    state.StateTrace.gather = lambda self, *a: gather(self, *a).detach()
    try:
        _, cut = gradients(model, ids, config, **given)
    finally:
        state.StateTrace.gather = gather
    name = "model.layers.0.attn." + ("qkv.weight" if family == "lact" else "v_proj.weight")
    assert relative_error(cut[name], expected[name]) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rollouts", [1, 3])
def test_both_ways_draw_the_same(family, num_rollouts):
    model = tiny_model(family)
    ids, mask = ragged_batch(170, 130, 101)
    config = RefineConfig(num_chunks=4, num_rollouts=num_rollouts)
    seeds = torch.tensor([1, 2, 3])
    with torch.no_grad():
        shared = refine_step(model, ids, config, attention_mask=mask, seeds=seeds)
        slow = refine_step(
            model, ids, dataclasses.replace(config, step="per_prefix"), attention_mask=mask, seeds=seeds
        )
    assert torch.equal(shared.positions, slow.positions)
    assert torch.equal(shared.rollouts, slow.rollouts)
    assert shared.rollouts.shape == (3, 4, num_rollouts, 5)
    assert shared.rewards.shape == shared.advantages.shape == (3, 4, num_rollouts)
    assert shared.entropy.shape == (3, 170)


def test_a_sequence_draws_the_same_in_any_batch():
    model = tiny_model()
    ids, mask = ragged_batch(150, 120, 140)
    config = RefineConfig(num_chunks=3, num_rollouts=2)

    def draw(rows: list[int]):
        with torch.no_grad():
            output = refine_step(
                model,
                ids[rows],
                config,
                attention_mask=mask[rows],
                generator=torch.Generator().manual_seed(7),
            )
        return output.positions, output.rollouts

    together = draw([0, 1, 2])
    again = draw([0, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(together, again))
    shuffled = draw([2, 0])
    for a, b in zip(together, shuffled):
        assert torch.equal(a[[2, 0]], b)
    alone = draw([1])
    for a, b in zip(together, alone):
        assert torch.equal(a[[1]], b)
    other = refine_step(model, ids, config, attention_mask=mask, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(other.rollouts, together[1])


def test_sequences_of_a_batch_do_not_touch_each_other():
    """The loss of a batch is the mean of its sequences' losses, whatever the padding."""
    model = tiny_model()
    ids, mask = ragged_batch(150, 101)
    config = RefineConfig(num_chunks=3)
    seeds = torch.tensor([11, 12])
    _, together = gradients(model, ids, config, attention_mask=mask, seeds=seeds)
    parts = [
        gradients(model, ids[i : i + 1, : int(mask[i].sum())], config, seeds=seeds[i : i + 1])[1]
        for i in (0, 1)
    ]
    for name, grad in together.items():
        assert_close(grad, (parts[0][name] + parts[1][name]) / 2, 1e-10, name)


def test_lambda_rl_zero_is_sft():
    model = tiny_model()
    ids, mask = ragged_batch(90, 70)
    _, got = gradients(model, ids, RefineConfig(num_chunks=2, lambda_rl=0.0), attention_mask=mask)
    model.zero_grad()
    targets, weight = next_token_targets(ids, mask.sum(1))
    model(ids, head=NextTokenLoss(targets, weight)).loss.backward()
    for name, p in model.named_parameters():
        assert_close(got[name], p.grad, 1e-10, name)
    logprobs = model(ids).logits.log_softmax(-1)
    per_sequence = [
        -logprobs[b, : n - 1].gather(1, ids[b, 1:n, None]).mean() for b, n in enumerate(mask.sum(1).tolist())
    ]
    assert_close(model(ids, head=NextTokenLoss(targets, weight)).loss, sum(per_sequence) / 2, 1e-6)


def test_off_policy_updates_use_the_ratio():
    model = tiny_model()
    ids, _ = ragged_batch(120)
    config = RefineConfig(num_chunks=4, lambda_sft=0.0, lambda_rl=1.0, clip_range=0.2)
    with torch.no_grad():
        draw = refine_step(model, ids, config, seeds=torch.tensor([1]))
    given = {"rollouts": draw.drawn}
    _, fresh = gradients(model, ids, config, seeds=torch.tensor([1]))
    same, again = gradients(model, ids, config, **given)
    for name, grad in fresh.items():
        assert_close(again[name], grad, 1e-9, name)
    assert same.clip_fraction == 0
    moved = dataclasses.replace(draw.drawn, old_logprobs=draw.logprobs - 1.0)
    output = refine_step(
        model, ids, config, rollouts=moved
    )  # every ratio is e: clipped where the advantage is > 0
    share = (draw.advantages > 0).double().mean().item()
    assert output.clip_fraction.item() == pytest.approx(share)


@pytest.mark.parametrize("selection", ["entropy", "uniform", "argmax", "argmin"])
@pytest.mark.parametrize("reward", ["cosine", "binary", "hybrid", "tests.refine.test_rewards:length_of_run"])
def test_every_selection_and_reward_runs(selection, reward):
    model = tiny_model(dtype=torch.float32)
    ids, mask = ragged_batch(90, 80)
    output = refine_step(
        model, ids, RefineConfig(num_chunks=3, selection=selection, reward=reward), attention_mask=mask
    )
    assert torch.isfinite(output.loss)
    assert output.rewards.dtype == torch.float32


def test_rewards_agree_with_their_definition():
    model = tiny_model()
    ids, _ = ragged_batch(100)
    config = RefineConfig(num_chunks=3, rollout_length=4, reward="hybrid")
    output = refine_step(model, ids, config, seeds=torch.tensor([9]))
    hidden = model(ids).last_hidden_state[0]
    for j in range(3):
        p = int(output.positions[0, j])
        rollout = output.rollouts[0, j, 0]
        text = torch.cat([ids[0, :p], rollout])[None]
        predicted = model(text).last_hidden_state[0, p:]
        cosine = torch.cosine_similarity(predicted, hidden[p : p + 4], dim=-1).mean()
        match = (rollout == ids[0, p : p + 4]).double().mean()
        assert_close(output.rewards[0, j, 0], cosine + match, 1e-6)


@pytest.mark.filterwarnings("error")
def test_the_spread_of_a_lone_reward_is_zero():
    ids = torch.randint(VOCABULARY, (1, 60))
    assert refine_step(tiny_model(), ids, RefineConfig(num_chunks=1)).reward_std == 0
    several = refine_step(tiny_model(), ids, RefineConfig(num_chunks=1, num_rollouts=3))
    assert_close(several.reward_std, several.rewards.flatten().std(), 1e-6)


def test_bfloat16_model_keeps_rewards_and_logprobs_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    ids, _ = ragged_batch(90)
    output = refine_step(model, ids, RefineConfig(num_chunks=3))
    assert output.rewards.dtype == output.logprobs.dtype == output.entropy.dtype == torch.float32
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast_runs():
    model = tiny_model(dtype=torch.float32)
    ids, _ = ragged_batch(90)
    config = RefineConfig(num_chunks=3)
    full = refine_step(model, ids, config, seeds=torch.tensor([1]))
    given = {"positions": full.positions, "rollouts": full.rollouts}
    with torch.autocast("cpu", torch.bfloat16):
        output = refine_step(model, ids, config, **given)
    output.loss.backward()
    assert relative_error(output.ntp_loss, full.ntp_loss) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": "hole"}, "attention_mask has a hole in row 1"),
        ({"attention_mask": "empty"}, "a sequence has 0 tokens"),
        ({"attention_mask": "shape"}, "attention_mask must have"),
        ({"input_ids": "short"}, "needs at least 160"),
        ({"input_ids": "flat"}, r"must be \[batch, tokens\]"),
        ({"positions": "shape"}, r"positions must have shape \(2, 8\)"),
        ({"positions": "late"}, "positions must lie between"),
        ({"rollouts": "alone"}, "without positions"),
        ({"rollouts": "twice"}, "positions were given twice"),
        ({"advantages": "alone"}, "belong to rollouts"),
    ],
)
def test_bad_input_is_named(change, message):
    ids, mask = ragged_batch(200, 180)
    arguments = {"input_ids": ids, "attention_mask": mask}
    kind = next(iter(change.items()))
    if kind == ("attention_mask", "hole"):
        mask[1, 90] = 0
    elif kind == ("attention_mask", "empty"):
        mask[1] = 0
    elif kind == ("attention_mask", "shape"):
        arguments["attention_mask"] = mask[:, :-1]
    elif kind == ("input_ids", "short"):
        arguments = {"input_ids": ids[:, :150]}
    elif kind == ("input_ids", "flat"):
        arguments = {"input_ids": ids[0]}
    elif kind == ("positions", "shape"):
        arguments["positions"] = torch.full((2, 3), 30)
    elif kind == ("positions", "late"):
        arguments["positions"] = torch.full((2, 8), 178)
    elif kind == ("rollouts", "alone"):
        arguments["rollouts"] = torch.zeros(2, 8, 1, 5, dtype=torch.int64)
    elif kind == ("rollouts", "twice"):
        positions = torch.full((2, 8), 30)
        arguments |= {"positions": positions, "rollouts": Rollouts(positions=positions)}
    else:
        arguments["rollouts"] = Rollouts(positions=torch.full((2, 8), 30), advantages=torch.zeros(2, 8, 1))
    ids = arguments.pop("input_ids")
    with pytest.raises(ValueError, match=message):
        refine_step(tiny_model(dtype=torch.float32), ids, RefineConfig(), **arguments)
