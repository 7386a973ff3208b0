"""Classification on a page: confusion, recall of each class, curves of two classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_jax.report.html.charts import Chart, plane
from finetune_jax.report.html.formats import percent, wilson
from finetune_jax.report.plots import MOST_NAMED, MOST_NUMBERED, shortened

# More classes are represented by those with the lowest recall.
MOST_CLASSES, FEWEST = 50, 20
# Most pairs of classes in the table of confusions.
MOST_PAIRS = 10
BINS = 10
# Most letters of all class names that fit above the columns of the confusion matrix.
_HEAD_LETTERS = 40
_POINTS = 200
# Shades of a cell of the confusion matrix.
SHADES = 8


def confusion(counts: np.ndarray, names: Sequence[str], caption: str) -> dict[str, Any]:
    """Returns the confusion matrix of a page, and what can be read from it.

    Args:
        counts: Counts [K, K], one row per true class.
        names: Names of the classes.
        caption: Such as 'test, 360 examples'.
    """
    classes, right, total = len(names), int(np.trace(counts)), int(counts.sum())
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Among many classes a confusion is a small share of each.
    shade = np.sqrt(share) if classes > MOST_NUMBERED else share
    shade = np.where(counts > 0, 1 + np.round((SHADES - 1) * shade), 0).astype(int)
    rows, shown = class_rows(counts, names), list(range(classes))
    if classes > MOST_CLASSES:
        shown = sorted(shown, key=lambda k: (rows[k]["recall"], -rows[k]["count"]))
        shown = [k for k in shown if rows[k]["count"]][:FEWEST]
    return {
        "caption": caption,
        "right": right,
        "total": total,
        "counts": counts.tolist() if classes <= MOST_NAMED else None,
        "shades": shade.tolist() if classes <= MOST_NAMED else None,
        "paths": None if classes <= MOST_NAMED else _shaded(shade),
        "is_numbered": classes <= MOST_NUMBERED,
        "columns_numbered": classes * max(map(len, names)) > _HEAD_LETTERS,
        "names": list(names),
        "pairs": most_confused(counts, names) if classes > 2 else [],
        "rows": [rows[k] for k in shown],
        "is_part": len(shown) < classes,
    }


def _shaded(shade: np.ndarray) -> list[str]:
    """Returns the SVG path of the cells of each shade."""
    return [
        "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(shade == level))
        for level in range(1, SHADES + 1)
    ]


def most_confused(
    counts: np.ndarray, names: Sequence[str]
) -> list[tuple[str, str, int, int]]:
    """Returns the most frequent confusions: true, predicted, examples, of how many."""
    classes, of = len(names), counts.sum(axis=1)
    wrong = counts * (1 - np.eye(classes, dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    cells = [divmod(int(index), classes) for index in order if wrong.flat[index]]
    return [(names[r], names[c], int(wrong[r, c]), int(of[r])) for r, c in cells]


def class_rows(counts: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns number, recall with its interval and precision of each class."""
    of, predicted = counts.sum(axis=1), counts.sum(axis=0)
    rows = []
    for k, name in enumerate(names):
        right, count, given = int(counts[k, k]), int(of[k]), int(predicted[k])
        recall = right / count if count else 0.0
        rows.append(
            {
                "number": k + 1,
                "name": name,
                "count": count,
                "recall": recall,
                "interval": wilson(recall, count) if count else None,
                "precision": right / given if given else None,
            }
        )
    return rows


def two_classes(probability: np.ndarray, label: np.ndarray, name: str) -> list[Chart]:
    """Returns the ROC curve, precision over recall, and calibration of two classes.

    There are none if one class has no example, or a probability is not finite.

    Args:
        probability: Predicted probability of the second class, [N].
        label: Class of each example, 0 or 1.
        name: Name of the second class.
    """
    if len(set(label.tolist())) != 2 or not np.isfinite(probability).all():
        return []
    return [
        _roc(probability, label),
        _precision(probability, label),
        _calibration(probability, label, name),
    ]


def _thinned(*arrays: np.ndarray) -> list[np.ndarray]:
    """Returns at most `_POINTS` values of each array, the first and the last among them."""
    size = len(arrays[0])
    kept = np.unique(np.linspace(0, size - 1, min(size, _POINTS)).round().astype(int))
    return [array[kept] for array in arrays]


def _roc(probability: np.ndarray, label: np.ndarray) -> Chart:
    from sklearn.metrics import roc_auc_score, roc_curve

    found = roc_curve(label, probability)
    area = roc_auc_score(label, probability)
    told = [
        (a, f"threshold {t:.3g}: {percent(b)} found, {percent(a)} false alarms")
        for a, b, t in zip(*_thinned(*found))
        if np.isfinite(t)
    ]
    points = list(zip(*_thinned(*found[:2])))
    return plane(
        f"ROC, area {area:.4f}",
        ("share of the others found", "share found"),
        [("", "chance", [(0, 0), (1, 1)], True), ("", "validation", points, True)],
        told,
    )


def _precision(probability: np.ndarray, label: np.ndarray) -> Chart:
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, threshold = precision_recall_curve(label, probability)
    area = average_precision_score(label, probability)
    told = [
        (r, f"threshold {t:.3g}: precision {percent(p)}, recall {percent(r)}")
        for p, r, t in zip(*_thinned(precision[:-1], recall[:-1], threshold))
    ]
    points = list(zip(*_thinned(recall, precision)))
    base = float(label.mean())
    return plane(
        f"Precision and recall, average {area:.4f}",
        ("recall", "precision"),
        [
            ("", "chance", [(0, base), (1, base)], True),
            ("", "validation", points, True),
        ],
        told,
    )


def _calibration(probability: np.ndarray, label: np.ndarray, name: str) -> Chart:
    """Returns the reliability diagram, with the expected calibration error."""
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    size = np.bincount(place, minlength=BINS)
    there = np.flatnonzero(size)
    size_of = np.maximum(size, 1)
    predicted = np.bincount(place, probability, minlength=BINS) / size_of
    found = np.bincount(place, label, minlength=BINS) / size_of
    error = float(np.abs(found - predicted) @ size / len(label))
    bounds = [wilson(float(found[k]), int(size[k])) for k in there]
    told = [
        (
            float(predicted[k]),
            f"{size[k]:,} examples: predicted {percent(float(predicted[k]))}, "
            f"found {percent(float(found[k]))} "
            f"({percent(low)} to {percent(high)})",
        )
        for k, (low, high) in zip(there, bounds)
    ]
    bars = [
        ("", "bar", [(predicted[k], low), (predicted[k], high)], True)
        for k, (low, high) in zip(there, bounds)
    ]
    points = [(predicted[k], found[k]) for k in there]
    return plane(
        f"Calibration, expected error {error:.4f}",
        (f"predicted probability of {shortened(name, 24)}", "share found"),
        [
            ("", "chance", [(0, 0), (1, 1)], True),
            *bars,
            ("", "validation", points, False),
        ],
        told,
    )
