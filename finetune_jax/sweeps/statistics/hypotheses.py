"""Tests over seeds, and their adjustment for the number of comparisons."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for the number of comparisons, in the same order.

    The probability of any false difference stays at the level, whatever the dependence
    between comparisons. A p-value that is NaN does not count. Source: Holm 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted.tolist()


def sign_flip_test(difference_S: np.ndarray) -> float:
    """Returns the two-sided p-value of a paired test that does not assume normality.

    It compares the mean with the means after all changes of sign, 100,000 random ones if
    there are more.
    """
    from scipy import stats

    def mean(values: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(values, axis=axis)

    if len(difference_S) < 2:
        return 1.0
    # Equal means that are summed in another order differ in their last bits.
    difference_S = np.round(np.asarray(difference_S, np.float64), 12)
    found = stats.permutation_test(
        (difference_S,), mean, permutation_type="samples", vectorized=True,
        n_resamples=100_000, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)


def smallest_p_value(seeds: int) -> float:
    """Returns the smallest p-value that the sign-flip test reaches with so many seeds.

    >>> smallest_p_value(5), smallest_p_value(6)
    (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - seeds))
