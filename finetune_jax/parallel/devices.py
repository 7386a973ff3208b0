"""Devices: where arrays lie, and how a pure step is compiled over them."""

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from finetune_jax.core.backend import backend
from finetune_jax.core.errors import UserError
from finetune_jax.core.machine import give_back_memory, threads, uncollected
from finetune_jax.core.pytrees import leaf_digest

# Smaller arrays are cheaper to repeat than to gather; chosen by us.
FSDP_MIN_VALUES = 2**12
# By default XLA computes early what it needs late: the same bits, but a full step of
# ResNet-20 takes up to four times as much memory, and a tenth longer to fetch it.
CPU_OPTIONS: Any = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step.

    Attributes:
        call: Takes placed arguments.
        compile_s: Seconds that tracing and compiling took.
    """

    call: Callable
    compile_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of a run and how they are used.

    Attributes:
        mode: 'jit' over a mesh with axes 'data' and 'fsdp', or 'pmap'.
        mesh: Of all devices, under both modes.
        shared: What lies there by its values' digest; what is placed again is the same
            array, and must not be donated. None places copies.
    """

    mode: str
    mesh: Mesh
    shared: MutableMapping[str, jax.Array] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.mesh.size

    def rounded_up(self, examples: int) -> int:
        """Returns a number of examples that the devices divide."""
        return -(-examples // self.count) * self.count

    @property
    def whole_rows(self) -> int:
        """Of so many examples, and of their multiples, no row depends on its place.

        What is left of a multiple is computed in another order by XLA's matrix kernels
        on CPU (oneDNN's, which take 24 pixels at once).
        """
        return 24 if self.count == 1 and backend() == "cpu" else 1

    @property
    def axis_name(self) -> str | None:
        """The axis to sum over by hand; under jit there is none."""
        return "data" if self.mode == "pmap" else None

    def _sharding(self, leaf: Any) -> NamedSharding:
        """Returns how a leaf of the state lies: its longest divisible axis is cut."""
        parts = self.mesh.shape["fsdp"]
        shape = np.shape(leaf)
        axes: list[str | None] = [None] * len(shape)
        if parts > 1 and math.prod(shape) >= FSDP_MIN_VALUES:
            divisible = [axis for axis, n in enumerate(shape) if n % parts == 0]
            if divisible:
                axes[max(divisible, key=lambda axis: shape[axis])] = "fsdp"
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _batch_sharding(self, batch_axis: int) -> NamedSharding:
        spec = PartitionSpec(*[None] * batch_axis, ("data", "fsdp"))
        return NamedSharding(self.mesh, spec)

    def place(self, tree: Any, *, own: bool = False) -> Any:
        """Returns a state or a part of one on the devices.

        Args:
            tree: On the host.
            own: Whether it must not share the memory of the host's arrays, which a CPU
                reads where they are: only what a program owns can be donated to it.
        """
        if self.shared is not None:
            return jax.tree.map(self._placed_once, tree)
        if self.mode == "pmap":
            stacked = jax.tree.map(lambda x: np.stack([x] * self.count), tree)
            return jax.tree.map(self._split_rows, stacked)
        shardings = jax.tree.map(self._sharding, tree)
        if own and jax.default_backend() == "cpu":
            # Of numpy's arrays no copy is made, whatever is asked for.
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
        """Returns a host batch divided among the devices along `batch_axis`."""
        if self.mode == "pmap":

            def divided(array):
                shape = array.shape
                rows = shape[batch_axis] // self.count
                array = array.reshape(
                    *shape[:batch_axis], self.count, rows, *shape[batch_axis + 1 :]
                )
                return self._split_rows(np.moveaxis(array, batch_axis, 0))

            return jax.tree.map(divided, batch)
        return jax.device_put(batch, self._batch_sharding(batch_axis))

    def _split_rows(self, array: np.ndarray) -> jax.Array:
        """Returns row i on device i, as pmap takes it."""
        rows = Mesh(self.mesh.devices.reshape(-1), ("device",))
        return jax.device_put(array, NamedSharding(rows, PartitionSpec("device")))

    def to_host(self, tree: Any) -> Any:
        """Returns a placed state as numpy arrays, one copy of each."""
        if self.mode == "pmap":
            tree = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], tree)
        return jax.tree.map(lambda leaf: np.array(leaf), tree)

    def rows_of(self, lowered: Any) -> Any:
        """Returns the shapes and dtypes of a row of what a lowered program gives."""
        axes = 2 if self.mode == "pmap" else 1
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype),
            lowered.out_info,
        )

    def rows_to_host(self, tree: Any) -> Any:
        """Returns placed outputs, a row an example, as numpy arrays."""
        rows = jax.device_get(tree)
        if self.mode == "pmap":
            return jax.tree.map(np.concatenate, rows)
        return rows

    @property
    def at_once(self) -> int:
        """How many programs that need not wait for one another are run at a time.

        A program leaves a seventh of two cores idle; two of them fill these.
        """
        return 2 if self.count == 1 and backend() == "cpu" and threads() > 1 else 1

    def part_of(self, examples: int) -> int:
        """Returns into batches of which size examples go that are computed at a time."""
        return self.rounded_up(-(-examples // self.at_once))

    def outputs(
        self, ready: Callable, batches: Iterable[Any], *, at_once: int
    ) -> Iterator[Any]:
        """Yields what a program gives for each batch, as numpy arrays, a row an example.

        Batches are made while those before are computed.

        Args:
            ready: Returns what computes a placed batch, compiled.
            batches: On the host.
            at_once: How many are computed at a time, in as much memory.
        """
        if backend() != "cpu":
            before = None
            for batch in batches:
                rows = ready(self.place_batch(batch, batch_axis=0))()
                if before is not None:
                    yield self.rows_to_host(before)
                before = rows
            if before is not None:
                yield self.rows_to_host(before)
            return
        with ThreadPoolExecutor(at_once) as pool:
            waiting: deque[Future] = deque()
            for batch in batches:
                call = ready(self.place_batch(batch, batch_axis=0))
                if len(waiting) == at_once:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(lambda call=call: self.rows_to_host(call())))
            while waiting:
                yield waiting.popleft().result()

    def compile_train(self, step: Callable, state: Any, *rest: Any) -> Compiled:
        """Returns the compiled `step(state, fixed, batch, learning_rate, progress)`.

        Args:
            step: `train_step` with its static arguments given.
            state: Placed arguments, for their shapes; this one will be donated.
            *rest: The other arguments.
        """
        if self.mode == "pmap":
            over = functools.partial(jax.pmap, axis_name="data", donate_argnums=0)
            devices = list(self.mesh.devices.reshape(-1))
            mapped = over(step, in_axes=(0, 0, 0, None, None), devices=devices)
            compiled = _timed(mapped, state, *rest)

            def first(state, *rest):
                state, metrics = compiled.call(state, *rest)
                return state, jax.tree.map(
                    lambda m: m.addressable_shards[0].data[0], metrics
                )

            return dataclasses.replace(compiled, call=first)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        shardings = jax.tree.map(self._sharding, state)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        return _timed(jitted, state, *rest)

    def compile_eval(self, step: Callable, *arguments: Any) -> Compiled:
        """Returns the compiled `step(params, batch_stats, fixed, batch)`.

        Args:
            step: `eval_step` with its static arguments given.
            *arguments: Placed arguments, for their shapes.
        """
        return _timed(self._over_devices(step), *arguments)

    def compile_members(self, many: Callable, *arguments: Any) -> Compiled:
        """Returns a compiled function of what several members have; nothing is donated.

        Args:
            many: The function, for one device.
            *arguments: Placed or on the host, for their shapes.
        """
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return _timed(jax.jit(many, out_shardings=everywhere), *arguments)

    def free_bytes(self) -> int | None:
        """Returns how much memory of the first device is free; None if it does not say."""
        stats = self.mesh.devices.flat[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)

    def has_room(self, program: Compiled) -> bool:
        """Returns whether what a program makes fits beside what lies on the device."""
        compiled: Any = program.call
        if (free := self.free_bytes()) is None:
            return True
        needs = compiled.memory_analysis()
        return needs.temp_size_in_bytes + needs.output_size_in_bytes <= free

    def lower_eval(self, step: Callable, *arguments: Any) -> Any:
        """Returns the lowered `step`, whose text is all that it computes."""
        return self._over_devices(step).lower(*arguments)

    def _over_devices(self, step: Callable) -> Any:
        if self.mode == "pmap":
            devices = list(self.mesh.devices.reshape(-1))
            return jax.pmap(step, axis_name="data", devices=devices)
        return jax.jit(step)


def _timed(jitted: Any, *arguments: Any) -> Compiled:
    begin = time.perf_counter()
    options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
    with uncollected():
        lowered = jitted.lower(*arguments)
    compiled = lowered.compile(compiler_options=options)
    give_back_memory()
    return Compiled(call=compiled, compile_s=time.perf_counter() - begin)


def run_once(function: Callable, *arguments: Any) -> Any:
    """Returns what a function returns, as numpy arrays, compiled for few runs."""
    return compiled_for_few(function, *arguments)(*arguments)


def compiled_for_few(function: Callable, *arguments: Any) -> Callable:
    """Returns a function whose results are numpy arrays, compiled for few runs.

    Random initial values are quick to compute and slow to compile: at XLA's lowest level
    of optimisation that still vectorises, ResNet-20's take 2 s instead of 16 s, and are
    the same bits.

    Args:
        function: To compile.
        *arguments: For their shapes.
    """
    options: Any = {"xla_backend_optimization_level": 1}
    with uncollected():
        lowered = jax.jit(function).lower(*arguments)
    compiled = lowered.compile(compiler_options=options)
    give_back_memory()
    return lambda *given: jax.tree.map(np.asarray, compiled(*given))


def make_devices(asked: Any) -> Devices:
    """Returns the devices that `config.parallel` asks for.

    Args:
        asked: That section.

    Raises:
        UserError: More devices than there are, or a number that `fsdp` does not divide.
    """
    mode, devices, fsdp = asked.mode, asked.devices, asked.fsdp
    there = jax.devices()
    count = len(there) if devices is None else devices
    if count > len(there):
        raise UserError(
            f"config.parallel.devices: {count}, but there are {len(there)} devices"
        )
    if mode == "pmap" and fsdp > 1:
        raise UserError("config.parallel.fsdp: pmap repeats all parameters; use jit")
    if count % fsdp:
        raise UserError(f"config.parallel.fsdp: {fsdp} does not divide {count} devices")
    mesh = jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=there[:count],
    )
    return Devices(mode=mode, mesh=mesh)
