"""What frozen stages make of the examples: computed once, kept on disk, used again.

A table of features is found by a digest of all that it depends on: the compiled program
(and so the model's code, the preprocessing and the precision), the variables of the frozen
stages, the data, the examples chosen, the machine. Nothing else is ever used in its place.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from finetune_jax.core.array_store import Tables
from finetune_jax.core.pytrees import digest, nbytes, stage_of
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.batches import Examples, Views, evaluation_batches
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.spec import DataSpec
from finetune_jax.features import cache_keys
from finetune_jax.features.frozen_prefix import at_a_time, features_step, taught_step
from finetune_jax.parallel.devices import Devices
from finetune_jax.tasks.task import EVALUATION, TAUGHT, Mode, Task


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


@dataclasses.dataclass(kw_only=True)
class Frozen:
    """The stages before a stage, while they stay as they are; or teachers.

    Attributes:
        first: The stage.
        variables: Their parameters and batch statistics, on the host.
        rng: Of the state.
        averaged: Whether averaged weights of them are others.
        sha256: Digest of the variables.
        teaches: Whether what is meant is what `Task.taught` says instead.
        tables: What held-out splits gave, None where that cannot be kept, with the
            split itself; by its identity.
    """

    first: str
    variables: tuple[Any, ...]
    rng: Any
    averaged: bool
    sha256: str
    teaches: bool = False
    tables: dict[int, tuple[Dataset, Features | None]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def what(self) -> str:
        """What is made of the examples, for a person."""
        return "answers of teachers" if self.teaches else f"inputs of {self.first!r}"

    def step(self, task: Task, mode: Mode, rows: int | None = None) -> Callable:
        """Returns what makes it of a batch, of the variables and the rng.

        Args:
            task: Has the models.
            mode: As `table` takes it.
            rows: Examples that are in work at a time; None: all.
        """
        given = {"task": task, "mode": mode, "rows": rows}
        if self.teaches:
            return functools.partial(taught_step, **given)
        return functools.partial(features_step, first=self.first, **given)

    def is_like(self, other: "Frozen | None") -> bool:
        """Returns whether the same variables of the same stages are meant."""
        return other is not None and (self.first, self.sha256) == (
            other.first,
            other.sha256,
        )


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


def teaching_part(fixed: Any, rng: Any) -> Frozen:
    """Returns what `Task.taught` is computed from.

    Args:
        fixed: What the task reads and nobody updates, on the host.
        rng: Of the state.
    """
    return Frozen(
        first="", variables=(fixed,), rng=rng, averaged=False,
        sha256=digest(fixed), teaches=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught:
    """A training split with what teachers say of its examples.

    Attributes:
        examples: The split, or what stands for it.
        said: A table as long as these.
    """

    examples: Examples
    said: Features

    @property
    def label(self) -> np.ndarray:
        """That of the examples."""
        return self.examples.label

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.examples)

    def take(self, positions: np.ndarray) -> dict[str, Any]:
        """Returns what the examples do, and 'taught'."""
        said = self.said.take(positions)["features"]
        return {**self.examples.take(positions), TAUGHT: said}


@dataclasses.dataclass(kw_only=True)
class FeatureStore:
    """What stages get of the examples, of this run and of others.

    Attributes:
        task: Has the model.
        devices: Where they are computed.
        tables: Where they are kept.
        batch_size: Examples of a held-out split that are in work at a time.
        compile_s: Seconds that compiling has taken.
        held: Tables of the stages that were asked for last, with their splits.
        programs: The last one that was compiled, by a digest of its text.
    """

    task: Task
    devices: Devices
    tables: Tables
    batch_size: int
    compile_s: float = 0.0
    held: dict[Any, tuple[Dataset, Features]] = dataclasses.field(default_factory=dict)
    programs: dict[str, Callable] = dataclasses.field(default_factory=dict)

    def held_out(self, dataset: Dataset, frozen: Frozen) -> Examples:
        """Returns what a stage gets of a split; the split where that cannot be kept."""
        if id(dataset) not in frozen.tables:
            size = self.devices.part_of(self.batch_size)
            found = self.table(dataset, frozen, batch_size=size)
            frozen.tables[id(dataset)] = dataset, found
        return frozen.tables[id(dataset)][1] or dataset

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
        if (reason := spec.why_always_others(views)) is not None:
            self.tables.say(f"{frozen.what} are not kept: {reason}")
            return None
        rows = self.devices.whole_rows
        batch_size += -batch_size % rows
        return self.table(
            dataset,
            frozen,
            mode=mode if spec.augment else EVALUATION,
            views=views or 1,
            batch_size=batch_size,
            rows=at_a_time(self.task, batch_size, rows),
            examples=examples,
        )

    def table(
        self,
        dataset: Dataset,
        frozen: Frozen,
        *,
        mode: Mode = EVALUATION,
        views: int = 1,
        batch_size: int,
        rows: int | None = None,
        examples: int | None = None,
    ) -> Features | None:
        """Returns what a stage gets of a split; None where it cannot be kept.

        Matrix products of one number of rows are others, in their last bits, than those
        of another, whatever row it is; so it is computed in batches of the size in which
        it would be computed otherwise, on CPU one of `Devices.whole_rows`.

        Args:
            dataset: The split.
            frozen: The stages before it.
            mode: EVALUATION, or one in which images are augmented.
            views: Augmented versions of each example.
            batch_size: Of the computation.
            rows: Examples of a batch that are in work at a time; None: all.
            examples: How many will be taken; a table of more is not made. None: all.
        """
        rng = "" if mode == EVALUATION else digest({"rng": frozen.rng})
        stages = frozen.first, frozen.sha256
        key = *stages, id(dataset), mode, views, batch_size, rows, rng
        if key in self.held:
            return self.held[key][1]
        found = self._found_or_made(
            dataset,
            frozen,
            mode=mode,
            views=views,
            batch_size=batch_size,
            rows=rows,
            examples=examples,
            drawn=rng,
        )
        if found is not None:
            mine = {k: v for k, v in self.held.items() if k[: len(stages)] == stages}
            self.held = mine | {key: (dataset, found)}
        return found

    def _found_or_made(
        self,
        dataset: Dataset,
        frozen: Frozen,
        *,
        mode: Mode,
        views: int,
        batch_size: int,
        rows: int | None,
        examples: int | None,
        drawn: str,
    ) -> Features | None:
        """Returns what `table` does, from the disk or computed; `drawn` is of the rng."""
        variables, rng = frozen.variables, frozen.rng
        step = frozen.step(self.task, mode, rows)
        seen = Views(dataset=dataset, views=views)
        example = next(evaluation_batches(seen, batch_size=batch_size))
        placed = self.devices.place((*variables, rng))
        batch = self.devices.place_batch(example, batch_axis=0)
        lowered = self.devices.lower_eval(step, *placed, batch)
        table = jax.tree.map(
            lambda row: jax.ShapeDtypeStruct((len(seen), *row.shape), row.dtype),
            self.devices.rows_of(lowered),
        )
        what = f"{len(seen):,} {frozen.what}"
        if nbytes(table) > self.tables.limit:
            self.tables.say(
                f"{what} are not kept: {nbytes(table) / 1e9:.1f} GB, more than "
                "config.data.cache_gb; frozen stages run in every update"
            )
            return None
        about = {
            "inputs_of": frozen.first,
            "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
            "variables": frozen.sha256,
            "rng": drawn,
            "views": views,
            **cache_keys.of_examples(dataset),
            "machine": cache_keys.of_machine(),
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        leaves = self.tables.find(key, table)
        if leaves is not None:
            self.tables.say(f"{what}: found in {self.tables.place(key)}")
        elif examples is not None and examples < len(seen):
            self.tables.say(
                f"{what} are not kept: the phase takes {examples:,} of them"
            )
        else:
            call = functools.partial(self._compiled(about["program"], lowered), *placed)
            made = self._leaves(call, seen, batch_size, rows)
            leaves = self.tables.make(key, about, table, made, what)
        if leaves is None:
            return None
        kept = jax.tree.unflatten(jax.tree.structure(table), leaves)
        return Features(table=kept, label=dataset.label, views=views)

    def _compiled(self, program: str, lowered: Any) -> Callable:
        """Returns a compiled program, given a digest of its text."""
        if program not in self.programs:
            begin = time.perf_counter()
            self.programs = {program: lowered.compile()}
            self.compile_s += time.perf_counter() - begin
        return self.programs[program]

    def _leaves(
        self, call: Callable, seen: Examples, batch_size: int, rows: int | None
    ) -> Iterator[list[np.ndarray]]:
        """Yields the arrays that a program gives for each batch, a row an example."""
        # No more examples at a time than evaluation has in memory.
        fits = (rows or batch_size) <= self.devices.part_of(self.batch_size)
        outputs = self.devices.outputs(
            lambda batch: functools.partial(call, batch),
            evaluation_batches(seen, batch_size=batch_size),
            at_once=self.devices.at_once if fits else 1,
        )
        for index, batch in enumerate(outputs):
            left = len(seen) - index * batch_size
            yield [leaf[:left] for leaf in jax.tree.leaves(batch)]
