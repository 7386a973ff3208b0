"""The evaluation step: outputs of a batch."""

from typing import Any

import jax

from finetune_jax.models.modes import EVALUATION
from finetune_jax.tasks.task import Task


def eval_step(
    params: Any,
    batch_stats: Any,
    batch: dict,
    *,
    task: Task,
    first: str | None = None,
    domain: str | None = None,
) -> dict:
    """Returns the task's outputs for one batch, one row per example.

    Args:
        params: From `eval_params`.
        batch_stats: Running averages.
        batch: Arrays [b, ...], with 'inputs', or with 'features', the input of `first`.
        task: Has the outputs.
        first: The stage up to which the model is computed on its own.
        domain: The domain of the batch, in a task of several.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    if domain is not None and task.domains is not None:
        variables = task.domains.variables_of(domain, variables)
        task = task.domains.tasks[domain]
    if "features" not in batch:
        batch = task.prepare(batch, jax.random.key(0), EVALUATION)
        if first is not None:
            batch = task.models.with_features(variables, batch, first=first)
    if "features" in batch:
        batch = task.models.unpacked(batch)
    return task.outputs(variables, batch, first=first)
