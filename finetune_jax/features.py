"""What frozen stages make of the examples: computed once, kept on disk, used again.

A table of features is found by a digest of all that it depends on: the compiled program
(and so the model's code, the preprocessing and the precision), the variables of the frozen
stages, the data, the examples chosen, the machine. Nothing else is ever used in its place.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import finetune_jax
from finetune_jax import machine
from finetune_jax.data.batches import Examples, Views, evaluation_batches
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.spec import DataSpec
from finetune_jax.parallel import Devices
from finetune_jax.state import TrainState
from finetune_jax.step import features_step
from finetune_jax.tasks.task import EVALUATION, Mode, Task
from finetune_jax.trees import digest, nbytes, stage_of

ABOUT = "about.json"
# A table that has been in the making for so long is not being made any more.
LEFTOVER_S = 7 * 24 * 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """A split as a stage gets it, in the place of a `Dataset`.

    Attributes:
        table: Arrays [N * views, ...]; the views of an example follow one another.
        label: Of each example, as in a `Dataset`.
        views: Augmented versions of an example.
    """

    table: Any
    label: np.ndarray
    views: int = 1

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.label) * self.views

    def take(self, positions: np.ndarray) -> dict[str, Any]:
        """Returns 'features', 'label' and 'weight' of rows of the table."""
        return {
            "features": jax.tree.map(
                lambda leaf: np.asarray(leaf[positions]), self.table
            ),
            "label": self.label[positions // self.views],
            "weight": np.ones(len(positions), np.float32),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The stages before a stage, while they stay as they are.

    Attributes:
        first: The stage.
        variables: Their parameters and batch statistics, on the host.
        rng: Of the state.
        averaged: Whether averaged weights of them are others.
        sha256: Digest of the variables.
    """

    first: str
    variables: tuple[Any, Any]
    rng: Any
    averaged: bool
    sha256: str


def frozen_part(task: Task, state: TrainState, first: str) -> Frozen:
    """Returns the stages before a stage.

    Args:
        task: Has the one model.
        state: On the host.
        first: From `Task.first_learning`.
    """
    before = task.stages[: task.stages.index(first)]
    params, batch_stats = (
        {stage: tree[stage] for stage in before if stage in tree}
        for tree in (state.params, state.batch_stats)
    )
    return Frozen(
        first=first,
        variables=(params, batch_stats),
        rng=state.rng,
        averaged=any(stage_of(name) in before for name in state.ema),
        sha256=digest((params, batch_stats)),
    )


@dataclasses.dataclass(kw_only=True)
class FeatureStore:
    """Tables of features, of this run and of others.

    Attributes:
        task: Has the model.
        devices: Where they are computed.
        folder: Where they are kept, a folder each.
        limit: Bytes that they may take there; the longest unused go first.
        memory: Bytes of one table that may be in memory; a larger one stays on disk.
        batch_size: Of the computation of held-out splits.
        say: Tells a person.
        compile_s: Seconds that compiling has taken.
    """

    task: Task
    devices: Devices
    folder: pathlib.Path
    limit: float
    memory: float
    batch_size: int
    say: Callable[[str], None]
    compile_s: float = 0.0
    _frozen: Frozen | None = None
    _held_out: dict[int, tuple[Dataset, Features | None]] = dataclasses.field(
        default_factory=dict
    )

    def held_out(self, dataset: Dataset, frozen: Frozen) -> Examples:
        """Returns what a stage gets of a split; the split where that cannot be kept."""
        kept = self._frozen
        if kept is None or (kept.first, kept.sha256) != (frozen.first, frozen.sha256):
            self._frozen, self._held_out = frozen, {}
        if id(dataset) not in self._held_out:
            # The dataset is kept too, so that its number stays its own.
            size = self.devices.rounded_up(self.batch_size)
            found = self.table(dataset, frozen, batch_size=size)
            self._held_out[id(dataset)] = dataset, found
        return self._held_out[id(dataset)][1] or dataset

    def training(
        self,
        dataset: Dataset,
        frozen: Frozen,
        *,
        spec: DataSpec,
        mode: Mode,
        views: int | None,
        batch_size: int,
        examples: int,
    ) -> Features | None:
        """Returns what a stage gets of the training split, where that pays.

        Args:
            dataset: The split.
            frozen: The stages before it.
            spec: Says how the examples are augmented.
            mode: Of the phase.
            views: Augmented versions of each example; None augments in every update.
            batch_size: Of a micro-batch.
            examples: That the phase takes.
        """
        reason = None
        if spec.mix:
            reason = "config.data.mix makes others in every update"
        elif spec.augment and views is None:
            reason = (
                "config.data.augment makes others in every update; "
                "config.data.cache_views=K keeps K versions of each"
            )
        elif examples < len(dataset) * (views or 1):
            reason = f"the phase takes {examples:,} of {len(dataset) * (views or 1):,}"
        if reason is not None:
            self.say(f"inputs of {frozen.first!r} are not kept: {reason}")
            return None
        mode = mode if spec.augment else EVALUATION
        return self.table(
            dataset, frozen, mode=mode, views=views or 1, batch_size=batch_size
        )

    def table(
        self,
        dataset: Dataset,
        frozen: Frozen,
        *,
        mode: Mode = EVALUATION,
        views: int = 1,
        batch_size: int,
    ) -> Features | None:
        """Returns what a stage gets of a split; None where it cannot be kept.

        Matrix products of one number of rows are others, in their last bits, than those
        of another, whatever row it is; so it is computed in batches of the size in which
        it would be computed otherwise.

        Args:
            dataset: The split.
            frozen: The stages before it.
            mode: EVALUATION, or one in which images are augmented.
            views: Augmented versions of each example.
            batch_size: Of the computation.
        """
        first, variables, rng = frozen.first, frozen.variables, frozen.rng
        step = functools.partial(features_step, task=self.task, first=first, mode=mode)
        seen = Views(dataset=dataset, views=views)
        example = next(evaluation_batches(seen, batch_size=batch_size))
        shapes = jax.eval_shape(step, *variables, rng, example)
        table = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(seen), *leaf.shape[1:]), leaf.dtype),
            shapes,
        )
        what = f"{len(seen):,} inputs of {first!r}"
        if nbytes(table) > self.limit:
            self.say(
                f"{what} are not kept: {nbytes(table) / 1e9:.1f} GB, more than "
                "config.data.cache_gb; frozen stages run in every update"
            )
            return None
        placed = self.devices.place((*variables, rng))
        batch = self.devices.place_batch(example, batch_axis=0)
        lowered = self.devices.lower_eval(step, *placed, batch)
        about = {
            "inputs_of": first,
            "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
            "variables": frozen.sha256,
            "rng": "" if mode == EVALUATION else digest({"rng": rng}),
            "views": views,
            "data": dataset.source.fingerprint(),
            "examples": digest({"indices": dataset.indices}),
            "geometry": repr((dataset.geometry, dataset.shape)),
            "machine": _machine(),
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        place = self.folder / key[:32]
        leaves = self._found(place, nbytes(table))
        if leaves is None:
            begin = time.perf_counter()
            program = lowered.compile()
            self.compile_s += time.perf_counter() - begin
            batches = evaluation_batches(seen, batch_size=batch_size)
            rows = _rows(self.devices, program, placed, batches)
            leaves = self._made(place, about, table, rows, what)
        else:
            self.say(f"{what}: found in {place}")
        if leaves is None:
            return None
        kept = jax.tree.unflatten(jax.tree.structure(table), leaves)
        return Features(table=kept, label=dataset.label, views=views)

    def _found(self, place: pathlib.Path, size: int) -> list[np.ndarray] | None:
        """Returns the arrays of a table that is there and whole."""
        if not (place / ABOUT).is_file():
            return None
        mapped = None if size <= self.memory else "r"
        try:
            wanted = json.loads((place / ABOUT).read_text())["sha256"]
            leaves = [
                np.load(place / f"{index}.npy", mmap_mode=mapped)
                for index in range(len(wanted))
            ]
            if [_sha256(leaf) for leaf in leaves] == wanted:
                os.utime(place / ABOUT)
                return leaves
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.say(f"{place} is damaged and made anew")
        shutil.rmtree(place, ignore_errors=True)
        return None

    def _made(
        self,
        place: pathlib.Path,
        about: dict[str, Any],
        table: Any,
        rows: Iterator[list[np.ndarray]],
        what: str,
    ) -> list[np.ndarray] | None:
        """Returns the arrays of a new table, which is kept if that can be."""
        part = place.with_name(f".{place.name}-{os.getpid()}")
        shapes, leaves = jax.tree.leaves(table), []
        if in_memory := nbytes(table) <= self.memory:
            leaves = [np.empty(leaf.shape, leaf.dtype) for leaf in shapes]
            _fill(leaves, rows)
        try:
            self._make_room(nbytes(table))
            part.mkdir(parents=True)
            for index, leaf in enumerate(shapes):
                file = part / f"{index}.npy"
                if in_memory:
                    np.save(file, leaves[index], allow_pickle=False)
                else:
                    opened = np.lib.format.open_memmap(
                        file, mode="w+", dtype=leaf.dtype, shape=leaf.shape
                    )
                    leaves.append(opened)
            if not in_memory:
                _fill(leaves, rows)
            about = {**about, "sha256": [_sha256(leaf) for leaf in leaves]}
            (part / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
            if not place.exists():  # Another run may have been faster.
                part.rename(place)
        except OSError as error:
            self.say(f"{what} cannot be kept in {self.folder}: {error}")
            leaves = leaves if in_memory else None
        else:
            self.say(f"{what}: computed once, {nbytes(table) / 1e6:,.1f} MB in {place}")
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return leaves

    def _make_room(self, size: int) -> None:
        """Deletes the tables that were not used for longest, as the limit says."""
        for part in self.folder.glob(".*"):  # Of runs that were killed.
            if time.time() - part.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(part, ignore_errors=True)
        found = []
        for about in self.folder.glob(f"*/{ABOUT}"):
            taken = sum(file.stat().st_size for file in about.parent.iterdir())
            found.append((about.stat().st_mtime, taken, about.parent))
        total = size + sum(taken for _, taken, _ in found)
        for _, taken, place in sorted(found):
            if total <= self.limit:
                break
            shutil.rmtree(place, ignore_errors=True)
            total -= taken


def _rows(
    devices: Devices, call: Callable, placed: Any, batches: Iterator[dict]
) -> Iterator[list[np.ndarray]]:
    """Yields the arrays that a step gives for each batch."""
    waiting = None
    for batch in batches:
        given = call(*placed, devices.place_batch(batch, batch_axis=0))
        # One batch late, so that the device need not wait for the next one.
        if waiting is not None:
            yield jax.tree.leaves(devices.rows_to_host(waiting))
        waiting = given
    yield jax.tree.leaves(devices.rows_to_host(waiting))


def _fill(leaves: list[np.ndarray], rows: Iterator[list[np.ndarray]]) -> None:
    """Writes arrays row by row; the padding of the last batch is left out."""
    begin = 0
    for parts in rows:
        for leaf, part in zip(leaves, parts):
            leaf[begin : begin + len(part)] = part[: len(leaf) - begin]
        begin += len(parts[0])


def _sha256(array: np.ndarray) -> str:
    """Returns the digest of an array, read in stretches."""
    digester = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    flat = array.reshape(-1)
    for begin in range(0, flat.size, 2**24):
        digester.update(flat[begin : begin + 2**24].tobytes())
    return digester.hexdigest()


def _machine() -> dict[str, Any]:
    """Returns what decides how a program is computed."""
    device = jax.devices()[0]
    return {
        "finetune_jax": finetune_jax.__version__,
        "jax": jax.__version__,
        "device": f"{device.platform} {device.device_kind}",
        "cpu": machine.cpu(),
        "nproc": os.environ.get("NPROC"),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
