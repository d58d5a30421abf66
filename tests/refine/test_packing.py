"""Packed rows in training: the run is the run with padding, without the padding."""

from __future__ import annotations

import pytest
import torch

import refine.train as training
from refine.method import Sequences
from refine.settings import SettingsError
from refine.training.settings import parse_settings
from refine.training.tracking import read_metrics
from tests.numerics import assert_close
from tests.refine.runs import run, weights, write_text


def test_a_batch_is_packed_row_after_row():
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    packed = Sequences.of(ids, mask).packed()
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert packed.cu_seqlens.tolist() == [0, 3, 7, 9]


@pytest.mark.parametrize("changes", [{}, {"phase": "sft"}, {"num_mini_batches": 2, "model_type": "lact"}])
def test_a_packed_run_is_the_run(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(training, "draw_plots", lambda folder: [])
    if "model_type" in changes:
        sizes = "hidden_size=16,num_hidden_layers=1,num_attn_heads=2,num_lact_heads=1,w0_w2_low_rank=4"
        changes = changes | {
            "config_overrides": f"{sizes},lact_chunk_size=32,window_size=24,intermediate_size=16"
        }
    data = write_text(tmp_path / "text.jsonl")
    changes = {"per_device_train_batch_size": 3, "learning_rate": 1e-3} | changes
    for name, packing in (("padded", False), ("packed", True)):
        assert run(tmp_path / name, data, packing=packing, save_steps=0, **changes) == 0
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("padded", "packed")]
    for padded, packed in zip(*lines, strict=True):
        for key in {"loss", "grad_norm", "reward", "entropy", "tokens"} & padded.keys():
            assert packed.get(key) == pytest.approx(padded.get(key), rel=1e-3), key
    expected = weights(tmp_path / "padded" / "final")
    for name, value in weights(tmp_path / "packed" / "final").items():
        assert_close(value, expected[name], 1e-3, name)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--phase", "post"], "phase post"),
        (["--segment_length", "64"], "segment_length"),
        (["--step", "per_prefix"], "step=per_prefix"),
    ],
)
def test_what_packing_goes_without(arguments, what):
    with pytest.raises(SettingsError, match=f"packing .* goes without {what}"):
        parse_settings(["--packing", *arguments])
