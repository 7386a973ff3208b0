"""Regression: one number or several per image or vector, in their own units."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.image_inputs import ImageInputs
from finetune_jax.tasks.components.supervised import SupervisedTask, one_model_task
from finetune_jax.tasks.components.targets import (
    TargetOptions,
    model_for,
    regression_target,
)

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("images", "numbers"), ("vectors", "numbers"))
METRICS = ("mse", "mae", "r2")


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    loss: str = "mse",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    class_weights: str = "none",
    metrics: tuple[str, ...] = METRICS,
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.REGRESSION`.
        loss_args: Arguments of the loss by name.
        class_weights: Only 'none': there are no classes.
        metrics: Names in `metrics.REGRESSION`.

    Raises:
        UserError: Something unknown or out of range.
    """
    options = TargetOptions(
        loss=loss, loss_args=loss_args, class_weights=class_weights, metrics=metrics
    )
    target = regression_target(data, options, METRICS)
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    module: Any = model_for(target, model, precision=precision)
    return one_model_task(
        module, ImageInputs(data=data, dtype=module.param_dtype), target
    )
