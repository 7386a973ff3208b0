"""Checks for `--mode=plan`: do the weights of a run exist, and do they fit the model?"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax.config import Config
from finetune_jax.config.members import (
    labels_of,
    weights_addresses,
    weights_entries,
)
from finetune_jax.core.errors import Problem, collected, raise_if
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Data
from finetune_jax.tasks.components.teachers import START
from finetune_jax.tasks.task import Task
from finetune_jax.training.initial.embeddings import matched
from finetune_jax.training.initial.starting_state import (
    with_domains_loaded,
    with_model_loaded,
)
from finetune_jax.weights.addresses import Weights, is_reachable, read_headers
from finetune_jax.weights.metadata import architecture


def weights_lines(
    task: Task, config: Config, shapes: TrainState, data: Data | None
) -> list[str]:
    """Returns a line for the weights of each model, from the headers of their files.

    Args:
        task: Task with the models.
        config: Config of the run.
        shapes: Shapes of the initial state.
        data: Data of the run; None if it is not there.

    Raises:
        UserError: Lists weights that are not there, and those that do not fit.
    """
    problems: list[Problem] = []
    with collected(problems):
        architecture.check(architecture.described(config), config.init.fresh)
    lines, entries = [], weights_entries(config)
    addresses = weights_addresses(config)
    learning = {p: a for p, a in addresses.items() if p in ("", *task.models.prefixes)}
    for prefix, address in learning.items():
        with collected(problems):
            found = read_headers(address, entries[prefix])
            if found is None:
                lines.append(f"{address}: {_not_downloaded()}")
            elif data is None:
                lines.append(f"{address}: found; whether it fits depends on the data")
            else:
                lines += _fitting(task, config, shapes, data, prefix, found)
    lines += _teacher_lines(task, config, problems)
    raise_if(problems)
    return lines or ["none: all parameters start at random"]


def _not_downloaded() -> str:
    reached = "the hub responds" if is_reachable() else "the hub was not reached"
    return f"not downloaded, so not checked; --mode=train downloads it ({reached})"


def _fitting(
    task: Task,
    config: Config,
    shapes: TrainState,
    data: Data,
    prefix: str,
    found: Weights,
) -> list[str]:
    """Returns lines about weights that fit the model of a prefix.

    Raises:
        UserError: They do not fit.
    """
    variables: Mapping[str, Any] = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape),
        {"params": shapes.params, "batch_stats": shapes.batch_stats},
    )
    if task.domains is not None:
        return with_domains_loaded(task.domains, variables, found, config)[2]
    if not prefix:
        found = matched(found, variables["params"], data.fitted)
    prefixes = task.models.prefixes
    others = [name for name in prefixes if name] if "" in prefixes else []
    return with_model_loaded(
        task, variables, prefix, found, others=others, spec=data.spec, config=config
    )[2]


def _teacher_lines(task: Task, config: Config, problems: list[Problem]) -> list[str]:
    """Returns a line for each teacher, and appends those that are not there."""
    if task.teachers is None:
        return []
    lines = []
    for label, entry in zip(labels_of(config.model), config.model.members):
        if entry.pretrained in (None, START):
            continue
        with collected(problems):
            found = read_headers(entry.pretrained, entry.entry)
            state = _not_downloaded() if found is None else "found"
            lines.append(f"teacher {label}: {entry.pretrained}: {state}")
    return lines
