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

AXIS = "data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PmapDevices(Devices):
    """Devices under `pmap`: the state is repeated, batches are divided."""

    axis_name: ClassVar[str | None] = AXIS

    def place(self, tree: Any, *, own: bool = False) -> Any:
        """Returns a copy of the tree on every device."""
        del own  # Stacking copies.
        stacked = jax.tree.map(lambda x: np.stack([x] * self.count), tree)
        return jax.tree.map(self._split_rows, stacked)

    def place_batch(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns a host batch divided among the devices along `batch_axis`."""

        def divided(array):
            shape = array.shape
            rows = shape[batch_axis] // self.count
            array = array.reshape(
                *shape[:batch_axis], self.count, rows, *shape[batch_axis + 1 :]
            )
            return self._split_rows(np.moveaxis(array, batch_axis, 0))

        return jax.tree.map(divided, batch)

    def _split_rows(self, array: np.ndarray) -> jax.Array:
        """Returns row i on device i."""
        rows = Mesh(self.mesh.devices.reshape(-1), ("device",))
        return jax.device_put(array, NamedSharding(rows, PartitionSpec("device")))

    def to_host(self, tree: Any) -> Any:
        """Returns the first device's copy of a placed state as numpy arrays."""
        return jax.tree.map(lambda leaf: np.array(_first(leaf)), tree)

    def rows_to_host(self, tree: Any) -> Any:
        """Returns placed outputs as numpy arrays, the devices' rows one after another."""
        return jax.tree.map(np.concatenate, jax.device_get(tree))

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
        rows = Mesh(self.mesh.devices.reshape(-1), ("device",))
        sharding = NamedSharding(rows, PartitionSpec("device"))
        return jax.ShapeDtypeStruct((self.count, *shape), dtype, sharding=sharding)

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
