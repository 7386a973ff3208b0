"""One exact pass over a split: every example counts once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.data.batches import (
    Examples,
    Shortened,
    by_length,
    evaluation_batches,
)
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.texts import TextOptions
from finetune_jax.features import Features, FeatureStore, Frozen, frozen_part
from finetune_jax.parallel import Compiled, Devices
from finetune_jax.state import TrainState, eval_params
from finetune_jax.step import eval_step
from finetune_jax.tasks.task import Task


@dataclasses.dataclass(kw_only=True)
class Evaluator:
    """Measures states; compiles once.

    Attributes:
        task: Has outputs and metrics.
        devices: Where batches go.
        fixed: What updates read and nobody updates, placed; 'task' is the task's part.
        ema: Whether averaged weights are measured too.
        chosen_ema: Whether they are what predictions are made with.
        batch_size: Rounded up to a multiple of the number of devices; no result depends
            on it, since padding is cut off.
        extras: What is measured besides the splits.
        compile_s: Seconds that compiling has taken.
        store: Keeps what frozen stages make of the splits; None computes it again.
        first: The stage up to which the model is computed on its own; None: is not.
        frozen: The stages before it, where the states to be measured have them in common.
        programs: Compiled so far, by name and the shapes of a batch.
        text: How texts may be shortened; None of what is no text.
    """

    task: Task
    devices: Devices
    fixed: Any
    batch_size: int
    ema: bool = False
    chosen_ema: bool = False
    extras: tuple["Extra", ...] = ()
    compile_s: float = 0.0
    store: FeatureStore | None = None
    first: str | None = None
    frozen: Frozen | None = None
    programs: dict[Any, Compiled] = dataclasses.field(default_factory=dict)
    text: TextOptions | None = None

    def freeze(self, first: str | None, state: TrainState) -> None:
        """Takes note of what the states to be measured have in common.

        Args:
            first: The stage before which none differs from `state`; None: there is none.
            state: On the host.
        """
        found, self.first = None, first
        if first is not None and self.store is not None:
            found = frozen_part(self.task, state, first)
        if found is None or not found.is_like(self.frozen):
            self.frozen = found

    def thaw(self, state: TrainState) -> None:
        """Keeps in mind what states have in common only if this one has it too."""
        if self.frozen is not None and self.first is not None:
            found = frozen_part(self.task, state, self.first)
            self.frozen = self.frozen if found.is_like(self.frozen) else None

    @property
    def all_compile_s(self) -> float:
        """Seconds that compiling has taken, of what the store keeps too."""
        return self.compile_s + (self.store.compile_s if self.store else 0.0)

    def weights(self, placed: TrainState) -> dict[str, Any]:
        """Returns the parameters that are measured, by what metrics' names begin with."""
        return {kind: eval_params(placed, ema=ema) for kind, ema in self._kinds.items()}

    @property
    def _kinds(self) -> dict[str, bool]:
        """Whether weights are averaged, by what the names of their metrics begin with."""
        return {"": False, "ema_": True} if self.ema else {"": False}

    def chosen(self, placed: TrainState) -> Any:
        """Returns the parameters that predictions are made with."""
        return eval_params(placed, ema=self.chosen_ema)

    def outputs(self, placed: TrainState, dataset: Dataset) -> dict[str, np.ndarray]:
        """Returns the outputs of a placed state, a row an example of `dataset.kept()`."""
        return self._outputs(placed, dataset, ema=self.chosen_ema)

    def _outputs(
        self, placed: TrainState, dataset: Dataset, *, ema: bool
    ) -> dict[str, np.ndarray]:
        step = functools.partial(eval_step, task=self.task, first=self.first)
        params = eval_params(placed, ema=ema)
        arguments = params, placed.batch_stats, self.fixed["task"]
        examples: Examples = dataset
        frozen, order = self.frozen, None
        if frozen is not None and not (ema and frozen.averaged):
            assert self.store is not None
            examples = self.store.held_out(dataset, frozen)
        elif self.text is not None and self.first is None:
            # By length, so that short texts stand beside short ones.
            order = by_length(dataset)
            examples = Shortened(dataset=dataset, options=self.text, order=order)
        kind = "features" if isinstance(examples, Features) else "inputs"
        rows = self.rows(f"outputs of {self.first}, {kind}", step, arguments, examples)
        if order is not None:
            rows = jax.tree.map(lambda array: array[np.argsort(order)], rows)
        counts = dataset.readable(np.arange(len(dataset)))
        return {name: array[counts] for name, array in rows.items()}

    def rows(
        self, name: str, step: Callable, arguments: tuple, dataset: Examples
    ) -> dict[str, np.ndarray]:
        """Returns what a step gives for a split, a row an example in their order.

        Args:
            name: Of the step, which is compiled once under it.
            step: Takes `arguments` and a batch; returns a dict of arrays [B, ...].
            arguments: Placed.
            dataset: The examples.
        """
        size = self.devices.rounded_up(self.batch_size)
        rows, parts = [], []
        for batch in evaluation_batches(dataset, batch_size=size):
            batch = self.devices.place_batch(batch, batch_axis=0)
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            if (name, shapes) not in self.programs:
                program = self.devices.compile_eval(step, *arguments, batch)
                self.programs[name, shapes] = program
                self.compile_s += program.compile_s
            rows.append(self.programs[name, shapes].call(*arguments, batch))
            # One batch late, so that the device need not wait, nor keep more than two.
            parts += [self.devices.rows_to_host(row) for row in rows[:-1]]
            rows = rows[-1:]
        parts += [self.devices.rows_to_host(row) for row in rows]
        return jax.tree.map(
            lambda *leaves: np.concatenate(leaves)[: len(dataset)], *parts
        )

    def measure(
        self, placed: TrainState, splits: Mapping[str, Dataset]
    ) -> dict[str, float]:
        """Returns the metrics of a placed state on some splits, as `split/name`.

        What `extras` measure is among them, under names of its own.
        """
        found = {}
        for split, dataset in splits.items():
            for kind, ema in self._kinds.items():
                outputs = self._outputs(placed, dataset, ema=ema)
                metrics = self.task.metrics(outputs, dataset.kept().on_host())
                found |= {f"{split}/{kind}{name}": v for name, v in metrics.items()}
        for extra in self.extras:
            found |= extra(self, placed)
        return found


# Returns metrics of a placed state by their full names.
Extra = Callable[[Evaluator, TrainState], dict[str, float]]
