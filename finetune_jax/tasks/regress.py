"""Regression: one number or several to predict of each example, in their own units."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import losses, metrics
from finetune_jax.augment import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.errors import UserError
from finetune_jax.metrics import check_metrics
from finetune_jax.models import make_model
from finetune_jax.tasks.task import EVALUATION, Mode, Task, apply

METRICS = ("mse", "mae", "r2")
LOSS_ON_HOST = {"mse": metrics.mse, "mae": metrics.mae, "huber": metrics.huber}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regress(Task):
    """Predicts numbers from images or feature vectors.

    Attributes:
        models: The one model, under ''; what would be logits are the predictions.
        data: What the examples look like.
        loss_name: A name in `losses.REGRESSION`.
        loss_args: Its arguments.
        metric_names: What is measured on a split; 'loss' always is.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    loss_name: str = "mse"
    loss_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric_names: tuple[str, ...] = METRICS

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs as the source gives them, and targets [T]."""
        targets = (len(self.data.targets),)
        return {
            "inputs": jax.ShapeDtypeStruct(self.data.shape, np.dtype(self.data.dtype)),
            "label": jax.ShapeDtypeStruct(targets, np.dtype(np.float32)),
        }

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same; images as large as augmentation takes them."""
        inputs = self.batch_spec["inputs"]
        shape = self.data.train_shape
        return self.batch_spec | {"inputs": jax.ShapeDtypeStruct(shape, inputs.dtype)}

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        x = jnp.zeros((1, *self.data.shape), jnp.float32)
        variables = self.models[""].init(rng, x, train=False)
        # Flax starts running averages in float32, whatever the parameters are.
        batch_stats = jax.tree.map(
            lambda leaf: leaf.astype(self._float()), variables.get("batch_stats", {})
        )
        return variables["params"], batch_stats

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs augmented (in training) and normalised."""
        inputs = batch["inputs"]
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = inputs / jnp.asarray(255, self._float())
        inputs = inputs.astype(self._float())
        if mode != EVALUATION and self.data.augment:
            keys = jax.vmap(lambda place: jax.random.fold_in(rng, place))
            augment = make_augment(
                self.data.augment, self.data.shape[:2], fill=self.data.mean
            )
            inputs = augment(inputs, keys(batch["position"]))
        last = (1,) * (inputs.ndim - 1) + (-1,)
        mean = jnp.asarray(self.data.mean, self._float()).reshape(last)
        std = jnp.asarray(self.data.std, self._float()).reshape(last)
        return {**batch, "inputs": (inputs - mean) / std}

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
        prediction_BxT, batch_stats = apply(
            self,
            "",
            {"params": params, "batch_stats": batch_stats},
            batch["features" if first else "inputs"],
            mode=mode,
            first=first,
            rng=rng,
        )
        weight_B = batch["weight"]
        target_BxT = batch["label"].astype(prediction_BxT.dtype)
        loss_B = losses.REGRESSION[self.loss_name](
            prediction_BxT, target_BxT, **self.loss_args
        )
        loss = jnp.sum(loss_B * weight_B), jnp.sum(weight_B)
        return loss, (batch_stats, {"loss": loss})

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
        prediction_BxT, _ = apply(
            self,
            "",
            {"params": params, "batch_stats": batch_stats},
            batch["features" if first else "inputs"],
            mode=EVALUATION,
            first=first,
        )
        return {"prediction": prediction_BxT}

    def answers(self, outputs: dict) -> dict:
        """Returns the predictions."""
        prediction_BxT = outputs["prediction"]
        # Programs without this one's libraries know no bfloat16.
        widest = jnp.promote_types(prediction_BxT.dtype, jnp.float32)
        return {"prediction": prediction_BxT.astype(widest)}

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured, and the mean loss."""
        prediction_BxT, target_BxT = outputs["prediction"], batch["label"]
        loss = LOSS_ON_HOST[self.loss_name]
        return {
            name: metrics.REGRESSION[name](prediction_BxT, target_BxT)
            for name in self.metric_names
            if name != "loss"
        } | {"loss": loss(prediction_BxT, target_BxT, **self.loss_args)}

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits on which R2 has no value."""
        return [
            f"config.task.metrics: 'r2' needs targets that differ, but the split {split!r} "
            f"has {len(label)} examples of the same; choose another split, or leave it out"
            for split, label in labels.items()
            if "r2" in self.metric_names and (label == label[:1]).all(axis=0).any()
        ]

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the predicted number of each target."""
        del batch
        return [
            {"prediction": dict(zip(self.data.targets, map(float, row)))}
            for row in outputs["prediction"]
        ]


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
    if class_weights != "none":
        raise UserError(
            f"config.task.class_weights: {class_weights!r}, but the data's labels are "
            "numbers, not classes; leave it at 'none'"
        )
    bound = losses.make_loss("regression", loss, loss_args)
    check_metrics("regression", metrics)
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    arguments = {**model}
    targets = arguments.pop("classes") or len(data.targets)
    if targets != len(data.targets):
        raise UserError(
            f"config.model.classes: {targets}, but the data has {len(data.targets)} "
            "targets; None takes the data's number."
        )
    module = make_model(
        arguments.pop("name"),
        arguments,
        classes=targets,
        dtype=jnp.dtype(precision),
        param_dtype=jnp.dtype("float64" if precision == "float64" else "float32"),
    )
    return Regress(
        models={"": module},
        data=data,
        loss_name=loss,
        loss_args=bound.keywords,
        metric_names=metrics,
    )
