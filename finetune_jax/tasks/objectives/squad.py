"""Exact match and word F1 of answers.

Source: Rajpurkar et al. 2018, the evaluation script of SQuAD 2.0.
"""

import collections
import re
import string
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Returns a text in lower case without punctuation, articles and extra spaces.

    >>> normalised("The  Broncos' quarterback, a rookie")
    'broncos quarterback rookie'
    """
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", plain).split())


def match_scores(
    predicted: Sequence[str], wanted: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns exact match and F1 of words, means over questions, each from 0 to 1.

    Args:
        predicted: An answer to each question; '' means no answer.
        wanted: Right answers to each question; the best match counts. Empty: no answer.
    """
    pairs = zip(predicted, wanted, strict=True)
    found = [answer_scores(answer, right) for answer, right in pairs]
    count = max(len(predicted), 1)
    return {
        "exact_match": sum((exact for exact, _ in found), 0.0) / count,
        "f1": sum((f1 for _, f1 in found), 0.0) / count,
    }


def answer_scores(answer: str, wanted: Sequence[str]) -> tuple[bool, float]:
    """Returns exact match and F1 of words of one answer.

    Args:
        answer: The answer; '' means no answer.
        wanted: Right answers; the best match counts. Empty: no answer.
    """
    given = normalised(answer)
    texts = [text for text in map(normalised, wanted) if text] or [""]
    return given in texts, max(_f1(given.split(), text.split()) for text in texts)


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    same = collections.Counter(given) & collections.Counter(wanted)
    return 2 * same.total() / (len(given) + len(wanted))
