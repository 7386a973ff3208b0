"""Decision thresholds for two classes, chosen on the rows of one split.

The second class is the positive one. It is predicted if its probability, the score, is
at least the threshold.
"""

import dataclasses
import math
from typing import Self, final

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError

KEY = "config.task.threshold_rule"
# Metrics of a split at the threshold, and the threshold itself.
METRICS = (
    "threshold", "precision_at_threshold", "recall_at_threshold",
    "specificity_at_threshold", "f1_at_threshold",
)  # fmt: skip
# Rates are quotients of counts; rounding must not decide whether one is reached.
ROUNDING = 1e-12


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that chooses a threshold.

    Attributes:
        measure: 'f1', which is maximised, or 'precision', 'recall', 'specificity', which
            has to reach `least`.
        least: Smallest allowed value of the measure; None for 'f1'.
    """

    measure: str
    least: float | None

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Returns the rule of `config.task.threshold_rule`.

        >>> Rule.from_text("specificity=0.95")
        Rule(measure='specificity', least=0.95)

        Raises:
            UserError: It is no such rule.
        """
        measure, _, number = str(text).partition("=")
        known = {"f1": None, "precision": None, "recall": None, "specificity": None}
        registry.choose(known, measure, KEY)
        if measure == "f1":
            if number:
                raise UserError(f"{KEY}: {text!r}; 'f1' is maximised, so write 'f1'")
            return cls(measure=measure, least=None)
        try:
            least = float(number)
        except ValueError:
            least = math.nan
        if not 0 < least <= 1:
            raise UserError(
                f"{KEY}: {text!r}; a value above 0 and up to 1 is needed, as in "
                f"'{measure}=0.95'"
            )
        return cls(measure=measure, least=least)

    def choose(self, score_B: np.ndarray, label_B: np.ndarray) -> float:
        """Returns the threshold, half-way between two scores.

        'f1' takes the threshold with the highest F1. 'precision' and 'specificity' take
        the lowest threshold that reaches the value, 'recall' the highest. A precision
        that no threshold reaches is replaced by the highest one.

        Args:
            score_B: Probabilities of the positive class.
            label_B: 1 for the positive class, else 0; both occur.
        """
        from sklearn.metrics import roc_curve

        if not np.isfinite(score_B).all():
            return math.nan
        false_rate_T, recall_T, score_T = roc_curve(
            label_B, score_B, drop_intermediate=False
        )
        positives = int(label_B.sum())
        found_T = recall_T * positives
        alarms_T = found_T + false_rate_T * (len(label_B) - positives)
        measure_T = {
            "f1": 2 * found_T / (alarms_T + positives),
            "precision": found_T / np.maximum(alarms_T, 1),
            "recall": recall_T,
            "specificity": 1 - false_rate_T,
        }[self.measure]
        best = int(np.argmax(measure_T))
        if self.least is not None:
            (reached,) = np.nonzero(measure_T >= self.least - ROUNDING)
            if len(reached):
                best = int(reached[0 if self.measure == "recall" else -1])
        # Scores fall along the curve; at its first point no row is positive.
        if best == 0:
            return float(np.nextafter(score_T[1], 2))
        below = score_T[best + 1] if best + 1 < len(score_T) else 0.0
        return float((score_T[best] + below) / 2)


def metrics_at(
    threshold: float, score_B: np.ndarray, label_B: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of `METRICS` for rows with a given threshold.

    Args:
        threshold: Smallest score of a row that is predicted positive.
        score_B: Probabilities of the positive class.
        label_B: 1 for the positive class, else 0.
    """
    is_alarm_B, is_positive_B = score_B >= threshold, label_B == 1
    found = int(np.sum(is_alarm_B & is_positive_B))
    alarms, positives = int(is_alarm_B.sum()), int(is_positive_B.sum())
    negatives = len(label_B) - positives
    values = (
        threshold,
        found / max(alarms, 1),
        found / max(positives, 1),
        (negatives - (alarms - found)) / max(negatives, 1),
        2 * found / max(alarms + positives, 1),
    )
    return dict(zip(METRICS, values, strict=True))
