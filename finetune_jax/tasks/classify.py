"""Classification: one label per image or vector."""

from collections.abc import Mapping
from typing import Any

from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.components.image_inputs import ImageInputs, check_classified
from finetune_jax.tasks.components.supervised import SupervisedTask, one_model_task
from finetune_jax.tasks.components.targets import (
    TargetOptions,
    class_target,
    model_for,
)

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("images", "classes"), ("vectors", "classes"))
METRICS = ("accuracy", "loss")
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
        UserError: Something unknown or out of range, or too few logits for the data.
    """
    check_classified(data)
    target = class_target(data, options, METRICS)
    module: Any = model_for(target, model, precision=precision)
    return one_model_task(
        module, ImageInputs(data=data, dtype=module.param_dtype), target
    )
