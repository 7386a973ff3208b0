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
    exact = f1 = 0.0
    for answer, right in zip(predicted, wanted, strict=True):
        given = normalised(answer)
        texts = [text for text in map(normalised, right) if text] or [""]
        exact += given in texts
        f1 += max(_f1(given.split(), text.split()) for text in texts)
    count = max(len(predicted), 1)
    return {"exact_match": exact / count, "f1": f1 / count}


def _f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    same = collections.Counter(given) & collections.Counter(wanted)
    return 2 * same.total() / (len(given) + len(wanted))
