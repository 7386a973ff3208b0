"""Prediction target of real numbers."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.objectives import losses, metrics
from finetune_jax.tasks.objectives.metrics import check_metrics
from finetune_jax.tasks.task import ExampleScores, LossOutput

if TYPE_CHECKING:
    from finetune_jax.tasks.components.targets import TargetOptions

# Losses of numbers, and those of each number.
LOSS_ON_HOST = {"mse": metrics.mse, "mae": metrics.mae, "huber": metrics.huber}
LOSSES_ON_HOST = {
    "mse": metrics.squares,
    "mae": metrics.distances,
    "huber": metrics.huber_losses,
}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionTarget:
    """One real number or several per example, in their own units.

    Attributes:
        names: Names of the numbers.
        loss_name: A name in `losses.REGRESSION`.
        loss_args: Arguments of the loss.
        metric_names: Metrics of a split; 'loss' is always added.
    """

    head_kind = "numbers"

    names: tuple[str, ...]
    loss_name: str
    loss_args: Mapping[str, Any]
    metric_names: tuple[str, ...]

    @property
    def logits(self) -> int:
        """One output for each number."""
        return len(self.names)

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """Targets [T]."""
        return jax.ShapeDtypeStruct((len(self.names),), np.dtype(np.float32))

    def loss(self, output: jax.Array, batch: Mapping) -> LossOutput:
        """Returns the weighted loss."""
        weight_B = batch["weight"]
        target_BxT = batch["label"].astype(output.dtype)
        loss_B = losses.REGRESSION[self.loss_name](output, target_BxT, **self.loss_args)
        loss = jnp.sum(loss_B * weight_B), jnp.sum(weight_B)
        return LossOutput(*loss, {"loss": loss})

    def outputs(self, output: jax.Array, batch: Mapping) -> dict:
        """Returns the predictions."""
        del batch
        return {"prediction": output}

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns the metrics of a split, and the mean loss."""
        prediction_BxT, target_BxT = outputs["prediction"], batch["label"]
        loss = LOSS_ON_HOST[self.loss_name]
        return {
            name: metrics.REGRESSION[name](prediction_BxT, target_BxT)
            for name in self.metric_names
            if name != "loss"
        } | {"loss": loss(prediction_BxT, target_BxT, **self.loss_args)}

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns the scores of single examples, means over their numbers."""
        given = outputs["prediction"], batch["label"]
        found = {
            name: rows(*given).mean(axis=1)
            for name in self.metric_names
            if (rows := metrics.example_scores("regression", name))
        }
        loss_BxT = LOSSES_ON_HOST[self.loss_name](*given, **self.loss_args)
        return ExampleScores(scores={**found, "loss": loss_BxT.mean(axis=1)})

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns the predictions."""
        return {"prediction": losses.widened(outputs["prediction"])}

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits on which R2 is undefined."""
        return [
            f"config.task.metrics: 'r2' needs targets that differ, but the split {split!r} "
            f"has {len(label)} examples of the same; choose another split, or leave it out"
            for split, label in labels.items()
            if "r2" in self.metric_names and (label == label[:1]).all(axis=0).any()
        ]

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns the predicted number of each target."""
        del batch
        return [
            {"prediction": dict(zip(self.names, map(float, row)))}
            for row in outputs["prediction"]
        ]


def regression_target(
    data: DataSpec, options: "TargetOptions", defaults: tuple[str, ...]
) -> RegressionTarget:
    """Returns the target of numbers that `config.task` describes.

    Args:
        data: Has the names of the numbers.
        options: Options of `config.task`; those of classes are not used.
        defaults: Metrics if the options name none.

    Raises:
        UserError: Something unknown or out of range.
    """
    of_classes = {"class_weights": "none", "threshold_rule": None}
    for key, default in of_classes.items():
        if (value := getattr(options, key)) != default:
            raise UserError(
                f"config.task.{key}: {value!r}, but the data's labels are numbers, not "
                f"classes; leave it at {default!r}"
            )
    loss = options.loss or "mse"
    names = defaults if options.metrics is None else options.metrics
    bound = losses.make_loss("regression", loss, options.loss_args)
    check_metrics("regression", names)
    return RegressionTarget(
        names=data.targets,
        loss_name=loss,
        loss_args=bound.keywords,
        metric_names=names,
    )
