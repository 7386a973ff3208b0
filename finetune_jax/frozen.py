"""What frozen stages and teachers make of a batch, in an update or to be kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.state import TrainState
from finetune_jax.tasks.task import TAUGHT, Mode, Task, with_taught


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


def as_kept(
    make: Callable[[dict], dict], batch: dict, state: TrainState, rows: int
) -> dict:
    """Returns what `make` does of a batch, to the bits of what is kept.

    Args:
        make: From `with_frozen`.
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


def taught_step(fixed: Any, rng: Any, batch: dict, *, task: Task, mode: Mode) -> Any:
    """Returns what `Task.taught` says of a batch, a row an example.

    Args:
        fixed: What the task reads and nobody updates.
        rng: Of the state; used where the mode augments.
        batch: Arrays [b, ...]; 'position' tells the views of an example apart.
        task: Has the teachers.
        mode: EVALUATION augments nothing.
    """
    batch = task.prepare(batch, augmentation_key(rng, 0), mode)
    return with_taught(task, fixed, batch)[TAUGHT]


def features_step(
    params: Any,
    batch_stats: Any,
    rng: Any,
    batch: dict,
    *,
    task: Task,
    first: str,
    mode: Mode,
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
    """
    batch = task.prepare(batch, augmentation_key(rng, 0), mode)
    return task.with_features(params, batch_stats, batch, first=first)["features"]
