"""Arrays that processes exchange: a flag of each in every call, and whole states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax.core.pytrees import whole
from finetune_jax.parallel import processes


class AnyProcess:
    """Tells whether any process has said yes, one call later, so that nobody waits.

    It is a sum over all devices by a program of its own: the programs of the run stay as
    they are in one process.
    """

    def __init__(self) -> None:
        """Compiles nothing yet."""
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("all",))
        self._rows = NamedSharding(mesh, PartitionSpec("all"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._sum = jax.jit(jnp.sum, out_shardings=everywhere)
        self._shape = devices.shape
        self._before: jax.Array | None = None

    def __call__(self, flag: bool) -> bool:
        """Returns whether any process has given True in the call before this one."""
        own = np.full(self._shape, flag, np.int32)
        flags = jax.make_array_from_callback(
            self._shape, self._rows, lambda index: own[index]
        )
        before, self._before = self._before, self._sum(flags)
        return before is not None and bool(before.addressable_data(0))


def on_first_process(tree: Any) -> Any:
    """Returns a tree on the host of process 0; the others get one without leaves.

    Leaves are gathered one at a time. All processes call it.
    """

    def gathered(leaf: Any) -> np.ndarray | None:
        found = whole(leaf)
        return np.array(found) if processes.is_first() else None

    return jax.tree.map(gathered, tree)
