"""Metrics over all rows of a split, on the host in float64.

Classification metrics take logits and class indices, regression metrics predictions and
targets [B, T], segmentation metrics counts of pixels [B, 3, K]. Probabilities are the
softmax of the logits, for every training loss. scikit-learn's conventions hold: a class
that neither occurs nor is predicted is in no average, and a division by zero gives 0.

Some metrics are means of scores of the examples, which `EXAMPLE_SCORES` has: two runs are
compared by them example by example.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.core.metric_names import is_better
from finetune_jax.core.registry import closest

AVERAGES = ("binary", "macro", "micro", "weighted")
# Metrics that rank examples, which needs examples of every class.
RANKING = ("roc_auc", "average_precision", "normalised_entropy")
BINS = 15  # Guo et al. 2017, section 5.
_TOP = re.compile(r"top_([1-9]\d*)_accuracy")
_SENSITIVITY = re.compile(r"sensitivity_at_specificity_([1-9]\d?)")


def accuracy(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the share of rows whose highest logit is that of the label."""
    return float(np.mean(is_right(logits_BxK, label_B)))


def is_right(logits_BxK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Returns whether the highest logit of each row is that of the label."""
    return np.argmax(logits_BxK, axis=-1) == label_B


def top_accuracy(k: int, logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the share of rows whose label is among the k highest logits."""
    return float(np.mean(is_among_top(k, logits_BxK, label_B)))


def is_among_top(k: int, logits_BxK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Returns whether the label of each row is among its k highest logits."""
    top_BxK = np.argsort(-logits_BxK.astype(np.float64), axis=-1, kind="stable")[:, :k]
    return (top_BxK == label_B[:, None]).any(axis=-1)


def log_loss(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the mean cross entropy of the labels."""
    return float(np.mean(log_losses(logits_BxK, label_B)))


def log_losses(logits_BxK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Returns the cross entropy of each row."""
    logits_BxK = logits_BxK.astype(np.float64)
    highest_Bx1 = logits_BxK.max(axis=-1, keepdims=True)
    shifted_BxK = logits_BxK - highest_Bx1
    norm_B = np.log(np.exp(shifted_BxK).sum(axis=-1))
    return norm_B - shifted_BxK[np.arange(len(label_B)), label_B]


def normalised_entropy(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the log loss divided by the entropy of the classes' shares.

    Source: He et al. 2014, section 3.
    """
    share_K = np.bincount(label_B) / len(label_B)
    share_K = share_K[share_K > 0]
    entropy = -float(np.sum(share_K * np.log(share_K)))
    return log_loss(logits_BxK, label_B) / entropy if entropy else math.nan


def probabilities(logits_BxK: np.ndarray) -> np.ndarray:
    """Returns the softmax of each row."""
    logits_BxK = logits_BxK.astype(np.float64)
    probability_BxK = np.exp(logits_BxK - logits_BxK.max(axis=-1, keepdims=True))
    return probability_BxK / probability_BxK.sum(axis=-1, keepdims=True)


def calibration_error(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the expected calibration error, in bins of equal width.

    Source: Guo et al. 2017, equation 3.
    """
    confidence_B = probabilities(logits_BxK).max(axis=-1)
    right_B = np.argmax(logits_BxK, axis=-1) == label_B
    edges = np.linspace(0, 1, BINS + 1)[1:-1]
    bin_B = np.digitize(confidence_B, edges, right=True)
    gap_of_bin = np.bincount(bin_B, right_B - confidence_B, minlength=BINS)
    return float(np.abs(gap_of_bin).sum() / len(label_B))


def brier(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the Brier score, the squared error of the probabilities.

    Of two classes it is the error of one, in [0, 1]; of more, the sum over all, in
    [0, 2].

    Source: Brier 1950; scikit-learn's brier_score_loss.
    """
    return float(np.mean(brier_scores(logits_BxK, label_B)))


def brier_scores(logits_BxK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Returns the Brier score of each row."""
    error_BxK = probabilities(logits_BxK)
    error_BxK[np.arange(len(label_B)), label_B] -= 1
    total_B = np.sum(error_BxK**2, axis=-1)
    return total_B / 2 if logits_BxK.shape[-1] == 2 else total_B


def sensitivity_at_specificity(
    percent: int, logits_BxK: np.ndarray, label_B: np.ndarray
) -> float:
    """Returns the best sensitivity at a specificity of at least so many percent.

    The point is on the ROC curve of these very rows, as if the threshold were chosen on
    them; `config.task.threshold` chooses it on the validation split instead. The second
    class is the positive one.
    """
    from sklearn.metrics import roc_curve

    if not np.isfinite(logits_BxK).all():
        return math.nan
    odds_B = _log_odds(logits_BxK)[:, 1]
    false_positives, sensitivity, _ = roc_curve(
        label_B, odds_B, drop_intermediate=False
    )
    # Rates are quotients of counts, which rounding must not exclude.
    is_allowed = false_positives <= 1 - percent / 100 + 1e-12
    return float(sensitivity[is_allowed].max())


def confusion_matrix(logits_BxK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Returns counts [K, K]: one row per true class, one column per predicted class."""
    classes = logits_BxK.shape[-1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (label_B, np.argmax(logits_BxK, axis=-1)), 1)
    return counts


def _counted(
    measure: str, average: str, logits_BxK: np.ndarray, label_B: np.ndarray
) -> float:
    """Returns precision, recall or F1; 'binary' is that of the second class."""
    from sklearn import metrics

    function = getattr(metrics, f"{measure}_score")
    predicted_B = np.argmax(logits_BxK, axis=-1)
    return float(function(label_B, predicted_B, average=average, zero_division=0))


def _ranked(measure: str, logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the area for the second of two classes, else the mean of one-vs-rest."""
    from sklearn import metrics

    if not np.isfinite(logits_BxK).all():
        return math.nan
    function = getattr(metrics, f"{measure}_score")
    odds_BxK, classes = _log_odds(logits_BxK), logits_BxK.shape[-1]
    ranked = [1] if classes == 2 else range(classes)
    return float(np.mean([function(label_B == k, odds_BxK[:, k]) for k in ranked]))


def _log_odds(logits_BxK: np.ndarray) -> np.ndarray:
    """Returns log(p / (1 - p)), which ranks like p even where p rounds to 1."""
    logits_BxK = logits_BxK.astype(np.float64)
    shifted_BxK = logits_BxK - logits_BxK.max(axis=-1, keepdims=True)
    rows, best_B = np.arange(len(logits_BxK)), np.argmax(logits_BxK, axis=-1)
    power_BxK = np.exp(shifted_BxK)
    rest_BxK = power_BxK.sum(axis=-1, keepdims=True) - power_BxK
    # Only in the highest class does 1 - p cancel, so its rest is summed without it.
    others_BxK = shifted_BxK.copy()
    others_BxK[rows, best_B] = -np.inf
    second_B = others_BxK.max(axis=-1)
    odds_BxK = shifted_BxK - np.log(np.maximum(rest_BxK, np.finfo(float).tiny))
    rest_B = np.exp(others_BxK - second_B[:, None]).sum(axis=-1)
    odds_BxK[rows, best_B] = -second_B - np.log(rest_B)
    return odds_BxK


def mse(prediction_BxT: np.ndarray, target_BxT: np.ndarray) -> float:
    """Returns the mean squared error."""
    return float(np.mean(squares(prediction_BxT, target_BxT)))


def squares(prediction_BxT: np.ndarray, target_BxT: np.ndarray) -> np.ndarray:
    """Returns the squared errors."""
    return _errors(prediction_BxT, target_BxT) ** 2


def mae(prediction_BxT: np.ndarray, target_BxT: np.ndarray) -> float:
    """Returns the mean absolute error."""
    return float(np.mean(distances(prediction_BxT, target_BxT)))


def distances(prediction_BxT: np.ndarray, target_BxT: np.ndarray) -> np.ndarray:
    """Returns the absolute errors."""
    return np.abs(_errors(prediction_BxT, target_BxT))


def huber(
    prediction_BxT: np.ndarray, target_BxT: np.ndarray, *, delta: float = 1.0
) -> float:
    """Returns the mean Huber loss, as in `losses.huber`."""
    return float(np.mean(huber_losses(prediction_BxT, target_BxT, delta=delta)))


def huber_losses(
    prediction_BxT: np.ndarray, target_BxT: np.ndarray, *, delta: float = 1.0
) -> np.ndarray:
    """Returns the Huber loss of each number."""
    error_BxT = distances(prediction_BxT, target_BxT)
    square_BxT = np.minimum(error_BxT, delta)
    return square_BxT**2 / 2 + delta * (error_BxT - square_BxT)


def r2(prediction_BxT: np.ndarray, target_BxT: np.ndarray) -> float:
    """Returns the coefficient of determination, a mean over the targets."""
    from sklearn.metrics import r2_score

    if not np.isfinite(prediction_BxT).all():
        return math.nan
    found = target_BxT.astype(np.float64), prediction_BxT.astype(np.float64)
    return float(r2_score(*found))


def _errors(prediction_BxT: np.ndarray, target_BxT: np.ndarray) -> np.ndarray:
    return prediction_BxT.astype(np.float64) - target_BxT.astype(np.float64)


def class_iou(counts_Bx3xK: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class, [K], over all examples' pixels.

    NaN for a class that neither occurs nor is predicted.

    Args:
        counts_Bx3xK: Numbers of pixels of each class: rightly predicted, true, and
            predicted, without ignored pixels.
    """
    right_K, true_K, predicted_K = counts_Bx3xK.astype(np.float64).sum(axis=0)
    union_K = true_K + predicted_K - right_K
    share_K = right_K / np.maximum(union_K, 1)
    return np.where(union_K > 0, share_K, np.nan)


def mean_iou(counts_Bx3xK: np.ndarray) -> float:
    """Returns the mean over the classes that occur or are predicted; NaN without any."""
    iou_K = class_iou(counts_Bx3xK)
    there_K = np.isfinite(iou_K)
    return float(iou_K[there_K].mean()) if there_K.any() else math.nan


def pixel_accuracy(counts_Bx3xK: np.ndarray) -> float:
    """Returns the share of rightly predicted pixels; NaN without any."""
    right, true, _ = counts_Bx3xK.astype(np.float64).sum(axis=(0, 2))
    return float(right / true) if true else math.nan


def mean_accuracy(counts_Bx3xK: np.ndarray) -> float:
    """Returns the mean over occurring classes of the share predicted rightly."""
    right_K, true_K, _ = counts_Bx3xK.astype(np.float64).sum(axis=0)
    there_K = true_K > 0
    share_K = right_K[there_K] / true_K[there_K]
    return float(share_K.mean()) if there_K.any() else math.nan


CLASSIFICATION = registry.Choices(
    "classification metric",
    {
        "accuracy": accuracy,
        "loss": log_loss,
        "cross_entropy": log_loss,
        "normalised_entropy": normalised_entropy,
        "calibration_error": calibration_error,
        "brier": brier,
        **{
            name: functools.partial(_ranked, name)
            for name in ("roc_auc", "average_precision")
        },
        **{
            f"{measure}_{average}": functools.partial(_counted, measure, average)
            for measure in ("precision", "recall", "f1")
            for average in AVERAGES
        },
    },
)
# Metrics whose names contain their first argument.
NUMBERED = {_TOP: top_accuracy, _SENSITIVITY: sensitivity_at_specificity}
REGRESSION = registry.Choices("regression metric", {"mse": mse, "mae": mae, "r2": r2})
SEGMENTATION = registry.Choices(
    "segmentation metric",
    {
        "mean_iou": mean_iou,
        "pixel_accuracy": pixel_accuracy,
        "mean_accuracy": mean_accuracy,
    },
)
# Scores of the rows, [B] or [B, T], whose mean is the metric of that name. A metric
# without an entry is no mean over examples.
EXAMPLE_SCORES: dict[str, dict[str, Callable]] = {
    "classification": {
        "accuracy": is_right,
        "loss": log_losses,
        "cross_entropy": log_losses,
        "brier": brier_scores,
    },
    "regression": {"mse": squares, "mae": distances},
}
METRICS = {
    "classification": CLASSIFICATION,
    "regression": REGRESSION,
    "segmentation": SEGMENTATION,
}


def metric(name: str, known: Mapping[str, Callable] = CLASSIFICATION) -> Callable:
    """Returns a metric by its name, which may contain a number."""
    for pattern, function in NUMBERED.items():
        if found := pattern.fullmatch(name):
            return functools.partial(function, int(found[1]))
    return known[name]


def example_scores(kind: str, name: str) -> Callable | None:
    """Returns the scores of examples whose mean is a metric; None if it is no mean.

    Args:
        kind: 'classification' or 'regression'.
        name: Name of the metric.
    """
    if kind == "classification" and (top := _TOP.fullmatch(name)):
        return functools.partial(is_among_top, int(top[1]))
    return EXAMPLE_SCORES[kind].get(name)


def needs_every_class(name: str) -> bool:
    """Returns whether a metric is undefined on rows that lack a class."""
    return name in RANKING or bool(_SENSITIVITY.fullmatch(name))


def check_metrics(kind: str, names: Sequence[str], classes: int = 0) -> None:
    """Checks the names in `config.task.metrics`.

    Args:
        kind: A key of `METRICS`.
        names: Names of metrics.
        classes: Number of classes of the data.

    Raises:
        UserError: Lists unknown metrics with close matches, and metrics that do not fit
            the number of classes.
    """
    known = {**METRICS[kind], "loss": log_loss}
    if kind == "classification":
        known["top_5_accuracy"] = top_accuracy
        known["sensitivity_at_specificity_95"] = sensitivity_at_specificity
    problems = []
    for name in map(str, names):
        if name not in known and not (
            kind == "classification"
            and any(pattern.fullmatch(name) for pattern in NUMBERED)
        ):
            others = [other for other, table in METRICS.items() if name in table]
            hint = f", a metric of {others[0]}" if others else closest(name, known)
            problems.append(f"no {name!r}{hint}")
        elif name.endswith("_binary") and classes != 2:
            ways = (name.replace("binary", average) for average in AVERAGES[1:])
            problems.append(
                f"{name!r} needs 2 classes, the data has {classes}: use {', '.join(ways)}"
            )
        elif (top := _TOP.fullmatch(name)) and 0 < classes <= int(top[1]):
            problems.append(f"{name!r} is always 1, the data has {classes} classes")
        elif _SENSITIVITY.fullmatch(name) and classes != 2:
            problems.append(f"{name!r} needs 2 classes, the data has {classes}")
        elif name in RANKING and classes < 2:
            problems.append(f"{name!r} needs 2 classes, the data has {classes}")
    if problems:
        listed = f"{kind} has {', '.join(sorted(known))}"
        raise UserError(
            *problems, header="config.task.metrics does not fit:", advice=listed
        )


def loss_beside(name: str) -> str:
    """Returns the name of the loss of the same split and weights as a metric.

    >>> loss_beside("validation/accuracy"), loss_beside("validation/usps/ema_top5")
    ('validation/loss', 'validation/usps/ema_loss')
    """
    split, _, metric = name.rpartition("/")
    return f"{split}/ema_loss" if metric.startswith("ema_") else f"{split}/loss"


def replaces(
    name: str,
    value: float,
    best: float | None,
    loss: float | None,
    best_loss: float | None,
) -> bool:
    """Returns whether a later state replaces the best one so far.

    A tie of the metric is decided by the loss, and a tie of both by the later step.

    Args:
        name: Name of the metric that decides.
        value: Its value at the later state.
        best: Its value at the best state; None if there is no best state yet.
        loss: Loss of the later state; None if unknown.
        best_loss: Loss of the best state; None if unknown.

    >>> replaces("validation/accuracy", 0.5, 0.5, 0.2, 0.9)
    True
    """
    if value != best or loss is None or best_loss is None:
        return value == best or is_better(name, value, best)
    return loss <= best_loss or math.isnan(best_loss)
