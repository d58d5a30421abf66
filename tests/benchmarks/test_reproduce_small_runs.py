"""A second run of the small-scale comparison, and the page that is made from results files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reproduce_small import agreement, measures, page, plan
from benchmarks.reproduce_small.__main__ import parse
from benchmarks.reproduce_small.measures import MAIN
from benchmarks.reproduce_small.plan import EQUAL_TIME


def test_the_page_is_that_of_the_results_files():
    """Written by --page from the files that are there, with no run."""
    written = (Path(page.__file__).parents[2] / "docs" / "reproduce_small.md").read_text(encoding="utf-8")
    assert page.page(page.recorded(), page.weighed()) == written


def test_a_second_run_stands_beside_the_first():
    """A field that the page lacks, or that nothing fills, would only show after an hour of runs."""
    path, first = page.recorded()[0]
    text = page.page([(path, first), (path, first | {"first_seed": 5})])
    assert "**First run** (seeds 0 to 4)." in text and "**Second run** (seeds 5 to 9)." in text
    assert "overlap: the runs agree" in text and "lie apart" not in text
    assert "{" not in text


def test_the_run_with_the_loss_on_the_answers_has_a_section_of_its_own():
    path, first = page.recorded()[0]
    text = page.page([(path, first)], (path, first | {"first_seed": 10}))
    assert (
        "**Loss on the answers** (seeds 10 to 14)." in text and "Not run yet" not in text.split("## With")[1]
    )
    assert "{" not in text


def test_two_runs_are_pooled_by_their_seeds():
    one = {"difference": 0.01, "interval": [-0.01, 0.03], "differences": [0.0, 0.02]}
    assert agreement.pooled(one, one)["difference"] == pytest.approx(0.01)
    low, high = agreement.pooled(one, one)["interval"]
    assert high - low == pytest.approx(0.04 / 2**0.5)
    other = {"difference": 0.04, "interval": [0.02, 0.06], "differences": [0.04]}
    assert agreement.pooled(one, other)["difference"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ((0.01, 0.03), (0.015, 0.05), (1, 1, 0, 1, 1)),  # twice on the same side, the second's mean outside
        ((0.01, 0.03), (-0.01, 0.04), (1, 1, 1, 1, 0)),
        ((0.01, 0.03), (-0.04, -0.01), (1, 0, 0, 1, 0)),
        ((0.0, 0.0), (-0.04, 0.01), (0, 0, 0, 0, 0)),  # no item moved
    ],
)
def test_rows_of_two_runs_are_counted(monkeypatch, first, second, says):
    monkeypatch.setattr(agreement, "MEASURES", {MAIN: measures.MEASURES[MAIN]})
    one, other = (
        {MAIN: {"difference": sum(ends) / 2, "interval": ends, "differences": [0.0]}}
        for ends in (first, second)
    )
    assert tuple(agreement.counted(one, other).values()) == says


def test_another_first_seed_shares_nothing_with_the_first():
    """Seeds of the arms and of the choice, prompts, documents, folders."""
    rates = dict.fromkeys(("SFT", "REFINE"), 1e-4)
    ratios = {"REFINE": 1.4}
    first, second = (
        {*plan.arms(options, rates, ratios), *plan.selection(options).values(), plan.before(options)}
        for options in (parse([]), parse(["--first_seed", "5"]))
    )
    assert len(first) == len(second)
    assert not {job.seed for job in first if job.steps} & {job.seed for job in second if job.steps}
    root = Path()
    assert not {job.folder(root) for job in first} & {job.folder(root) for job in second}


def test_the_loss_on_the_answers_is_that_of_both_sides(tmp_path):
    options = parse(["--weigh_answers", "--first_seed", "10"])
    jobs = plan.arms(options, {"SFT": 1e-4, "REFINE": 3e-4}, dict.fromkeys(("REFINE",), 1.4))
    assert all(job.weighed for job in (*jobs, *plan.selection(options).values()))
    assert {rate for _, rate in plan.selection(options)} == {3e-5, 1e-4, 3e-4, 1e-3}
    plain = plan.arms(parse(["--first_seed", "10"]), {"SFT": 1e-4, "REFINE": 3e-4}, {"REFINE": 1.4})
    assert not {job.folder(tmp_path) for job in jobs} & {job.folder(tmp_path) for job in plain}


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    from refine.prepare import packaged_model

    return AutoTokenizer.from_pretrained(packaged_model())


def test_documents_of_the_first_and_of_a_second_run_are_apart(tokenizer, monkeypatch):
    monkeypatch.setattr(measures, "DOCUMENTS", 8)  # a distribution's Python has less text of its own
    sets = [
        {tuple(row) for row in measures._documents(tokenizer, first_seed, separate).tolist()}
        for first_seed in (0, 5)
        for separate in (False, True)
    ]
    assert [len(one) for one in sets] == [measures.DOCUMENTS] * 4
    assert len(set.union(*sets)) == 4 * measures.DOCUMENTS


def test_too_few_documents_are_said(tokenizer, monkeypatch):
    monkeypatch.setattr(measures, "DOCUMENTS", 10**4)
    with pytest.raises(
        ValueError, match=r"are measured on 10000 held-out documents .* of this Python has \d+ of"
    ):
        measures._documents(tokenizer)


def test_arms_that_were_never_run_come_before_the_control():
    jobs = plan.arms(parse(["--arms", *plan.ORDER]), dict.fromkeys(("SFT", "REFINE"), 1e-4), {"REFINE": 1.4})
    arms = list(dict.fromkeys(job.arm for job in jobs))
    assert arms[:3] == ["SFT", "REFINE", EQUAL_TIME]
    assert set(arms[-2:]) == {plan.SMALLER_STEPS, "REFINE, c = 32"}
    assert jobs[1].arm == "REFINE" and jobs[1].seed == jobs[0].seed
