"""What frozen stages and teachers make of a batch, in an update or to be kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.core.pytrees import nbytes
from finetune_jax.core.train_state import TrainState
from finetune_jax.tasks.task import TAUGHT, Mode, Task, with_taught

# Bytes of a large example; photos of 224 pixels have 150,000. Chosen by us.
LARGE = 100_000


def with_frozen(
    task: Task, state: TrainState, fixed: Any, first: str | None, batch: dict
) -> dict:
    """Returns a prepared batch with what teachers say and what stage `first` gets.

    Args:
        task: Has the models.
        state: Has the parameters of the stages before.
        fixed: What the task reads and nobody updates.
        first: From `Task.first_learning`.
        batch: Arrays [b, ...].
    """
    batch = with_taught(task, fixed, batch)
    if first is None:
        return batch
    return task.with_features(state.params, state.batch_stats, batch, first=first)


def is_large(task: Task) -> bool:
    """Returns whether few examples take much memory, and keep a processor busy."""
    return nbytes(task.batch_spec) >= LARGE


def at_a_time(task: Task, examples: int, rows: int) -> int | None:
    """Returns how many examples of a batch frozen stages get at a time; None: all.

    Args:
        task: Says how large an example is.
        examples: Of the batch.
        rows: Of a part, if it divides them; else it is the largest that does.
    """
    if rows == 1 or not is_large(task):
        return None
    fitting = max(n for n in range(1, rows + 1) if examples % n == 0)
    return fitting if fitting >= rows / 3 else None


def part_by_part(make: Callable[[dict], Any], batch: dict, rows: int | None) -> Any:
    """Returns what `make` does of a batch, in the memory that a part of it takes.

    Args:
        make: Makes a row of an example.
        batch: Prepared.
        rows: Examples in a part, by which a larger batch is divided; None: it is whole.
    """
    count = len(batch["label"])
    if rows is None or count <= rows:
        return make(batch)
    # Parts of a batch may be of size 0, of which -1 says nothing.
    number = count // rows
    parts = jax.tree.map(lambda x: x.reshape(number, rows, *x.shape[1:]), batch)
    made = jax.lax.map(make, parts)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), made)


def as_kept(
    make: Callable[[dict], dict],
    batch: dict,
    state: TrainState,
    rows: int,
) -> dict:
    """Returns what `make` does of a batch, to the bits of what is kept.

    Args:
        make: From `with_frozen`, of all examples or part by part.
        batch: Prepared.
        state: Of the update.
        rows: It is made of a multiple of so many examples, with zeros after the batch.
    """
    count = len(batch["label"])
    more = -count % rows
    filled = jax.tree.map(
        lambda x: jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]), batch
    )
    shapes = jax.eval_shape(make, filled)
    # A branch that is always taken: XLA fuses nothing across it, not even what a barrier
    # parts, so that what follows is computed as it is from kept features.
    made = jax.lax.cond(
        state.step >= 0,
        make,
        lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        filled,
    )
    return jax.tree.map(lambda leaf: leaf[:count], made)


def augmentation_key(rng: Any, number: Any) -> jax.Array:
    """Returns the key from which images are augmented.

    Args:
        rng: Of the state.
        number: Of the update.
    """
    for_images, _ = jax.random.wrap_key_data(rng)
    return jax.random.split(jax.random.fold_in(for_images, number))[0]


def taught_step(
    fixed: Any,
    rng: Any,
    batch: dict,
    *,
    task: Task,
    mode: Mode,
    rows: int | None = None,
) -> Any:
    """Returns what `Task.taught` says of a batch, a row an example.

    Args:
        fixed: What the task reads and nobody updates.
        rng: Of the state; used where the mode augments.
        batch: Arrays [b, ...]; 'position' tells the views of an example apart.
        task: Has the teachers.
        mode: EVALUATION augments nothing.
        rows: Examples that are in work at a time; None: all.
    """
    batch = task.prepare(batch, augmentation_key(rng, 0), mode)
    return part_by_part(
        lambda part: with_taught(task, fixed, part)[TAUGHT], batch, rows
    )


def features_step(
    params: Any,
    batch_stats: Any,
    rng: Any,
    batch: dict,
    *,
    task: Task,
    first: str,
    mode: Mode,
    rows: int | None = None,
) -> Any:
    """Returns what stage `first` gets of a batch, a row an example.

    Args:
        params: Of the stages before it, at least.
        batch_stats: Likewise.
        rng: Of the state; used where the mode augments.
        batch: Arrays [b, ...]; 'position' tells the views of an example apart.
        task: Has the model.
        first: A stage.
        mode: EVALUATION augments nothing.
        rows: Examples that are in work at a time; None: all.
    """

    def made(part: dict) -> Any:
        return task.with_features(params, batch_stats, part, first=first)["features"]

    batch = task.prepare(batch, augmentation_key(rng, 0), mode)
    return part_by_part(made, batch, rows)
