"""Devices under `pmap`: every leaf of the state has a leading axis for the devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax.parallel.compiling import Compiled, compiled
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.mesh import rows_of_process, whole

AXIS = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmapDevices(Devices):
    """Devices under `pmap`: the state is repeated, batches are divided."""

    axis_name: ClassVar[str | None] = AXIS

    def place(self, tree: Any, *, own: bool = False) -> Any:
        """Returns a copy of the tree on every device."""
        del own  # Stacking copies.
        here = len(self.mesh.local_devices)
        stacked = jax.tree.map(lambda x: np.stack([x] * here), tree)
        return jax.tree.map(self._split_rows, stacked)

    def place_batch(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns a host batch divided among the devices along `batch_axis`."""

        def divided(array):
            shape = array.shape
            here = len(self.mesh.local_devices)
            rows = shape[batch_axis] // here
            array = array.reshape(
                *shape[:batch_axis], here, rows, *shape[batch_axis + 1 :]
            )
            return self._split_rows(np.moveaxis(array, batch_axis, 0))

        return jax.tree.map(divided, batch)

    def _split_rows(self, array: np.ndarray) -> jax.Array:
        """Returns row i on device i of this process."""
        if self.spans_processes:
            return jax.make_array_from_process_local_data(self._rows_sharding, array)
        return jax.device_put(array, self._rows_sharding)

    @functools.cached_property
    def _rows_sharding(self) -> NamedSharding:
        """A row for each device."""
        mesh = Mesh(self.mesh.devices.reshape(-1), ("device",))
        return NamedSharding(mesh, PartitionSpec("device"))

    def local_rows(self, count: int) -> np.ndarray:
        """Returns the rows of a batch axis that this process's devices need."""
        return rows_of_process(self._rows_sharding, count)

    def to_host(self, tree: Any) -> Any:
        """Returns the first device's copy of a placed state as numpy arrays."""
        return jax.tree.map(lambda leaf: np.array(_first(leaf)), tree)

    def at_rest(self, tree: Any) -> Any:
        """Returns a placed state on the host; see `Devices.at_rest`."""
        return self.to_host(tree)

    def rows_to_host(self, tree: Any) -> Any:
        """Returns placed outputs as numpy arrays, the devices' rows one after another."""
        if self.spans_processes:
            tree = jax.tree.map(self._on_rows, tree)
        return jax.tree.map(lambda leaf: np.concatenate(np.asarray(whole(leaf))), tree)

    def _on_rows(self, leaf: jax.Array) -> jax.Array:
        """Returns an output of pmap with the sharding that has a mesh."""
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(
            leaf.shape, self._rows_sharding, shards
        )

    def placed_shapes(self, tree: Any) -> Any:
        """Returns the shapes and shardings of a placed tree."""
        return jax.tree.map(lambda leaf: self._rows(leaf.shape, leaf.dtype), tree)

    def batch_shapes(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns the shapes and shardings of a placed batch."""

        def divided(leaf):
            shape = list(leaf.shape)
            shape[batch_axis] //= self.count
            return self._rows(shape, leaf.dtype)

        return jax.tree.map(divided, batch)

    def _rows(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns the shape of an array whose first axis is the devices."""
        whole_shape = self.count, *shape
        return jax.ShapeDtypeStruct(whole_shape, dtype, sharding=self._rows_sharding)

    def compile_train(
        self, step: Callable, state: Any, *rest: Any, for_running: bool = True
    ) -> Compiled:
        """Returns the compiled step; its metrics are the first device's copy."""
        over = functools.partial(jax.pmap, axis_name=AXIS, donate_argnums=0)
        mapped = over(step, in_axes=(0, 0, 0, None, None), devices=self._devices)
        program = compiled(mapped, state, *rest, for_running=for_running)

        def call(state, *rest):
            state, metrics = program.call(state, *rest)
            return state, jax.tree.map(_first, metrics)

        return dataclasses.replace(program, call=call)

    def over_devices(self, step: Callable) -> Any:
        """Returns the pmapped step."""
        return jax.pmap(step, axis_name=AXIS, devices=self._devices)

    @property
    def _devices(self) -> list[Any]:
        return list(self.mesh.devices.reshape(-1))


def _first(leaf: jax.Array) -> Any:
    return leaf.addressable_shards[0].data[0]
