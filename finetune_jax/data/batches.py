"""Batches in an order that is a function of (seed, position) alone."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from finetune_jax.data.dataset import Dataset


class Examples(Protocol):
    """A split: a `Dataset`, or what stands for one."""

    @property
    def label(self) -> np.ndarray:
        """Class index of each example, or its targets."""
        ...

    def __len__(self) -> int:
        """Returns the number of rows; an example has one, or one for each of its views."""
        ...

    def take(self, positions: np.ndarray) -> dict[str, Any]:
        """Returns arrays of one row for each position, 'weight' among them."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """A split each of whose examples comes several times, one after another.

    Attributes:
        dataset: The split.
        views: How often.
    """

    dataset: Dataset
    views: int

    @property
    def label(self) -> np.ndarray:
        """Class index of each example, or its targets."""
        return self.dataset.label

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.dataset) * self.views

    def take(self, positions: np.ndarray) -> dict[str, Any]:
        """Returns the examples of the rows."""
        return self.dataset.take(positions // self.views)


def training_order(label: np.ndarray, seed: int, sampling: str = "uniform") -> Any:
    """Returns the endless order of training.

    Args:
        label: Class index of each training example.
        seed: Of the run.
        sampling: 'uniform': each epoch is a new shuffle of all examples. 'balanced': the
            classes take turns, and each goes through its own examples in such epochs.

    Returns:
        A `grain.MapDataset` of positions; update s of batch size B takes the stretch
        from s * B on, so nothing is dropped, repeated or padded at the end of an epoch.
    """
    if sampling == "uniform":
        return grain.MapDataset.range(len(label)).shuffle(seed=seed).repeat()
    members = [np.flatnonzero(label == value) for value in np.unique(label)]
    classes = [
        grain.MapDataset.source(positions.tolist()).seed(seed).shuffle().repeat()
        for positions in members
    ]
    return grain.MapDataset.mix(classes)


def training_positions(
    label: np.ndarray, *, seed: int, batch_size: int, update: int, sampling: str
) -> np.ndarray:
    """Returns which examples of the training split an update takes, int [batch_size].

    Args:
        label: Class index of each training example.
        seed: Of the order.
        batch_size: Examples in one update.
        update: Counted from the beginning of the run.
        sampling: 'uniform' or 'balanced'.
    """
    return np.asarray(training_order(label, seed, sampling).batch(batch_size)[update])


def training_batches(
    dataset: Examples,
    *,
    seed: int,
    batch_size: int,
    micro_batches: int,
    start: int,
    stop: int,
    sampling: str = "uniform",
    views: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of updates `start` to `stop`, arrays [k, b, ...].

    Args:
        dataset: The training split.
        seed: Of the order.
        batch_size: Examples in one update.
        micro_batches: k, by which the batch is divided.
        start: First update, counted from the beginning of the run.
        stop: The update after the last.
        sampling: 'uniform' or 'balanced'.
        views: How many ways there are to augment an example, which take turns; 'position'
            then is the example's view instead of its place in the update.
    """
    epoch = len(dataset.label)

    def load(taken: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        places, rows = taken
        if views is not None:
            rows = rows * views + places // epoch % views
        batch = dataset.take(rows)
        place = np.arange(batch_size) if views is None else rows
        batch["position"] = place.astype(np.int32)
        return jax.tree.map(
            lambda array: array.reshape(micro_batches, -1, *array.shape[1:]), batch
        )

    order = training_order(dataset.label, seed, sampling)
    numbered = order.map_with_index(lambda place, row: (place, row))
    numbered = numbered.batch(batch_size)[start:stop]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    yield from numbered.map(load).to_iter_dataset(options)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns the rows and copies of the first, `size` in all."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])


def evaluation_batches(
    dataset: Examples, *, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yields all rows once, in order; the last batch is padded with weight 0.

    Args:
        dataset: A split.
        batch_size: Of every batch, the last too.
    """
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, start + batch_size)
        real = rows < len(dataset)
        batch: dict[str, Any] = jax.tree.map(
            lambda array: _padded(array, batch_size), dataset.take(rows[real])
        )
        batch["weight"] *= real
        batch["position"] = rows.astype(np.int32)
        yield batch
