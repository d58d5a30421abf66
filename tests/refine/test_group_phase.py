"""Phase grpo: prompts from files, rewards of the user's own, and that it learns what is rewarded."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from refine.data.document import DataError
from refine.data.prompts import PromptBatch, held_out_prompts, training_prompts
from refine.data.stream import DataConfig
from refine.method.objective import OBJECTIVES
from refine.prepare import packaged_model
from refine.settings import SettingsError
from refine.training.parallel import World
from refine.training.phases import make_phase
from refine.training.settings import TrainSettings, parse_settings
from refine.training.text_rewards import TextRewards
from refine.training.tracking import read_metrics
from tests.numerics import assert_close
from tests.refine.test_train import run, weights
from tests.refine.test_train_parallel import SHORT, torchrun
from tests.refine.tiny import ragged_batch, tiny_model

HERE = "tests.refine.test_group_phase"
GRPO = {
    "phase": "grpo",
    "reward_funcs": f"{HERE}:share_of_e",
    "num_generations": 4,
    "max_completion_length": 12,
    "eval_samples": 2,
    "max_steps": 4,
    "max_length": 60,
}


def share_of_e(prompts, completions, **_):
    """The share of e among the characters."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def is_number(prompts, completions, completion_ids, number, **_):
    """1 where the row's number is said; nothing about a row without one."""
    assert len(prompts) == len(completion_ids)
    return [None if n is None else float(str(n) in text) for n, text in zip(number, completions)]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"Number {i}. " + "Say it. " * (3 + i), "number": i} for i in range(9)]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": " "}, {"text": "no prompt"}]))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(packaged_model())


def test_prompts_come_with_their_columns(prompt_file, tokenizer):
    config = DataConfig(str(prompt_file), eval_fraction=0.3, max_length=40, min_length=1)
    stream = training_prompts(config, "prompt", tokenizer)
    held_out = held_out_prompts(config, "prompt", tokenizer)
    trained, measured = next(stream.batches(40)), list(held_out.batches(1))
    assert stream.counts.bad_rows == 2 and stream.counts.cut_prompts
    texts = {text for batch in measured for text in batch.texts}
    assert texts and not texts & set(trained.texts) and len(texts | set(trained.texts)) == 9
    for row, text in enumerate(trained.texts):
        assert text.startswith(f"Number {trained.columns['number'][row]}.")
        ids = trained.input_ids[row][trained.attention_mask[row].bool()]
        assert len(ids) <= 40 and tokenizer.decode(ids).startswith(text[:8])
    state = stream.state_dict()
    again = training_prompts(config, "prompt", tokenizer)
    again.load_state_dict(state)
    assert next(again.batches(3)).texts == next(stream.batches(3)).texts


def test_columns_that_are_not_there_are_named(prompt_file, tokenizer):
    with pytest.raises(DataError, match="no column 'question'; it has number, prompt, text"):
        training_prompts(DataConfig(str(prompt_file), min_length=1), "question", tokenizer)
    with pytest.raises(DataError, match="there is no file"):
        training_prompts(DataConfig("/nowhere.jsonl", min_length=1), "prompt", tokenizer)


def test_generated_prompts_have_an_answer(tokenizer):
    batch = next(training_prompts(DataConfig("recall", max_length=300), "prompt", tokenizer).batches(2))
    assert len(batch.columns["answer"]) == 2 and all(batch.columns["answer"])


# ---- rewards ----------------------------------------------------------------------------------------------


FIXED = {"value": None}


def fixed(prompts, completions, **_):
    """A reward that returns, or raises, what the test has put there."""
    if isinstance(FIXED["value"], Exception):
        raise FIXED["value"]
    return FIXED["value"]


def test_rewards_are_weighted_and_may_say_nothing():
    rewards = TextRewards([f"{HERE}:share_of_e", f"{HERE}:is_number"], [2.0, 0.5])
    each = rewards(["p"] * 3, ["ee", "7", "xe"], [[1], [2], [3]], {"number": [1, 7, None]})
    assert rewards.names == ["share_of_e", "is_number"]
    assert torch.equal(each.nan_to_num(-9), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -9.0]]))
    assert rewards.total(each).tolist() == [2.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0], "must return one number per completion, 2, got 1"),
        (torch.zeros(3), "must return one number per completion, 2, got 3"),
        (1.0, "must return a list of 2 numbers, got a float"),
        ("ab", "must return a list of 2 numbers, got a str"),
        ([1.0, float("nan")], "must return finite numbers .* got nan for completion 1"),
        ([float("inf"), 1.0], "got inf for completion 0"),
        (["1", 0.0], "got '1' for completion 0"),
        ([[1.0], 0.0], r"got \[1.0\] for completion 0"),
        ([None, None], "no reward function says anything of 2 completions, such as 'a'"),
        (KeyError("x"), "raised KeyError: 'x'"),
    ],
)
def test_rewards_that_are_wrong_are_named(value, words):
    FIXED["value"] = value
    with pytest.raises(ValueError, match=words):
        TextRewards([f"{HERE}:fixed"])(["p", "p"], ["a", "b"], [[1], [2]], {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_funcs": []}, "reward_funcs must name at least one function"),
        ({"reward_funcs": ["no.such:thing"]}, "reward_funcs 'no.such:thing' cannot be imported"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must hold one per reward function, 1, got 2"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"objective": "ppo"}, "objective must be one of grpo, bnpo"),
        ({"parallel": "context", "segment_length": 64}, "parallel context"),
        (
            {"phase": "mid", "max_length": 200},
            "reward_funcs is for phase grpo; the reward of phase mid is 'reward'",
        ),
        (
            {"phase": "mid", "max_length": 200, "reward_funcs": [], "num_iterations": 2},
            "num_iterations is for phase grpo",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words):
    with pytest.raises(SettingsError, match=words):
        TrainSettings(**GRPO | {"reward_funcs": [f"{HERE}:share_of_e"]} | changes)


def test_settings_go_by_the_names_of_trl(capsys):
    line = "--phase grpo --epsilon 0.1 --epsilon_high 0.3 --delta 4 --loss_type dapo --num_generations 6 --beta 0.2"
    settings = parse_settings([*line.split(), "--reward_funcs", f"{HERE}:share_of_e,{HERE}:is_number"])
    found = (
        settings.clip_range,
        settings.clip_range_high,
        settings.dual_clip,
        settings.objective,
        settings.beta,
    )
    assert found == (0.1, 0.3, 4.0, "dapo", 0.2) and settings.num_generations == 6
    assert capsys.readouterr().err.count("code from outside this package") == 2


# ---- updates ----------------------------------------------------------------------------------------------


def make_phase_of(model, tokenizer, **changes):
    """A phase over a tiny model; its optimizer does nothing."""
    settings = TrainSettings(
        **GRPO | {"reward_funcs": [f"{HERE}:share_of_e"], "max_grad_norm": 1e9} | changes
    )
    return make_phase(settings, model, torch.optim.SGD(model.parameters(), lr=0.0), World(), tokenizer)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_micro_batches_have_the_gradient_of_one(prompt_file, tokenizer, objective):
    """Losses over tokens of the whole update add up to it; others are means over equally many completions."""
    config = DataConfig(str(prompt_file), min_length=1, max_length=60)
    stream = training_prompts(config, "prompt", tokenizer)
    one, two = stream.batches(1), None
    parts = [next(one), next(one)]
    stream = training_prompts(config, "prompt", tokenizer)
    two = next(stream.batches(2))
    found = []
    for mini_batch in (parts, [two]):
        model = tiny_model(dtype=torch.float64, vocab_size=len(tokenizer))
        phase = make_phase_of(model, tokenizer, objective=objective, clip_range_high=5.0)
        draws = phase.draw([mini_batch], 3)[0]
        metrics, _ = phase.update(mini_batch, draws, 3)
        found.append((metrics, model.lm_head.weight.grad.clone()))
    (metrics, gradient), (whole, expected) = found
    assert expected.norm() > 0
    assert metrics["reward"] == pytest.approx(whole["reward"])
    if objective != "bnpo":  # a mean over the tokens of each micro-batch
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)
        assert metrics["loss"] == pytest.approx(whole["loss"])


def test_metrics_have_the_names_of_trl(prompt_file, tmp_path):
    changes = GRPO | {"beta": 0.1, "reward_funcs": f"{HERE}:share_of_e,{HERE}:is_number", "num_iterations": 2}
    changes["eval_dataset_name_or_path"] = prompt_file
    assert run(tmp_path, prompt_file, **changes) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    names = {
        "loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl",
        "rewards/share_of_e/mean", "rewards/is_number/std", "completions/mean_length", "completions/clipped_ratio",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    }  # fmt: skip
    assert all(names <= line.keys() and line["loss"] is not None for line in trained)
    assert trained[0]["kl"] < 1e-8 < trained[1]["kl"]
    assert trained[0]["reward"] == trained[1]["reward"] != trained[2]["reward"]  # drawn once for two updates
    assert [line["eval_reward"] for line in lines if "eval_reward" in line]
    assert (tmp_path / "samples").is_dir() and (tmp_path / "reward.png").is_file()


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_same_run(prompt_file, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = GRPO | {"eval_samples": 0, "beta": 0.05, "lr_scheduler_type": "constant"}
    assert run(whole, prompt_file, **changes) == 0
    assert run(parts, prompt_file, **changes | {"max_steps": 2}) == 0
    assert run(parts, prompt_file, **changes, resume_from_checkpoint="auto") == 0
    for name, value in weights(whole / "final").items():
        assert torch.equal(weights(parts / "final")[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_end_where_one_ends(prompt_file, tmp_path, parallel):
    """A prompt in each process, or both in one: the same draws, rewards and updates; dapo's total is over both."""
    changes = GRPO | SHORT | {"eval_samples": 0, "sample_steps": 0, "loss_type": "dapo", "max_branches": 2}
    assert run(tmp_path / "alone", prompt_file, **changes | {"gradient_accumulation_steps": 2}) == 0
    torchrun(tmp_path / parallel, prompt_file, **changes, parallel=parallel)
    expected = weights(tmp_path / "alone" / "final")
    for name, value in weights(tmp_path / parallel / "final").items():
        assert_close(value, expected[name], 1e-4, name)
    rewards = [
        [line["reward"] for line in read_metrics(tmp_path / folder / "metrics.jsonl") if "reward" in line]
        for folder in ("alone", parallel)
    ]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-5) and len(rewards[0]) == 4


class Digits:
    """A tokenizer whose tokens are the numbers of a small vocabulary."""

    eos_token_id = 0

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row)) for row in ids]


def share_of_seven(prompts, completions, **_):
    return [text.split().count("7") / len(text.split()) for text in completions]


def drawn_by(changes: dict):
    """A phase, its batch of two prompts, and the draw of one update of two micro-batches."""
    model = tiny_model(dtype=torch.float32)
    settings = TrainSettings(**GRPO | {"reward_funcs": [f"{HERE}:share_of_seven"]} | changes)
    phase = make_phase(settings, model, torch.optim.SGD(model.parameters(), lr=0.0), World(), Digits())
    ids, mask = ragged_batch(70, 20)
    batch = PromptBatch(ids, mask, torch.tensor([1, 2]), ["a", "b"], {})
    return phase, batch, phase.draw([[batch, batch._replace(keys=torch.tensor([3, 4]))]], 0)[0]


def test_advantages_scaled_by_the_rewards_of_the_whole_draw():
    draws = drawn_by({"scale_rewards": "batch", "max_completion_length": 6})[2]
    rewards = torch.stack([group.rewards for group in draws])
    expected = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std() + 1e-6)
    assert_close(torch.stack([group.advantages for group in draws]), expected, 1e-6, "advantages")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_completions_that_were_cut_short_are_left_out(objective):
    changes = {"objective": objective, "mask_truncated_completions": True, "max_completion_length": 60}
    changes |= {"grpo": {"top_entropy_quantile": 0.5}, "cispo": {"clip_range_high": 5.0}}.get(objective, {})
    phase, batch, draws = drawn_by(changes)
    for group in draws:
        ends = (group.completion_ids == 0).any(-1)
        assert torch.equal(group.counted.any(-1), ends) and not ends.all()
        assert torch.equal(group.counted[ends], group.completion_mask[ends].bool())
    assert any(group.counted.any() for group in draws)
    metrics, _ = phase.update([batch, batch], draws, 0)
    assert metrics["grad_norm"] > 0 and not metrics["skipped"]
    cut = [group._replace(counted=torch.zeros_like(group.counted)) for group in draws]
    metrics, _ = phase.update([batch, batch], cut, 0)
    assert metrics["grad_norm"] == metrics["loss"] == 0 and not metrics["skipped"]


def test_messages_become_a_prompt_and_rewards_get_messages(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say seven."}]
    path.write_text(
        "\n".join(json.dumps({"prompt": p}) for p in (chat, "Say eight.", [{"role": "user"}], []))
    )
    config = DataConfig(str(path), eval_fraction=0.0, min_length=1, shuffle_buffer=1)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        training_prompts(config, "prompt", tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    stream = training_prompts(config, "prompt", tokenizer)
    batch = next(stream.batches(2))
    assert stream.counts.bad_rows == 2
    text = "system: Be brief.\nuser: Say seven.\nassistant:"
    assert batch.texts == [text, "Say eight."] and batch.prompts == [chat, "Say eight."]
    assert tokenizer.decode(batch.input_ids[0][batch.attention_mask[0].bool()]) == text

    settings = TrainSettings(**GRPO | {"reward_funcs": [f"{HERE}:about_messages"], "num_generations": 2})
    model = tiny_model(dtype=torch.float32, vocab_size=len(tokenizer))
    phase = make_phase(settings, model, torch.optim.SGD(model.parameters(), lr=0.0), World(), tokenizer)
    assert phase.draw([[batch]], 0)[0][0].rewards.tolist() == [[2.0, 2.0], [0.0, 0.0]]


def about_messages(prompts, completions, **_):
    """The number of messages of a chat, whose completion is a message too; 0 of a text."""
    for prompt, completion in zip(prompts, completions):
        assert isinstance(prompt, str) == isinstance(completion, str)
        assert isinstance(completion, str) or completion[0]["role"] == "assistant"
    return [0 if isinstance(prompt, str) else len(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "gspo", "num_iterations": 3},
        {"objective": "dapo", "max_branches": 20, "segment_length": 64, "scale_rewards": "none"},
    ],
    ids=str,
)
def test_what_is_rewarded_becomes_frequent(changes):
    """From one in 53 tokens to most of them, by reward alone."""
    model = tiny_model(dtype=torch.float32)
    changes |= {"reward_funcs": [f"{HERE}:share_of_seven"], "num_generations": 16, "max_completion_length": 8}
    settings = TrainSettings(**GRPO | {"max_grad_norm": 1e9} | changes)
    phase = make_phase(settings, model, torch.optim.Adam(model.parameters(), lr=1e-2), World(), Digits())
    ids, mask = ragged_batch(70, 20)
    batch = PromptBatch(ids, mask, torch.tensor([1, 2]), ["a", "b"], {})
    rewards = []
    for step in range(25):
        draws = phase.draw([[batch]], step)[0]
        rewards.append(draws[0].metrics["reward"])
        for _ in range(settings.num_iterations):
            metrics, _ = phase.update([batch], draws, step)
    assert rewards[0] < 0.1 and rewards[-1] > 0.5
    assert metrics["completions/mean_length"] <= 8 and not metrics["skipped"]
