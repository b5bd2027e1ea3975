"""How right an answer is: the field's metrics, each as it was published, and a user's own function.

In: an answer and the reference answers of its row. Out: a number, the best over the references; of the
metrics here it lies between 0 and 1, and higher is better. METRICS is a plain dict of functions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Score = Callable[[str, str], float]

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
ARTICLES = re.compile(r"\b(a|an|the)\b")
WORDS = re.compile(r"[^\W_]+")


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same text; white space around them does not count, case and punctuation do.

    Source: the metric exact_match of Hugging Face's evaluate, with its defaults.
    """
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """1 where the reference stands somewhere in the answer, in either case; "no" also stands in "know".

    Source: Mallen et al. 2023, "When Not to Trust Language Models" (PopQA), section 3; OCRBench, too.
    """
    return float(join_lower(reference) in join_lower(answer))


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall over words, as bags; without articles and punctuation.

    An answer of nothing but these, such as the option "A", equals every other such answer.
    Source: Rajpurkar et al. 2016, "SQuAD", section 6.1; empty texts as the script of SQuAD 2.0 has them.
    """
    given, wanted = squad_words(answer), squad_words(reference)
    if not given or not wanted:
        return float(given == wanted)
    num_shared = (Counter(given) & Counter(wanted)).total()
    return 2 * num_shared / (len(given) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in lower case and without stemming.

    Source: Lin 2004, "ROUGE", section 3, with beta 1 as in Google's rouge_score, whose words these are for
    English; words of other scripts count, too.
    """
    given, wanted = WORDS.findall(answer.lower()), WORDS.findall(reference.lower())
    if not given or not wanted:
        return 0.0
    return 2 * common_length(given, wanted) / (len(given) + len(wanted))


def anls(answer: str, reference: str) -> float:
    """1 less the edit distance over the longer length, 0 from a distance of half on; in lower case.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", equation 1, with threshold 0.5.
    """
    given, wanted = join_lower(answer), join_lower(reference)
    longest = max(len(given), len(wanted))
    distance = edit_distance(given, wanted) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, reference: str) -> float:
    """1 where two numbers differ by at most 5 % of the reference; other texts must be equal, but for case.

    A percent sign divides by 100. A reference of 0 is compared as a text.
    Source: Masry et al. 2022, "ChartQA", section 5.1, after Methani et al. 2020, "PlotQA".
    """
    given, wanted = as_number(answer), as_number(reference)
    if given is not None and wanted:
        return float(abs(given - wanted) <= RELAXED_TOLERANCE * abs(wanted))
    return float(answer.strip().lower() == reference.strip().lower())


METRICS: dict[str, Score] = {
    "exact_match": exact_match,
    "contains": contains,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def best_score(metric: Score, answer: str, references: Sequence[str]) -> float:
    """Over the references, of which one is enough."""
    return max(metric(answer, reference) for reference in references)


def join_lower(text: str) -> str:
    return " ".join(text.lower().split())


def squad_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def as_number(text: str) -> float | None:
    """ "5 %" -> 0.05; None for what is no finite number."""
    text = text.strip()
    try:
        number = float(text.rstrip("%").strip()) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Of the longest common subsequence: of "a b c d" and "a x c" it is "a c", so 2."""
    lengths = [0] * (len(second) + 1)
    for item in first:
        above = list(lengths)
        for i, other in enumerate(second, start=1):
            lengths[i] = above[i - 1] + 1 if item == other else max(above[i], lengths[i - 1])
    return lengths[-1]


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and exchanges; "cat" to "cart" is 1."""
    distances = list(range(len(second) + 1))
    for i, character in enumerate(first, start=1):
        above = distances
        distances = [i]
        for j, other in enumerate(second, start=1):
            exchanged = above[j - 1] + (character != other)
            distances.append(min(exchanged, above[j] + 1, distances[j - 1] + 1))
    return distances[-1]
