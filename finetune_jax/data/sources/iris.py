"""`iris`: 150 flowers of 3 species, 4 measurements in cm, that scikit-learn brings.

Source: https://scikit-learn.org/stable/datasets/toy_dataset.html (Fisher 1936).
"""

from typing import Any

from finetune_jax.data.source import Source, array_source


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the data set, without splits of its own."""
    del directory, argument
    from sklearn import datasets

    bunch: Any = datasets.load_iris()
    names = [str(name) for name in bunch.target_names]
    return array_source("iris", {"all": (bunch.data, bunch.target)}, names)
