"""Batches of examples, for training in the order that a seed decides."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np

from finetune_jax.data.dataset import Dataset
from finetune_jax.data.kind import Lengths
from finetune_jax.data.order import Order, training_order

# The positions that this process needs of a batch axis: a function of the length of the
# axis, as `Devices.local_rows`. None needs all.
LocalRows = Callable[[int], np.ndarray] | None


class BatchSource(Protocol):
    """A split that batches are taken from: a `Dataset` or a view of one."""

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
    """A split that repeats each example several times, one after another.

    Attributes:
        dataset: The split.
        views: Number of times.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortened:
    """A split whose batches are no longer than their longest example needs.

    Attributes:
        dataset: The split.
        lengths: How a batch is cut.
        order: Order of the examples; None is that of the split.
    """

    dataset: Dataset
    lengths: Lengths
    order: np.ndarray | None = None

    @property
    def label(self) -> np.ndarray:
        """Class index of each example, or its targets."""
        return self.dataset.label

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.dataset)

    def take(self, positions: np.ndarray) -> dict[str, Any]:
        """Returns the examples of the rows."""
        rows = positions if self.order is None else self.order[positions]
        return self.lengths.shortened(self.dataset.take(rows))

    def unsorted(self, rows: np.ndarray) -> np.ndarray:
        """Returns results, a row for each example, in the order of the split."""
        return rows if self.order is None else rows[np.argsort(self.order)]


def shortened(split: Any, *, by_length: bool = False) -> Any:
    """Returns the view of a split whose batches have no needless padding.

    Examples that all have the same shape are their own view.

    Args:
        split: A `Dataset`, or the mixture of several.
        by_length: Whether the shortest examples come first, for evaluation.
    """
    if not isinstance(split, Dataset) or split.lengths is None:
        return split
    order = None
    if by_length:
        lengths = split.lengths.of(split.take(np.arange(len(split))))
        order = np.argsort(lengths, kind="stable")
    return Shortened(dataset=split, lengths=split.lengths, order=order)


def training_batches(
    dataset: BatchSource,
    *,
    seed: int,
    batch_size: int,
    micro_batches: int,
    updates: range,
    sampling: str = "uniform",
    views: int | None = None,
    local_rows: LocalRows = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of updates, arrays [k, b, ...].

    With several processes b is the number of rows that the devices of this one need.

    Args:
        dataset: The training split.
        seed: Seed of the order.
        batch_size: Examples in one update.
        micro_batches: k, by which the batch is divided.
        updates: The updates, counted from the beginning of the run.
        sampling: 'uniform' or 'balanced'.
        views: How many ways there are to augment an example, which take turns; 'position'
            then is the example's view instead of its place in the update.
        local_rows: Rows of a micro-batch that this process needs.
    """
    order = training_order(dataset.label, seed, sampling)
    mine = local_part(batch_size, micro_batches, local_rows)

    def load(update: int) -> dict[str, Any]:
        taken = rows_of(
            order, len(dataset.label), batch_size, update, update + 1, views
        )
        batch = taken_locally(dataset, taken, mine)
        batch["position"] = places_of(taken, batch_size, views)[mine]
        return batch

    return loaded(load, updates, micro_batches)


def local_part(
    examples: int, micro_batches: int, local_rows: LocalRows
) -> np.ndarray | slice:
    """Returns the places in an update of the examples that this process needs.

    Args:
        examples: Examples in the update.
        micro_batches: Number of micro-batches, each of which is divided.
        local_rows: Rows of a micro-batch that this process needs.
    """
    if local_rows is None:
        return slice(None)
    places = np.arange(examples).reshape(micro_batches, -1)
    return places[:, local_rows(places.shape[1])].reshape(-1)


def taken_locally(
    source: BatchSource, rows: np.ndarray, mine: np.ndarray | slice
) -> dict[str, Any]:
    """Returns arrays of the rows of a batch that this process needs.

    Args:
        source: The split.
        rows: Rows of the whole batch.
        mine: Places among them that this process needs.
    """
    if isinstance(getattr(source, "examples", source), Shortened):
        # The longest text of the whole batch decides its length; texts are in memory.
        return jax.tree.map(lambda array: array[mine], source.take(rows))
    wanted, back = np.unique(rows[mine], return_inverse=True)
    if len(wanted) == len(back):
        return source.take(rows[mine])
    # Padding repeats a row, which is read once.
    return jax.tree.map(lambda array: array[back], source.take(wanted))


def loaded(
    load: Callable[[int], dict[str, Any]], updates: range, micro_batches: int
) -> Iterator[dict[str, Any]]:
    """Yields the batches of updates, arrays [k, b, ...].

    Args:
        load: Returns the batch of an update, arrays [k * b, ...]; called by threads.
        updates: The updates, counted from the beginning of the run.
        micro_batches: k, by which each batch is divided.
    """
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = grain.MapDataset.range(updates.start, updates.stop).map(load)
    for batch in batches.to_iter_dataset(options):
        yield jax.tree.map(
            lambda array: array.reshape(
                micro_batches, len(array) // micro_batches, *array.shape[1:]
            ),
            batch,
        )


def rows_of(
    order: Order, epoch: int, batch_size: int, start: int, stop: int, views: int | None
) -> np.ndarray:
    """Returns the rows of the split that updates `start` to `stop` take, int64 [N].

    Args:
        order: Order of the examples.
        epoch: Number of examples.
        batch_size: Examples in one update.
        start: First update, counted from the beginning of the run.
        stop: The update after the last.
        views: Rows of an example, one for each epoch in turn; None is one row.
    """
    places = np.arange(start * batch_size, stop * batch_size)
    rows = order(start * batch_size, stop * batch_size)
    return rows if views is None else rows * views + places // epoch % views


def places_of(rows: np.ndarray, batch_size: int, views: int | None) -> np.ndarray:
    """Returns the 'position' of rows that updates take: place in the update, or view."""
    places = np.arange(len(rows)) % batch_size if views is None else rows
    return places.astype(np.int32)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Returns the rows and copies of the first, `size` in all."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])


def evaluation_batches(
    dataset: BatchSource, *, batch_size: int, local_rows: LocalRows = None
) -> Iterator[dict[str, Any]]:
    """Yields all rows once, in order; the last batch is padded with weight 0.

    Args:
        dataset: A split.
        batch_size: Size of every batch, the last too.
        local_rows: Rows of a batch that this process needs.
    """
    mine = local_part(batch_size, 1, local_rows)
    for start in range(0, len(dataset), batch_size):
        places = np.arange(start, start + batch_size)
        real = places < len(dataset)
        # The padding repeats the first row of the batch.
        rows = np.where(real, places, start)
        if local_rows is None:
            batch: dict[str, Any] = jax.tree.map(
                lambda array: _padded(array, batch_size), dataset.take(rows[real])
            )
        else:
            batch = taken_locally(dataset, rows, mine)
        batch["weight"] *= real[mine]
        batch["position"] = places.astype(np.int32)[mine]
        yield batch
