"""Documents with marked answers, the weights of their tokens, and lengths that grow: from text to the loss."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

from refine.data.curriculum import Curriculum, check_lengths
from refine.data.document import Answer, DataError, Document, document_of
from refine.data.needle_words import ADJECTIVES, NOUNS
from refine.data.needles import HELD_OUT_WORDING, RULER_WORDING, WORDINGS, key_words, needle_document
from refine.data.recall_documents import recall_document
from refine.data.sources import find_answers
from refine.data.stream import DataConfig, Encoder, held_out_stream, training_stream
from refine.evaluation.generation import generate
from refine.evaluation.recall import answered_greedily, questions_of_recall
from refine.evaluation.tasks.niah import NEEDLE, NIAH_TASKS, Draw, write_prompt
from refine.models import load_model
from refine.prepare import packaged_model
from refine.train import main
from refine.training.parallel import World
from refine.training.phases import Phase
from refine.training.settings import TrainSettings
from refine.training.update import adamw

from .tiny import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packaged_model())


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {
            "text": f"The code of house {i} is 4{i}. {'Words and words. ' * 20}House {i}: 4{i}",
            "answers": [f"4{i}"],
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- Which characters, and which tokens, are answers


def test_pieces_of_a_document_say_where_its_answers_are():
    document = document_of("name", ["a", Answer("bc"), "", Answer("d"), "e"])
    assert document == Document("name", "abcde", ((1, 3), (3, 4)))


def test_the_tokens_of_answers_are_those_with_one_of_their_characters(tokenizer):
    encode, rng = Encoder(tokenizer), random.Random(0)
    for _ in range(50):
        words = ["naïve", "x", " 1234567", "\n\n", "lantern-straße", "€", ".", " is", "  two", "日本"]
        text = "".join(rng.choices(words, k=12))
        places = sorted(rng.sample(range(len(text) + 1), 4))
        answers = ((places[0], places[1]), (places[2], places[3]))
        ids, marked = encode.with_answers(Document("name", text, answers))
        assert ids.tolist() == encode(text).tolist() and len(marked) == len(ids) and not marked[-1]
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        for (begin, end), found in zip(offsets, marked):
            assert found == any(begin < last and end > first for first, last in answers)


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        (None, ()),
        ("one", ((8, 11),)),  # the last place
        (["one", "two"], ((4, 7), (8, 11))),
        ([[0, 3], "two"], ((0, 3), (4, 7))),
        ([], ()),
    ],
)
def test_answers_of_a_row(marked, expected):
    assert find_answers("one two one", marked) == expected


@pytest.mark.parametrize("marked", ["three", [""], [[3, 1]], [[0, 12]], [[0]], [7], [None], [[0.5, 2]]])
def test_answers_that_cannot_be_are_refused(marked):
    with pytest.raises(ValueError, match=r"does not stand in the text|or \[first, behind\]"):
        find_answers("one two one", marked)


# --- Generated documents


def test_recall_documents_mark_what_follows_from_their_facts():
    seen = 0
    for index in range(60):
        text, answers = recall_document(0, index, 3_000)[1:]
        for first, behind in answers:
            question = text[text.rfind("\n", 0, first) + 1 : first]
            assert text[first] == " " and text.index(text[first:behind]) < first
            assert question, "an answer follows its question"
            seen += 1
    assert seen > 300


@pytest.mark.parametrize("tokens", [127, 300, 1500])
def test_needle_documents_fit_and_can_be_answered(tokens, tokenizer):
    count = Encoder(tokenizer).count
    for index in range(30):
        name, text, answers = document = needle_document(3, index, tokens, count)
        assert document == needle_document(3, index, tokens, count) and name == f"needles/train/3/{index}"
        assert answers and count(text) <= tokens
        for first, behind in answers:
            assert text.index(text[first:behind].strip()) < first  # told before it is asked
    full = [count(needle_document(3, index, tokens, count).text) for index in range(30)]
    assert sum(full) > 0.7 * 30 * tokens


def test_no_key_and_no_wording_of_a_test_is_trained_on(tokenizer):
    assert not {*ADJECTIVES, *NOUNS} & set(key_words()) and len(key_words()) > 2_000
    assert HELD_OUT_WORDING not in WORDINGS
    begin = HELD_OUT_WORDING.needle.split("{")[0]
    count = Encoder(tokenizer).count
    assert not any(begin in needle_document(0, index, 400, count).text for index in range(60))
    held_out = [needle_document(0, index, 400, count, "held_out").text for index in range(5)]
    assert all(begin in text for text in held_out)


def test_the_wording_of_ruler_is_rulers():
    assert RULER_WORDING.needle.format(kind="number", key="a-b", value="7") == NEEDLE.format(
        kind="numbers", key="a-b", value="7"
    )
    draw = Draw(("a-b",), (("7",),), ("",), (0,))
    prompt = write_prompt(NIAH_TASKS["niah_single_1"], draw, "CONTEXT")
    words = RULER_WORDING
    assert prompt == f"{words.intro}CONTEXT\n{words.question}".replace("{kind}", "number").replace(
        "{key}", "a-b"
    )


# --- Weights in batches and in the loss


def config(path, **settings) -> DataConfig:
    return DataConfig(
        dataset_name_or_path=str(path),
        **{"max_length": 64, "min_length": 8, "shuffle_buffer": 4, "eval_fraction": 0} | settings,
    )


def test_every_token_has_the_weight_of_what_it_is(rows, tokenizer):
    weights = {"answers_column": "answers", "answer_weight": 5.0, "context_weight": 0.25}
    plain = training_stream(config(rows), tokenizer).batches(6)
    weighted = training_stream(config(rows, **weights), tokenizer).batches(6)
    for _, without, batch in zip(range(6), plain, weighted):
        assert without.weight is None and torch.equal(without.input_ids, batch.input_ids)
        assert torch.equal(batch.weight > 0, batch.attention_mask.bool())
        for ids, weight in zip(batch.input_ids, batch.weight):
            answer = tokenizer.decode(ids[weight == 5])
            assert not answer or (answer.strip().isdigit() and answer.strip()[0] == "4")
            assert set(weight.tolist()) <= {0.0, 0.25, 5.0}


def test_documents_without_answers_count_one_and_held_out_text_is_not_weighed(tokenizer):
    settings = config("default+needles", max_length=128, answer_weight=3.0, context_weight=0.0)
    batch = next(iter(training_stream(settings, tokenizer).batches(32)))
    kinds = [set(weight[mask.bool()].tolist()) for weight, mask in zip(batch.weight, batch.attention_mask)]
    assert kinds.count({1.0}) == 16  # half of the windows, recall_weight
    assert all(kind in ({1.0}, {0.0, 3.0}) for kind in kinds)
    assert next(iter(held_out_stream(settings, tokenizer).batches(4))).weight is None
    needles = config("needles", max_length=128, answer_weight=3.0)
    assert next(iter(held_out_stream(needles, tokenizer).batches(4))).weight is None


@pytest.mark.parametrize(
    "more",
    [{}, {"segment_length": 64}, {"packing": True}, {"phase": "mid"}, {"phase": "mid", "segment_length": 64}],
    ids=str,
)
def test_the_loss_is_the_weighted_mean_over_the_update(more, tokenizer):
    model = tiny_model("delta_net", dtype=torch.float64, vocab_size=len(tokenizer))
    # as long as two chunks of rollouts ask for
    settings = config("default+needles", max_length=128, min_length=48, answer_weight=3.0, context_weight=0.5)
    mini_batch = list(itertools.islice(training_stream(settings, tokenizer).batches(3), 2))
    chosen = TrainSettings(
        **{"phase": "sft", "lambda_rl": 0.0} | more, dataset_name_or_path="default+needles", answer_weight=3.0,
        context_weight=0.5, max_length=128, num_chunks=2, learning_rate=1e-12, max_grad_norm=1e9,
    )  # fmt: skip
    phase = Phase(chosen, model, adamw(model, chosen), World())
    metrics, _ = phase.update(mini_batch, [None, None], 0)
    gradients = [p.grad.clone() for p in model.parameters()]
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for batch in mini_batch:
        losses = torch.nn.functional.cross_entropy(
            model(batch.input_ids).logits[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none"
        )
        weight = (batch.weight * batch.attention_mask)[:, 1:].double()
        total = total + (losses * weight).sum()
        weights += weight.sum()
    expected = torch.autograd.grad(total / weights, list(model.parameters()))
    assert metrics["loss"] == pytest.approx(float(total.detach() / weights), rel=1e-6)
    scale = max(gradient.abs().max() for gradient in expected)
    for gradient, wanted in zip(gradients, expected):
        assert (gradient - wanted).abs().max() < 1e-6 * scale


def test_positions_that_count_nothing_are_left_out_of_the_head():
    from refine.models.head import NextTokenLoss

    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (2, 9))
    for counted in (0, 1, 5, 18):
        rows = torch.zeros(18, dtype=torch.float64)
        rows[torch.randperm(18)[:counted]] = 0.7
        loss = NextTokenLoss(targets, rows.view(2, 9), entropy=False)(hidden, weight)["loss"]
        every = torch.nn.functional.cross_entropy(
            (hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none"
        )
        wanted = (every * rows).sum()
        assert abs(loss - wanted) < 1e-6 * max(1.0, float(wanted.detach()))
        for gradient, expected in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight))
        ):
            assert (gradient - expected).abs().max() < 1e-6


# --- Lengths that grow


def test_a_curriculum_grows_keeps_its_tokens_and_resumes(tokenizer):
    settings = config("default+needles", max_length=256, answer_weight=2.0)
    lengths = {0: 64, 3: 128, 5: 256}

    def curriculum() -> Curriculum:
        return Curriculum(settings, lengths, tokenizer)

    stream = curriculum()
    whole = [batch for _, batch in zip(range(8), stream.batches(2))]
    assert [batch.input_ids.shape[0] for batch in whole] == [8] * 3 + [4] * 2 + [2] * 3
    widths = [batch.input_ids.shape[1] for batch in whole]
    assert max(widths[:3]) <= 64 < max(widths[3:5]) <= 128 < max(widths[5:]) <= 256
    assert stream.counts.windows >= sum(batch.input_ids.shape[0] for batch in whole)
    for taken in (1, 3, 4, 7):
        first, second = curriculum(), curriculum()
        list(zip(range(taken), first.batches(2)))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = [batch for _, batch in zip(range(8 - taken), second.batches(2))]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rest, whole[taken:]))
        assert len(rest) == 8 - taken
    with pytest.raises(DataError, match="the lengths are"):
        Curriculum(settings, {0: 64, 4: 256}, tokenizer).load_state_dict(stream.state_dict())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({5: 128}, "must begin with update 0, got 5"),
        (
            {0: 128, 10: 128},
            "must rise in updates and in tokens; 128 tokens from update 0 are followed by 128",
        ),
        ({0: 128, 10: 64}, "must rise"),
        ({0: 64, 20: 128, 10: 256}, "must rise"),
        ({0: 128, 10: 1024}, r"from 32 \(min_length\) to 512 \(max_length\), got 128 to 1024"),
        ({0: 16}, r"from 32 \(min_length\)"),
        ({0: 64.5}, "must be update=tokens"),
        ({"first": 64}, "must be update=tokens"),
    ],
)
def test_schedules_that_cannot_be_are_named(lengths, message):
    with pytest.raises(DataError, match=message):
        check_lengths(lengths, 512, 32)


def test_a_schedule_reads_as_numbers():
    assert check_lengths({"0": 64, 10: "512"}, 512) == {0: 64, 10: 512}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length_schedule", "0=512,10=256"], "length_schedule must rise"),
        (["--length_schedule", "0=512,10=4096"], "to 2048 (max_length), got 512 to 4096"),
        (["--answer_weight", "-1"], "answer_weight must be over 0 and finite, got -1.0"),
        (["--context_weight", "-0.1"], "context_weight must be at least 0 and finite, got -0.1"),
        (["--answer_weight", "4", "--phase", "post"], "are about the documents of phases mid and sft"),
        (
            ["--answer_weight", "4", "--dataset_name_or_path", "default"],
            "the first documents of the default text mark no answers: name their answers_column",
        ),
        (
            ["--answer_weight", "4", "--dataset_name_or_path", "ROWS"],
            "mark no answers: name their answers_column",
        ),
        (
            ["--answers_column", "answer", "--dataset_name_or_path", "ROWS"],
            "answers_column is 'answer', a column that",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, rows, tmp_path, capsys):
    arguments = [str(rows) if word == "ROWS" else word for word in arguments]
    arguments = ["--phase", "sft", "--max_length", "2048", "--eval_samples", "0", *arguments]
    assert main(["--output_dir", str(tmp_path / "run"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_with_all_of_it(rows, tmp_path):
    run = tmp_path / "run"
    model = load_model(packaged_model())
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "model")
    arguments = {
        "phase": "sft", "model_name_or_path": tmp_path / "model", "tokenizer_name_or_path": packaged_model(),
        "dataset_name_or_path": rows, "answers_column": "answers", "answer_weight": 4, "context_weight": 0,
        "length_schedule": "0=48,2=96", "max_length": 96, "num_chunks": 2, "per_device_train_batch_size": 2,
        "max_steps": 4, "save_steps": 3, "eval_samples": 2, "output_dir": run, "learning_rate": 1e-3,
    }  # fmt: skip
    assert main([word for name, value in arguments.items() for word in (f"--{name}", str(value))]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(0 < line["loss"] < 20 for line in lines if "loss" in line)
    resumed = ["--resume_from_checkpoint", str(run / "checkpoint-3"), "--output_dir", str(tmp_path / "again")]
    assert (
        main([*(w for n, v in arguments.items() if n != "output_dir" for w in (f"--{n}", str(v))), *resumed])
        == 0
    )
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again if line["step"] == 4 and "loss" in line] == [
        line["loss"] for line in lines if line["step"] == 4 and "loss" in line
    ]


# --- What a run asks its model


def test_answered_greedily_is_what_greedy_decoding_says(tokenizer):
    model = load_model(packaged_model()).eval()
    rows = questions_of_recall(tokenizer, 300, 3)
    assert set(rows) == {"niah_single_1", "niah_single_2", "recall"}
    for name, own in rows.items():
        longest = 300 if name != "recall" else 600  # its documents are only about as long
        assert len(own) == 3 and all(100 < len(prompt) + len(answer) <= longest for prompt, answer in own)
        said = [generate(model, [prompt], len(answer))[0] for prompt, answer in own]
        asked = own + [(prompt, words) for (prompt, _), words in zip(own, said)]
        right = [words == list(answer) for (_, answer), words in zip(own, said)]
        assert answered_greedily(model, asked) == right + [True] * 3


def test_a_run_reports_needles_and_recall(rows, tmp_path, capsys):
    arguments = [
        "--phase", "sft", "--model_name_or_path", str(packaged_model()), "--dataset_name_or_path", "needles",
        "--max_length", "200", "--max_steps", "1", "--eval_samples", "1", "--recall_samples", "2",
        "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for name in ("needles found in noise", "needles found in prose", "recall questions answered"):
        assert name in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval_niah_single_1" in line]
    assert [line["step"] for line in measured] == [0, 1]
    assert all(line["eval_recall"] in (0, 0.5, 1) for line in measured)
    assert (
        main(
            [*arguments[:6], "--max_length", "80", "--num_chunks", "2", *arguments[8:-1], str(tmp_path / "b")]
        )
        == 2
    )
    assert "recall_samples: length 80 is too short for niah_single_1" in capsys.readouterr().err
