"""Every metric against hand-made cases and against a computation of another kind."""

from __future__ import annotations

import random
import re
import string
from itertools import combinations

import pytest

from refine.evaluation.metrics import (
    METRICS,
    TREC_CLASSES,
    classification_accuracy,
    edit_similarity,
    first_code_line,
    first_line,
    interval_of_mean,
    longest_common_subsequence,
    normalize_answer,
    rouge_l,
    string_match_all,
    string_match_part,
    token_f1,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("prediction", "references", "all_of_them", "any_of_them"),
    [
        (" 1234567.", ["1234567"], 1.0, 1.0),
        ("1234567 and 7654321", ["1234567", "7654321", "1111111", "2222222"], 0.5, 1.0),
        (
            "It is BLAKE\x0bShelton, of course",
            ["blake shelton"],
            0.0,
            0.0,
        ),  # a control character breaks a line
        ("It is BLAKE Shelton, of course", ["Tim", "blake shelton"], 0.5, 1.0),
        ("", ["x"], 0.0, 0.0),
        ("a|b", ["a|b", "c"], 0.5, 1.0),  # a reference with a bar is one reference
    ],
)
def test_string_match(prediction, references, all_of_them, any_of_them):
    assert string_match_all(prediction, references) == pytest.approx(all_of_them)
    assert string_match_part(prediction, references) == any_of_them


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The cat, sat!", ["cat sat"], 1.0),
        ("a cat sat down", ["The cat ran"], 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        (
            "cat cat cat",
            ["cat dog"],
            2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2),
        ),  # a word counts as often as both have it
        ("dog", ["cat", "the dog", "a dog and cat"], 1.0),  # the best of several
        ("U.S.A.", ["usa"], 1.0),
        ("", ["cat"], 0.0),
        ("the", ["a"], 0.0),  # nothing is left of either
    ],
)
def test_token_f1_by_hand(prediction, references, expected):
    assert token_f1(prediction, references) == pytest.approx(expected)


def test_normalize_answer_in_squads_order():
    assert normalize_answer("  The  Theatre, an (A) to-do\tlist") == "theatre todo list"
    assert normalize_answer("a.n. apple") == "apple"  # "an" appears when the dots go


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the cat sat on the mat", ["the cat lay on the mat"], 5 / 6),
        ("Emilia is angry", ["Emilia is still angry."], 2 * 1 * 0.75 / 1.75),
        ("b a", ["a b"], 0.5),
        ("", ["a b"], 0.0),
        ("...", ["a"], 0.0),
        ("x y z", ["q", "x z"], 0.8),
    ],
)
def test_rouge_l_by_hand(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("return x", ["return x"], 1.0),
        ("\n\nreturn x\nreturn y", ["return x"], 1.0),
        ("# a comment\n```python\nreturn x", ["return x"], 1.0),
        ("// nothing else", ["return x"], 0.0),
        ("abcd", ["abxd"], 2 * 3 / 8),  # one deletion and one insertion
        ("    a", ["\ta"], 2 * 1 / 7),
        ("kitten", ["sitting"], 8 / 13),
    ],
)
def test_edit_similarity_by_hand(prediction, references, expected):
    assert edit_similarity(prediction, references) == pytest.approx(expected)


def test_first_lines():
    assert first_line("\n\n one\ntwo") == " one"
    assert first_line("") == ""
    assert first_code_line("#\n") == ""


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (" Other location", "Other location", 1.0),
        ("City or Country", "City", 0.5),
        ("City or Country", "State", 0.0),
        ("Description of a person", "Description of a person", 1.0),
        ("nothing", "City", 0.0),
    ],
)
def test_classification_by_hand(prediction, reference, expected):
    assert classification_accuracy(prediction, [reference]) == expected


def test_a_class_inside_the_right_one_does_not_count_as_named():
    classes = ["location", "other location", "another location", "other"]
    assert classification_accuracy("other location", ["other location"], classes) == 1.0
    assert (
        classification_accuracy("another location", ["other location"], classes) == 0.5
    )  # three fit, two stay
    assert classification_accuracy("another location", ["another location"], classes) == 1.0
    assert len(set(TREC_CLASSES)) == len(TREC_CLASSES) == 50


def _lcs_by_trying(a: str, b: str) -> int:
    """The longest of all subsequences of ``a`` that is one of ``b``."""
    for size in range(len(a), 0, -1):
        for chosen in combinations(a, size):
            rest = iter(b)
            if all(item in rest for item in chosen):
                return size
    return 0


def test_metrics_agree_with_computations_of_another_kind():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 8))) for _ in range(2))
        common = _lcs_by_trying(a, b)
        assert longest_common_subsequence(a, b) == common == longest_common_subsequence(b, a)
        if a or b:
            assert edit_similarity(a, [b]) == pytest.approx(2 * common / (len(a) + len(b)))
            words = [" ".join(text) for text in (a, b)]
            assert rouge_l(words[0], [words[1]]) == pytest.approx(2 * common / (len(a) + len(b)))
    vocabulary = ["The", "cat", "sat,", "mat.", "an", "on"]
    for _ in range(200):
        a, b = (" ".join(rng.choices(vocabulary, k=rng.randint(1, 6))) for _ in range(2))
        bags = []
        for text in (a, b):
            text = "".join(" " if ch.isspace() else ch for ch in text.lower() if ch not in string.punctuation)
            bags.append([word for word in re.split(" +", text) if word not in ("", "a", "an", "the")])
        same = sum(min(bags[0].count(word), bags[1].count(word)) for word in set(bags[0]))
        precision, recall = (same / len(bag) if bag else 0 for bag in bags)
        f1 = 2 * precision * recall / (precision + recall) if same else 0.0
        assert token_f1(a, [b]) == pytest.approx(f1)


def test_rouge_l_and_edit_similarity_agree_with_their_packages():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the package rouge-score")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rng = random.Random(1)
    for _ in range(50):
        a, b = (" ".join(rng.choices(("The", "cat", "sat,", "it's", "12", "x-y"), k=9)) for _ in range(2))
        assert rouge_l(a, [b]) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)


def test_every_score_of_a_right_answer_is_one():
    for name, metric in METRICS.items():
        assert metric("City", ["City"]) == 1.0, name
        assert metric("", ["City"]) == 0.0, name


def test_wilson_interval():
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.403832, 0.596168), abs=1e-6)  # the textbook's example
    low, high = wilson_interval(0.0, 10)
    assert low == 0.0 and high == pytest.approx(0.277533, abs=1e-6)
    rng = random.Random(0)  # it holds the truth about as often as it says
    held = 0
    for _ in range(2000):
        mean = sum(rng.random() < 0.9 for _ in range(60)) / 60
        low, high = wilson_interval(mean, 60)
        held += low <= 0.9 <= high
    assert 0.93 < held / 2000 < 0.975


def test_interval_of_a_mean_of_means():
    low, high = interval_of_mean([0.4, 0.6], [(0.3, 0.5), (0.5, 0.7)])
    assert low == pytest.approx(0.5 - 0.1 / 2**0.5) and high == pytest.approx(0.5 + 0.1 / 2**0.5)
    assert interval_of_mean([0.2], [(0.1, 0.4)]) == pytest.approx((0.1, 0.4))
