"""The decision threshold of a task: chosen on validation rows, then fixed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune_jax.tasks.components.supervised import SupervisedTask
from finetune_jax.tasks.components.targets import ClassTarget
from finetune_jax.tasks.task import Task

# Entry of `result.json`.
THRESHOLD = "threshold"


def _target(task: Task) -> ClassTarget | None:
    """Returns the target of a task with a threshold rule; None without a rule."""
    target = task.target if isinstance(task, SupervisedTask) else None
    if isinstance(target, ClassTarget) and target.threshold_rule is not None:
        return target
    return None


def decided(task: Task, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Task:
    """Returns the task with the threshold that its rule chooses.

    A task without a rule, or with a threshold already, stays as it is.

    Args:
        task: The task.
        outputs: Outputs of all validation examples.
        batch: Their 'label'.
    """
    target = _target(task)
    if target is None or target.threshold is not None:
        return task
    return with_threshold(task, target.choose_threshold(outputs, batch))


def with_threshold(task: Task, threshold: float | None) -> Task:
    """Returns the task with a given threshold, if it has a rule."""
    target: Any = _target(task)
    if target is None:
        return task
    target = dataclasses.replace(target, threshold=threshold)
    return dataclasses.replace(task, target=target)  # type: ignore[type-var]


def threshold_of(task: Task) -> float | None:
    """Returns the threshold of a task, if it has one."""
    target = _target(task)
    return None if target is None else target.threshold


def threshold_entry(found: Mapping[str, float], *, ema: bool) -> dict[str, float]:
    """Returns the entry of `result.json` with the threshold; empty without a rule.

    Args:
        found: Metrics of the best state.
        ema: Whether predictions use averaged weights.
    """
    name = f"validation/{'ema_' if ema else ''}{THRESHOLD}"
    return {THRESHOLD: found[name]} if name in found else {}


def describe_threshold(task: Task) -> str | None:
    """Returns a line about the threshold of a task; None if it has no rule."""
    target = _target(task)
    if target is None:
        return None
    if target.threshold is None:
        return (
            "warning: config.task.threshold_rule: the run has not finished, so no "
            "threshold was chosen; the class with the highest probability is predicted"
        )
    positive, rule = target.names[1], target.threshold_rule
    return (
        f"class {positive!r} from a probability of {target.threshold:.4g} "
        f"(config.task.threshold_rule={rule!r}, chosen on validation)"
    )
