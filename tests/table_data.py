"""Data of small tables."""

import numpy as np

from finetune_jax import config as configs
from finetune_jax.data.dataset import make_data
from finetune_jax.data.kind import Resources


def section(place, name="criteo", **given):
    config = configs.default()
    own = {"train": "all", "min_count": 1}
    config.data.update(name=name, dir=str(place), **{**own, **given})
    resolved, problems = configs.resolve(config)
    assert not problems
    return resolved.data


def data_of(place, name="criteo", seed=0, fitted=None, **given):
    resources = Resources(fitted=fitted)
    return make_data(section(place, name, **given), seed=seed, resources=resources)


def taken(dataset):
    """Returns numbers and categories of all rows of a split, as a model takes them."""
    found = dataset.take(np.arange(len(dataset)))["inputs"]
    return found


def in_order(data):
    """Returns the rows of 'all' as the file has them."""
    return np.argsort(data.train.indices)
