"""Tasks: `task.py` is the contract, every other file one task, found by its name."""

import sys
from typing import Any

from finetune_jax import lookup
from finetune_jax.config import Config
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.task import Task


def make_task(config: Config, spec: DataSpec) -> Task:
    """Returns the task that a config describes, for data that look like `spec`.

    Raises:
        UserError: Unknown names or arguments in `config.task` or `config.model`.
    """
    arguments = dict(config.task)
    return lookup.call(
        task_module(arguments.pop("name")).make,
        arguments,
        "config.task",
        data=spec,
        model=dict(config.model),
        precision=config.precision,
    )


def task_module(name: str) -> Any:
    """Returns the module of a task.

    Raises:
        UserError: No such task.
    """
    module = lookup.module(sys.modules[__name__], name, "config.task.name")
    if not hasattr(module, "make"):
        lookup.choose({}, name, "config.task.name")
    return module
