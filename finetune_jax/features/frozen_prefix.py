"""Outputs of frozen stages and teachers for a batch, in the step or for the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.core.pytrees import nbytes
from finetune_jax.core.train_state import TrainState
from finetune_jax.models.modes import Mode
from finetune_jax.tasks.task import TEACHER_OUTPUTS, Task

# Bytes of a large example; photos of 224 pixels have 150,000. Chosen by us.
LARGE = 100_000


def with_teacher_outputs(task: Task, fixed: Any, batch: dict) -> dict:
    """Returns a prepared batch with the outputs of the teachers, if there are any."""
    if task.teachers is None or TEACHER_OUTPUTS in batch:
        return batch
    # The barriers keep XLA from fusing across them: the bits are those of the cache.
    inputs = jax.lax.optimization_barrier(batch["inputs"])
    outputs = task.teachers.outputs(fixed, inputs)
    return {**batch, TEACHER_OUTPUTS: jax.lax.optimization_barrier(outputs)}


def with_frozen_outputs(
    task: Task, state: TrainState, fixed: Any, first: str | None, batch: dict
) -> dict:
    """Returns a prepared batch with teacher outputs and the input of stage `first`.

    Args:
        task: Has the models.
        state: Has the parameters of the stages before `first`.
        fixed: Variables of the teachers.
        first: From `ModelSet.frozen_prefix_end`.
        batch: Arrays [b, ...].
    """
    batch = with_teacher_outputs(task, fixed, batch)
    if first is None:
        return batch
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return task.models.with_features(variables, batch, first=first)


def is_large(task: Task) -> bool:
    """Returns whether a few examples fill the memory and keep the processor busy."""
    return nbytes(task.batch_spec) >= LARGE


def at_a_time(task: Task, examples: int, rows: int) -> int | None:
    """Returns the chunk size of frozen stages for a batch; None: the whole batch.

    Args:
        task: Says how large an example is.
        examples: Size of the batch.
        rows: Wanted chunk size. If it does not divide the batch, the largest smaller
            divisor is taken.
    """
    if rows == 1 or not is_large(task):
        return None
    fitting = max(n for n in range(1, rows + 1) if examples % n == 0)
    return fitting if fitting >= rows / 3 else None


def in_chunks(make: Callable[[dict], Any], batch: dict, rows: int | None) -> Any:
    """Returns `make(batch)`, computed chunk by chunk to save memory.

    Args:
        make: Returns one row per example.
        batch: Prepared.
        rows: Chunk size, a divisor of the batch; None: the whole batch.
    """
    count = len(batch["label"])
    if rows is None or count <= rows:
        return make(batch)
    # A leaf may have size 0, for which reshape cannot infer a -1.
    number = count // rows
    chunks = jax.tree.map(lambda x: x.reshape(number, rows, *x.shape[1:]), batch)
    made = jax.lax.map(make, chunks)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), made)


def as_cached(
    make: Callable[[dict], dict],
    batch: dict,
    state: TrainState,
    rows: int,
) -> dict:
    """Returns `make(batch)` with the bits of the cached features.

    Args:
        make: `with_frozen_outputs`, for the whole batch or in chunks.
        batch: Prepared.
        state: State of the update.
        rows: The batch is padded with zeros to a multiple of this.
    """
    count = len(batch["label"])
    more = -count % rows
    padded = jax.tree.map(
        lambda x: jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]), batch
    )
    shapes = jax.eval_shape(make, padded)
    # A branch that is always taken. XLA fuses nothing across it, not even operations that
    # a barrier separates, so the rest is computed as it is from cached features.
    made = jax.lax.cond(
        state.step >= 0,
        make,
        lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        padded,
    )
    return jax.tree.map(lambda leaf: leaf[:count], made)


def augmentation_key(rng: Any, number: Any) -> jax.Array:
    """Returns the key for augmenting images.

    Args:
        rng: Keys of the state.
        number: Number of the update.
    """
    for_images, _ = jax.random.wrap_key_data(rng)
    return jax.random.split(jax.random.fold_in(for_images, number))[0]


def teacher_step(
    fixed: Any,
    rng: Any,
    batch: dict,
    *,
    task: Task,
    mode: Mode,
    rows: int | None = None,
) -> Any:
    """Returns the outputs of the teachers for a batch, one row per example.

    Args:
        fixed: Variables of the teachers.
        rng: Keys of the state, for augmentation.
        batch: Arrays [b, ...]; 'position' distinguishes the views of an example.
        task: Has the teachers.
        mode: EVALUATION augments nothing.
        rows: Chunk size; None: the whole batch.
    """
    batch = task.prepare(batch, augmentation_key(rng, 0), mode)
    return in_chunks(
        lambda chunk: with_teacher_outputs(task, fixed, chunk)[TEACHER_OUTPUTS],
        batch,
        rows,
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
    """Returns the input of stage `first` for a batch, one row per example.

    Args:
        params: Parameters of the stages before it, at least.
        batch_stats: Batch statistics of the stages before it, at least.
        rng: Keys of the state, for augmentation.
        batch: Arrays [b, ...]; 'position' distinguishes the views of an example.
        task: Has the model.
        first: The stage.
        mode: EVALUATION augments nothing.
        rows: Chunk size; None: the whole batch.
    """
    variables = {"params": params, "batch_stats": batch_stats}

    def features(chunk: dict) -> Any:
        return task.models.with_features(variables, chunk, first=first)["features"]

    batch = task.prepare(batch, augmentation_key(rng, 0), mode)
    return in_chunks(features, batch, rows)
