"""Feeds the updates of a phase with examples: one update per call, or a scan over many.

Examples that fit into memory are placed on the device as a whole; a compiled loop takes the
rows of one update after the other. Its length is an argument, so that any number of updates
uses the same program and has the bits of one call per update.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.flops import inner_programs
from finetune_jax.core.pytrees import nbytes
from finetune_jax.data.batches import BatchSource, Shortened, Views, places_of, rows_of
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.domains import DomainMixture
from finetune_jax.data.order import Order
from finetune_jax.features.cache import Features, TeacherOutputs
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.executor import LONGEST, Pace
from finetune_jax.tasks.task import TEACHER_OUTPUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of a compiled program, besides the state and the fixed arrays.

    Attributes:
        updates: Number of updates.
        arguments: Placed arguments.
        batch: Returns the arrays [k, b, ...] of one of its updates, on the host.
    """

    updates: int
    arguments: tuple[Any, ...]
    batch: Callable[[int], Mapping[str, np.ndarray]]


class Stepwise:
    """A feed of one update per call.

    Attributes:
        kind: Part of the program's key, besides the phase.
    """

    def __init__(
        self,
        make: Callable[..., Iterator[dict]],
        devices: Devices,
        updates: range,
        *,
        repeats: bool,
    ):
        """Starts the feed.

        Args:
            make: Takes `updates` and `local_rows`; returns the batches, in order.
            devices: Devices of the run.
            updates: The updates, counted from the beginning of the run.
            repeats: Whether all updates get the first batch.
        """
        self._make = make
        local_rows = devices.local_rows if devices.spans_processes else None
        batches = make(updates=updates, local_rows=local_rows)
        begun = next(batches)
        self._devices = devices
        self._batches = zip(updates, itertools.chain([begun], batches))
        if repeats:
            self._batches = itertools.repeat((updates.start, begun))
        self.kind = ("stepwise", "features" in begun, TEACHER_OUTPUTS in begun)

    def program(self, step: Callable) -> Callable:
        """Returns the function to compile, the update itself.

        Args:
            step: One update, `train_step` with its static arguments given.
        """
        return step

    def call(self, rates: np.ndarray, progress: np.ndarray) -> Call:
        """Returns the call of the next update.

        Args:
            rates: Learning rates of the updates that may be made, float32.
            progress: Share of the phase that is over before each.
        """
        number, batch = next(self._batches)
        placed = self._devices.place_batch(batch, batch_axis=1)

        def whole(_: int) -> Mapping[str, np.ndarray]:
            """Returns the batch with the rows of all processes."""
            if not self._devices.spans_processes:
                return batch
            return next(self._make(updates=range(number, number + 1)))

        arguments = placed, rates[0], progress[0]
        return Call(updates=1, arguments=arguments, batch=whole)

    def took(self, seconds: float) -> None:
        """Ignores the duration; one update cannot be shortened."""


@dataclasses.dataclass(kw_only=True)
class Scanned:
    """A feed of many updates per call, from examples on the device.

    Its methods take the arguments of those of `Stepwise`.

    Attributes:
        examples: Training split.
        order: Order of its examples.
        placed: All of `resident`, on the device.
        start: Next update, counted from the beginning of the run.
        batch_size: Examples in one update.
        micro_batches: Number of micro-batches in one update.
        views: As in `training_batches`.
        pace: Pace of the calls.
    """

    examples: BatchSource
    order: Order
    placed: Any
    start: int
    batch_size: int
    micro_batches: int
    views: int | None
    pace: Pace

    @property
    def rows_each(self) -> int:
        """Number of views of an example on the device, by which rows are divided."""
        return len(self.examples) // len(resident(self.examples))

    @property
    def kind(self) -> tuple[Any, ...]:
        """Part of the program's key, besides the phase."""
        inputs = "features" in self.placed, TEACHER_OUTPUTS in self.placed
        return "scanned", *inputs, self.rows_each

    def program(self, step: Callable) -> Callable:
        """Returns a loop of updates."""
        return functools.partial(many_steps, step=step, rows_each=self.rows_each)

    def call(self, rates: np.ndarray, progress: np.ndarray) -> Call:
        """Returns the call of the next updates."""
        updates = min(len(rates), self.pace.updates)
        start, size = self.start, self.batch_size
        self.start += updates
        shape = self.micro_batches, size // self.micro_batches
        epoch = len(self.examples.label)
        rows = rows_of(self.order, epoch, size, start, self.start, self.views)
        places = places_of(rows, size, self.views)

        def padded(array: np.ndarray, *shape: int) -> np.ndarray:
            given = array.reshape(updates, *shape)
            rest = np.zeros((LONGEST - updates, *shape), array.dtype)
            return np.concatenate([given, rest])

        def batch(index: int) -> Mapping[str, np.ndarray]:
            mine = slice(index * size, (index + 1) * size)
            found = self.examples.take(rows[mine]) | {"position": places[mine]}
            return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found)

        schedule = {
            "rows": padded(rows.astype(np.int32), *shape),
            "position": padded(places, *shape),
            "rate": padded(rates[:updates]),
            "progress": padded(progress[:updates]),
        }
        arguments = self.placed, schedule, np.int32(updates)
        return Call(updates=updates, arguments=arguments, batch=batch)

    def took(self, seconds: float) -> None:
        """Adapts the number of updates of the next calls."""
        self.pace.took(seconds)


# A source of calls for the updates of a phase.
Feed = Stepwise | Scanned


def many_steps(
    state: Any,
    fixed: Any,
    examples: Any,
    schedule: Mapping[str, jax.Array],
    updates: jax.Array,
    *,
    step: Callable,
    rows_each: int,
) -> tuple[Any, Any]:
    """Returns the state after some updates, and the metrics of each of them.

    Args:
        state: State, donated.
        fixed: Fixed arrays.
        examples: All arrays of the split, a row an example.
        schedule: For each update its 'rows' and their 'position' in it, [L, k, b], its
            learning 'rate' and the 'progress' of the phase before it, [L].
        updates: Number of updates; later rows are not read.
        step: Function of one update.
        rows_each: Number of views of an example, by which rows are divided.
    """
    step = jax.jit(step)  # Traced once.

    def arguments(state: Any, index: Any) -> tuple:
        given = {name: array[index] for name, array in schedule.items()}
        taken = given["rows"] // rows_each
        batch = jax.tree.map(
            lambda whole: whole.at[taken].get(mode="promise_in_bounds"), examples
        )
        batch["position"] = given["position"]
        return state, fixed, batch, given["rate"], given["progress"]

    def update(index: Any, carry: tuple) -> tuple:
        state, kept = carry
        state, metrics = step(*arguments(state, index))
        return state, jax.tree.map(lambda k, m: k.at[index].set(m), kept, metrics)

    _, metrics = jax.eval_shape(lambda: step(*arguments(state, 0)))
    kept = jax.tree.map(
        lambda leaf: jnp.zeros((len(schedule["rate"]), *leaf.shape), leaf.dtype),
        metrics,
    )
    return jax.lax.fori_loop(0, updates, update, (state, kept))


def resident(examples: BatchSource) -> Dataset | Features | TeacherOutputs:
    """Returns the split without repetitions, as it is placed on the device."""
    whole = examples.dataset if isinstance(examples, Views) else examples
    assert isinstance(whole, Dataset | Features | TeacherOutputs)
    return whole


def everything(whole: Dataset | Features | TeacherOutputs) -> dict[str, Any]:
    """Returns all rows of a split as `take` does; arrays in memory are not copied."""
    count = len(whole)
    if isinstance(whole, TeacherOutputs):
        return {
            **everything(resident(whole.examples)),
            TEACHER_OUTPUTS: whole.outputs.table,
        }
    if isinstance(whole, Features):
        label = np.repeat(whole.label, whole.views, axis=0)
        weight = np.ones(count, np.float32)
        return {"features": whole.table, "label": label, "weight": weight}
    if whole.decoded is None:
        return whole.take(np.arange(count))
    weight = whole.readable(np.arange(count)).astype(np.float32)
    return {**whole.parts(whole.decoded), "label": whole.label, "weight": weight}


def why_not_resident(
    examples: BatchSource | DomainMixture, devices: Devices, limit: float
) -> str | None:
    """Returns why a split cannot be placed on the device, or None if it can.

    Args:
        examples: Training split.
        devices: Devices of the run.
        limit: Bytes that may be placed on the device.
    """
    if devices.count > 1:
        return f"there are {devices.count} devices"
    if isinstance(examples, DomainMixture):
        return "there are several domains"
    if isinstance(examples, Shortened):
        return "batches of texts differ in length (config.data.buckets)"
    if isinstance(examples, TeacherOutputs):
        if isinstance(examples.examples, Views):
            return "examples have several views (config.data.cache_views)"
        limit -= nbytes(examples.outputs.table)
        return why_not_resident(examples.examples, devices, limit)
    whole = resident(examples)
    assert not isinstance(whole, TeacherOutputs)
    if isinstance(whole, Features):
        size = nbytes(whole.table)
    elif whole.nbytes:
        return "the examples are not kept in memory (config.data.memory_gb)"
    else:
        taken = whole.take(np.zeros(1, int))
        size = len(whole) * (nbytes(taken["inputs"]) + nbytes(taken.get("mask", ())))
    if size > limit:
        return f"the examples are {size / 1e9:.1f} GB (config.data.memory_gb)"
    return None


def stock_gradients(program: Any) -> int:
    """Returns the number of convolution gradients that a program leaves to jax.

    They are convolutions whose images or kernels have permuted axes or dilations. On CPU
    they take sixteen times as long in a loop, and have other bits.

    Args:
        program: Jaxpr of the program.
    """
    count = 0
    for equation in program.eqns:
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            axes = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
            dilations = (
                *equation.params["lhs_dilation"],
                *equation.params["rhs_dilation"],
            )
            first, last = axes[0][0], axes[0][1]
            is_forward = (first, last) == (0, len(axes[0]) - 1) and axes[2] == axes[0]
            is_forward &= axes[1][:2] == (len(axes[1]) - 1, len(axes[1]) - 2)
            count += not (is_forward and set(dilations) == {1})
        count += sum(
            stock_gradients(inner) for inner in inner_programs(equation.params)
        )
    return count
