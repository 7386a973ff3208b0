"""Executors compile the programs of a run and run them, for one run or for several."""

import abc
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from finetune_jax.core.backend import backend
from finetune_jax.parallel import watch
from finetune_jax.parallel.compiling import Cost, compiled
from finetune_jax.parallel.devices import Devices, concurrent_programs

# Most updates of one call.
LONGEST = 256
# Bounds of the seconds that a call should take, so that signals and logs need not wait.
SHORT_S, LONG_S = 0.15, 0.4


class Pace:
    """The number of updates of a call: fixed, or adapted to take a fraction of a second.

    Attributes:
        updates: Number of updates of the next call.
    """

    def __init__(self, chosen: int | None):
        """Takes the number of updates of a call; None adapts it."""
        self._chosen = chosen
        self.updates = 1 if chosen is None else min(chosen, LONGEST)

    def took(self, seconds: float) -> None:
        """Doubles or halves the number of updates of the next calls."""
        if self._chosen is None and seconds < SHORT_S:
            self.updates = min(2 * self.updates, LONGEST)
        elif self._chosen is None and seconds > LONG_S:
            self.updates = max(self.updates // 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """The evaluation batches of a split.

    Attributes:
        key: Identity of the examples and of the batch size.
        count: Number of examples; the last batch may be padded.
        make: Returns an iterator of the batches, on the host.
        cache: Batches on the devices by `key`; None reads and places them in every call.
        is_large: Whether one batch keeps all cores busy and fills much memory.
    """

    key: Hashable
    count: int
    make: Callable[[], Iterator[Any]]
    cache: dict[Hashable, list[Any]] | None = None
    is_large: bool = False

    def placed(self, devices: Devices) -> Iterator[Any]:
        """Yields the batches on the devices."""
        place = functools.partial(devices.place_batch, batch_axis=0)
        if self.cache is None:
            yield from map(place, self.make())
            return
        if self.key not in self.cache:
            self.cache[self.key] = list(map(place, self.make()))
        yield from self.cache[self.key]


@dataclasses.dataclass(kw_only=True)
class Executor(abc.ABC):
    """Compiles and runs the programs of a run.

    Attributes:
        devices: Devices that arrays are placed on.
        compile_s: Seconds spent on compiling evaluation programs.
    """

    devices: Devices
    compile_s: float = 0.0
    _training: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    _resident: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns `make()`, computed once for each key."""
        if key not in self._training:
            self._training[key] = make()
        return self._training[key]

    def resident(self, split: Any, make: Callable[[], Any]) -> Any:
        """Returns a split on the devices; the split of the last call is kept.

        Args:
            split: The split, compared by identity.
            make: Returns its arrays on the host.
        """
        if not self._resident or self._resident[0][0] is not split:
            self._resident[:] = [(split, self.devices.place(make()))]
        return self._resident[0][1]

    @abc.abstractmethod
    def train_program(
        self,
        key: Hashable,
        step: Callable[[], Callable],
        arguments: tuple,
        *,
        frozen: Callable[[], frozenset[str]],
        is_resident: bool,
    ) -> tuple[Callable, float]:
        """Returns the program of one call, and the seconds that compiling it took now.

        Args:
            key: All that the program depends on.
            step: Returns the function `(state, fixed, *arguments)` to compile.
            arguments: Placed state, fixed and the arguments of the call.
            frozen: Returns names of the leaves of the state that no update changes.
            is_resident: Whether the third argument is a split on the devices.
        """

    def cost(self, key: Hashable) -> Cost | None:
        """Returns the cost of a program of `train_program`; None if it is unknown."""
        del key
        return None

    @abc.abstractmethod
    def rows(
        self, name: str, step: Callable, arguments: tuple, batches: Batches
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a step for a split, a row an example, in order.

        Args:
            name: Name of the step, under which it is compiled once.
            step: Takes `arguments` and a batch; returns a dict of arrays [B, ...].
            arguments: Placed arguments.
            batches: The split.
        """

    def pace(self, key: Hashable, chosen: int | None) -> Pace:
        """Returns the pace of the calls of a phase.

        Args:
            key: Key of the phase's program.
            chosen: Number of updates of a call; None adapts it.
        """
        del key
        return Pace(chosen)


@dataclasses.dataclass(kw_only=True)
class DeviceExecutor(Executor):
    """Runs each program for one run. Runs of one model may share it, one after another."""

    _evaluation: dict[Hashable, Callable] = dataclasses.field(default_factory=dict)
    _costs: dict[Hashable, Cost | None] = dataclasses.field(default_factory=dict)

    def train_program(
        self,
        key: Hashable,
        step: Callable[[], Callable],
        arguments: tuple,
        *,
        frozen: Callable[[], frozenset[str]],
        is_resident: bool,
    ) -> tuple[Callable, float]:
        """Returns the compiled program; it donates the state."""
        del frozen, is_resident
        if key in self._training:
            return self._training[key], 0.0
        program = self.devices.compile_train(step(), *arguments)
        self._training[key], self._costs[key] = program.call, program.cost
        return program.call, program.compile_s

    def cost(self, key: Hashable) -> Cost | None:
        """Returns the cost of a program; None under pmap."""
        return self._costs[key]

    def rows(
        self, name: str, step: Callable, arguments: tuple, batches: Batches
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a step for a split, a row an example."""

        def ready(batch: Any) -> Callable:
            key = name, tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            if key not in self._evaluation:
                over = self.devices.over_devices(step)
                with watch.doing("compiling", watch.LONG):
                    program = compiled(over, *arguments, batch)
                self._evaluation[key] = program.call
                self.compile_s += program.compile_s
            return functools.partial(self._evaluation[key], *arguments, batch)

        at_once = 1 if batches.is_large else concurrent_programs(self.devices)
        parts = list(
            outputs(self.devices, ready, batches.placed(self.devices), at_once=at_once)
        )
        return jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[: batches.count], *parts
        )

    def end_training(self) -> None:
        """Frees the compiled updates and the training data on the devices."""
        self._training.clear()
        self._resident.clear()


def _watched(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields the batches, and notes whether this process reads one or waits for results."""
    batches = iter(batches)
    while True:
        watch.begins("reading a batch")
        try:
            batch = next(batches)
        except StopIteration:
            watch.begins("computing the outputs of a split", watch.LONG)
            return
        watch.begins("computing the outputs of a batch", watch.WAITING)
        yield batch


def outputs(
    devices: Devices, ready: Callable, batches: Iterable[Any], *, at_once: int
) -> Iterator[Any]:
    """Yields the outputs of a program for each batch, as numpy arrays, a row an example.

    A batch is read while those before it are computed.

    Args:
        devices: Devices that compute them.
        ready: Returns a function of no arguments that computes a placed batch.
        batches: Placed batches.
        at_once: Number of batches that are computed concurrently on CPU.
    """
    batches = _watched(batches)
    if backend() != "cpu":
        before = None
        for batch in batches:
            rows = ready(batch)()
            if before is not None:
                yield devices.rows_to_host(before)
            before = rows
        if before is not None:
            yield devices.rows_to_host(before)
        return
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future] = deque()
        for batch in batches:
            call = ready(batch)
            if len(waiting) == at_once:
                yield waiting.popleft().result()
            waiting.append(pool.submit(lambda call=call: devices.rows_to_host(call())))
        while waiting:
            yield waiting.popleft().result()
