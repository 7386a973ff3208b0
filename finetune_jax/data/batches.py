"""Batches in an order that is a function of (seed, position) alone."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from finetune_jax.data.dataset import Dataset


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
    dataset: Dataset,
    *,
    seed: int,
    batch_size: int,
    micro_batches: int,
    start: int,
    stop: int,
    sampling: str = "uniform",
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
    """

    def load(positions: np.ndarray) -> dict[str, np.ndarray]:
        batch = dataset.take(positions)
        batch["position"] = np.arange(batch_size, dtype=np.int32)
        return {
            name: array.reshape(micro_batches, -1, *array.shape[1:])
            for name, array in batch.items()
        }

    order = training_order(dataset.label, seed, sampling)
    order = order.batch(batch_size)[start:stop]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    yield from order.map(load).to_iter_dataset(options)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns the rows and copies of the first, `size` in all."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])


def evaluation_batches(
    dataset: Dataset, *, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields all examples once, in order; the last batch is padded with weight 0.

    Args:
        dataset: A split.
        batch_size: Of every batch, the last too.
    """
    for start in range(0, len(dataset), batch_size):
        positions = np.arange(start, start + batch_size)
        real = positions < len(dataset)
        batch = {
            name: _padded(rows, batch_size)
            for name, rows in dataset.take(positions[real]).items()
        }
        batch["weight"] *= real
        batch["position"] = np.arange(batch_size, dtype=np.int32)
        yield batch
