"""Labels that are numbers, as float32 has them: when that loses what tells them apart."""

import numpy as np

# float32 and float64 have all whole numbers up to here.
_EXACT, _EXACT_64 = 2.0**24, 2.0**53
# Largest rounding error, in standard deviations of the labels.
_LARGEST = 1e-3


def may_lose(rounded: np.ndarray) -> bool:
    """Returns whether rounding may have lost what tells labels apart.

    Args:
        rounded: Labels, float32 [N].
    """
    most = np.abs(rounded).max(initial=0)
    deviation = rounded.std(dtype=np.float64) if len(rounded) else 0
    return bool(most >= _EXACT or np.spacing(most) > _LARGEST * deviation)


def rounding_doubt(labels: np.ndarray, where: str) -> str | None:
    """Returns that rounding to float32 changes labels too much.

    That is so if different whole numbers become equal, or if some label changes by more
    than a thousandth of the standard deviation.

    >>> print(rounding_doubt(1.7e12 + np.arange(4) * 1000, "'time'"))
    'time': rounding to float32 changes numbers by up to 3.89e+04 (standard deviation \
1.12e+03), and leaves 1 of 4 different ones; subtract an offset such as 1700000001500 in \
the file, or divide
    >>> rounding_doubt(np.array([0.1, 0.2, 1e6]), "'time'")

    Args:
        labels: Labels, float64 [N].
        where: Start of the message.
    """
    rounded = labels.astype(np.float32).astype(np.float64)
    different, after = len(np.unique(labels)), len(np.unique(rounded))
    if not different:
        return None
    error, deviation = np.abs(labels - rounded).max(), labels.std()
    is_merged = different > after and (labels % 1 == 0).all()
    if is_merged or (different > 1 and error > _LARGEST * deviation):
        return (
            f"{where}: rounding to float32 changes numbers by up to {error:.3g} (standard "
            f"deviation {deviation:.3g}), and leaves {after:,} of {different:,} different "
            f"ones; subtract an offset such as {np.median(labels):.0f} in the file, or "
            "divide"
        )
    most = np.abs(labels).max()
    if most > _EXACT_64 and np.spacing(most) > _LARGEST * deviation:
        return f"{where}: numbers beyond 2**53, whose last digits are lost"
    return None
