"""What an answer is worth: the scores of RULER and LongBench, each between 0 and 1.

Every function takes one prediction and its references and knows nothing of models or files. With several
references the best counts, except in :func:`string_match_all`, which asks for every one of them.

Sources: Hsieh et al., RULER (arXiv 2404.06654); Bai et al., LongBench (arXiv 2308.14508); Rajpurkar et al., SQuAD
(arXiv 1606.05250) for the normalised token F1.
"""

from __future__ import annotations

import inspect
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

# The question types of TREC, as LongBench words them (one is cut short there, and is so in its prompts).
TREC_CLASSES = (
    *(
        "Abbreviation",
        "Animal",
        "City",
        "Color",
        "Country",
        "Currency name",
        "Date",
        "Definition of something",
    ),
    *(
        "Description of a person",
        "Description of something",
        "Disease and medicine",
        "Distance, linear measure",
    ),
    *("Element and substance", "Equivalent term", "Event", "Expression abbreviated", "Food"),
    *(
        "Group or organization of person",
        "Individual",
        "Invention, book and other creative piece",
        "Language",
    ),
    *("Lasting time of somethin", "Letter like a-z", "Manner of an action", "Mountain", "Musical instrument"),
    *(
        "Number of something",
        "Order, rank",
        "Organ of body",
        "Other entity",
        "Other location",
        "Other number",
    ),
    *("Percent, fraction", "Plant", "Postcode or other code", "Price", "Product", "Reason", "Religion"),
    *("Size, area and volume", "Speed", "Sport", "State", "Symbols and sign", "Techniques and method"),
    *("Temperature", "Title of a person", "Vehicle", "Weight", "Word with a special property"),
)

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_COMMENT_SIGNS = ("`", "#", "//")  # a line with one of these is not taken for the code that was asked for


def found_in(prediction: str, references: Sequence[str]) -> list[bool]:
    """Which references stand in the prediction, whatever their case (RULER: stripped, control characters as
    line breaks)."""
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the prediction (RULER's needles)."""
    found = found_in(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when any reference stands in the prediction, else 0 (RULER's questions)."""
    return float(any(found_in(prediction, references)))


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus blanks, in this order (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the normalised words, as bags."""
    return max(_f1_of_words(normalize_answer(prediction).split(), ref) for ref in references)


def _f1_of_words(said: list[str], reference: str) -> float:
    wanted = normalize_answer(reference).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L as LongBench computes it, by the package ``rouge``.

    A text is cut into sentences at its full stops. For every sentence of the reference, the words of its
    longest common subsequences with all sentences of the prediction are united; words are kept as they are written
    and count once in a whole text. The F is 2 p r / (p + r + 1e-8). A prediction of mere full stops scores 0.
    This is not Lin's sentence-level ROUGE-L that ``rouge-score`` computes: means differ by several points.

    Raises:
        ImportError: the package is not installed.
    """
    return max(_rouge_l(prediction, reference) for reference in references)


def check_rouge() -> None:
    """Whether ROUGE-L can be computed here.

    Raises:
        ImportError: names what to install.
    """
    _rouge()


@cache
def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ImportError(
            "LongBench's ROUGE-L is computed by the package rouge, which is not installed: "
            "pip install 'refine-fast-weights[evaluation]'"
        ) from error
    return Rouge(metrics=["rouge-l"])


def _rouge_l(prediction: str, reference: str) -> float:
    rouge = _rouge()
    if not prediction.strip(".") or not reference.strip("."):
        return 0.0  # no sentence; the package raises, which LongBench's script takes for 0
    words = len(prediction.split()) + len(reference.split())
    with _recursion(words + 100):  # the package walks back through the table by calling itself
        return rouge.get_scores([prediction], [reference])[0]["rouge-l"]["f"]


@contextmanager
def _recursion(calls: int) -> Iterator[None]:
    """Allow so many nested calls from here on."""
    before = sys.getrecursionlimit()
    here = len(inspect.stack(0))
    sys.setrecursionlimit(max(before, here + calls))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def longest_common_subsequence(a: Sequence, b: Sequence) -> int:
    """How many items two sequences have in common in the same order; the bits of one integer are a row of the
    table (Hyyrö 2004), so that summaries and lines of code take milliseconds."""
    places: dict = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    everything = (1 << len(a)) - 1
    row = everything
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """Similarity of the first line of code to the reference: 1 - (insertions + deletions) / (both lengths).

    In whole percents: the same as ``fuzz.ratio / 100`` of LongBench's script with the package ``Levenshtein``
    installed (without it, ``fuzzywuzzy`` falls back on ``difflib``, which is another measure). Lines with a
    backtick, ``#`` or ``//`` are passed over.
    """
    line = first_code_line(prediction)
    return max(_edit_similarity(line, reference) for reference in references)


def first_code_line(prediction: str) -> str:
    """The first line, after leading line breaks, that shows no sign of a comment or of a fence; "" if none."""
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not any(sign in line for sign in _COMMENT_SIGNS)), "")


def _edit_similarity(a: str, b: str) -> float:
    if a == b:
        return 1.0
    total = len(a) + len(b)
    edits = total - 2 * longest_common_subsequence(a, b)
    return round(100 * (1 - edits / total)) / 100


def classification_accuracy(
    prediction: str, references: Sequence[str], classes: Sequence[str] = TREC_CLASSES
) -> float:
    """1 / (classes named) when the right one is among them, else 0.

    A class whose name is a part of the right one's is struck off the list of those named, while the list is
    gone through, as in LongBench's script: the one that follows in the list is then not looked at. (No class of
    TREC is a part of another.)
    """
    return max(_share([name for name in classes if name in prediction], ref) for ref in references)


def _share(named: list[str], reference: str) -> float:
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            named.remove(named[place])
        place += 1
    return 1 / len(named) if reference in named else 0.0


def first_line(prediction: str) -> str:
    """What stands before the second line, leading line breaks aside."""
    return prediction.lstrip("\n").split("\n")[0]


METRICS: dict[str, Callable[..., float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "classification_accuracy": classification_accuracy,
}


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a mean of ``count`` scores between 0 and 1 (Wilson 1927).

    Exact in its coverage for scores that are 0 or 1; on the safe side for those in between, whose variance is
    smaller. It does not shrink to a point where all scores are the same.
    """
    z = 1.959963984540054
    centre = mean + z * z / (2 * count)
    spread = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def interval_of_mean(means: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The 95 % interval of the plain mean of independent means, from theirs (MOVER, Zou and Donner 2008)."""
    mean = sum(means) / len(means)
    down = math.sqrt(sum((m - low) ** 2 for m, (low, _) in zip(means, intervals))) / len(means)
    up = math.sqrt(sum((high - m) ** 2 for m, (_, high) in zip(means, intervals))) / len(means)
    return mean - down, mean + up
