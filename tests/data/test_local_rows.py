"""Each of several processes reads the rows that its devices need, and no others."""

import collections
import dataclasses

import numpy as np
import pictures
import pytest

from finetune_jax import config as configs
from finetune_jax.data.batches import evaluation_batches, training_batches
from finetune_jax.data.dataset import make_data

SIZE, MICRO = 8, 2


class Counted:
    """The examples of a split, which count how often each is read."""

    def __init__(self, examples):
        self._examples, self.reads = examples, collections.Counter()

    def __getattr__(self, name):
        return getattr(self._examples, name)

    def __len__(self):
        return len(self._examples)

    def read(self, index, geometry=None):
        self.reads[index] += 1
        return self._examples.read(index, geometry)


def counted(root):
    config = configs.default().data
    config.update(name="folder", dir=str(root), image_size=16)
    dataset = make_data(config, seed=0).train
    ((name, part),) = dataset.source.splits.items()
    part = Counted(part)
    source = dataclasses.replace(dataset.source, splits={name: part})
    return dataclasses.replace(dataset, source=source), part


def half(second):
    """Returns the rows that the first or the second of two processes needs."""
    return lambda count: np.arange(count).reshape(2, -1)[int(second)]


def training(dataset, updates, local_rows=None):
    return list(
        training_batches(
            dataset, seed=3, batch_size=SIZE, micro_batches=MICRO, updates=updates,
            local_rows=local_rows,
        )
    )  # fmt: skip


@pytest.fixture
def root(tmp_path):
    return pictures.make_folder(tmp_path, examples=10)


@pytest.mark.parametrize("second", [False, True])
def test_training_reads_its_own_rows_alone(root, second):
    wanted = training(counted(root)[0], range(3))
    dataset, part = counted(root)
    found = training(dataset, range(3), half(second))
    assert sum(part.reads.values()) == 3 * SIZE // 2
    for ours, theirs in zip(found, wanted, strict=True):
        for name, array in theirs.items():
            parts = np.split(array, 2, axis=1)
            np.testing.assert_array_equal(ours[name], parts[second])


@pytest.mark.parametrize("second", [False, True])
def test_evaluation_reads_its_own_rows_alone(root, second):
    whole = list(evaluation_batches(counted(root)[0], batch_size=SIZE))
    dataset, part = counted(root)
    found = list(evaluation_batches(dataset, batch_size=SIZE, local_rows=half(second)))
    for ours, theirs in zip(found, whole, strict=True):
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], np.split(array, 2)[second])
    # The last batch is padded with copies of its first row, which its owner needs, too.
    places = np.arange(-(-len(dataset) // SIZE) * SIZE)
    mine = places.reshape(-1, 2, SIZE // 2)[:, int(second)].reshape(-1)
    first = len(dataset) // SIZE * SIZE
    rows = np.unique(np.where(mine < len(dataset), mine, first))
    assert part.reads == collections.Counter(dataset.indices[rows].tolist())


def test_examples_in_memory_are_read_once(root):
    dataset, part = counted(root)
    lazy = dataset.in_memory(lazily=True)
    assert not part.reads
    first, again = (
        training(lazy, range(3), half(False)),
        training(lazy, range(3), half(False)),
    )
    assert set(part.reads.values()) == {1}
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])
    whole = training(dataset.in_memory(), range(3), half(False))
    np.testing.assert_array_equal(first[0]["inputs"], whole[0]["inputs"])
