"""Post-training: pairs from files, the two updates of a step, and that a resumed run is the same run."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from refine.data.document import DataError
from refine.data.pairs import PairColumns, training_pairs
from refine.data.stream import DataConfig
from refine.prepare import load_model_and_tokenizer, packaged_model
from refine.shared_settings import ModelSettings
from refine.training.parallel import World
from refine.training.phases import Phase
from refine.training.settings import TrainSettings
from refine.training.tracking import read_metrics
from tests.refine.test_train import run, weights
from tests.refine.test_train_parallel import SHORT, check_same, torchrun


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"Number {i}. " + "The grass is green. " * 120 + "Which number?", "answer": [str(i), "x"]}
        for i in range(12)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    "changes",
    [{"gradient_accumulation_steps": 2}, {"num_mini_batches": 2}, {"prompt_step": "none"}],
)
@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_same_run(tmp_path, pair_file, changes):
    changes = {"phase": "post", "max_steps": 4, "eval_samples": 0} | changes
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, pair_file, **changes) == 0
    assert run(parts, pair_file, **changes) == 0
    for late in ("checkpoint-4", "final"):
        for path in (parts / late).iterdir():
            path.unlink()
        (parts / late).rmdir()
    assert run(parts, pair_file, **changes, resume_from_checkpoint="auto") == 0
    for name, value in weights(whole / "final").items():
        assert torch.equal(weights(parts / "final")[name], value), name
    keep = ("step", "loss", "answer_loss", "grad_norm", "total_tokens")
    lines = [
        [{k: line.get(k) for k in keep} for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (whole, parts)
    ]
    assert lines[0] == lines[1]
    assert ("reward" in read_metrics(whole / "metrics.jsonl")[0]) == ("prompt_step" not in changes)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_end_where_one_ends(tmp_path, pair_file, parallel):
    changes = {"phase": "post", "eval_samples": 0, "sample_steps": 0}
    assert run(tmp_path / "alone", pair_file, **SHORT | changes | {"gradient_accumulation_steps": 2}) == 0
    torchrun(tmp_path / parallel, pair_file, parallel=parallel, **changes)
    check_same(tmp_path / parallel, tmp_path / "alone")


def test_in_bfloat16(tmp_path, pair_file, capsys):
    measured = {"eval_dataset_name_or_path": pair_file, "eval_samples": 2}
    assert run(tmp_path, pair_file, phase="post", max_steps=2, bf16=True, **measured) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("next-token loss", "binary reward", "answer loss"))
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "answer_loss" in line]
    assert len(lines) == 2 and all(0 < line["answer_loss"] < 20 and not line["skipped"] for line in lines)


def test_every_answer_token_weighs_the_same(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    prompt = "The grass is green. " * 10
    rows = [
        {"prompt": prompt + "?", "answer": "yes"},
        {"prompt": prompt, "answer": "a much longer answer " * 4},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = DataConfig(dataset_name_or_path=str(path), max_length=400, shuffle_buffer=1, eval_fraction=0)
    model, _ = load_model_and_tokenizer(ModelSettings())
    stream = training_pairs(config, PairColumns(), tokenizer).batches(1)
    batches = [next(stream), next(stream)]
    expected, count = 0.0, 0
    for batch, row in zip(batches, rows):
        length = int(batch.attention_mask.sum())
        answer = batch.full_ids[0, length:]
        assert tokenizer.decode(answer[:-1]).strip() == row["answer"].strip()
        assert answer[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            logits = model(batch.full_ids).logits[0, length - 1 : -1].double()
        expected -= logits.log_softmax(-1).gather(1, answer[:, None]).sum().item()
        count += len(answer)
    settings = TrainSettings(phase="post", prompt_step="none", max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found, _ = Phase(settings, model, optimizer, World(device=torch.device("cpu"))).update(batches, [], 0)
    assert found["answer_loss"] == pytest.approx(expected / count, rel=1e-4)


def test_long_prompts_are_cut_in_the_middle_and_bad_rows_counted(tmp_path, tokenizer, caplog):
    path = tmp_path / "pairs.jsonl"
    long = "BEGIN " + "middle " * 400 + "END"
    good = json.dumps({"prompt": long, "answer": "yes"})
    path.write_text(
        "\n".join([good, '{"prompt": "p", "answer": []}', "{torn", '{"prompt": "", "answer": "x"}'])
    )
    config = DataConfig(dataset_name_or_path=str(path), max_length=64, eval_fraction=0)
    stream = training_pairs(config, PairColumns(), tokenizer)
    assert (stream.counts.documents, stream.counts.bad_rows, stream.counts.cut_prompts) == (1, 3, 1)
    text = tokenizer.decode(next(stream.batches(1)).input_ids[0])
    assert "BEGIN" in text and text.endswith("END")
    assert "row 2" in caplog.text
    with pytest.raises(DataError, match="has no column 'question'; it has answer, prompt"):
        training_pairs(config, PairColumns(prompt="question"), tokenizer)


def test_question_prompts_fill_the_budget_with_others_passages(tmp_path, tokenizer):
    path = tmp_path / "qa.jsonl"
    rows = [
        {
            "context": [f"The key of house {i} is {i * 7}. " * 3],
            "question": f"Key of house {i}?",
            "answer": str(i * 7),
        }
        for i in range(30)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = DataConfig(dataset_name_or_path=str(path), max_length=500, shuffle_buffer=1, eval_fraction=0)
    columns = PairColumns(passages="context")
    streams = [training_pairs(config, columns, tokenizer) for _ in range(2)]
    for i, (batch, again) in enumerate(zip(streams[0].batches(1), streams[1].batches(1))):
        assert torch.equal(batch.full_ids, again.full_ids)
        assert 380 < batch.input_ids.shape[1] <= 500
        text = tokenizer.decode(batch.input_ids[0])
        assert f"house {i} is {i * 7}." in text and "Document 2:" in text
        assert text.endswith(f"Question: Key of house {i}?\nAnswer:")
        if i == 9:
            break
    assert streams[0].counts.cut_prompts == 0
