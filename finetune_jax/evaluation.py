"""One exact pass over a split: every example counts once."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from finetune_jax.data.batches import evaluation_batches
from finetune_jax.data.dataset import Dataset
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
        fixed: What the task reads and nobody updates, placed.
        batch_size: Rounded up to a multiple of the number of devices; no result depends
            on it, since padding is cut off.
        compile_s: Seconds that compiling has taken.
    """

    task: Task
    devices: Devices
    fixed: Any
    batch_size: int
    compile_s: float = 0.0
    _program: Compiled | None = None

    def outputs(self, placed: TrainState, dataset: Dataset) -> dict[str, np.ndarray]:
        """Returns the outputs of a placed state, a row an example in their order."""
        count = self.devices.count
        size = -(-self.batch_size // count) * count
        rows = []
        for batch in evaluation_batches(dataset, batch_size=size):
            batch = self.devices.place_batch(batch, batch_axis=0)
            arguments = (eval_params(placed), placed.batch_stats, self.fixed, batch)
            if self._program is None:
                step = functools.partial(eval_step, task=self.task)
                self._program = self.devices.compile_eval(step, *arguments)
                self.compile_s += self._program.compile_s
            rows.append(self._program.call(*arguments))
        parts = [self.devices.rows_to_host(row) for row in rows]
        return {
            name: np.concatenate([part[name] for part in parts])[: len(dataset)]
            for name in parts[0]
        }

    def measure(
        self, placed: TrainState, splits: Mapping[str, Dataset]
    ) -> dict[str, float]:
        """Returns the metrics of a placed state on some splits, as `split/name`."""
        found = {}
        for split, dataset in splits.items():
            outputs = self.outputs(placed, dataset)
            metrics = self.task.metrics(outputs, {"label": dataset.label})
            found |= {f"{split}/{name}": value for name, value in metrics.items()}
        return found
