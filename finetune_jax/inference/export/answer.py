"""What an exported model computes: from inputs as files have them to answers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.tasks.task import EVALUATION, Task


def answer(
    task: Task, variables: Mapping[str, Any], fixed: Any, inputs: Any
) -> dict[str, jax.Array]:
    """Returns what a model says of a batch, as evaluation computes it.

    Args:
        task: Has the model.
        variables: 'params' and 'batch_stats'.
        fixed: What the task reads besides.
        inputs: [B, ...], as a file has them: images in bytes, not normalised; of
            texts [B, 2, T], ids and sentences.
    """
    data = getattr(task, "data", None)
    if data is not None and data.text is not None:
        # Texts may have another length than those of the run.
        data = dataclasses.replace(data, shape=inputs.shape[1:])
        task = dataclasses.replace(task, data=data)  # type: ignore[call-arg]
    # Outputs may have a part that compares with labels, which is left out of answers.
    batch = {
        name: jnp.zeros((inputs.shape[0], *leaf.shape), leaf.dtype)
        for name, leaf in task.batch_spec.items()
    }
    batch = task.prepare({**batch, "inputs": inputs}, jax.random.key(0), EVALUATION)
    state = variables["params"], variables["batch_stats"], fixed
    return task.answers(task.outputs(*state, batch))
