"""How the small-scale comparison is summed up: differences item by item, intervals over items and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.reproduce_small import measures, plan, table
from benchmarks.reproduce_small.measures import MAIN
from benchmarks.reproduce_small.plan import EQUAL_TIME
from benchmarks.reproduce_small.statement import verdict
from benchmarks.reproduce_small.table import interval, render, summarize

ITEMS = 60
MEASURES = {name: measures.MEASURES[name] for name in (MAIN, "loss", "copy_32")}


@pytest.fixture(autouse=True)
def _few_measures(monkeypatch):
    monkeypatch.setattr(table, "MEASURES", MEASURES)


def runs(gain: float = 0.0, noise: float = 0.0, seeds: int = 3, arms=("REFINE",)) -> list[dict]:
    """A first measure, SFT, and arms that differ from it by ``gain`` and by noise of their own."""
    rng = np.random.default_rng(1)
    texts = rng.normal(size=ITEMS)  # what an item is worth, far more than any arm changes it
    found = [{"arm": "before", "seed": 0, "steps": 0, "items": dict.fromkeys(MEASURES, texts.tolist())}]
    for arm in ("SFT", *arms):
        for seed in range(seeds):
            values = texts + 0.1 * seed + (gain + noise * rng.normal(size=ITEMS) if arm != "SFT" else 0)
            items = dict.fromkeys(MEASURES, values.tolist())
            found.append({"arm": arm, "seed": seed, "steps": 160, "items": items})
    return found


def test_differences_are_taken_item_by_item():
    """Items and seeds differ by much; a constant gain is still found exactly."""
    table = summarize(runs(gain=0.02), {"SFT": 1.0, "REFINE": 1.3})
    refine = table["measures"]["REFINE"]["loss"]
    assert refine["difference"] == pytest.approx(0.02)
    assert refine["interval"] == pytest.approx([0.02, 0.02])
    assert refine["seeds"] == pytest.approx([refine["mean"] - 0.1, refine["mean"], refine["mean"] + 0.1])
    assert "difference" not in table["measures"]["SFT"]["loss"]
    assert table["arms"]["REFINE"] == {"updates": 160, "seeds": 3, "time_of_an_update": 1.3}


def test_intervals_cover_what_they_say():
    """Of many samples without a difference about one in twenty shows one; few seeds make it more."""
    rng = np.random.default_rng(0)
    missed = sum(
        not (low <= 0 <= high)
        for low, high in (interval(rng.normal(size=(1, 200)), draws=300) for _ in range(200))
    )
    assert 2 <= missed <= 25
    wide, narrow = interval(rng.normal(size=(3, 20))), interval(rng.normal(size=(3, 2000)))
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_seeds_that_differ_widen_an_interval():
    same, apart = np.zeros((3, 500)), np.array([[-1.0], [0.0], [1.0]]) + np.zeros((3, 500))
    assert interval(same) == [0, 0]
    low, high = interval(apart)
    assert low < -0.5 and high > 0.5


def test_a_table_marks_what_leaves_zero_out():
    ratios = {"SFT": 1.0, "REFINE": 1.3, EQUAL_TIME: 1.0}
    sure = render(summarize(runs(gain=0.02, noise=0.01), ratios))
    unsure = render(summarize(runs(noise=1.0), ratios))
    assert sure.count("**+0.0") == len(MEASURES) and "**" not in unsure
    assert "| time of an update / SFT | - | 1.00 | 1.30 |" in sure
    assert "| seeds | - | 3 | 3 |" in sure
    assert sure.count("\n") == len(MEASURES) + 4
    with_time = render(summarize(runs(arms=("REFINE", EQUAL_TIME)), ratios))
    assert with_time.startswith(f"| | before | SFT | REFINE | {EQUAL_TIME} |")


def test_seeds_are_compared_with_themselves():
    """An arm that has fewer seeds than SFT, and not the first of them."""
    found = [one for one in runs(gain=0.02) if one["arm"] != "REFINE" or one["seed"] > 0]
    refine = summarize(found, {"SFT": 1.0, "REFINE": 1.3})["measures"]["REFINE"][MAIN]
    assert refine["differences"] == pytest.approx([0.02, 0.02])


def test_plain_text_is_compared_with_plain_text():
    found = runs(gain=0.02, arms=("SFT, plain text", "REFINE, plain text"))
    rows = summarize(found, dict.fromkeys(plan.ORDER, 1.0))["measures"]
    assert rows["REFINE, plain text"]["loss"]["difference"] == pytest.approx(0)
    assert "difference" not in rows["SFT, plain text"]["loss"]


def test_refine_is_compared_with_the_other_arms_of_sft():
    found = runs(gain=0.02, arms=("REFINE", EQUAL_TIME))
    table = summarize(found, dict.fromkeys(plan.ORDER, 1.0))
    assert table["refine_minus"][EQUAL_TIME][MAIN]["differences"] == pytest.approx([0, 0, 0])


@pytest.mark.parametrize(
    ("gain", "noise", "time_gain", "says"),
    [
        (0.01, 0.0, 0.0, "**Supported**"),
        (0.01, 0.0, 0.02, "at equal updates only"),
        (0.05, 0.0, 0.0, "**A trade**"),  # the same numbers are a loss that has risen
        (-0.05, 0.0, 0.0, "**Contradicted**"),
        (0.0, 0.05, 0.0, "more than 3 points is excluded"),
        (0.0, 3.0, 0.0, "the question stays open"),
    ],
)
def test_the_verdict_is_what_the_statement_says(gain, noise, time_gain, says):
    found = runs(gain=gain, noise=noise)
    longer = [one | {"arm": EQUAL_TIME} for one in runs(gain=time_gain) if one["arm"] == "REFINE"]
    assert says in verdict(summarize(found + longer, dict.fromkeys(plan.ORDER, 1.0)))


def test_questions_from_one_reading_are_those_of_whole_prompts(monkeypatch, tmp_path):
    """The answer's nats, of four questions that go on from one state and of four prompts read from the start."""
    import torch
    from transformers import AutoTokenizer

    from refine.models import load_model
    from refine.models.head import SampleToken
    from refine.prepare import packaged_model

    monkeypatch.setattr(measures, "TASKS", ("niah_multikey_1",))
    path = packaged_model()
    model, tokenizer = load_model(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    prompts = measures._prompts(tokenizer, tmp_path, {1: 1}, seed=0)
    assert measures._prompts(tokenizer, tmp_path, {1: 1}, seed=0) == prompts
    assert measures._prompts(tokenizer, tmp_path, {1: 1}, seed=10) != prompts
    ((shared, questions),) = prompts["niah_multikey_1_1x"]
    whole = []
    with torch.no_grad():
        nats = measures._needles(model, prompts)["niah_multikey_1_1x_nats"]
        for rest, answer in questions:
            ids = torch.tensor([[*shared, *rest, *answer]])
            head = SampleToken(temperature=0.0, targets=ids[:, 1:])
            logprob = model(ids[:, :-1], use_cache=False, head=head).logprob
            whole.append(-logprob[0, -len(answer) :].mean().item())
    assert len(questions) == 4 and len({tuple(answer) for _, answer in questions}) == 4
    assert nats == pytest.approx([np.mean(whole)], abs=1e-4)


def test_every_arm_is_a_setting_of_training():
    """Arms that a setting's rename would silently make equal."""
    from refine.training.settings import TrainSettings

    known = set(TrainSettings.__dataclass_fields__)
    for settings in (plan.COMMON, *plan.ARMS.values()):
        assert set(settings) <= known
