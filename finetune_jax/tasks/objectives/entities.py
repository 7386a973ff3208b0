"""Entities in sequences of tags, and their precision, recall and F1.

Source: the rules of conlleval.pl (Tjong Kim Sang & De Meulder 2003), with the schemes
IOB1, IOB2, IOE and IOBES at once, as seqeval has them by default.
"""

from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]


def entities(tags: Sequence[str]) -> set[Entity]:
    """Returns (kind, first, last) of each entity.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    found, begin = set(), 0
    before, kind_before = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        now = tag[:1]
        kind = tag[1:].split("-", maxsplit=1)[-1] or "_"
        if _ends(before, now, kind_before, kind):
            found.add((kind_before, begin, place - 1))
        if _begins(before, now, kind_before, kind):
            begin = place
        before, kind_before = now, kind
    return found


def _ends(before: str, now: str, kind_before: str, kind: str) -> bool:
    if before == "O":
        return False
    return before in "ES" or now in "BSO" or kind_before != kind


def _begins(before: str, now: str, kind_before: str, kind: str) -> bool:
    if now == "O":
        return False
    return now in "BS" or before in "ESO" or kind_before != kind


def entity_scores(
    predicted: Iterable[Sequence[str]], true: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Returns precision, recall and F1 over the entities of all sequences.

    A division by zero gives 0.
    """
    right = given = wanted = 0
    for one, other in zip(predicted, true, strict=True):
        found, there = entities(one), entities(other)
        right += len(found & there)
        given += len(found)
        wanted += len(there)
    precision, recall = right / max(given, 1), right / max(wanted, 1)
    f1 = 2 * right / max(given + wanted, 1)
    return {"precision": precision, "recall": recall, "f1": f1}
