"""Texts of one or two sentences: one class or one number each."""

from collections.abc import Mapping
from typing import Any

from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.supervised import SupervisedTask, one_model_task
from finetune_jax.tasks.components.targets import (
    TargetOptions,
    class_or_regression_target,
    model_for,
)
from finetune_jax.tasks.components.text_inputs import TextInputs, check_encoder

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("text", "classes"), ("text", "numbers"))
# Default metrics for each value of `config.data.labels`.
METRICS = {"classes": ("accuracy", "loss"), "numbers": ("mse", "mae", "r2")}
OPTIONS = TargetOptions()


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    options: TargetOptions = OPTIONS,
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        options: Loss and metrics.

    Raises:
        UserError: Something unknown or out of range, or a model that cannot read texts.
    """
    target = class_or_regression_target(data, options, METRICS)
    module: Any = model_for(target, model, precision=precision)
    check_encoder(module, model["name"], data)
    return one_model_task(module, TextInputs(data=data), target)
