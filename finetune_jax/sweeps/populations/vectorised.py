"""A vectorised population: one compiled call makes the updates of many members.

The members' loops are ordinary ones and run in lockstep. When all of them wait for a
program, the states of those that wait for the same one are stacked, and it runs once,
vmapped; measurements wait until no member waits for updates. Arrays that all members share
(data, features, equal frozen weights) are not stacked; `MeshDevices.shared` finds them by
content. The others do not wait for a member that has ended.
"""

import copy
import functools
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from finetune_jax.core.backend import backend
from finetune_jax.core.machine import memory
from finetune_jax.core.pytrees import named, nbytes
from finetune_jax.parallel.compiling import Compiled, compiled
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.executor import Batches, Executor, Pace, outputs
from finetune_jax.parallel.mesh import MeshDevices
from finetune_jax.sweeps.populations.lockstep import Lockstep, Request
from finetune_jax.training.setup import Setup

# Most members of one call, and most arrays of their states in one call: compile time
# grows with both. Chosen by us, not by measurement.
MOST, MOST_ARRAYS = 64, 4096
# Copies of the trained parameters on the device: old, stacked, updated, gradient.
COPIES = 4
# Urgencies, lowest first: measurements wait until all members ask for them; updates; last
# measurements come first, so that finished members are written.
WAITS, UPDATES, URGENT = range(3)


def members_at_once(setups: Sequence[Setup]) -> int:
    """Returns the number of members to train side by side; 1 trains them in turn.

    On CPU and over several devices it is 1. Otherwise it is the largest number for which

    - there are at most `MOST` members, and their states have at most `MOST_ARRAYS` arrays;
    - `COPIES` of the trained parameters and the optimizer's state, and the model once more
      unless pretrained weights make the frozen part equal for all, take at most four
      fifths of the device's free memory, if that is known;
    - the states held for checkpoints take at most a quarter of the host's memory.

    Activations are not counted: programs that turn out not to fit run for half as many.
    """
    devices = setups[0].devices
    if backend() == "cpu" or devices.count > 1 or devices.axis_name:
        return 1
    most = [MOST]
    for setup in setups:
        whole = nbytes(setup.shapes)
        kept = (
            setup.config.checkpoint.keep + 3
        )  # Besides the first, the best and the last due one.
        for index in range(len(setup.plan)):
            own = _own(setup, index)
            size = max(nbytes(own), 1)
            most.append(MOST_ARRAYS // len(jax.tree.leaves(own)))
            most.append(memory() // 4 // (kept * (whole + size)))
            if (free := free_bytes(devices)) is not None:
                frozen = (
                    0 if setup.config.init.pretrained else nbytes(setup.shapes.params)
                )
                most.append(int(0.8 * free) // (COPIES * size + frozen))
    return max(min(most), 1)


def _own(setup: Setup, index: int) -> Any:
    """Returns the shapes of the leaves of a state that a phase changes."""
    phase, params = setup.phase(index), setup.shapes.params
    learns = {
        name: leaf for name, leaf in named(params).items() if name in phase.groups
    }
    ema = learns if setup.config.evaluate.ema_decay is not None else {}
    stats = setup.shapes.batch_stats
    return learns, stats, jax.eval_shape(phase.optimizer().init, params), ema


class SharedPace(Pace):
    """A pace that all members keep, by the seconds that their common call took."""

    def __init__(self, chosen: int | None, executor: "VectorisedExecutor"):
        """Takes the number of updates of a call; None adapts it."""
        super().__init__(chosen)
        self._executor, self._seen = executor, 0

    def took(self, seconds: float) -> None:
        """Notes, once a call, its duration without waiting for other members."""
        del seconds
        if self._executor.calls > self._seen:
            self._seen = self._executor.calls
            super().took(self._executor.call_s)


class VectorisedExecutor(Executor):
    """Runs the programs of several members as one, vmapped over them.

    Equal arrays are placed once, and compiling is part of the calls.

    Attributes:
        size: Largest number of members of a program.
        calls: Number of training calls so far.
        call_s: Seconds that the last of them took.
    """

    def __init__(self, size: int, devices: Devices):
        """Takes the largest number of members, and the device."""
        shared: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        super().__init__(devices=MeshDevices(mesh=devices.mesh, shared=shared))
        self.size = size
        self.calls, self.call_s = 0, 0.0
        # Programs of several members; None if one does not fit into memory.
        self._programs: dict[Any, Compiled | None] = {}
        self._lockstep = Lockstep()
        self._urgency = WAITS

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Runs the training of some members in lockstep.

        Raises:
            BaseException: An exception of one of them; the others then end, too.
        """
        self._lockstep.run(works)

    def pace(self, key: Hashable, chosen: int | None) -> Pace:
        """Returns the pace of a phase, which all members share."""
        return self.once(("pace", key), lambda: SharedPace(chosen, self))

    def train_program(
        self,
        key: Hashable,
        step: Callable[[], Callable],
        arguments: tuple,
        *,
        frozen: Callable[[], frozenset[str]],
        is_resident: bool,
    ) -> tuple[Callable, float]:
        """Returns a program that waits for the other members' calls of it.

        Unlike a program of `DeviceExecutor` it does not donate the state.
        """
        del arguments

        def make() -> Callable:
            one = step()
            update = functools.partial(self._update, one, frozen())

            def call(*given: Any) -> tuple[Any, Any]:
                data = jax.tree.leaves(given[2]) if is_resident else ()
                request = Request(
                    signature=(one, _signature(given), tuple(map(id, data))),
                    given=given,
                    answer=update,
                    urgency=UPDATES,
                )
                return self._lockstep.ask(request)

            return call

        return self.once(key, make), 0.0

    def _update(
        self, step: Callable, kept: frozenset[str], given: list[tuple]
    ) -> list[Any]:
        """Returns each member's state and metrics after a call."""
        names = list(named(given[0][0]))
        is_kept = [name in kept for name in names]
        stacks = _Stacks(given, alone=[not keep for keep in is_kept])
        tree = stacks.tree

        def many(shared: list, own: list) -> list:
            def one(mine: list) -> tuple[list, Any]:
                before = tree(shared, mine)
                state, metrics = step(*before)
                assert jax.tree.structure(state) == jax.tree.structure(before[0])
                leaves = jax.tree.leaves(state)
                return _marked(leaves, is_kept, False), metrics

            made = jax.vmap(one)(_stacked(own))
            return [jax.tree.map(lambda x, i=i: x[i], made) for i in range(len(own))]

        size = self._size(len(given))
        own = stacks.padded(size)
        program = self._program((step, size, *stacks.key), many, stacks.shared, own)
        if program is None:
            return self._halves(functools.partial(self._update, step, kept), given)
        begin, results = time.perf_counter(), []
        made = jax.block_until_ready(program.call(stacks.shared, own))
        self.calls, self.call_s = self.calls + 1, time.perf_counter() - begin
        for arguments, (moved, metrics) in zip(given, made):
            leaves, structure = jax.tree.flatten(arguments[0])
            new = iter(moved)
            leaves = [x if keep else next(new) for x, keep in zip(leaves, is_kept)]
            results.append((jax.tree.unflatten(structure, leaves), metrics))
        return results

    def rows(
        self, name: str, step: Callable, arguments: tuple, batches: Batches
    ) -> dict[str, np.ndarray]:
        """Returns the outputs of a step for a split, once no member waits for updates."""
        request = Request(
            signature=((name, batches.key), _signature(arguments)),
            given=arguments,
            answer=functools.partial(self._rows, name, step, batches),
            urgency=self._urgency,
        )
        return self._lockstep.ask(request)

    def urgent(self) -> "VectorisedExecutor":
        """Returns the executor of a member that makes no more updates.

        Its measurements do not wait for updates: its result is written before the updates
        of the other members go on.
        """
        urgent = copy.copy(self)
        urgent._urgency = URGENT
        return urgent

    def _rows(
        self, name: str, step: Callable, batches: Batches, given: list[tuple]
    ) -> list[dict[str, np.ndarray]]:
        """Returns the rows of each member."""
        stacks = _Stacks(given, alone=[])
        size = self._size(len(given))
        own, tree = stacks.padded(size), stacks.tree

        def many(shared: list, own: list, batch: Any) -> Any:
            def one(mine: list) -> Any:
                return step(*tree(shared, mine), batch)

            return jax.vmap(one, axis_size=len(own))(_stacked(own))

        def ready(batch: Any) -> Any:
            key = name, size, *stacks.key, _signature(batch)
            program = self._program(key, many, stacks.shared, own, batch)
            if program is None:
                raise _DoesNotFit
            return functools.partial(program.call, stacks.shared, own, batch)

        try:
            parts = list(
                outputs(self.devices, ready, batches.placed(self.devices), at_once=1)
            )
        except _DoesNotFit:
            half = functools.partial(self._rows, name, step, batches)
            return self._halves(half, given)
        rows = jax.tree.map(
            lambda *leaves: np.concatenate(leaves, axis=1)[:, : batches.count], *parts
        )
        return [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(len(given))]

    def _size(self, members: int) -> int:
        """Returns the number of members that a program is compiled for.

        It is `size`, its half, its quarter, ...: members end one by one, and few programs
        are compiled. Spare places repeat the first member.
        """
        size = self.size
        while -(-size // 2) >= members and size > 1:
            size = -(-size // 2)
        return size

    def _program(self, key: Any, many: Callable, *arguments: Any) -> Compiled | None:
        """Returns a compiled program; None if one for several members does not fit."""
        if key not in self._programs:
            everywhere = NamedSharding(self.devices.mesh, PartitionSpec())
            program = compiled(jax.jit(many, out_shardings=everywhere), *arguments)
            fits = len(arguments[1]) == 1 or has_room(self.devices, program)
            self._programs[key] = program if fits else None
        return self._programs[key]

    def _halves(self, answer: Callable, given: list[tuple]) -> list[Any]:
        """Returns the responses for one half of the members, then for the other."""
        assert len(given) > 1  # A program for one runs whether it fits or not.
        middle = -(-len(given) // 2)
        return answer(given[:middle]) + answer(given[middle:])


def free_bytes(devices: Devices) -> int | None:
    """Returns the free memory of the first device; None if it does not say."""
    stats = devices.mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def has_room(devices: Devices, program: Compiled) -> bool:
    """Returns whether the results of a program fit beside the arrays on the device."""
    call: Any = program.call
    if (free := free_bytes(devices)) is None:
        return True
    needs = call.memory_analysis()
    return needs.temp_size_in_bytes + needs.output_size_in_bytes <= free


class _DoesNotFit(Exception):
    """A program needs more memory than there is."""


class _Stacks:
    """Arguments of some members: leaves that all share, and each member's own.

    Attributes:
        shared: Leaves that are the same array, or the same whole number, for all.
        key: Key of a program that takes these arguments.
        tree: Returns the arguments of a member from the shared and its own leaves.
    """

    def __init__(self, given: list[tuple], *, alone: Sequence[bool]):
        """Divides the leaves of the arguments.

        Args:
            given: Arguments of each member.
            alone: For each of the first leaves, whether it is stacked even if it is the
                same for all, as trained parameters are in the beginning.
        """
        self._leaves = [jax.tree.leaves(arguments) for arguments in given]
        first = self._leaves[0]
        alone = [*alone, *[False] * (len(first) - len(alone))]
        self._is_shared = [
            not own and (_is_number(leaf) or all(x is leaf for x in column))
            for leaf, own, column in zip(first, alone, zip(*self._leaves), strict=True)
        ]
        self.shared = _marked(first, self._is_shared, True)
        self.key = tuple(self._is_shared), _signature(given[0], numbers=False)
        # A partial of the structure alone, so that no program holds an array.
        structure = jax.tree.structure(given[0])
        self.tree = functools.partial(_merged, structure, self._is_shared)

    def padded(self, size: int) -> list[list]:
        """Returns each member's own leaves, padded to a size with those of the first."""
        own = [_marked(leaves, self._is_shared, False) for leaves in self._leaves]
        return own + [own[0]] * (size - len(own))


def _merged(structure: Any, is_shared: list[bool], shared: list, mine: list) -> Any:
    of_all, own = iter(shared), iter(mine)
    leaves = [next(of_all) if same else next(own) for same in is_shared]
    return jax.tree.unflatten(structure, leaves)


def _stacked(own: list[list]) -> list[jax.Array]:
    return [jnp.stack(leaves) for leaves in zip(*own, strict=True)]


def _marked(leaves: Sequence[Any], marks: Sequence[bool], wanted: bool) -> list:
    """Returns the leaves whose mark is `wanted`."""
    return [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark == wanted]


def _is_number(leaf: Any) -> bool:
    """Returns whether a leaf is a whole number on the host, such as a loop's length."""
    return isinstance(leaf, np.integer)


def _signature(tree: Any, *, numbers: bool = True) -> tuple:
    """Returns structure, shapes, dtypes and, if asked for, whole numbers of arguments."""
    leaves, structure = jax.tree.flatten(tree)
    looks = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    found = [int(leaf) for leaf in leaves if numbers and _is_number(leaf)]
    return structure, tuple(looks), tuple(found)
