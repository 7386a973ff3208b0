"""Names of metrics: which are better when lower, which belong to one class."""

import math
import re
from collections.abc import Collection

# Prefixes of metric names, which no domain, model or label may have.
RESERVED = ("train", "validation", "test", "time", "distance", "cka")
LOWER_IS_BETTER = (
    "loss", "cross_entropy", "normalised_entropy", "calibration_error", "brier", "mse",
    "mae",
)  # fmt: skip


_BOUNDED = re.compile(
    r".*accuracy|exact_match|roc_auc|average_precision|(mean_)?iou.*"
    r"|(precision|recall|f1|sensitivity|specificity)(_.*)?"
)
# Prefix of the metrics of single classes, which may be many.
PER_CLASS = "iou_"


def label_problem(label: str, others: Collection[str]) -> str | None:
    """Returns why a label cannot begin the names of metrics, or None.

    >>> label_problem("test", ())
    "'test' names other metrics; choose another"

    Args:
        label: Label of a domain or of a model.
        others: Labels before it.
    """
    if not re.fullmatch("[a-z0-9_]+", label):
        return f"{label!r}; a-z, 0-9 and _ are possible"
    if label in RESERVED:
        return f"{label!r} names other metrics; choose another"
    return f"{label!r} twice; give each its own label" if label in others else None


def is_of_class(name: str) -> bool:
    """Returns whether a metric is of one class, whatever split or weights it is of.

    >>> is_of_class("test/ema_iou_road"), is_of_class("test/mean_iou")
    (True, False)
    """
    return name.rpartition("/")[2].removeprefix("ema_").startswith(PER_CLASS)


def higher_is_better(name: str) -> bool:
    """Returns which way of a metric is better, whatever split or weights it is of.

    >>> higher_is_better("validation/ema_accuracy"), higher_is_better("test/ema_loss")
    (True, False)
    """
    return name.rpartition("/")[2].removeprefix("ema_") not in LOWER_IS_BETTER


def is_bounded(name: str) -> bool:
    """Returns whether a metric lies between 0 and 1, and is better when higher.

    >>> is_bounded("test/digits/ema_f1_macro"), is_bounded("test/r2")
    (True, False)
    """
    return bool(_BOUNDED.fullmatch(name.rpartition("/")[2].removeprefix("ema_")))


def is_better(name: str, value: float, best: float | None, change: float = 0.0) -> bool:
    """Returns whether a metric's value beats the best so far by more than `change`.

    NaN is never better.

    >>> is_better("validation/loss", 0.4, 0.5), is_better("validation/accuracy", 0.4, 0.5)
    (True, False)
    """
    if best is None or math.isnan(value):
        return not math.isnan(value)
    gain = value - best if higher_is_better(name) else best - value
    return gain > change
