"""What the benchmarks say of themselves: counts against PyTorch's own, a page of results drawn from files alone."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cost_model, report, results, roofline
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
    with pytest.raises(ValueError, match=r"docs/results\.md must hold the lines"):
        report.renewed("# a page\n")


def test_two_runs_are_compared_on_one_machine():
    def run(*ratios, processor="x"):
        rows = [{"what": f"w{i}", "against": "a", "ratio": ratio} for i, ratio in enumerate(ratios)]
        return {"machine": {"processor": processor, "threads": 2}, "table": rows}

    files = [("first", run(1.0, 2.0)), ("other", run(9.0, 9.0, processor="y")), ("last", run(1.05, 2.5))]
    said = report.agreement(files)
    assert said.startswith(
        "The run before on this machine ([file](../first)): of the 2 ratios that both have, 1 "
    )
    assert "the furthest 25 % apart" in said and "w1" in said
    assert report.agreement(files[:1]) == report.agreement(files[:2]) == ""
    assert "of the 2 ratios" in report.agreement([files[0], ("last", run(1.0, 2.0, 3.0))])
    assert report.agreement([files[0], ("last", run(*[1.0] * 5))]) == ""


def test_the_roofline_takes_the_longer_of_bytes_and_products():
    by_name = {count.name: count for count in roofline.COUNTS}
    forward, head = by_name["delta rule, forward"], by_name["LM head, forward with entropy"]
    assert forward.floor == pytest.approx(0.142e-3, rel=0.01)  # by bytes: 1,812 a token and head
    assert head.floor == pytest.approx(2.68e-3, rel=0.01)  # by products: G
    gpu = {"table": {"times": [{"what": "delta rule 1 x 16384: ours", "forward_ms": 0.3, "value": "-"}]}}
    assert roofline.measured(gpu) == {"delta rule, forward": 0.3} and roofline.measured(None) == {}
    assert (
        "| delta rule, forward | 16K tokens, 16 heads of 128 | 128 | bytes | 142 | 300 |"
        in roofline.table(gpu)
    )
    assert "| 142 | - |" in roofline.table(None)


def test_a_large_models_table():
    paired = {"ratio": 1.05, "low": 1.0, "high": 1.1, "rounds": 2, "seconds_a": 70.0, "seconds_b": 68.0}
    machine = {"processor": "x", "threads": 2, "load_before": 0.1}
    table = {"tokens": 16384, "shared_prefix": paired, "memory_mb": {"sft": 5000.0, "shared_prefix": 6000.0}}
    contents = {
        "model": "M", "date": "2026-01-01", "machine": machine, "versions": {"torch": "2"}, "table": table
    }  # fmt: skip
    row = "| M, vocabulary 32,000 | 16,384 | 1.05 (1.00-1.10, 2 pairs) | - | 5,000, 6,000 | 68 |"
    assert row in report._large({"m": ("path", contents)})
    contents["table"] = table | {"per_prefix": paired | {"ratio": 7.46}}
    assert "| 7.5 | 5,000" in report._large({"m": ("path", contents)})
    contents["table"] = table | {"per_prefix": {"failed": "ended with -9 (-9: killed, out of memory)"}}
    assert "| out of memory | 5,000" in report._large({"m": ("path", contents)})


def test_the_page_of_results_is_drawn_from_the_results():
    """Every number between the markers comes from a results file or a count."""
    if not torch.__version__.startswith("2.13"):
        pytest.skip(
            "what autograd keeps differs between versions of PyTorch; docs/results.md counts with 2.13"
        )
    readme = (report.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert report.renewed(readme) == readme, "run python -m benchmarks.report"
