"""Classification: one label an example."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.answers import Classes, logits_asked, make_classes
from finetune_jax.augment import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.inputs import (
    batch_specs,
    check_has_classes,
    prepared,
    random_variables,
    with_mixtures,
)
from finetune_jax.mix import check_mix
from finetune_jax.models import make_model
from finetune_jax.tasks.task import Mode, Task

METRICS = ("accuracy", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """A classifier of images or feature vectors.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        answer: Has losses and metrics.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    answer: Classes

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs as the source gives them, and class indices."""
        return batch_specs(self.data, self.answer.label, training=False)

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same; images as large as augmentation takes them."""
        return batch_specs(self.data, self.answer.label, training=True)

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        return random_variables(self.models, self.data.shape, rng, self._float())

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs augmented (in training) and normalised.

        Where examples are mixed, 'target' [B, K] has the shares of the classes.
        """
        looks = {"data": self.data, "kind": self._float()}
        batch = prepared(batch, rng, mode, **looks)
        return with_mixtures(batch, rng, mode, **looks)

    def _float(self) -> Any:
        return self.models[""].param_dtype  # type: ignore[attr-defined]

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        rng: jax.Array,
        progress: jax.Array,
        mode: Mode,
        first: str | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, dict]]:
        """Returns the weighed loss and accuracy as (total, weight) pairs."""
        del fixed, progress
        logits_BxK, batch_stats = self.given(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        loss, found = self.answer.loss(logits_BxK, batch)
        return loss, (batch_stats, found)

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns the logits."""
        del fixed
        logits_BxK, _ = self.given(params, batch_stats, batch, first=first)
        return self.answer.outputs(logits_BxK)

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured; 'loss' is the unsmoothed cross entropy."""
        return self.answer.metrics(outputs, batch)

    def answers(self, outputs: dict) -> dict:
        """Returns logits and probabilities of the data's classes."""
        return self.answer.answers(outputs)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits that lack a class without which a metric has no value."""
        return self.answer.check_splits(labels)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the class names of the highest probabilities, best first."""
        del batch
        return self.answer.records(outputs)


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
    check_has_classes(data, "classify")
    answer = make_classes(
        data,
        loss=loss,
        loss_args=loss_args,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        top_k=top_k,
        metrics=metrics,
    )
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    check_mix(data.mix, data.shape)
    arguments = {**model}
    classes = logits_asked(arguments.pop("classes"), answer)
    module = make_model(
        arguments.pop("name"),
        arguments,
        classes=classes,
        dtype=jnp.dtype(precision),
        param_dtype=jnp.dtype("float64" if precision == "float64" else "float32"),
    )
    return Classify(models={"": module}, data=data, answer=answer)
