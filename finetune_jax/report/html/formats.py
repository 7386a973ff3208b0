"""Texts of the numbers on a page, and intervals of shares."""

import math
import re

from scipy.stats import binomtest, norm

SPACE = "\N{NO-BREAK SPACE}"
# Words of metric names that are written in another way.
_WORDS = {
    "auc": "AUC", "ema": "EMA", "f1": "F1", "iou": "IoU", "mae": "MAE", "mse": "MSE",
    "r2": "R²", "roc": "ROC",
}  # fmt: skip
# Metrics that are shares of the examples of a split, each counted once.
_SHARES = re.compile(r"(ema_)?(accuracy|top_\d+_accuracy|exact_match|recall_micro)")


def percent(share: float) -> str:
    """Returns a share in percent, never rounded to 0 or 100.

    >>> [percent(x).replace(SPACE, " ") for x in (0.9220, 0.99996, 0.0002293, 0, 1)]
    ['92.2 %', '99.996 %', '0.02 %', '0 %', '100 %']
    """
    if not 0 < round(share, 9) < 1:
        return f"{100 * share:.0f}{SPACE}%"
    digits = 1
    while digits < 7 and not 0 < abs(float(f"{100 * share:.{digits}f}")) < 100:
        digits += 1
    return f"{100 * share:.{digits}f}{SPACE}%"


def is_share(name: str) -> bool:
    """Returns whether a metric is shown in percent, whatever split it is of.

    >>> is_share("test/ema_accuracy"), is_share("test/loss")
    (True, False)
    """
    return name.endswith(("accuracy", "exact_match"))


def metric_text(name: str, value: float | None) -> str:
    """Returns the value of a metric; a dash where it is not finite.

    >>> metric_text("test/loss", 0.28732), metric_text("test/loss", None)
    ('0.2873', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if is_share(name):
        return percent(value)
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.3e}"
    return f"{value:.4f}" if size < 10 else f"{value:,.{2 if size < 1e3 else 0}f}"


def metric_title(name: str) -> str:
    """Returns the name of a metric, or its split and name, as a text.

    >>> metric_title("roc_auc"), metric_title("validation/digits/loss")
    ('ROC AUC', 'validation digits loss')
    """
    words = name.replace("/", "_").split("_")
    return " ".join(_WORDS.get(word, word) for word in words)


def capitalised(text: str) -> str:
    """Returns a text whose first letter is a capital, all others as they are."""
    return text[:1].upper() + text[1:]


def count_text(count: int) -> str:
    """Returns a number of parameters, in millions where it is large.

    >>> count_text(64_650), count_text(25_557_032).replace(SPACE, " ")
    ('64,650', '25.6 M')
    """
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f}{SPACE}M"


def size_text(size: int) -> str:
    """Returns a number of bytes in MB or GB.

    >>> size_text(124_570_000), size_text(1_400_000_000), size_text(25_600)
    ('124.6 MB', '1.4 GB', '0.03 MB')
    """
    if size >= 1e9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:.{1 if size >= 1e5 else 2}f} MB"


def rate_text(rate: float) -> str:
    """Returns a learning rate.

    >>> rate_text(0.003), rate_text(1e-05)
    ('0.003', '1e-5')
    """
    return f"{rate:.3g}".replace("e-0", "e-")


def time_text(seconds: float) -> str:
    """Returns a duration.

    >>> [time_text(s).replace(SPACE, " ") for s in (0.031, 4.21, 27.4, 725, 12_060)]
    ['0.03 s', '4.2 s', '27 s', '12 min', '3 h 21 min']
    """
    if seconds < 99.5:
        digits = 2 if seconds < 0.95 else 1 if seconds < 9.95 else 0
        return f"{seconds:.{digits}f}{SPACE}s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes}{SPACE}min"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of `count` independent examples.

    Source: Wilson 1927.

    >>> [round(bound, 3) for bound in wilson(0.5, 10)]
    [0.237, 0.763]
    >>> [round(bound, 3) for bound in wilson(1.0, 40)]
    [0.912, 1.0]
    """
    found = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def auc_interval(area: float, positive: int, negative: int) -> tuple[float, float]:
    """Returns the 95 % interval of the area under a ROC curve.

    Source: Hanley & McNeil 1982, equation 1.

    >>> [round(bound, 3) for bound in auc_interval(0.8, 50, 50)]
    [0.713, 0.887]

    Args:
        area: The area.
        positive: Number of examples of the second class.
        negative: Number of examples of the first class.
    """
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area)
    spread += (positive - 1) * (first - area**2) + (negative - 1) * (second - area**2)
    half = float(norm.ppf(0.975)) * math.sqrt(spread / (positive * negative))
    return max(area - half, 0.0), min(area + half, 1.0)


def interval(
    name: str, value: float | None, class_counts: tuple[int, ...]
) -> tuple[float, float] | None:
    """Returns the 95 % interval of a metric from the numbers of examples alone.

    None where these numbers do not give one, such as for a loss or a mean over domains.

    Args:
        name: Name of the metric without its split.
        value: Value of the metric.
        class_counts: Examples of each class of the split, or one number without classes.
    """
    if value is None or not math.isfinite(value) or not 0 <= value <= 1:
        return None
    if _SHARES.fullmatch(name) and sum(class_counts):
        return wilson(value, sum(class_counts))
    if name.removeprefix("ema_") == "roc_auc" and len(class_counts) == 2:
        negative, positive = class_counts
        return auc_interval(value, positive, negative) if min(class_counts) else None
    return None
