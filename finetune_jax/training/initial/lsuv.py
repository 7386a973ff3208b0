"""Layer-sequential unit-variance initialisation: kernels scaled by outputs for examples.

Source: Mishkin & Matas 2016, "All you need is a good init".
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.config import Config, seeds
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.pytrees import like, named
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.batches import training_batches
from finetune_jax.data.dataset import Data
from finetune_jax.data.kind import kind_named
from finetune_jax.models.modes import EVALUATION
from finetune_jax.tasks.task import Task


def scale_layers(
    task: Task,
    state: TrainState,
    batch: dict,
    chosen: Mapping[str, tuple[float, float]],
) -> Any:
    """Returns the parameters with kernels scaled so that outputs have variance 1.

    Layers are scaled in the order in which they run. The variance is over all examples,
    positions and channels, in evaluation mode. A layer that runs more than once is measured
    at its first run.

    Args:
        task: Task with the models.
        state: State with orthonormal kernels.
        batch: Training examples.
        chosen: (tolerance, rounds) of each kernel to scale: at most `rounds` times, until
            the variance is 1 up to the tolerance.

    Raises:
        UserError: A layer never runs, or its output has no variance.

    Source: Mishkin & Matas 2016, algorithm 1.
    """
    order: list[str] = []

    @jax.jit
    def variances(params: Any, batch_stats: Any, batch: dict) -> list[jax.Array]:
        found: dict[str, jax.Array] = {}
        prepared = task.prepare(batch, jax.random.key(0), EVALUATION)
        variables = {"params": params, "batch_stats": batch_stats}
        for prefix in task.models.prefixes:
            with nn.intercept_methods(_recorder(prefix, chosen, found)):
                task.models.apply(variables, prepared["inputs"], prefix=prefix)
        order[:] = found
        return list(found.values())

    leaves = named(state.params)

    def measured() -> dict[str, float]:
        found = variances(like(state.params, leaves), state.batch_stats, batch)
        return dict(zip(order, map(float, found)))

    seen = measured()
    raise_if(
        sorted(set(chosen) - set(seen)),
        "config.init.schemes, 'lsuv': the model does not run these layers:",
    )
    for name in tuple(order):
        tolerance, rounds = chosen[name]
        for _ in range(int(rounds)):
            if abs(seen[name] - 1) < tolerance:
                break
            if not 0 < seen[name] < math.inf:
                raise UserError(
                    f"config.init.schemes, 'lsuv': the output of {name} has variance "
                    f"{seen[name]} over the first batch; no scale of its kernel makes "
                    "that 1"
                )
            scaled = leaves[name] / math.sqrt(seen[name])
            leaves[name] = scaled.astype(leaves[name].dtype)
            seen = measured()
    return like(state.params, leaves)


def _recorder(
    prefix: str, wanted: Mapping[str, Any], found: dict[str, jax.Array]
) -> Callable:
    """Returns an interceptor that records the variance of the wanted layers' outputs."""
    before = (prefix,) if prefix else ()

    def record(next_call, args, kwargs, context):
        output = next_call(*args, **kwargs)
        name = "/".join((*before, *context.module.path, "kernel"))
        if context.method_name == "__call__" and name in wanted and name not in found:
            kind = jnp.promote_types(output.dtype, jnp.float32)
            found[name] = jnp.var(output.astype(kind))
        return output

    return record


def first_examples(data: Data, config: Config) -> dict[str, np.ndarray]:
    """Returns the batch of the first update, not augmented.

    Raises:
        UserError: Lists the examples that cannot be read.
    """
    geometry = kind_named(data.spec.kind).geometry(data.spec, training=False)
    train = dataclasses.replace(
        data.train, geometry=geometry, shape=data.spec.shape, decoded=None
    )
    batches = training_batches(
        train,
        seed=seeds(config)["order"],
        batch_size=config.data.batch_size,
        micro_batches=1,
        updates=range(1),
        sampling=config.data.sampling,
    )
    return {name: array[0] for name, array in next(iter(batches)).items()}
