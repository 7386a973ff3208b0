"""`digits`: 1,797 images of handwritten digits, 8x8, that scikit-learn brings.

Source: https://scikit-learn.org/stable/datasets/toy_dataset.html, from the UCI data set
"Optical Recognition of Handwritten Digits". 17 grey levels are spread over a byte.
"""

from typing import Any

import numpy as np

from finetune_jax.data.source import Source, array_source


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the data set, without splits of its own."""
    del directory, argument
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in bunch.target_names]
    return array_source("digits", {"all": (images, bunch.target)}, names)
