"""Devices of one mesh under `jit`: the compiler divides the work by shardings."""

import dataclasses
import math
from collections.abc import Callable, MutableMapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from finetune_jax.core.pytrees import leaf_digest
from finetune_jax.parallel.compiling import Compiled, compiled
from finetune_jax.parallel.devices import Devices

# Smaller arrays are cheaper to repeat than to gather; chosen by us.
FSDP_MIN_VALUES = 2**12


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshDevices(Devices):
    """Devices under `jit`: batches are divided over 'data', large leaves over 'fsdp'.

    Attributes:
        shared: Placed arrays by the digest of their values: equal arrays are placed once,
            and must not be donated. None places copies.
    """

    shared: MutableMapping[str, jax.Array] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def _sharding(self, leaf: Any) -> NamedSharding:
        """Returns the sharding of a leaf: its longest divisible axis is divided."""
        parts = self.mesh.shape["fsdp"]
        shape = np.shape(leaf)
        axes: list[str | None] = [None] * len(shape)
        if parts > 1 and math.prod(shape) >= FSDP_MIN_VALUES:
            divisible = [axis for axis, n in enumerate(shape) if n % parts == 0]
            if divisible:
                axes[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def place(self, tree: Any, *, own: bool = False) -> Any:
        """Returns the tree on the devices; see `Devices.place`."""
        if self.shared is not None:
            return jax.tree.map(self._placed_once, tree)
        shardings = jax.tree.map(self._sharding, tree)
        if own and jax.default_backend() == "cpu":
            # `may_alias=False` is ignored for numpy arrays, so they are copied twice.
            tree = jax.device_put(tree)
            return jax.device_put(tree, shardings, may_alias=False)
        return jax.device_put(tree, shardings)

    def _placed_once(self, leaf: Any) -> jax.Array:
        assert self.shared is not None
        key = leaf_digest(leaf)
        found = self.shared.get(key)
        if found is None:
            found = self.shared[key] = jax.device_put(leaf, self._sharding(leaf))
        return found

    def place_batch(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns a host batch divided over both axes of the mesh."""
        spec = PartitionSpec(*[None] * batch_axis, ("data", "fsdp"))
        return jax.device_put(batch, NamedSharding(self.mesh, spec))

    def to_host(self, tree: Any) -> Any:
        """Returns a placed state as numpy arrays."""
        return jax.tree.map(lambda leaf: np.array(leaf), tree)

    def rows_to_host(self, tree: Any) -> Any:
        """Returns placed outputs as numpy arrays."""
        return jax.device_get(tree)

    def compile_train(self, step: Callable, state: Any, *rest: Any) -> Compiled:
        """Returns the compiled step; the new state has the shardings of the old one."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        shardings = jax.tree.map(self._sharding, state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        return compiled(jitted, state, *rest)

    def over_devices(self, step: Callable) -> Any:
        """Returns the jitted step."""
        return jax.jit(step)
