"""Classification: one label an example."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.tasks.components.image_inputs import Mixed, check_classified
from finetune_jax.tasks.components.single_model import Answering
from finetune_jax.tasks.components.targets import Classes, logits_asked, make_classes

# Kinds of data and of labels.
ACCEPTS = (("images", "classes"), ("vectors", "classes"))
METRICS = ("accuracy", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Mixed, Answering):
    """A classifier of images or feature vectors."""

    answer: Classes


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    loss: str = "cross_entropy",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: str = "none",
    top_k: int = 5,
    metrics: tuple[str, ...] = METRICS,
) -> Classify:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.CLASSIFICATION`.
        loss_args: Its arguments by name.
        label_smoothing: Share of the target spread over all classes.
        class_weights: 'none', or 'balanced': the loss of an example counts N / (K n), n
            of the N training examples being of its class, one of K.
        top_k: Classes that a prediction names.
        metrics: Names in `metrics.CLASSIFICATION`, or top_K_accuracy with any number.

    Raises:
        UserError: Something unknown or out of range, or too few logits for the data.
    """
    check_classified(data)
    answer = make_classes(
        data,
        loss=loss,
        loss_args=loss_args,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        top_k=top_k,
        metrics=metrics,
    )
    classes = logits_asked(model["classes"], answer)
    module = model_of(model, classes=classes, precision=precision)
    return Classify(models={"": module}, data=data, answer=answer)
