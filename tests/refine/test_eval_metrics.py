"""Every metric against hand-made cases and against a computation of another kind."""

from __future__ import annotations

import random
import re
import string
import sys
from collections import Counter
from itertools import combinations

import pytest

from refine.evaluation import metrics
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
from refine.evaluation.tasks.longbench import longbench_items, longbench_score
from refine.evaluation.tasks.rows import BadRows, Columns, Row


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
        ("the cat sat on the mat", ["the cat lay on the mat"], 4 / 5),  # "the" counts once in either
        ("The cat", ["the cat"], 1 / 2),  # case is kept
        ("b a", ["a b"], 1 / 2),
        (
            "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5",
            ["w1 w2 w3 w4 w5"],
            2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5),
        ),  # united
        ("a. b", ["b. a"], 1.0),  # sentences may change places
        ("", ["a b"], 0.0),
        ("...", ["a"], 0.0),
        (" ", ["a"], 0.0),
        ("x y z", ["q", "x z"], 0.8),  # the best of several
    ],
)
def test_rouge_l_by_hand(prediction, references, expected):
    pytest.importorskip("rouge")
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=2e-8)


def test_rouge_l_of_a_text_longer_than_pythons_stack():
    pytest.importorskip("rouge")
    limit = sys.getrecursionlimit()
    words = " ".join(map(str, range(700)))
    assert rouge_l(words, [words]) == pytest.approx(1.0, abs=2e-8)
    assert rouge_l(words, [" ".join(map(str, range(350, 1050)))]) == pytest.approx(0.5, abs=2e-8)
    assert sys.getrecursionlimit() == limit


def test_without_its_package_rouge_l_says_what_to_install(monkeypatch, tmp_path):
    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge", None)
    try:
        with pytest.raises(ImportError, match=r"refine-fast-weights\[evaluation\]"):
            rouge_l("a", ["a"])
        (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answers": ["a"], "task": "qmsum"}\n')
        given = [str(tmp_path / "rows.jsonl")], Columns(), None
        with pytest.raises(ValueError, match=r"refine-fast-weights\[evaluation\]"):
            longbench_items(*given, bad=BadRows(), tasks=["qmsum"])
        with pytest.raises(ValueError, match="no row of qasper"):
            longbench_items(*given, bad=BadRows(), tasks=["qasper"])  # needs no package
    finally:
        metrics._rouge.cache_clear()


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("return x", ["return x"], 1.0),
        ("\n\nreturn x\nreturn y", ["return x"], 1.0),
        ("# a comment\n```python\nreturn x", ["return x"], 1.0),
        ("// nothing else", ["return x"], 0.0),
        ("abcd", ["abxd"], 2 * 3 / 8),  # one deletion and one insertion
        ("    a", ["\ta"], 0.29),  # 2 / 7 in whole percents
        ("kitten", ["sitting"], 0.62),
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
    """Except the second of two in a row, as in LongBench's script."""
    classes = ["location", "other location", "another location", "other"]
    assert classification_accuracy("other location", ["other location"], classes) == 1.0
    assert (
        classification_accuracy("another location", ["other location"], classes) == 0.5
    )  # three fit, two stay
    assert classification_accuracy("another location", ["another location"], classes) == 0.5
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
            assert edit_similarity(a, [b]) == pytest.approx(2 * common / (len(a) + len(b)), abs=0.0051)
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


def _f1(said: str, wanted: str) -> float:
    """SQuAD's F1, by its definition."""
    bags = []
    for text in (said, wanted):
        bare = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        bags.append(Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split()))
    same = (bags[0] & bags[1]).total()
    if not same:
        return 0.0
    precision, recall = same / bags[0].total(), same / bags[1].total()
    return 2 * precision * recall / (precision + recall)


def _rouge_package(said: str, wanted: str) -> float:
    """LongBench's call of the package: what raises is 0."""
    from rouge import Rouge

    try:
        return Rouge().get_scores([said], [wanted], avg=True)["rouge-l"]["f"]
    except ValueError:
        return 0.0


def _code_similarity(said: str, wanted: str) -> float:
    from fuzzywuzzy import fuzz

    lines = said.lstrip("\n").split("\n")
    code = [line for line in lines if "`" not in line and "#" not in line and "//" not in line]
    return fuzz.ratio(code[0] if code else "", wanted) / 100


def _class_score(said: str, wanted: str, classes) -> float:
    """The list of named classes loses members while it is gone through, as in LongBench's script."""
    named = [name for name in classes if name in said]
    for name in named:
        if name in wanted and name != wanted:
            named.remove(name)
    return 1 / len(named) if wanted in named else 0.0


OFFICIAL = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "triviaqa"), _f1),
    **dict.fromkeys(("qmsum", "multi_news", "samsum"), _rouge_package),
    **dict.fromkeys(("lcc", "repobench-p"), _code_similarity),
    "trec": _class_score,
}
NESTED = ["location", "other", "other location", "loc", "another location", "place", "a place"]
VOCABULARY = {
    "trec": [*TREC_CLASSES, *NESTED, "\n", "or", "Type:"],
    "lcc": ["def f(x):", "    return x", "# no", "``", "//", "\n", "\n\n", "é", "x", "y", "(", ")", "= 1"],
    None: [
        "The",
        "the",
        "a",
        "An",
        "cat",
        "cats,",
        "sat.",
        ".",
        "...",
        "U.S.",
        "\n",
        "\t",
        "Ünï",
        "it's",
        "-",
    ],
}


@pytest.mark.parametrize("pairs", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", list(OFFICIAL))
def test_every_task_scores_as_longbenchs_script(task, pairs):
    """Random and hard pairs: empty answers, only dots, odd breaks, several references, nested classes."""
    official = OFFICIAL[task]
    if official is _rouge_package:
        pytest.importorskip("rouge")
    if official is _code_similarity:
        pytest.importorskip("fuzzywuzzy.StringMatcher", reason="needs fuzzywuzzy and Levenshtein")
    words = VOCABULARY["lcc" if official is _code_similarity else task if task == "trec" else None]
    rng = random.Random(f"pairs/{task}")
    classes = [*TREC_CLASSES, *NESTED]
    different = 0
    for number in range(pairs):
        joint = rng.choice(("", " ", " ", "\n"))
        said = joint.join(rng.choices(words, k=rng.choice((0, 1, 2, 5, 12, 40))))
        said = (said, "", ".", "\n", " ")[number % 5 if number < 25 else 0]
        wanted = [
            rng.choice(classes) if task == "trec" else joint.join(rng.choices(words, k=rng.randint(1, 20)))
            for _ in range(rng.randint(1, 4))
        ]
        if number % 7 == 0:
            said += wanted[0]
        row = Row("0", "row", f"{task}", "prompt", tuple(wanted), {"all_classes": classes})
        cut = said.lstrip("\n").split("\n")[0] if task in ("trec", "triviaqa", "samsum") else said
        extra = {"classes": classes} if task == "trec" else {}
        expected = max(official(cut, reference, **extra) for reference in wanted)
        different += 0 < expected < 1
        assert longbench_score(row)(said, tuple(wanted)) == pytest.approx(expected, abs=1e-9), (said, wanted)
    assert different > pairs * (0.02 if task == "trec" else 0.1)


def test_every_score_of_a_right_answer_is_one():
    pytest.importorskip("rouge")
    for name, metric in METRICS.items():
        assert metric("City", ["City"]) == pytest.approx(1.0, abs=2e-8), name
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
