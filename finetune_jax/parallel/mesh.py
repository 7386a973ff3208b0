"""Devices of one mesh under `jit`: the compiler divides the work by shardings."""

import dataclasses
import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from finetune_jax.core.pytrees import leaf_digest, name_of, whole
from finetune_jax.parallel.activations import divided_by_example
from finetune_jax.parallel.compiling import Compiled, compiled
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.sharding import DATA, FSDP, MODEL, Sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshDevices(Devices):
    """Devices under `jit`: batches are divided over 'data' and 'fsdp', states by rules.

    Attributes:
        rules: Sharding rules of states.
        shared: Placed arrays by the digest of their values: equal arrays are placed once,
            and must not be donated. None places copies.
    """

    rules: Sharding = Sharding()
    shared: MutableMapping[str, jax.Array] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def shardings(self, tree: Any) -> Any:
        """Returns the sharding of each leaf of a state, or of a subtree of one."""
        return jax.tree_util.tree_map_with_path(self._sharding, tree)

    def _sharding(self, path: tuple, leaf: Any) -> NamedSharding:
        axes = self.rules.axes(name_of(path), leaf, self.mesh.shape)
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def place(self, tree: Any, *, own: bool = False) -> Any:
        """Returns the tree on the devices; see `Devices.place`."""
        if self.shared is not None:
            return jax.tree_util.tree_map_with_path(self._placed_once, tree)
        shardings = self.shardings(tree)
        if self.spans_processes:
            placed = jax.tree.map(_over_processes, tree, shardings)
            return jax.tree.map(jnp.copy, placed) if own else placed
        if own and jax.default_backend() == "cpu":
            # `may_alias=False` is ignored for numpy arrays, so they are copied twice.
            tree = jax.device_put(tree)
            return jax.device_put(tree, shardings, may_alias=False)
        return jax.device_put(tree, shardings)

    def _placed_once(self, path: tuple, leaf: Any) -> jax.Array:
        assert self.shared is not None
        key = leaf_digest(leaf)
        found = self.shared.get(key)
        if found is None:
            placed = jax.device_put(leaf, self._sharding(path, leaf))
            found = self.shared[key] = placed
        return found

    def place_batch(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns a host batch divided over the first two axes of the mesh."""
        spec = PartitionSpec(*[None] * batch_axis, (DATA, FSDP))
        sharding = NamedSharding(self.mesh, spec)
        if self.spans_processes:
            return jax.make_array_from_process_local_data(sharding, batch)
        return jax.device_put(batch, sharding)

    def local_rows(self, count: int) -> np.ndarray:
        """Returns the rows of a batch axis that this process's devices need."""
        sharding = NamedSharding(self.mesh, PartitionSpec((DATA, FSDP)))
        return rows_of_process(sharding, count)

    def to_host(self, tree: Any) -> Any:
        """Returns a placed state as numpy arrays."""
        return jax.tree.map(lambda leaf: np.array(whole(leaf)), tree)

    def at_rest(self, tree: Any) -> Any:
        """Returns a placed state as it lies between phases; see `Devices.at_rest`."""
        return tree if self.spans_processes else self.to_host(tree)

    @property
    def divides_state(self) -> bool:
        """Whether no process has all of a state."""
        return self.spans_processes and self.mesh.size > self.mesh.shape[DATA]

    def unused(self, params: Any) -> dict[str, int]:
        """Returns the sizes of the axes 'fsdp' and 'model' that divide no parameter."""
        specs = [sharding.spec for sharding in jax.tree.leaves(self.shardings(params))]
        used = {axis for spec in specs for axis in spec}
        sizes = {axis: self.mesh.shape[axis] for axis in (FSDP, MODEL)}
        return {axis: n for axis, n in sizes.items() if n > 1 and axis not in used}

    def jit_at_rest(self, function: Callable, *, options: Any = None) -> Callable:
        """Returns a jitted function whose results are at rest.

        With several processes each computes its part alone.
        """
        if not self.spans_processes:
            return Devices.jit_at_rest(self, function, options=options)

        @functools.cache
        def jitted(structure: Any) -> Any:
            shapes = jax.eval_shape(function, *jax.tree.unflatten(*structure))
            shardings = self.shardings(shapes)
            return jax.jit(function, out_shardings=shardings, compiler_options=options)

        def call(*given: Any) -> Any:
            leaves, structure = jax.tree.flatten(self.place(given))
            shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
            return jitted((structure, shapes))(*jax.tree.unflatten(structure, leaves))

        return call

    def rows_to_host(self, tree: Any) -> Any:
        """Returns placed outputs as numpy arrays."""
        return jax.device_get(tree)

    def placed_shapes(self, tree: Any) -> Any:
        """Returns the shapes and shardings of a placed tree."""
        return jax.tree.map(_shaped, tree, self.shardings(tree))

    def batch_shapes(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns the shapes and shardings of a placed batch."""
        spec = PartitionSpec(*[None] * batch_axis, (DATA, FSDP))
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: _shaped(leaf, sharding), batch)

    def compile_train(
        self, step: Callable, state: Any, *rest: Any, for_running: bool = True
    ) -> Compiled:
        """Returns the compiled step; the new state has the shardings of the old one."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        shardings = self.shardings(state), everywhere
        step = divided_by_example(step, self.mesh, batch=2, axis=1)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        return compiled(
            jitted, state, *rest, for_running=for_running, costs=for_running
        )

    def over_devices(self, step: Callable) -> Any:
        """Returns the jitted step, whose outputs every process of several gets whole."""
        step = divided_by_example(step, self.mesh, batch=-1, axis=0)
        if self.count == 1:
            return jax.jit(step)
        return jax.jit(step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))


def rows_of_process(sharding: NamedSharding, count: int) -> np.ndarray:
    """Returns the rows of an axis of `count` that the devices of this process have."""
    rows, shape = np.zeros(count, bool), (count,)
    for index in sharding.addressable_devices_indices_map(shape).values():
        rows[index] = True
    return np.flatnonzero(rows)


def _over_processes(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Returns an array over processes.

    `device_put` would gather all values to compare them.

    Args:
        leaf: Array of which this process has all values, or an array over processes.
        sharding: Sharding of the result.
    """
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _shaped(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)
