"""Keeps activations divided by example where parameters are divided, too.

Where 'fsdp' divides a batch and the parameters, the compiler may gather either. It gathers
the batch of some layers, so that every device has the activations of all examples. A
constraint on the output of every module leaves it the parameters only.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax.parallel.sharding import DATA, FSDP, MODEL


def divided_by_example(step: Callable, mesh: Mesh, *, batch: int, axis: int) -> Any:
    """Returns a step whose modules return activations that are divided by example.

    Args:
        step: Function of several arguments, which is traced.
        mesh: Mesh of the devices.
        batch: Index of the argument that is the batch.
        axis: Axis of the examples in the batch.
    """
    if mesh.shape[FSDP] * mesh.shape[MODEL] == 1:
        return step

    def constrained(*arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments[batch])
        sizes = {leaf.shape[axis] for leaf in leaves if leaf.ndim > axis}

        def output(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            made = call(*args, **kwargs)
            is_layer = context.method_name == "__call__"
            return jax.tree.map(divided, made) if is_layer else made

        def divided(leaf: Any) -> Any:
            if not leaf.ndim or leaf.shape[0] not in sizes:
                return leaf
            # Other axes may be divided over 'model'.
            rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
            sharding = NamedSharding(mesh, PartitionSpec((DATA, FSDP), *rest))
            return jax.lax.with_sharding_constraint(leaf, sharding)

        with nn.intercept_methods(output):
            return step(*arguments)

    return constrained
