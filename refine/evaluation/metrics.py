"""What an answer is worth: the scores of RULER and LongBench, each between 0 and 1.

Every function takes one prediction and its references and knows nothing of models or files. With several
references the best counts, except in :func:`string_match_all`, which asks for every one of them.

Sources: Hsieh et al., RULER (arXiv 2404.06654); Bai et al., LongBench (arXiv 2308.14508); Rajpurkar et al., SQuAD
(arXiv 1606.05250) for the normalised token F1; Lin, ROUGE (2004).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

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
_NOT_A_WORD = re.compile(r"[^a-z0-9]+")
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
    """F1 of the longest common subsequence of words, which are runs of a-z and 0-9 in lower case.

    This is Lin's sentence-level ROUGE-L with beta = 1, as the package ``rouge-score`` computes it without
    stemming. LongBench's own script uses the package ``rouge``, which joins subsequences over sentences and
    counts every word once; the numbers of the two are not to be compared.
    """
    return max(_rouge_l(_words(prediction), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return [word for word in _NOT_A_WORD.split(text.lower()) if word]


def _rouge_l(said: list[str], wanted: list[str]) -> float:
    common = longest_common_subsequence(said, wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


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

    The same as ``fuzz.ratio / 100`` of LongBench, without its rounding to whole percents. Lines with a backtick,
    ``#`` or ``//`` are passed over.
    """
    line = first_code_line(prediction)
    return max(_edit_similarity(line, reference) for reference in references)


def first_code_line(prediction: str) -> str:
    """The first line, after leading line breaks, that shows no sign of a comment or of a fence; "" if none."""
    lines = prediction.lstrip("\n").split("\n")
    return next((line for line in lines if not any(sign in line for sign in _COMMENT_SIGNS)), "")


def _edit_similarity(a: str, b: str) -> float:
    total = len(a) + len(b)
    return 2 * longest_common_subsequence(a, b) / total if total else 1.0


def classification_accuracy(
    prediction: str, references: Sequence[str], classes: Sequence[str] = TREC_CLASSES
) -> float:
    """1 / (classes named) when the right one is among them, else 0.

    A class whose name is a part of the right one's does not count as named.
    """
    named = [name for name in classes if name in prediction]
    return max(_share(named, reference) for reference in references)


def _share(named: list[str], reference: str) -> float:
    kept = [name for name in named if name == reference or name not in reference]
    return 1 / len(kept) if reference in kept else 0.0


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
