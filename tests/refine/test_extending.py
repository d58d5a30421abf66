"""Parts of one's own, from outside the package: a reward, a selection, an objective, a data source, a model."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from refine import RefineConfig, load_model, refine_step
from refine.data.document import DataError
from refine.data.sources import open_source
from refine.method.objective import policy_loss
from refine.models import DeltaNetConfig, DeltaNetForCausalLM, new_model
from refine.models.body import FastWeightModel
from refine.models.delta_net import DeltaNetAttention
from refine.models.registry import register_model
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


def documents():
    """A data source: every text is a document; the second is no text."""
    return [f"Document {number}: the grass is green, the sky is blue. " * 60 for number in range(8)]


def rows_with_a_hole():
    """A data source of rows."""
    return [{"body": "text " * 50}, {"body": None}, {"body": "more " * 50}]


def test_a_data_source_of_ones_own(tmp_path):
    """It trains, with a checkpoint and held-out texts of its own."""
    arguments = ["--dataset_name_or_path", f"{HERE}:documents", "--output_dir", str(tmp_path / "run")]
    arguments += [
        "--model_type",
        "slow_net",
        "--max_length",
        "200",
        "--max_steps",
        "2",
        "--eval_samples",
        "1",
    ]
    arguments += ["--save_steps", "0", "--shuffle_buffer", "4", "--num_chunks", "2", "--eval_fraction", "0.3"]
    from refine.train import main

    assert main(arguments) == 0
    assert isinstance(load_model(tmp_path / "run" / "final"), SlowNetForCausalLM)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4  # before, two updates, after
    source = open_source(f"{HERE}:rows_with_a_hole")
    kinds = [type(row).__name__ for unit in range(3) for row in source.rows(unit, 0)]
    assert source.units == 3 and kinds == ["Document", "BadRow", "Document"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"{HERE}:nothing", "dataset_name_or_path .* cannot be imported"),
        (f"{HERE}:HERE", "must be a function"),
        (f"{HERE}:middle", "must return a sequence of texts or rows"),
        ("builtins:list", "returned no text"),
    ],
)
def test_a_data_source_that_cannot_be_is_named(value, message):
    with pytest.raises(DataError, match=message):
        open_source(value)


class SlowNetConfig(DeltaNetConfig):
    """A model of one's own: DeltaNet with a tenth of the writing rate."""

    model_type = "slow_net"


class SlowAttention(DeltaNetAttention):
    """Its mixer."""

    def __init__(self, config):
        super().__init__(config)
        self.beta_scale = 0.1


class SlowNetModel(FastWeightModel):
    """Its body."""

    config_class = SlowNetConfig
    mixers: ClassVar = {"linear_attention": SlowAttention}


@register_model(tiny={"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48})
class SlowNetForCausalLM(DeltaNetForCausalLM):
    """With a head."""

    config_class = SlowNetConfig
    body_class = SlowNetModel


def test_a_model_of_ones_own():
    """Found by its type; its state branches as the others' do."""
    model = new_model("slow_net", vocab_size=53, hidden_size=24, num_hidden_layers=2, num_heads=2).double()
    assert type(model) is SlowNetForCausalLM and model.model.layers[0].attn.beta_scale == 0.1
    ids, mask = ragged_batch(130, 120)
    given = {"attention_mask": mask, "seeds": torch.tensor([1, 2])}
    shared = refine_step(model, ids, RefineConfig(num_chunks=3), **given)
    slow = refine_step(model, ids, RefineConfig(num_chunks=3, step="per_prefix"), **given)
    assert torch.equal(shared.rollouts, slow.rollouts)
    assert_close(shared.loss, slow.loss, 1e-10)
