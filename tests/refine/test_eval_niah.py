"""The needle generator: RULER's prompts word for word, the budget to the unit, and nothing left to chance."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from refine.evaluation.metrics import string_match_all
from refine.evaluation.tasks.haystack import DEPTHS, Essay, find_essay, insert_lines, insert_sentences
from refine.evaluation.tasks.niah import (
    NIAH_TASKS,
    Draw,
    NiahGenerator,
    TokenCounter,
    draw_needles,
    write_prompt,
)
from refine.evaluation.tasks.words import ADJECTIVES, NOUNS, find_words
from refine.prepare import packaged_model

TASKS = tuple(NIAH_TASKS)


@pytest.fixture(scope="module")
def counter():
    return TokenCounter(AutoTokenizer.from_pretrained(packaged_model()))


def generator(task: str, counter, length: int, **options) -> NiahGenerator:
    return NiahGenerator(NIAH_TASKS[task], counter, length, find_essay(None), **options)


def _text(counter, prompt) -> str:
    return counter.tokenizer.decode(prompt.ids)


# --- The prompts


def test_a_whole_prompt_of_one_needle():
    draw = Draw(("red-fox",), (("12",),), ("One of the special magic numbers for red-fox is: 12.",), (0,))
    assert write_prompt(NIAH_TASKS["niah_single_1"], draw, "CONTEXT") == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\nCONTEXT\n"
        "What is the special magic number for red-fox mentioned in the provided text? "
        "The special magic number for red-fox mentioned in the provided text is"
    )


def test_a_whole_prompt_of_several():
    draw = Draw(("a-b", "c-d", "e-f", "g-h"), (("1",), ("2",), ("3",), ("4",)), (), (2, 0, 3, 1))
    assert write_prompt(NIAH_TASKS["niah_multiquery"], draw, "CONTEXT") == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\nCONTEXT\n"
        "What are all the special magic numbers for e-f, a-b, g-h, and c-d mentioned in the provided text? "
        "The special magic numbers for e-f, a-b, g-h, and c-d mentioned in the provided text are"
    )


def _as_ruler_writes(task, keys, values, needles, asked, sentences, depths, lines, places) -> str:
    """RULER's prompt from its own rules: one template, changed by replacement where one value is asked for."""
    if task.haystack == "essay":
        cuts = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
        context, begin = "", 0
        for cut, needle in zip(cuts, needles):
            context += " ".join(sentences[begin:cut]) + " " + needle + " "
            begin = cut
        context += " ".join(sentences[begin:])
    else:
        rows = dict(enumerate(lines))
        for place, needle in zip(sorted(places, reverse=True), needles):
            rows[place] = needle + "\n" + rows[place]
        context = "\n".join(rows[i] for i in sorted(rows))
    template = (
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards.\n{context}\n"
        "What are all the special magic {kind} for {query} mentioned in the provided text? "
        "The special magic {kind} for {query} mentioned in the provided text are"
    )
    kind, names = task.value, [keys[i] for i in asked]
    if task.queries * task.values == 1:
        for old, new in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template = template.replace(old, new)
        kind = kind[:-1]
    query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
    return template.format(kind=kind, context=context, query=query)


@pytest.mark.parametrize("name", TASKS)
def test_the_prompts_are_rulers_for_the_same_draw(name):
    task = NIAH_TASKS[name]
    for seed in range(20):
        rng = random.Random(seed)
        draw = draw_needles(task, rng)
        units = rng.randint(task.needles, 30)
        sentences, lines = [f"Sentence {i}." for i in range(units)], [f"line {i}" for i in range(units)]
        state = rng.getstate()
        if task.haystack == "essay":
            depths, places = rng.sample(DEPTHS, task.needles), None
            context = insert_sentences(sentences, draw.needles, depths)
        else:
            depths, places = None, rng.sample(range(units), task.needles)
            rng.setstate(state)
            context = insert_lines(lines, draw.needles, rng)
        expected = _as_ruler_writes(
            task, draw.keys, draw.values, draw.needles, draw.asked, sentences, depths, lines, places
        )
        assert write_prompt(task, draw, context) == expected
        said = {f"One of the special magic {task.value} for {key} is: {value}."
                for key, own in zip(draw.keys, draw.values) for value in own}  # fmt: skip
        assert set(draw.needles) == said and len(said) == task.keys * task.values


def test_depths_are_those_of_ruler():
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


def test_kinds_of_keys_and_values():
    rng = random.Random(0)
    for task in NIAH_TASKS.values():
        draw = draw_needles(task, rng)
        for kind, texts in ((task.key, draw.keys), (task.value, sum(draw.values, ()))):
            for text in texts:
                if kind == "numbers":
                    assert text.isdigit() and len(text) == 7
                elif kind == "uuids":
                    assert len(text) == 36 and text.count("-") == 4 and text[14] == "4"
                else:
                    assert "-" in text
    assert len(set(ADJECTIVES)) * len(set(NOUNS)) > 100_000  # a long prompt has thousands of needles
    assert find_words().draw(random.Random(5)) == find_words().draw(random.Random(5))


# --- The budget


def _units(task, text: str, needles) -> int:
    """How many units of haystack a prompt has."""
    context = text[text.index("\n") + 1 : text.rindex("\nWhat ")]
    if task.haystack != "essay":
        return len(context.split("\n")) - len(needles)
    for needle in needles:
        context = context.replace(needle, "")
    return len(context.split())


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", TASKS)
def test_one_more_unit_would_be_too_many(name, length, counter):
    made = generator(name, counter, length)
    for index in range(2):
        ids = made.make(index).ids
        assert len(ids) + 128 <= length
        draw, haystack, stream = made._begin(index)
        units = _units(made.task, counter.tokenizer.decode(ids), draw.needles)
        tokens = []
        for count in (units, units + 1):
            context = haystack.context(count, draw.needles, random.Random(f"{stream}/places"))
            tokens.append(counter.encode(write_prompt(made.task, draw, context)))
        assert tokens[0] == ids.tolist()
        assert len(tokens[1]) + 128 > length


def test_few_exact_counts_are_enough(counter, monkeypatch):
    calls = []
    encode = counter.encode
    monkeypatch.setattr(counter, "encode", lambda text: calls.append(len(text)) or encode(text))
    started = time.perf_counter()
    for name in TASKS:
        made = generator(name, counter, 8192)
        calls.clear()
        for index in range(3):
            made.make(index)
        assert len(calls) <= 3 * 6, name
    assert time.perf_counter() - started < 20  # measured: 0.7 s


@pytest.mark.parametrize("length", [16384, 65536])
@pytest.mark.parametrize("name", TASKS)
def test_long_budgets_are_met(name, length, counter):
    prompt = generator(name, counter, length).make(0)
    assert 0 <= length - (len(prompt.ids) + 128) <= 100  # the largest unit is a needle of two uuids


@pytest.mark.parametrize("name", TASKS)
def test_tiny_budgets_name_the_least_length(name, counter):
    for length in (1, 100, 130):
        with pytest.raises(ValueError, match=rf"length {length} is too short for {name}: the least is \d+"):
            generator(name, counter, length).make(0)
    with pytest.raises(ValueError, match="the least is") as error:
        generator(name, counter, 140).items(20)
    least = int(str(error.value).split("the least is ")[1].split()[0])
    assert len(generator(name, counter, least).items(20)) == 20
    for item in generator(name, counter, least).items(20):
        assert len(item.make().ids) + 128 <= least
    with pytest.raises(ValueError, match=f"the least is {least}"):
        generator(name, counter, least - 1).items(20)


# --- Determinism and answers


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_follows_from_its_seed_and_index(name, counter):
    made = generator(name, counter, 700, seed=3)
    first = made.make(5)
    assert np.array_equal(first.ids, generator(name, counter, 700, seed=3).make(5).ids)
    for other in (generator(name, counter, 700, seed=4).make(5), made.make(6)):
        assert other.references != first.references
    longer = generator(name, counter, 1500, seed=3).make(5)
    assert longer.references == first.references  # the same needles at every length


@pytest.mark.parametrize("name", TASKS)
def test_the_prompt_holds_its_answers_where_it_says(name, counter):
    task = NIAH_TASKS[name]
    made = generator(name, counter, 1500)
    for index in range(3):
        prompt = made.make(index)
        text = _text(counter, prompt)
        assert len(prompt.references) == task.values * task.queries == len(prompt.depths)
        assert string_match_all(text, prompt.references) == 1.0
        context = text[text.index("\n") + 1 : text.rindex("\nWhat ")]
        for value, depth in zip(prompt.references, prompt.depths):
            assert 100 * context.index(value) / len(context) == pytest.approx(depth, abs=3)
        if task.haystack == "needles":
            keys = [line.split(" for ")[1].split(" is: ")[0] for line in context.split("\n")]
            asked = text.rsplit(" for ", 1)[1].split(" mentioned")[0]
            assert keys.count(asked) == 1


def test_essays_repeat_and_cut_sentences():
    essay = Essay('He said: "Go." Then e.g. 5 came! Was it Mr. Smith? yes. no', "here")
    whole = ['He said: "Go."', "Then e.g. 5 came!", "Was it Mr. Smith? yes. no"]
    assert essay.sentences(13) == whole
    assert essay.sentences(5) == ['He said: "Go."', "Then e.g."]
    assert essay.sentences(15) == [*whole, "He said:"]
    with pytest.raises(ValueError, match="holds no words"):
        Essay("  ", "an empty file")


def test_an_essay_file_is_read(tmp_path, counter):
    path = tmp_path / "essay.txt"
    path.write_text("Ships sail. " * 50 + "They come home. ", encoding="utf-8")
    made = NiahGenerator(NIAH_TASKS["niah_single_2"], counter, 700, find_essay(str(path)))
    assert "Ships sail. Ships sail." in _text(counter, made.make(0))
    with pytest.raises(ValueError, match=r"essay_file .* cannot be read"):
        find_essay(str(tmp_path / "none.txt"))
    path.write_bytes(b"\xff\xfe\x00")
    find_essay.cache_clear()
    with pytest.raises(ValueError, match="it is not UTF-8"):
        find_essay(str(path))
    find_essay.cache_clear()


# --- Another wording


def test_a_prompt_in_the_held_out_wording(counter):
    made = generator("niah_single_2", counter, 600, wording="held_out")
    prompt, ruler = made.make(0), generator("niah_single_2", counter, 600).make(0)
    assert prompt.references == ruler.references  # the same draw
    text = _text(counter, prompt)
    key = made._begin(0)[0].keys[0]
    assert f"The ticket of {key} carries the number {prompt.references[0]}." in text
    assert text.endswith(f"\nWhich number does the ticket of {key} carry? It carries the number")
    assert "magic" not in text
    with pytest.raises(ValueError, match="niah_multivalue asks for several values"):
        generator("niah_multivalue", counter, 600, wording="held_out")
