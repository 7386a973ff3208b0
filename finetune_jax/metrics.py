"""Metrics over all rows of a split, on the host in float64."""

import numpy as np

# Of the last part of a metric's name: which way is better.
HIGHER_IS_BETTER = {"accuracy": True, "loss": False}


def accuracy(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the share of rows whose highest logit is that of the label."""
    return float(np.mean(np.argmax(logits_BxK, axis=-1) == label_B))


def log_loss(logits_BxK: np.ndarray, label_B: np.ndarray) -> float:
    """Returns the mean cross entropy of the labels."""
    logits_BxK = logits_BxK.astype(np.float64)
    highest_Bx1 = logits_BxK.max(axis=-1, keepdims=True)
    shifted_BxK = logits_BxK - highest_Bx1
    norm_B = np.log(np.exp(shifted_BxK).sum(axis=-1))
    return float(np.mean(norm_B - shifted_BxK[np.arange(len(label_B)), label_B]))


def confusion_matrix(logits_BxK: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Returns counts [K, K]: a row a true class, a column a predicted one."""
    classes = logits_BxK.shape[-1]
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (label_B, np.argmax(logits_BxK, axis=-1)), 1)
    return counts


def is_better(name: str, value: float, best: float | None, change: float = 0.0) -> bool:
    """Returns whether a metric's value beats the best so far by more than `change`.

    >>> is_better("validation/loss", 0.4, 0.5), is_better("validation/accuracy", 0.4, 0.5)
    (True, False)
    """
    if best is None:
        return True
    gain = value - best if HIGHER_IS_BETTER[name.rpartition("/")[2]] else best - value
    return gain > change
