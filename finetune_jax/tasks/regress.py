"""Regression: one number or several to predict of each example, in their own units."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.tasks.components.image_inputs import Normalised
from finetune_jax.tasks.components.single_model import Answering
from finetune_jax.tasks.components.targets import Numbers, logits_asked, make_numbers

# Kinds of data and of labels.
ACCEPTS = (("images", "numbers"), ("vectors", "numbers"))
METRICS = ("mse", "mae", "r2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regress(Normalised, Answering):
    """Predicts numbers from images or feature vectors: what would be logits are they."""

    answer: Numbers


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    loss: str = "mse",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    class_weights: str = "none",
    metrics: tuple[str, ...] = METRICS,
) -> Regress:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.REGRESSION`.
        loss_args: Its arguments by name.
        class_weights: 'none': there are no classes.
        metrics: Names in `metrics.REGRESSION`.

    Raises:
        UserError: Something unknown or out of range, or data with classes.
    """
    answer = make_numbers(
        data,
        loss=loss,
        loss_args=loss_args,
        class_weights=class_weights,
        metrics=metrics,
    )
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    targets = logits_asked(model["classes"], answer)
    module = model_of(model, classes=targets, precision=precision)
    return Regress(models={"": module}, data=data, answer=answer)
