"""The contract of the devices of a run: where arrays lie, how a pure step is compiled."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from finetune_jax.core.backend import backend
from finetune_jax.core.machine import threads
from finetune_jax.parallel.compiling import Compiled
from finetune_jax.parallel.sharding import DATA, FSDP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices(abc.ABC):
    """The devices of a run.

    Attributes:
        mesh: Mesh of all devices, with axes 'data', 'fsdp' and 'model'.
        axis_name: Name of the axis to sum over by hand; None where the compiler does it.
    """

    mesh: Mesh
    axis_name: ClassVar[str | None] = None

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """Platform of the devices: 'cpu', 'gpu' or 'tpu'."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch_shards(self) -> int:
        """Number of parts that a batch is divided into; 'model' repeats each of them."""
        return self.mesh.shape[DATA] * self.mesh.shape[FSDP]

    @abc.abstractmethod
    def place(self, tree: Any, *, own: bool = False) -> Any:
        """Returns a state, or a subtree of one, on the devices.

        Args:
            tree: Tree of arrays on the host.
            own: Whether the copy must not share the memory of the host's arrays, which a
                CPU reads in place: only memory that a program owns can be donated.
        """

    @abc.abstractmethod
    def place_batch(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns a host batch divided among the devices along `batch_axis`.

        With several processes each gives the rows of `local_rows`.
        """

    @abc.abstractmethod
    def local_rows(self, count: int) -> np.ndarray:
        """Returns the rows of a batch axis of `count` that this process's devices need."""

    @functools.cached_property
    def spans_processes(self) -> bool:
        """Whether other processes have some of the devices."""
        return any(
            device.process_index != jax.process_index()
            for device in self.mesh.devices.flat
        )

    @abc.abstractmethod
    def to_host(self, tree: Any) -> Any:
        """Returns a placed state as numpy arrays, one copy of each."""

    @abc.abstractmethod
    def at_rest(self, tree: Any) -> Any:
        """Returns a placed state as it lies between phases, one copy of each array.

        It lies on the host; with several processes it stays on the devices, divided, since
        no process needs it whole. Its arrays must not be donated.
        """

    @property
    def divides_state(self) -> bool:
        """Whether no process has all of a state."""
        return False

    def unused(self, params: Any) -> dict[str, int]:
        """Returns the sizes of the axes 'fsdp' and 'model' that divide no parameter.

        Args:
            params: Parameters, or their shapes.
        """
        del params
        return {}

    def jit_at_rest(self, function: Callable, *, options: Any = None) -> Callable:
        """Returns a jitted function whose results are at rest; see `at_rest`.

        Args:
            function: Takes trees of arrays; returns a tree of the names of a state.
            options: Options of XLA.
        """
        jitted = jax.jit(function, compiler_options=options)
        return lambda *given: jax.tree.map(np.asarray, jitted(*given))

    def rows_of(self, lowered: Any) -> Any:
        """Returns shape and dtype of a row of each output of a lowered program."""
        leading = 1 if self.axis_name is None else 2  # Under pmap one is the devices.
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[leading:], leaf.dtype),
            lowered.out_info,
        )

    @abc.abstractmethod
    def rows_to_host(self, tree: Any) -> Any:
        """Returns placed outputs as numpy arrays, a row an example."""

    @abc.abstractmethod
    def placed_shapes(self, tree: Any) -> Any:
        """Returns the shapes and shardings that `place` gives a tree, or one of shapes."""

    @abc.abstractmethod
    def batch_shapes(self, batch: Any, *, batch_axis: int) -> Any:
        """Returns the shapes and shardings that `place_batch` gives a batch."""

    @abc.abstractmethod
    def compile_train(
        self, step: Callable, state: Any, *rest: Any, for_running: bool = True
    ) -> Compiled:
        """Returns the compiled `step(state, fixed, batch, learning_rate, progress)`.

        Args:
            step: `train_step` with its static arguments given.
            state: Placed state, for its shapes; the program's first argument is donated.
            *rest: The other arguments, placed.
            for_running: Whether the program will be run. If not, arguments may be shapes.
        """

    @abc.abstractmethod
    def over_devices(self, step: Callable) -> Any:
        """Returns the jitted or pmapped `step(*arguments, batch)`."""


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of placed arrays, or of their shapes, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def rounded_up(devices: Devices, examples: int) -> int:
    """Returns the least multiple of the shards of a batch that holds the examples."""
    return -(-examples // devices.batch_shards) * devices.batch_shards


def stable_batch(devices: Devices) -> int:
    """Returns the batch size whose multiples give a row the same bits at any position.

    XLA's matrix kernels on CPU (oneDNN) take 24 pixels at once, and compute the remainder
    in another order.
    """
    return 24 if devices.count == 1 and backend() == "cpu" else 1


def concurrent_programs(devices: Devices) -> int:
    """Returns the number of independent programs that run concurrently.

    One program leaves a seventh of two cores idle; two of them fill these.
    """
    return 2 if devices.count == 1 and backend() == "cpu" and threads() > 1 else 1


def concurrent_batch(devices: Devices, examples: int) -> int:
    """Returns the batch size of one program if all concurrent ones hold `examples`."""
    return rounded_up(devices, -(-examples // concurrent_programs(devices)))
