"""`diabetes`: 442 patients, 10 measurements, and how far the disease was a year later.

The measurements have mean 0 and standard deviation 0.0476; the target is 25 to 346.
Source: https://scikit-learn.org/stable/datasets/toy_dataset.html (Efron et al. 2004).
"""

from typing import Any

from finetune_jax.data.source import Source, array_source


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the data set, without splits of its own."""
    del directory, argument
    from sklearn import datasets

    bunch: Any = datasets.load_diabetes()
    splits = {"all": (bunch.data, bunch.target)}
    return array_source("diabetes", splits, targets=["progression"])
