"""RULER's other generated tasks: prompts word for word, counts by their laws, the budget to the unit."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer

from refine.evaluation.tasks.haystack import NOISE
from refine.evaluation.tasks.niah import TokenCounter
from refine.evaluation.tasks.ruler import (
    RULER_TASKS,
    RulerGenerator,
    common_words,
    frequent_words,
    largest_that_fits,
    variable_tracking,
)
from refine.prepare import packaged_model

TASKS = tuple(RULER_TASKS)


@pytest.fixture(scope="module")
def counter():
    return TokenCounter(AutoTokenizer.from_pretrained(packaged_model()))


def test_a_chain_of_variables():
    text, variables = variable_tracking(7, "name", 4096, lambda text: len(text.split()))
    example, asked = text.split("\n\nMemorize and track")
    shown = re.findall(r"VAR ([A-Z]{3}) = ", example)
    assert len(shown) == len(set(shown)) == 5 and example.endswith("they are:  " + " ".join(shown))
    assert len(example.split()) - 5 <= 500 < len(example.split()) - 5 + len(NOISE.split())
    head, context, question = asked.split("\n\n")[0], *asked.split("\n\n")[1].split("\nQuestion: ")
    assert head == " the chain(s) of variable assignment hidden in the following text."
    lines = context.split("\n")
    assert lines.count(NOISE) == 7 and len(lines) == 12
    statements = [line for line in lines if line != NOISE]
    value = statements[0].split(" = ")[1]
    assert re.fullmatch(r"\d{5}", value) and statements[0] == f"VAR {variables[0]} = {value}"
    assert statements[1:] == [f"VAR {b} = VAR {a} " for a, b in pairwise(variables)]
    assert question == (
        f"Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, 5 variables are assigned the value {value}, they are: "
    )
    assert variable_tracking(40, "name", 9, len).references == variables  # the same at every length


@pytest.mark.parametrize(("length", "units", "often", "seldom"), [(4095, 60, 6, 1), (4096, 90, 30, 3)])
def test_common_words_are_as_often_as_ruler_writes_them(length, units, often, seldom):
    text, common = common_words(units, "name", length, len)
    assert len(set(common)) == 10
    example, asked = text.split("\nBelow is a numbered list of words. ")
    assert example.endswith("are: 1. " + example.rsplit("are: 1. ", 1)[1]) and example.count(" 10. ") >= 2
    listed = re.findall(r"(\d+)\. ([a-z-]+)", asked.split("\n")[1])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert counts == dict.fromkeys(common, often) | {word: seldom for word in counts if word not in common}
    assert len(counts) == units
    assert asked.endswith("Question: What are the 10 most common words in the above list? Answer: The top 10 words "
                          "that appear most often in the list are:")  # fmt: skip


def test_coded_words_follow_zipfs_law():
    text, references = frequent_words(1000, "name", 2048, len)
    words = text.split("coded words. ")[1].split("\nQuestion: ")[0].split(" ")
    counts = Counter(words).most_common()
    zeta = sum(r**-2.0 for r in range(1, 200_000))
    assert len(counts) <= (2048 - 50) // 50
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == list(references)
    for rank, (word, count) in enumerate(counts[:20], 1):
        assert count == int(1000 / zeta / rank**2 + 1e-4)
        assert rank == 1 or re.fullmatch(r"[a-z]{6}", word)


@pytest.mark.parametrize("name", TASKS)
def test_the_smallest_sample_has_an_answer(name):
    task = RULER_TASKS[name]
    text, references = task.write(task.least, "name", 1024, len)
    assert all(reference in text for reference in references)
    if name == "fwe":  # no two of the first four are as frequent as each other
        counts = [text.split("\nQuestion")[0].count(word) for word in references]
        assert counts == sorted(set(counts), reverse=True) and counts[-1] > 1


@pytest.mark.parametrize("length", [1024, 6000])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_keep_within_the_length_and_nearly_fill_it(name, length, counter):
    made = RulerGenerator(name, counter, length, seed=2)
    prompt = made.make(1)
    left = length - made.task.new_tokens - len(prompt.ids)
    assert 0 <= left <= 40  # a line of noise has 33 tokens
    assert np.array_equal(prompt.ids, made.make(1).ids)
    assert made.make(2).references != prompt.references
    assert RulerGenerator(name, counter, length, seed=3).make(1).references != prompt.references


@pytest.mark.parametrize("name", TASKS)
def test_too_short_lengths_name_the_least(name, counter):
    with pytest.raises(ValueError, match=rf"length 200 is too short for {name}: the least is \d+") as error:
        RulerGenerator(name, counter, 200).items(5)
    least = int(str(error.value).split("the least is ")[1].split()[0])
    items = RulerGenerator(name, counter, least).items(5)
    assert [len(item.make().ids) + item.max_new_tokens <= least for item in items] == [True] * 5
    with pytest.raises(ValueError, match="too short"):
        RulerGenerator(name, counter, least - 1).items(5)


def test_a_right_answer_scores_one(counter):
    item = RulerGenerator("vt", counter, 1024).items(1)[0]
    references = item.make().references
    assert item.score(" " + " ".join(references), references) == 1
    assert item.score(" " + " ".join(references[:3]), references) == pytest.approx(0.6)


@pytest.mark.parametrize("slope", [0.3, 1, 7])
@pytest.mark.parametrize("most", [None, 40])
def test_the_largest_that_fits(slope, most):
    calls = []

    def tokens(units):
        calls.append(units)
        return int(50 + slope * units)

    for budget in (52, 60, 200, 1000):
        wanted = max(u for u in range(5, most + 1 if most else 5000) if tokens(u) <= budget or u == 5)
        calls.clear()
        found = largest_that_fits(5, budget, tokens, most)
        assert found == (wanted if 50 + slope * 5 < budget + 1 else None)
        assert len(calls) <= 12
