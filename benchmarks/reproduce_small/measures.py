"""What is measured of a model, one number an item."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch

from benchmarks.reproduce_small.plan import LENGTH, ROLLOUT

DOCUMENTS = 24  # held out; those after them serve the choice of the learning rate
DOCUMENT_SETS = 3  # of twice as many: there are 155 windows of 2 x LENGTH held-out tokens
COPIED = (32, 64, 128)  # tokens between the two readings of random tokens
RETURNS = (256, 1024)  # tokens between a passage of real text and its return
TASKS = ("niah_single_2", "niah_multikey_1")  # one needle in prose, or four, each of which is asked for
NEEDLES = {1: 20, 2: 160, 4: 24}  # length over LENGTH -> samples of each task
SELECT_NEEDLES = {2: 32}
COPIES = 40
MAIN = "needles"  # the measure that the statement is about
# name of a measure -> (what the table calls it, better is)
MEASURES = {
    MAIN: (f"needles found at {2 * LENGTH}, both tasks", 1),
    **{
        f"{task}_{scale}x_{what}": (f"{task} at {scale * LENGTH}, {label}", sign)
        for task in TASKS
        for scale in NEEDLES
        for what, label, sign in (("score", "found", 1), ("nats", "nats a token of the answer", -1))
    },
    **{f"copy_{d}": (f"random tokens again after {d}", 1) for d in COPIED},
    **{f"copy_five_{d}": (f"- five in a row, after {d}", 1) for d in COPIED},
    **{f"return_{d}": (f"returning passage after {d}", 1) for d in RETURNS},
    **{f"return_five_{d}": (f"- five in a row, after {d}", 1) for d in RETURNS},
    "loss": (f"held-out loss to {LENGTH}, nats", -1),
    "loss_2x": (f"held-out loss from {LENGTH} to {2 * LENGTH}, nats", -1),
}  # fmt: skip


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def measure(path: Path, cache: Path, first_seed: int = 0, separate: bool = False) -> dict[str, list[float]]:
    """Every measure of a model, one number an item; the items are the same for every model of a run.

    Args:
        path: the model.
        cache: where prompts are kept for the next model.
        first_seed: which needles, documents and random tokens; other ones for another number.
        separate: needles and held-out loss alone, on the items that choose the learning rate.
    """
    from transformers import AutoTokenizer

    from refine.models import load_model

    model, tokenizer = load_model(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    documents = _documents(tokenizer, first_seed, separate)
    with torch.no_grad(), autocast():
        if separate:
            prompts = _prompts(tokenizer, cache, SELECT_NEEDLES, seed=2 * first_seed + 1)
            return {**_needles(model, prompts), **_held_out(model, documents)}
        needles = _needles(model, _prompts(tokenizer, cache, NEEDLES, seed=2 * first_seed))
        return {
            MAIN: [score for task in TASKS for score in needles[f"{task}_2x_score"]],
            **needles,
            **_copies(model, len(tokenizer), first_seed),
            **_returns(model, documents),
            **_held_out(model, documents),
        }


def _documents(tokenizer, first_seed: int = 0, separate: bool = False) -> torch.Tensor:
    """Held-out documents, [DOCUMENTS, 2 x LENGTH], none of which an arm has read."""
    from itertools import islice

    from refine.data.stream import DataConfig, held_out_stream

    config = DataConfig(dataset_name_or_path="default", max_length=2 * LENGTH, min_length=2 * LENGTH)
    first = DOCUMENTS * (2 * (first_seed % DOCUMENT_SETS) + separate)
    found = [
        batch.input_ids for batch in islice(held_out_stream(config, tokenizer).batches(1), first + DOCUMENTS)
    ]
    if len(found) < first + DOCUMENTS:
        raise ValueError(
            f"seeds from {first_seed} on are measured on {DOCUMENTS} held-out documents after the first {first}, "
            f"but the text of this Python has {len(found)} of {2 * LENGTH} tokens: take a Python with its "
            "own tests"
        )
    return torch.cat(found[first:])


def _greedy(model, ids, targets=None):
    """Best guess at each position, [B, T], and the log-prob of ``targets`` if given."""
    from refine.models.head import SampleToken

    found = model(ids, use_cache=False, head=SampleToken(temperature=0.0, targets=targets))
    return found.token, found.logprob


def _in_a_row(right: torch.Tensor, count: int = ROLLOUT) -> torch.Tensor:
    """[..., T] bool -> [..., T - count + 1]: all of ``count`` neighbours. What greedy decoding from the true
    prefix gets right as a whole."""
    return right.unfold(-1, count, 1).all(-1)


def _held_out(model, documents) -> dict[str, list[float]]:
    rows = []
    for few in documents.split(4):
        _, logprob = _greedy(model, few[:, :-1], few[:, 1:])
        rows.append(-logprob)
    nats = torch.cat(rows)
    return {"loss": nats[:, : LENGTH - 1].mean(1).tolist(), "loss_2x": nats[:, LENGTH - 1 :].mean(1).tolist()}


def _copies(model, vocabulary: int, first_seed: int = 0) -> dict[str, list[float]]:
    """Random tokens, read twice."""
    found = {}
    for distance in COPIED:
        generator = torch.Generator().manual_seed(distance + 1000 * first_seed)
        once = torch.randint(vocabulary, (COPIES, distance), generator=generator)
        rows = []
        for few in once.split(8):
            token, _ = _greedy(model, torch.cat([few, few], 1))
            rows.append(token[:, distance:-1] == few[:, 1:])
        right = torch.cat(rows)
        found[f"copy_{distance}"] = right.float().mean(1).tolist()
        found[f"copy_five_{distance}"] = _in_a_row(right).float().mean(1).tolist()
    return found


def _returns(model, documents, passage: int = 64) -> dict[str, list[float]]:
    """A passage of real text, other text of the same document, and the passage again."""
    found = {}
    for distance in RETURNS:
        rows = []
        for few in documents.split(8):
            first, between = few[:, :passage], few[:, passage : passage + distance]
            token, _ = _greedy(model, torch.cat([first, between, first], 1))
            rows.append(token[:, passage + distance : -1] == first[:, 1:])
        # its first eight tokens tell which passage it is
        right = torch.cat(rows)[:, 8:]
        found[f"return_{distance}"] = right.float().mean(1).tolist()
        found[f"return_five_{distance}"] = _in_a_row(right).float().mean(1).tolist()
    return found


def _prompts(tokenizer, cache: Path, needles: dict[int, int], seed: int) -> dict[str, list[tuple]]:
    """Name of task and length -> for each sample the ids that its questions share, and for each question the rest
    of its ids and those of its answer. Made once.
    """
    from refine.evaluation.tasks.haystack import find_essay
    from refine.evaluation.tasks.niah import NIAH_TASKS, NiahGenerator, TokenCounter, draw_needles

    path, wanted = cache / f"prompts-{seed}.pt", f"{TASKS} {needles} {seed} {LENGTH}"
    if path.is_file() and (kept := torch.load(path))["wanted"] == wanted:
        return kept["prompts"]
    counter, essay, found = TokenCounter(tokenizer), find_essay(None), {}
    for name in TASKS:
        task = NIAH_TASKS[name]
        for scale, samples in needles.items():
            generator = NiahGenerator(task, counter, scale * LENGTH, essay, seed, new_tokens=32)
            found[f"{name}_{scale}x"] = rows = []
            for index in range(samples):
                draw = draw_needles(task, random.Random(f"niah/{name}/{seed}/{index}"))
                text = tokenizer.decode(generator.make(index).ids, skip_special_tokens=True)
                before, what, question = text.rpartition("What is the special magic")
                asked = draw.keys[draw.asked[0]]
                assert question.count(asked) == 2
                whole = [counter.encode(before + what + question.replace(asked, key)) for key in draw.keys]
                shared = counter.encode(before + what)
                while any(one[: len(shared)] != shared for one in whole):
                    shared.pop()
                answers = [
                    tokenizer(f" {value}", add_special_tokens=False)["input_ids"] for (value,) in draw.values
                ]
                rows.append((shared, [(one[len(shared) :], told) for one, told in zip(whole, answers)]))
    torch.save({"wanted": wanted, "prompts": found}, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)
    return found


def _needles(model, prompts: dict[str, list[tuple]]) -> dict[str, list[float]]:
    """Whether greedy decoding begins with the right answer, and the nats a token of that answer; means of a
    sample's questions, which all go on from one reading of its text.

    Greedy decoding says the answer exactly where each of its tokens is the best guess after those before it.
    (RULER's score also counts an answer that comes later.)
    """
    from refine.models.head import HiddenOnly, SampleToken

    found = {}
    for name, samples in prompts.items():
        scores, nats = [], []
        for shared, questions in samples:
            read = model(torch.tensor([shared]), use_cache=True, head=HiddenOnly())
            state = read.past_key_values.select(torch.zeros(len(questions), dtype=torch.int64))
            width = max(len(rest) + len(answer) for rest, answer in questions)
            ids = torch.zeros(len(questions), width, dtype=torch.int64)
            for row, (rest, answer) in enumerate(questions):  # padding on the right reaches nothing before it
                ids[row, : len(rest) + len(answer)] = torch.tensor([*rest, *answer])
            hidden = model(ids, past_key_values=state, use_cache=True, head=HiddenOnly()).last_hidden_state
            right, cost = [], []
            for row, (rest, answer) in enumerate(questions):
                targets = torch.tensor([answer])
                at = hidden[row : row + 1, len(rest) - 1 : len(rest) - 1 + len(answer)]
                said = model(hidden_states=at, head=SampleToken(temperature=0.0, targets=targets))
                right.append(float((said.token == targets).all()))
                cost.append(-said.logprob.mean().item())
            scores.append(float(np.mean(right)))
            nats.append(float(np.mean(cost)))
        found |= {f"{name}_score": scores, f"{name}_nats": nats}
    return found
