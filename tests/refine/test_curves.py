"""Recall over distance and loss by position, against plain forwards and against models of known behaviour."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from refine.eval import main
from refine.evaluation import curves
from refine.evaluation.curves import (
    CUE,
    PASSAGE,
    bootstrap_interval,
    draw_curves,
    loss_by_position,
    range_ends,
    recall_over_distance,
)
from refine.evaluation.settings import expand_tasks

from .tiny import FAMILIES, tiny_model


class Rememberer:
    """Predicts what followed the last occurrence of the token, up to ``reach`` tokens back."""

    training = False

    class config:
        vocab_size = 50_000

    def __init__(self, reach: int):
        self.reach = reach

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, ids, past_key_values, use_cache, head):
        before = torch.zeros(len(ids), 0, dtype=torch.int64) if past_key_values is None else past_key_values
        rows = torch.cat([before, ids], 1)
        token = torch.full_like(rows, -1)
        for b, row in enumerate(rows.tolist()):
            places: dict[int, int] = {}
            for t, now in enumerate(row):
                if now in places and t - places[now] <= self.reach:
                    token[b, t] = row[places[now] + 1]
                places[now] = t
        token = token[:, before.shape[1] :]
        right = token == head.targets
        return type("Output", (), {"past_key_values": rows, "token": token, "logprob": right.float().log()})()


def test_a_model_that_remembers_so_far_recalls_so_far(monkeypatch):
    monkeypatch.setattr(curves, "SEGMENT", 64)
    text = list(range(50_000, 60_000))
    found = recall_over_distance(
        Rememberer(reach=100), text, [0, 64, 100 - PASSAGE, 101 - PASSAGE, 150], count=3
    )
    assert [found[distance]["accuracy"] for distance in found] == [1, 1, 1, 0, 0]
    assert found[0]["nats"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_change_nothing_and_numbers_are_those_of_a_plain_forward(family, monkeypatch):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    documents = torch.randint(model.config.vocab_size, (3, 300), generator=generator)
    whole = loss_by_position(model, documents.tolist(), 300)
    monkeypatch.setattr(curves, "SEGMENT", 77)
    parts = loss_by_position(model, documents.tolist(), 300)
    assert list(whole) == [128, 256, 300]
    with torch.no_grad():
        logits = model(documents).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), documents[:, 1:], reduction="none")
    for end, begin in zip(whole, (1, 128, 256)):
        expected = losses[:, begin - 1 : end - 1].mean(1).numpy()
        assert np.abs(whole[end] - expected).max() < 1e-4
        assert np.abs(parts[end] - expected).max() < 1e-4


def test_the_passages_are_those_of_the_seed_at_every_distance():
    seen = []

    class Recorder(Rememberer):
        def __call__(self, ids, **rest):
            seen.append(ids)
            return super().__call__(ids, **rest)

    recall_over_distance(Recorder(10), list(range(100)), [0, 30], count=2, seed=3)
    first, second = seen
    assert first.shape[1] == CUE + 2 * PASSAGE and second.shape[1] == first.shape[1] + 30
    passage = first[:, CUE : CUE + PASSAGE]
    assert torch.equal(passage, first[:, -PASSAGE:]) and torch.equal(passage, second[:, -PASSAGE:])
    assert torch.equal(passage, second[:, CUE : CUE + PASSAGE])


def test_ranges():
    assert range_ends(100) == [100]
    assert range_ends(128) == [128]
    assert range_ends(1000) == [128, 256, 512, 1000]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="distances from 0 on"):
        recall_over_distance(Rememberer(1), [1, 2], [-1], 1)
    with pytest.raises(ValueError, match="has 5 tokens; loss_by_position needs 8"):
        loss_by_position(Rememberer(1), [[1] * 5], 8)
    with pytest.raises(ValueError, match="at least one document"):
        loss_by_position(Rememberer(1), [], 8)


def test_interval_of_a_mean_by_resampling():
    assert bootstrap_interval([1.0]) is None
    low, high = bootstrap_interval(np.random.default_rng(1).normal(size=400).tolist())
    assert low < 0.1 and high > -0.1 and 0.12 < high - low < 0.28  # 2 * 1.96 / sqrt(400) = 0.196


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert not draw_curves({}, {}, tmp_path / "curves.png")
    assert draw_curves(
        {64: (0.5, (0.4, 0.6))}, {128: (3.0, None), 256: (2.9, (2.8, 3.0))}, tmp_path / "curves.png"
    )
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_the_command_measures_draws_and_writes(tmp_path, capsys):
    arguments = [
        "--tasks", "recall_curve", "loss_by_position", "vt", "--recall_distances", "8", "64", "--positions", "300",
        "--samples", "2", "--lengths", "900", "--output_dir", str(tmp_path),
    ]  # fmt: skip
    assert main(arguments) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    found, intervals = record["results"], record["intervals"]
    assert 0 <= found["recall_curve_8"] <= 1 and found["recall_curve_nats_64"] > 0
    assert 2 < found["loss_by_position_128"] < 8 and set(intervals) >= {
        "recall_curve_64",
        "loss_by_position_300",
    }
    assert 0 <= found["vt_900"] <= 1 and "recall_curve_8" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "curves.png").is_file()


def test_positions_that_no_document_has_are_one_sentence(capsys):
    assert main(["--tasks", "loss_by_position", "--positions", "1000000"]) == 2
    said = capsys.readouterr().err
    assert "positions is 1000000, but no held-out document has so many tokens" in said


def test_ruler_is_all_that_needs_no_download():
    expanded = expand_tasks(["ruler"])
    assert len(expanded) == 11 and expanded[-3:] == ["vt", "cwe", "fwe"]
