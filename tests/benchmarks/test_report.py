"""What the benchmarks say of themselves: counts against PyTorch's own, and a README drawn from files alone."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cost_model, report, results
from benchmarks.cost_model import PUBLISHED, Step, step_flops
from benchmarks.step_cost import model_of_the_table


@pytest.mark.parametrize("model", ["delta_net", "lact"])
def test_counted_ratio_is_that_of_the_products_that_run(model):
    """To 5 %: the formulas leave out what a kernel does beside its products."""
    net = model_of_the_table(model)
    at = Step(1024)
    counted = step_flops(net.config, at, "shared_prefix") / step_flops(net.config, at, "sft")
    assert counted == pytest.approx(cost_model.counted_ratio_of_calls(net, 1024), rel=0.05)


def test_the_papers_way_is_its_own_count():
    for config in PUBLISHED.values():
        sft, paper = (step_flops(config, Step(16384), way) for way in ("sft", "paper"))
        assert paper / sft == pytest.approx(44 / 3)
        assert step_flops(config, Step(16384), "shared_prefix") / sft < 1.01
    with pytest.raises(ValueError, match="way must be sft, shared_prefix or paper, got 'magic'"):
        step_flops(config, Step(16384), "magic")


def test_a_lact_chunk_is_the_published_count():
    """21.7 GFLOP forward for a chunk of 2,048 tokens and a layer, window attention apart."""
    config = PUBLISHED["LaCT-760M"]
    window = 4 * config.window_size * config.hidden_size
    assert 2048 * (cost_model.mixer_flops(config) - window) == pytest.approx(21.7e9, rel=0.01)


def test_records_are_found_by_kind_and_device(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    path = results.record("ratios", [1], name="x")
    assert path.startswith("benchmarks/results/ratios_x_")
    (tmp_path / "step_cost_cpu_20200101_0000.json").write_text(json.dumps({"table": 2}))
    assert [contents["table"] for _, contents in results.read("ratios")] == [[1]]
    assert [contents["table"] for _, contents in results.read("step_cost", "cpu")] == [2]
    assert results.read("gpu") == []


def test_the_report_needs_its_markers():
    with pytest.raises(ValueError, match=r"README\.md must hold the lines"):
        report.renewed("# a README\n")


def test_the_readme_is_drawn_from_the_results():
    """Every number between the markers comes from a results file or a count."""
    if not torch.__version__.startswith("2.13"):
        pytest.skip("what autograd keeps differs between versions of PyTorch; the README counts with 2.13")
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert report.renewed(readme) == readme, "run python -m benchmarks.report"
