"""The evaluation step: outputs of a batch, and its loss."""

from typing import Any

import jax

from finetune_jax.tasks.task import EVALUATION, Task


def eval_step(
    params: Any,
    batch_stats: Any,
    fixed: Any,
    batch: dict,
    *,
    task: Task,
    first: str | None = None,
) -> dict:
    """Returns the task's outputs for one batch, a row an example.

    Args:
        params: From `eval_params`.
        batch_stats: Running averages.
        fixed: Arrays that the task reads and nobody updates.
        batch: Arrays [b, ...], with 'inputs', or with the 'features' that `first` gets.
        task: Has the outputs.
        first: The stage up to which the model is computed on its own.
    """
    if "features" not in batch:
        batch = task.prepare(batch, jax.random.key(0), EVALUATION)
        if first is not None:
            batch = task.with_features(params, batch_stats, batch, first=first)
    return task.outputs(params, batch_stats, fixed, batch, first=first)
