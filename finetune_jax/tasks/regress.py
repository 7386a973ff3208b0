"""Regression: one number or several to predict of each example, in their own units."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.answers import Numbers, logits_asked, make_numbers
from finetune_jax.augment import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.errors import UserError
from finetune_jax.inputs import batch_specs, prepared, random_variables
from finetune_jax.models import make_model
from finetune_jax.tasks.task import Mode, Task

METRICS = ("mse", "mae", "r2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regress(Task):
    """Predicts numbers from images or feature vectors.

    Attributes:
        models: The one model, under ''; what would be logits are the predictions.
        data: What the examples look like.
        answer: Has losses and metrics.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    answer: Numbers

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs as the source gives them, and targets [T]."""
        return batch_specs(self.data, self.answer.label, training=False)

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same; images as large as augmentation takes them."""
        return batch_specs(self.data, self.answer.label, training=True)

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        return random_variables(self.models, self.data.shape, rng, self._float())

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs augmented (in training) and normalised."""
        return prepared(batch, rng, mode, data=self.data, kind=self._float())

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
        """Returns the loss and its metrics as (total, weight) pairs."""
        del fixed, progress
        prediction_BxT, batch_stats = self.given(
            params, batch_stats, batch, mode=mode, first=first, rng=rng
        )
        loss, found = self.answer.loss(prediction_BxT, batch)
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
        """Returns the predictions."""
        del fixed
        prediction_BxT, _ = self.given(params, batch_stats, batch, first=first)
        return self.answer.outputs(prediction_BxT)

    def answers(self, outputs: dict) -> dict:
        """Returns the predictions."""
        return self.answer.answers(outputs)

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured, and the mean loss."""
        return self.answer.metrics(outputs, batch)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits on which R2 has no value."""
        return self.answer.check_splits(labels)

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the predicted number of each target."""
        del batch
        return self.answer.records(outputs)


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
    if not data.targets:
        raise UserError(
            "config.task.name: 'regress', but the data's labels are classes: use "
            "task.name='classify', or data with floating-point labels"
        )
    if data.text is not None:
        raise UserError("config.task.name: 'regress', but the data is text: use 'text'")
    if data.table is not None:
        raise UserError(
            "config.task.name: 'regress', but the data is a table: use 'tabular'; or, if "
            "it is texts, name their columns in config.data.text, such as ('sentence',)"
        )
    answer = make_numbers(
        data,
        loss=loss,
        loss_args=loss_args,
        class_weights=class_weights,
        metrics=metrics,
    )
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    arguments = {**model}
    targets = logits_asked(arguments.pop("classes"), answer)
    module = make_model(
        arguments.pop("name"),
        arguments,
        classes=targets,
        dtype=jnp.dtype(precision),
        param_dtype=jnp.dtype("float64" if precision == "float64" else "float32"),
    )
    return Regress(models={"": module}, data=data, answer=answer)
