"""Cache of the outputs of frozen stages and teachers: computed once, stored on disk.

The cache key of a table is a digest of all that it depends on: the program (and so the
model's code, the preprocessing and the precision), the variables of the frozen stages, the
data, the chosen examples and the machine.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.core.array_store import Tables
from finetune_jax.core.pytrees import digest, nbytes, stage_of
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.batches import (
    BatchSource,
    LocalRows,
    Views,
    evaluation_batches,
)
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.spec import DataSpec
from finetune_jax.features import cache_keys
from finetune_jax.features.frozen_prefix import at_a_time, features_step, teacher_step
from finetune_jax.models.modes import EVALUATION, Mode
from finetune_jax.parallel import processes
from finetune_jax.parallel.devices import (
    Devices,
    concurrent_batch,
    concurrent_programs,
    stable_batch,
)
from finetune_jax.parallel.executor import outputs
from finetune_jax.tasks.task import TEACHER_OUTPUTS, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The cached features of a split, which replace a `Dataset`.

    Attributes:
        table: Arrays [N * views, ...]; the views of an example follow one another.
        label: Label of each example, as in a `Dataset`.
        views: Number of augmented versions of an example.
        device_batches: Evaluation batches on the devices, by their key.
    """

    table: Any
    label: np.ndarray
    views: int = 1
    device_batches: dict[Any, list[Any]] = dataclasses.field(
        default_factory=dict, compare=False
    )

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
class FrozenPrefix:
    """The stages before `first`, whose outputs no update of a phase changes.

    Attributes:
        first: First stage after the prefix.
        variables: Parameters and batch statistics of the prefix, on the host; None if
            its outputs are not cached.
        rng: Key data of the state.
        is_averaged: Whether the averaged weights of the prefix differ from the weights.
    """

    first: str
    variables: tuple[Any, Any] | None = None
    rng: Any = None
    is_averaged: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the variables."""
        return digest(self.variables)

    @property
    def what(self) -> str:
        """The outputs of the prefix in words."""
        return f"inputs of {self.first!r}"

    def step(self, task: Task, mode: Mode, rows: int | None = None) -> Callable:
        """Returns the function of (*variables, rng, batch) that computes the outputs.

        Args:
            task: Task with the model.
            mode: EVALUATION, or a mode in which images are augmented.
            rows: Chunk size of the computation; None computes a batch at once.
        """
        given = {"task": task, "mode": mode, "rows": rows, "first": self.first}
        return functools.partial(features_step, **given)

    def cached_like(self, other: "FrozenPrefix | None") -> "FrozenPrefix":
        """Returns the prefix, cached only if it has the variables of another one."""
        if self.variables is not None and other is not None:
            if (self.first, self.sha256) == (other.first, other.sha256):
                return self
        return self.uncached()

    def uncached(self) -> "FrozenPrefix":
        """Returns the prefix without variables, so that its outputs are computed."""
        return FrozenPrefix(first=self.first)


def frozen_prefix(task: Task, state: TrainState, mode: Mode) -> FrozenPrefix | None:
    """Returns the longest prefix of a model that no update changes; None if it is empty.

    Args:
        task: Task with the model.
        state: State on the host.
        mode: Mode of the phase.
    """
    first = task.models.frozen_prefix_end(mode)
    if first is None:
        return None
    stages = task.models.stages
    before = stages[: stages.index(first)]
    params, batch_stats = (
        {stage: tree[stage] for stage in before if stage in tree}
        for tree in (state.params, state.batch_stats)
    )
    return FrozenPrefix(
        first=first,
        variables=(params, batch_stats),
        rng=state.rng,
        is_averaged=any(stage_of(name) in before for name in state.ema),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teachers:
    """The teachers of a task, whose outputs no update changes.

    Attributes:
        fixed: Arrays that the task reads and nobody updates, on the host.
        rng: Key data of the state.
    """

    fixed: Any
    rng: Any
    first: str = ""
    what: str = "outputs of teachers"

    @property
    def variables(self) -> tuple[Any]:
        """The fixed arrays."""
        return (self.fixed,)

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the fixed arrays."""
        return digest(self.fixed)

    def step(self, task: Task, mode: Mode, rows: int | None = None) -> Callable:
        """Returns the function of (*variables, rng, batch) that computes the outputs."""
        return functools.partial(teacher_step, task=task, mode=mode, rows=rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOutputs:
    """A training split with the teachers' outputs for its examples.

    Attributes:
        examples: Training split, or the features that replace it.
        outputs: Table of the teachers' outputs, as long as the examples.
    """

    examples: BatchSource
    outputs: Features

    @property
    def label(self) -> np.ndarray:
        """Label of each example."""
        return self.examples.label

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.examples)

    def take(self, positions: np.ndarray) -> dict[str, Any]:
        """Returns arrays of the examples, and 'taught'."""
        outputs = self.outputs.take(positions)["features"]
        return {**self.examples.take(positions), TEACHER_OUTPUTS: outputs}


# A function of examples whose outputs no update changes.
Computation = FrozenPrefix | Teachers


@dataclasses.dataclass(kw_only=True)
class FeatureStore:
    """Outputs of frozen stages and teachers, cached for this run and for others.

    Attributes:
        task: Task with the models.
        devices: Devices that compute the outputs.
        tables: Cache on the disk.
        batch_size: Number of held-out examples that are computed at once.
        splits: Names of splits by the key of their data set, for messages.
        compile_s: Seconds spent on compiling.
    """

    task: Task
    devices: Devices
    tables: Tables
    batch_size: int
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compile_s: float = 0.0
    # Tables of the last prefix and of the teachers, by all that they depend on; None if
    # a table cannot be cached.
    _held: dict[tuple, Features | None] = dataclasses.field(default_factory=dict)
    # The last compiled program, by the digest of its text.
    _program: tuple[str, Callable] | None = None

    def held_out(self, dataset: Dataset, prefix: FrozenPrefix) -> BatchSource:
        """Returns the features of a split; the split itself if they cannot be cached."""
        size = concurrent_batch(self.devices, self.batch_size)
        return self.table(dataset, prefix, batch_size=size) or dataset

    def training(
        self,
        dataset: Dataset,
        computation: Computation,
        *,
        spec: DataSpec,
        mode: Mode,
        views: int | None,
        batch_size: int,
        examples: int,
    ) -> Features | None:
        """Returns the outputs for the training split; None if caching does not pay.

        Args:
            dataset: Training split.
            computation: Frozen prefix, or teachers.
            spec: Spec of the data, which says how examples are augmented.
            mode: Mode of the phase.
            views: Augmented versions of each example; None augments in every update.
            batch_size: Size of a micro-batch.
            examples: Number of examples that the phase takes.
        """
        if (reason := spec.why_not_repeated(views)) is not None:
            self.tables.say(f"{computation.what} are not kept: {reason}")
            return None
        rows = stable_batch(self.devices)
        batch_size += -batch_size % rows
        return self.table(
            dataset,
            computation,
            mode=mode if spec.augment else EVALUATION,
            views=views or 1,
            batch_size=batch_size,
            rows=at_a_time(self.task, batch_size, rows),
            examples=examples,
        )

    def table(
        self,
        dataset: Dataset,
        computation: Computation,
        *,
        mode: Mode = EVALUATION,
        views: int = 1,
        batch_size: int,
        rows: int | None = None,
        examples: int | None = None,
    ) -> Features | None:
        """Returns the outputs for a split; None if they cannot be cached.

        The last bits of a matrix product depend on its number of rows, so the outputs are
        computed with the batch size that the training step would use.

        Args:
            dataset: Split.
            computation: Frozen prefix, or teachers.
            mode: EVALUATION, or a mode in which images are augmented.
            views: Augmented versions of each example.
            batch_size: Batch size of the computation.
            rows: Chunk size within a batch; None is the whole batch.
            examples: Number of examples that will be taken; if the table has more, it is
                not made. None is all.
        """
        drawn = "" if mode == EVALUATION else digest({"rng": computation.rng})
        stages = computation.first, computation.sha256
        assert computation.variables is not None
        key = *stages, dataset.key, mode, views, batch_size, rows, drawn
        if key not in self._held:
            step = computation.step(self.task, mode, rows)
            seen = Views(dataset=dataset, views=views)
            batches = evaluation_batches(
                seen, batch_size=batch_size, local_rows=self._local_rows
            )
            example = next(batches)
            placed = self.devices.place((*computation.variables, computation.rng))
            batch = self.devices.place_batch(example, batch_axis=0)
            lowered = self.devices.over_devices(step).lower(*placed, batch)
            about = {
                "inputs_of": computation.first,
                "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
                "variables": computation.sha256,
                "rng": drawn,
                "views": views,
                **dataset.about,
                "machine": cache_keys.of_machine(),
            }
            name = self.splits.get(dataset.key)
            split = f" for {name}" if name else ""
            found = self._found_or_made(
                seen, f"{len(seen):,} {computation.what}{split}", about, lowered, placed,
                batch_size=batch_size, rows=rows, examples=examples,
            )  # fmt: skip
            if found is None and examples is not None:
                return None  # Another phase may take more examples.
            mine = {k: v for k, v in self._held.items() if k[:2] == stages}
            self._held = mine | {key: found}
        return self._held[key]

    @property
    def _local_rows(self) -> LocalRows:
        """The rows of a batch that this process needs; None needs all."""
        return self.devices.local_rows if self.devices.spans_processes else None

    def _found_or_made(
        self,
        seen: Views,
        what: str,
        about: dict[str, Any],
        lowered: Any,
        placed: tuple,
        *,
        batch_size: int,
        rows: int | None,
        examples: int | None,
    ) -> Features | None:
        """Returns a table from the disk, or computed with a lowered program."""
        table = jax.tree.map(
            lambda row: jax.ShapeDtypeStruct((len(seen), *row.shape), row.dtype),
            self.devices.rows_of(lowered),
        )
        if nbytes(table) > self.tables.limit:
            self.tables.say(
                f"{what} are not kept: {nbytes(table) / 1e9:.1f} GB, more than "
                "config.data.cache_gb; frozen stages run in every update"
            )
            return None
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        leaves = self._if_all_have(self.tables.find(key, table))
        if leaves is not None:
            self.tables.say(f"{what}: found in {self.tables.place(key)}")
        elif examples is not None and examples < len(seen):
            self.tables.say(
                f"{what} are not kept: the phase takes {examples:,} of them"
            )
        else:
            call = functools.partial(self._compiled(about["program"], lowered), *placed)
            made = self._leaves(call, seen, batch_size, rows)
            leaves = self._if_all_have(self.tables.make(key, about, table, made, what))
        if leaves is None:
            return None
        kept = jax.tree.unflatten(jax.tree.structure(table), leaves)
        return Features(table=kept, label=seen.label, views=seen.views)

    def _if_all_have(self, leaves: list[np.ndarray] | None) -> list | None:
        """Returns the arrays of a table if all processes have it."""
        found = processes.gathered("table of features", leaves is not None)
        return leaves if all(found) else None

    def _compiled(self, program: str, lowered: Any) -> Callable:
        """Returns a compiled program, given a digest of its text."""
        if self._program is None or self._program[0] != program:
            begin = time.perf_counter()
            self._program = program, lowered.compile()
            self.compile_s += time.perf_counter() - begin
        return self._program[1]

    def _leaves(
        self, call: Callable, seen: BatchSource, batch_size: int, rows: int | None
    ) -> Iterator[list[np.ndarray]]:
        """Yields the output arrays of a program for each batch, a row an example."""
        # No more examples at once than evaluation has in memory.
        largest = concurrent_batch(self.devices, self.batch_size)
        fits = (rows or batch_size) <= largest
        computed = outputs(
            self.devices,
            lambda batch: functools.partial(call, batch),
            (
                self.devices.place_batch(batch, batch_axis=0)
                for batch in evaluation_batches(
                    seen, batch_size=batch_size, local_rows=self._local_rows
                )
            ),
            at_once=concurrent_programs(self.devices) if fits else 1,
        )
        for index, batch in enumerate(computed):
            left = len(seen) - index * batch_size
            yield [leaf[:left] for leaf in jax.tree.leaves(batch)]
