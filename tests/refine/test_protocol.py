"""What the authors' code does otherwise, each behind a setting: prompts, pairs, answers, updates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from refine import RefineConfig, refine_step
from refine.data.document import DataError
from refine.data.encoder import Encoder
from refine.data.pairs import PairColumns, training_pairs
from refine.data.rows import split_of
from refine.data.stream import DataConfig
from refine.evaluation.answers import _line, whole_batches
from refine.evaluation.generation import Sampling, generate
from refine.evaluation.prompt_training import PromptTrainer
from refine.evaluation.settings import EvalSettings
from refine.evaluation.tasks.item import Item, Prompt, encode
from refine.evaluation.tasks.rows import BadRows, Columns, read_rows
from refine.prepare import packaged_model
from refine.settings import SettingsError
from refine.shared_settings import OptimizerSettings
from refine.training.parallel import World
from refine.training.phases import Phase
from refine.training.settings import TrainSettings
from refine.training.tracking import first_evaluation
from refine.training.update import adamw
from tests.refine.tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    """The tiny model's, with a beginning as both published checkpoints' has one."""
    found = AutoTokenizer.from_pretrained(packaged_model())
    from tokenizers.processors import TemplateProcessing

    end = found.eos_token
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, found.eos_token_id)]
    )
    return found


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_a_protocol_decides_what_is_not_given():
    ours, paper = EvalSettings(ttt="refine"), EvalSettings(ttt="refine", protocol="paper")
    names = ("add_bos_token", "answer_cut", "do_sample", "top_k", "drop_last_batch", "ttt_restore")
    assert [getattr(ours, name) for name in names] == [True, "task", False, None, False, "batch"]
    assert [getattr(paper, name) for name in names] == [False, "line", True, 50, True, "never"]
    assert (ours.ttt_mini_batches, paper.ttt_mini_batches) == (1, 2)
    assert (ours.decay_vectors, paper.decay_vectors) == (False, True)
    own = EvalSettings(protocol="paper", do_sample=False, ttt_restore="sample", ttt="sft")
    assert (own.do_sample, own.top_k, own.ttt_restore, own.ttt_mini_batches) == (False, None, "sample", 1)
    with pytest.raises(SettingsError, match="top_k is about drawing answers: it needs do_sample, got 5"):
        EvalSettings(top_k=5)
    with pytest.raises(SettingsError, match="ttt_mini_batches is about rollouts"):
        EvalSettings(ttt="sft", ttt_mini_batches=2)


def test_no_beginning_where_none_is_wanted(tokenizer):
    begin, text = tokenizer.eos_token_id, "The grass is green."
    assert encode(tokenizer, text)[0] == Encoder(tokenizer)(text)[0] == begin
    assert encode(tokenizer, text, add_bos_token=False) == encode(tokenizer, text)[1:]
    assert (
        Encoder(tokenizer, add_special_tokens=False)(text).tolist() == Encoder(tokenizer)(text).tolist()[1:]
    )


def test_pairs_without_beginning_and_end_of_certain_lengths(tokenizer, tmp_path):
    """From a folder, whose files to test on are passed over."""
    rows = [
        {"prompt": f"Number {i}?", "answer": f"{i}", "max_seq_length": 4096 * (1 + i % 2)} for i in range(6)
    ]
    write(tmp_path / "qa_4096_1600_train.jsonl", rows[:4])
    write(tmp_path / "more.jsonl", rows[4:])
    write(tmp_path / "qa_4096_200_test.jsonl", rows * 9)
    config = {
        "dataset_name_or_path": str(tmp_path),
        "eval_fraction": 0.0,
        "min_length": 1,
        "shuffle_buffer": 1,
    }
    end = tokenizer.eos_token_id

    def pairs(lengths=(), **changes):
        stream = training_pairs(DataConfig(**config | changes), PairColumns(lengths=lengths), tokenizer)
        return [stream._at(i) for i in range(len(stream._pairs))]

    usual, bare = pairs(), pairs(add_bos_token=False, answer_eos=False)
    assert len(usual) == len(bare) == 6 and len({pair.key for pair in usual}) == 6
    for one, other in zip(usual, bare):
        assert one.prompt.tolist() == [end, *other.prompt.tolist()]
        assert one.answer.tolist() == [*other.answer.tolist(), end]
    assert len(pairs((4096,))) == 3 and len(pairs((4096, 8192))) == 6
    with pytest.raises(DataError, match="holds no pair"):
        pairs((16384,))


def test_rows_to_train_on_are_never_scored(tmp_path):
    row = {"prompt": "Who?", "answer": ["Ann"]}
    write(tmp_path / "ruler_squadqa_lact_4096_200_test.jsonl", [row])
    train = write(tmp_path / "ruler_squadqa_lact_4096_1600_train.jsonl", [row] * 4)
    found = list(read_rows([str(tmp_path)], "ruler_qa_files", Columns(), BadRows()))
    assert [row.source for row in found] == ["row 1 of ruler_squadqa_lact_4096_200_test.jsonl"]
    with pytest.raises(ValueError, match=r"ruler_qa_files: .*1600_train.jsonl' .* never scored"):
        list(read_rows([train], "ruler_qa_files", Columns(), BadRows()))
    (tmp_path / "ruler_squadqa_lact_4096_200_test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no file of rows .* but those to train on"):
        list(read_rows([str(tmp_path)], "ruler_qa_files", Columns(), BadRows()))
    assert [split_of(tmp_path / name) for name in ("train-00000-of-00001.parquet", "retrain.jsonl")] == [
        "train",
        None,
    ]


def item(number: int, task: str = "qa", kind: str = "question") -> Item:
    def score(text, references):
        return float(references[0] in text)

    return Item(f"{task}/{number}", task, None, score, 5, lambda: Prompt(np.arange(3), ("b",)), "row", kind)


def test_an_answer_ends_at_its_first_line_break(tokenizer):
    prompt, answer = Prompt(np.arange(3), ("b",)), tokenizer("a\nb", add_special_tokens=False)["input_ids"]
    score = {
        (kind, cut): _line(item(0, kind=kind), prompt, answer, tokenizer, None, cut)["score"]
        for kind in ("question", "document", "generated") for cut in ("task", "line")
    }  # fmt: skip
    assert [key for key, value in score.items() if not value] == [("question", "line")]


def test_rows_that_fill_no_batch_are_dropped():
    items = [*(item(i) for i in range(5)), *(item(i, "niah", "generated") for i in range(3))]
    kept = whole_batches(items, EvalSettings(batch_size=2))
    assert [one.key for one in kept] == ["qa/0", "qa/1", "qa/2", "qa/3", "niah/0", "niah/1", "niah/2"]
    with pytest.raises(SettingsError, match="leaves no row of qa: there are 5, and a batch has 8"):
        whole_batches(items, EvalSettings())


def test_drawn_answers_follow_from_prompt_and_place_alone():
    model = tiny_model("delta_net", torch.float32).eval()
    prompts = [torch.randint(VOCABULARY, (n,)).tolist() for n in (9, 30, 17)]
    together = generate(model, prompts, 6, frozenset(), Sampling([1, 2, 3], 1.0, 5))
    assert together == [
        generate(model, [prompt], 6, frozenset(), Sampling([seed], 1.0, 5))[0]
        for prompt, seed in zip(prompts, (1, 2, 3))
    ]
    assert together != generate(model, prompts, 6, frozenset(), Sampling([4, 5, 6], 1.0, 5))
    greedy = generate(model, prompts, 6)
    assert generate(model, prompts, 6, frozenset(), Sampling([1, 2, 3], 1.0, 1)) == greedy != together
    logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    first = {generate(model, [prompts[0]], 1, frozenset(), Sampling([s], 1.0, 3))[0][0] for s in range(60)}
    assert first == set(logits.topk(3).indices.tolist())


def test_test_time_training_in_two_updates_of_one_draw():
    """Rollouts of all prompts by the policy as it was, then an update on each half with the ratio clipped."""
    config = RefineConfig(num_chunks=2, reward="binary", lambda_rl=0.4)
    prompts, keys = (
        [torch.randint(VOCABULARY, (n,)).numpy().astype(np.int32) for n in (60, 80, 70)],
        list("abc"),
    )
    models = [tiny_model(dtype=torch.float32) for _ in range(2)]
    optimizer = OptimizerSettings(learning_rate=1e-2)
    trainer = PromptTrainer(models[0], config, optimizer=optimizer, mini_batches=2)
    assert trainer.train(prompts, keys) == 3
    by_hand = PromptTrainer(models[1], config, optimizer=optimizer)
    models[1].train()
    with torch.no_grad():
        drawn = [by_hand._refine(prompt, key, 0).drawn for prompt, key in zip(prompts, keys)]
    for share in ((0, 1), (2,)):
        by_hand.optimizer.zero_grad()
        for i in share:
            ids = torch.from_numpy(prompts[i].astype(np.int64))[None]
            (refine_step(models[1], ids, config, rollouts=drawn[i]).loss / len(share)).backward()
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), optimizer.max_grad_norm)
        by_hand.optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.allclose(one, other, rtol=0, atol=2e-6)


def test_one_update_on_the_answers_of_a_whole_draw(tokenizer, tmp_path):
    """Four updates on prompts, then one on all their answers: that of a batch of all pairs."""
    rows = [{"prompt": "The sky is blue. " * 40 + f"Number {i}?", "answer": f"{i}"} for i in range(4)]
    path = write(tmp_path / "pairs.jsonl", rows)
    config = DataConfig(dataset_name_or_path=path, eval_fraction=0.0, max_length=300, shuffle_buffer=1)
    given = {"phase": "post", "dataset_name_or_path": path, "max_length": 300, "num_mini_batches": 2,
             "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "num_chunks": 2}  # fmt: skip
    taken = {}
    for answers in ("each", "draw"):
        model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer))
        settings = TrainSettings(**given, answer_updates=answers)
        optimizer = adamw(model, settings)
        phase, batches = (
            Phase(settings, model, optimizer, World()),
            training_pairs(config, PairColumns(), tokenizer),
        )
        read = batches.batches(1)
        drawn = [[next(read) for _ in range(2)] for _ in range(2)]
        draws = phase.draw(drawn, 0)
        metrics = [phase.update(batch, draw, step)[0] for step, (batch, draw) in enumerate(zip(drawn, draws))]
        taken[answers] = int(optimizer.state[next(iter(model.parameters()))]["step"])
        said = ["answer_loss" in one for one in metrics]
        assert said == ([True, True] if answers == "each" else [False, True])
    assert taken == {"each": 4, "draw": 3}


def test_vectors_are_decayed_where_that_is_asked_for():
    model = tiny_model()
    for asked, decay in ((None, 0.0), (True, 0.5)):
        groups = adamw(model, OptimizerSettings(weight_decay=0.5, decay_vectors=asked)).param_groups
        assert [group["weight_decay"] for group in groups] == [0.5, decay]


def test_a_resumed_runs_report_has_its_before(tmp_path):
    path, after = tmp_path / "metrics.jsonl", {"eval_loss": 2.0, "eval_sequences": 4}
    write(
        path,
        [{"step": 0, "eval_loss": 3.0, "eval_sequences": 4}, {"step": 1, "loss": 3.0}, {"step": 2} | after],
    )
    assert first_evaluation(path, after)["eval_loss"] == 3.0
    assert first_evaluation(path, after | {"eval_sequences": 5}) is None  # of other data
    assert first_evaluation(path, after | {"eval_accuracy": 0.1}) is None
    assert first_evaluation(tmp_path / "none.jsonl", after) is None
