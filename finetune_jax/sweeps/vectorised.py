"""Members of a population side by side: one compiled call for the updates of many.

Their loops are the ordinary ones and run in lockstep. Where all of them wait for a program,
those that wait for the same one have their states stacked, and it runs once, over an axis
more; what measures them waits until none waits for updates. What is the same array for all
of them has no such axis: data, features, and what is frozen or fixed and has the same
values, which `Devices.shared` makes the same array. A member that ends, for whatever
reason, is waited for no more.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.backend import backend
from finetune_jax.core.machine import memory
from finetune_jax.core.pytrees import named, nbytes
from finetune_jax.data.batches import Examples, evaluation_batches
from finetune_jax.parallel.devices import Compiled, Devices
from finetune_jax.sweeps.lockstep import Lockstep, Request
from finetune_jax.training.dispatch import OwnPace, Pace
from finetune_jax.training.setup import Setup

# Members side by side at most, and arrays that a call takes of all their states: compiling
# takes longer with each. Chosen by us, not by measurement.
MOST, MOST_ARRAYS = 64, 4096
# What learns lies there as it was, stacked, updated, and as its gradient.
COPIES = 4
# In which order members are answered: measured so that all are at once; updated; measured
# for the last time, so that what is finished is written.
WAITS, UPDATES, URGENT = range(3)


def members_at_once(setups: Sequence[Setup]) -> int:
    """Returns how many members shall train side by side; 1 is in turn.

    On CPU and over several devices it is 1. Else it is the most for which

    - they are at most `MOST`, and their states at most `MOST_ARRAYS` arrays;
    - `COPIES` of what learns and its optimizer's state, and the model once more where no
      weights make what is frozen the same for all, take four fifths of the device's free
      memory, where that is known;
    - the states that are kept for checkpoints take a quarter of the host's memory.

    Activations are not in this: programs that turn out not to fit are run for half as many.
    """
    devices = setups[0].devices
    if backend() == "cpu" or devices.count > 1 or devices.mode != "jit":
        return 1
    most = [MOST]
    for setup in setups:
        whole = nbytes(setup.shapes)
        kept = setup.config.checkpoint.keep + 3  # And the first, the best, the one due.
        for index in range(len(setup.plan)):
            own = _own(setup, index)
            size = max(nbytes(own), 1)
            most.append(MOST_ARRAYS // len(jax.tree.leaves(own)))
            most.append(memory() // 4 // (kept * (whole + size)))
            if (free := devices.free_bytes()) is not None:
                frozen = (
                    0 if setup.config.init.pretrained else nbytes(setup.shapes.params)
                )
                most.append(int(0.8 * free) // (COPIES * size + frozen))
    return max(min(most), 1)


def _own(setup: Setup, index: int) -> Any:
    """Returns the shapes of what a phase changes of a state."""
    phase, params = setup.phase(index), setup.shapes.params
    learns = {
        name: leaf for name, leaf in named(params).items() if name in phase.groups
    }
    ema = learns if setup.config.evaluate.ema_decay is not None else {}
    stats = setup.shapes.batch_stats
    return learns, stats, jax.eval_shape(phase.optimizer().init, params), ema


class SharedPace:
    """A pace that all members keep, of the seconds that their common call took."""

    def __init__(self, pace: Pace, together: "Together"):
        """Takes a pace of one run."""
        self._pace, self._together, self._seen = pace, together, 0

    @property
    def updates(self) -> int:
        """Updates that the next call shall make."""
        return self._pace.updates

    def took(self, seconds: float) -> None:
        """Notes, once a call, how long it took: a member waits for the others too."""
        del seconds
        if self._together.calls > self._seen:
            self._seen = self._together.calls
            self._pace.took(self._together.call_s)


class Together:
    """Runs members side by side.

    Attributes:
        size: How many at most.
        devices: Of all of them; arrays placed with it are placed once.
        programs: Compiled so far, by what they depend on; None of those that do not fit.
        paces: Of phases, by their programs.
        calls: Of updates so far.
        call_s: Seconds that the last of them took.
    """

    def __init__(self, size: int, devices: Devices):
        """Takes how many there are at most, and the device."""
        self.size = size
        self.devices = dataclasses.replace(
            devices, shared=weakref.WeakValueDictionary()
        )
        self.programs: dict[Any, Compiled | None] = {}
        self.paces: dict[Any, SharedPace] = {}
        self.calls, self.call_s = 0, 0.0
        self._lockstep = Lockstep()

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Runs what trains some members, in lockstep.

        Raises:
            BaseException: What one of them has raised; the others then end, too.
        """
        self._lockstep.run(works)

    def pace(self, key: Any, chosen: int | None) -> SharedPace:
        """Returns the pace of a phase.

        Args:
            key: Of its program.
            chosen: Updates a call; None chooses by time.
        """
        if key not in self.paces:
            self.paces[key] = SharedPace(OwnPace(chosen), self)
        return self.paces[key]

    def train_program(
        self, step: Callable, kept: frozenset[str], *, resident: bool
    ) -> Compiled:
        """Returns a program that waits for the other members' calls of it.

        Unlike those of `Devices.compile_train` it leaves the state that it gets as it is.

        Args:
            step: Of a member, `step(state, fixed, *arguments)`.
            kept: Names of what it leaves as it is, of the state.
            resident: Whether the first of the arguments is a split on the device, which is
                never stacked.
        """

        def call(*given: Any) -> tuple[Any, Any]:
            data = jax.tree.leaves(given[2]) if resident else ()
            request = Request(
                signature=(step, _look(given), tuple(map(id, data))),
                given=given,
                answer=functools.partial(self._update, step, kept),
                urgency=UPDATES,
            )
            return self._lockstep.ask(request)

        return Compiled(call=call, compile_s=0.0)

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
                return _those(leaves, is_kept, False), metrics

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
        self,
        name: str,
        step: Callable,
        arguments: tuple,
        dataset: Examples,
        *,
        batch_size: int,
        urgent: bool = False,
    ) -> dict[str, np.ndarray]:
        """Returns what `Evaluator.rows` does.

        Args:
            name: As there, with what follows.
            step: Likewise.
            arguments: Likewise.
            dataset: Likewise.
            batch_size: Examples in a batch.
            urgent: Whether it does not wait until no member waits for updates.
        """
        whole = getattr(dataset, "dataset", dataset)
        what = name, type(dataset), id(whole), batch_size
        request = Request(
            signature=(what, _look(arguments)),
            given=arguments,
            answer=functools.partial(self._rows, name, step, dataset, batch_size),
            urgency=URGENT if urgent else WAITS,
        )
        return self._lockstep.ask(request)

    def _rows(
        self,
        name: str,
        step: Callable,
        dataset: Examples,
        batch_size: int,
        given: list[tuple],
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
            key = name, size, *stacks.key, _look(batch)
            program = self._program(key, many, stacks.shared, own, batch)
            if program is None:
                raise _DoesNotFit
            return functools.partial(program.call, stacks.shared, own, batch)

        batches = evaluation_batches(dataset, batch_size=batch_size)
        try:
            parts = list(self.devices.outputs(ready, batches, at_once=1))
        except _DoesNotFit:
            half = functools.partial(self._rows, name, step, dataset, batch_size)
            return self._halves(half, given)
        rows = jax.tree.map(
            lambda *leaves: np.concatenate(leaves, axis=1)[:, : len(dataset)], *parts
        )
        return [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(len(given))]

    def _size(self, members: int) -> int:
        """Returns for how many a program is compiled that shall run for some.

        It is `size`, or a half of it, or a quarter: so members leave one by one, and few
        programs are compiled. The places that are too many repeat the first member.
        """
        size = self.size
        while -(-size // 2) >= members and size > 1:
            size = -(-size // 2)
        return size

    def _program(self, key: Any, many: Callable, *arguments: Any) -> Compiled | None:
        """Returns a compiled program; None if it is for several and does not fit."""
        if key not in self.programs:
            program = self.devices.compile_members(many, *arguments)
            fits = len(arguments[1]) == 1 or self.devices.has_room(program)
            self.programs[key] = program if fits else None
        return self.programs[key]

    def _halves(self, answer: Callable, given: list[tuple]) -> list[Any]:
        """Returns the answers for one half of the members, then for the other."""
        assert len(given) > 1  # A program for one runs whether it fits or not.
        middle = -(-len(given) // 2)
        return answer(given[:middle]) + answer(given[middle:])


class _DoesNotFit(Exception):
    """A program needs more memory than there is."""


class _Stacks:
    """Some members' arguments: leaves that are the same for all, and each one's own.

    Attributes:
        shared: Those that are the same array, or the same whole number.
        key: What a program depends on besides what it computes.
        tree: Returns the arguments of a member, of what is shared and its own leaves.
    """

    def __init__(self, given: list[tuple], *, alone: Sequence[bool]):
        """Takes the arguments.

        Args:
            given: Of each member.
            alone: Of the first leaves: whether they are stacked even where they are the
                same, as what learns is in the beginning.
        """
        self._leaves = [jax.tree.leaves(arguments) for arguments in given]
        first = self._leaves[0]
        alone = [*alone, *[False] * (len(first) - len(alone))]
        self._is_shared = [
            not own and (_is_number(leaf) or all(x is leaf for x in column))
            for leaf, own, column in zip(first, alone, zip(*self._leaves), strict=True)
        ]
        self.shared = _those(first, self._is_shared, True)
        self.key = tuple(self._is_shared), _look(given[0], numbers=False)
        # Which holds no array, so that no program does.
        structure = jax.tree.structure(given[0])
        self.tree = functools.partial(_merged, structure, self._is_shared)

    def padded(self, size: int) -> list[list]:
        """Returns each member's own leaves, and those of the first again up to a size."""
        own = [_those(leaves, self._is_shared, False) for leaves in self._leaves]
        return own + [own[0]] * (size - len(own))


def _merged(structure: Any, is_shared: list[bool], shared: list, mine: list) -> Any:
    of_all, own = iter(shared), iter(mine)
    leaves = [next(of_all) if same else next(own) for same in is_shared]
    return jax.tree.unflatten(structure, leaves)


def _stacked(own: list[list]) -> list[jax.Array]:
    return [jnp.stack(leaves) for leaves in zip(*own, strict=True)]


def _those(leaves: Sequence[Any], marks: Sequence[bool], wanted: bool) -> list:
    """Returns the leaves that are marked so."""
    return [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark == wanted]


def _is_number(leaf: Any) -> bool:
    """Returns whether a leaf is a whole number on the host, such as a loop's length."""
    return isinstance(leaf, np.integer)


def _look(tree: Any, *, numbers: bool = True) -> tuple:
    """Returns structure, shapes and types of arguments, and maybe their whole numbers."""
    leaves, structure = jax.tree.flatten(tree)
    looks = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    found = [int(leaf) for leaf in leaves if numbers and _is_number(leaf)]
    return structure, tuple(looks), tuple(found)
