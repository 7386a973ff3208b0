"""What examples are to be answered with, whatever they are: classes, or numbers.

Tasks apply models; from the logits on, losses, metrics and records are made here.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.objectives import losses, metrics
from finetune_jax.tasks.objectives.metrics import check_metrics

Pair = tuple[jax.Array, jax.Array]
LOSS_ON_HOST = {"mse": metrics.mse, "mae": metrics.mae, "huber": metrics.huber}


class Answer(Protocol):
    """From logits to losses, metrics and records."""

    @property
    def logits(self) -> int:
        """How many are needed."""
        ...

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """The label of one example."""
        ...

    def loss(self, logits_BxK: jax.Array, batch: Mapping) -> tuple[Pair, dict]:
        """Returns the weighed loss as (total, weight), and metrics that are such pairs."""
        ...

    def outputs(self, logits_BxK: jax.Array) -> dict:
        """Returns what metrics and records are made of."""
        ...

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns what is to be measured, from the rows of all examples."""
        ...

    def answers(self, outputs: Mapping) -> dict:
        """Returns what programs without this one are given, of no bfloat16."""
        ...

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns what cannot be measured on some splits, given their labels by name."""
        ...

    def records(self, outputs: Mapping) -> list[dict]:
        """Returns what a prediction says of each example."""
        ...


def _widened(array: jax.Array) -> jax.Array:
    """Returns numbers of 32 bits or more."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _equal(data: DataSpec) -> tuple[float, ...]:
    del data
    return ()


def _balanced(data: DataSpec) -> tuple[float, ...]:
    """Source: scikit-learn's class_weight='balanced'."""
    mean = data.train_examples / len(data.class_names)
    return tuple(mean / count for count in data.train_counts)


CLASS_WEIGHTS = {"none": _equal, "balanced": _balanced}


def _target(batch: Mapping[str, jax.Array], logits_BxK: jax.Array) -> jax.Array:
    """Returns the shares of the classes: of a mixture, or all of it the label's."""
    classes, dtype = logits_BxK.shape[-1], logits_BxK.dtype
    if "target" not in batch:
        return losses.one_hot(batch["label"], classes, dtype)
    # A model may have more logits than the data has classes.
    absent = classes - batch["target"].shape[-1]
    return jnp.pad(batch["target"], ((0, 0), (0, absent))).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """One class an example.

    Attributes:
        names: Of the classes.
        loss_name: A name in `losses.CLASSIFICATION`.
        loss_args: Its arguments.
        label_smoothing: In training only.
        class_weights: Of the examples of each class in the training loss; empty is 1.
        top_k: Classes that a prediction names.
        metric_names: What is measured on a split; 'loss' always is.
    """

    names: tuple[str, ...]
    loss_name: str
    loss_args: Mapping[str, Any]
    label_smoothing: float
    class_weights: tuple[float, ...]
    top_k: int
    metric_names: tuple[str, ...]

    @property
    def logits(self) -> int:
        """One for each class."""
        return len(self.names)

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """A class index."""
        return jax.ShapeDtypeStruct((), np.dtype(np.int32))

    def loss(self, logits_BxK: jax.Array, batch: Mapping) -> tuple[Pair, dict]:
        """Returns the weighed loss and accuracy as (total, weight) pairs."""
        weight_B, label_B = batch["weight"], batch["label"]
        target_BxK = _target(batch, logits_BxK)
        loss_B = losses.CLASSIFICATION[self.loss_name](
            logits_BxK,
            losses.smoothed(target_BxK, self.label_smoothing),
            **self.loss_args,
        )
        right_B = jnp.argmax(logits_BxK, axis=-1) == label_B
        accuracy = jnp.sum(right_B * weight_B), jnp.sum(weight_B)
        weight_B = self.weights(logits_BxK, batch)
        loss = jnp.sum(loss_B * weight_B), jnp.sum(weight_B)
        return loss, {"loss": loss, "accuracy": accuracy}

    def weights(self, logits_BxK: jax.Array, batch: Mapping) -> jax.Array:
        """Returns how much each example counts in the loss, its class considered."""
        weight_B = batch["weight"]
        if self.class_weights:
            class_weight_1xK = jnp.asarray(self.class_weights, weight_B.dtype)[None]
            target_BxK = _target(batch, logits_BxK)[:, : len(self.class_weights)]
            weight_B *= jnp.sum(target_BxK * class_weight_1xK, axis=-1)
        return weight_B

    def outputs(self, logits_BxK: jax.Array) -> dict:
        """Returns the logits."""
        return {"logits": logits_BxK}

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns what is to be measured; 'loss' is the unsmoothed cross entropy."""
        logits_BxK, label_B = self._known(outputs["logits"]), batch["label"]
        return {
            name: metrics.metric(name)(logits_BxK, label_B)
            for name in dict.fromkeys((*self.metric_names, "loss"))
        }

    def answers(self, outputs: Mapping) -> dict:
        """Returns logits and probabilities of the data's classes."""
        logits_BxK = _widened(self._known(outputs["logits"]))
        return {"logits": logits_BxK, "probabilities": jax.nn.softmax(logits_BxK)}

    def _known(self, logits_BxK: Any) -> Any:
        """Returns the logits of the data's classes; a model may have more."""
        return logits_BxK[:, : len(self.names)]

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits that lack a class without which a metric has no value."""
        ranking = [name for name in self.metric_names if name in metrics.RANKING]
        problems = []
        for split, label in labels.items():
            there = set(label.tolist())
            absent = [n for k, n in enumerate(self.names) if k not in there]
            problems += [
                f"config.task.metrics: {name!r} needs examples of every class, but "
                f"the split {split!r} has none of {', '.join(absent[:20])}; choose "
                "another split, or leave the metric out"
                for name in ranking
                if absent
            ]
        return problems

    def records(self, outputs: Mapping) -> list[dict]:
        """Returns the class names of the highest probabilities, best first."""
        probability_BxK = metrics.probabilities(self._known(outputs["logits"]))
        top_BxK = np.argsort(-probability_BxK, axis=-1)[:, : self.top_k]
        names = self.names
        return [
            {
                "class": names[top[0]],
                "top": [{"class": names[k], "probability": float(row[k])} for k in top],
            }
            for row, top in zip(probability_BxK, top_BxK)
        ]


def make_classes(
    data: DataSpec,
    *,
    loss: str = "cross_entropy",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: str = "none",
    top_k: int = 5,
    metrics: tuple[str, ...],
) -> Classes:
    """Returns what `config.task` says of classes.

    Args:
        data: Has the classes.
        loss: A name in `losses.CLASSIFICATION`.
        loss_args: Its arguments by name.
        label_smoothing: Share of the target spread over all classes.
        class_weights: 'none', or 'balanced': the loss of an example counts N / (K n), n
            of the N training examples being of its class, one of K.
        top_k: Classes that a prediction names.
        metrics: Names in `metrics.CLASSIFICATION`, or top_K_accuracy with any number.

    Raises:
        UserError: Something unknown or out of range.
    """
    bound = losses.make_loss("classification", loss, loss_args)
    check_metrics("classification", metrics, len(data.class_names))
    registry.choose(CLASS_WEIGHTS, class_weights, "config.task.class_weights")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"config.task.label_smoothing: {label_smoothing}; 0 to 1")
    if top_k < 1:
        raise UserError(f"config.task.top_k: {top_k}; at least 1 is needed")
    return Classes(
        names=data.class_names,
        loss_name=loss,
        loss_args=bound.keywords,
        label_smoothing=label_smoothing,
        class_weights=CLASS_WEIGHTS[class_weights](data),
        top_k=top_k,
        metric_names=metrics,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """One number or several an example, in their own units.

    Attributes:
        names: Of the numbers.
        loss_name: A name in `losses.REGRESSION`.
        loss_args: Its arguments.
        metric_names: What is measured on a split; 'loss' always is.
    """

    names: tuple[str, ...]
    loss_name: str
    loss_args: Mapping[str, Any]
    metric_names: tuple[str, ...]

    @property
    def logits(self) -> int:
        """One for each number."""
        return len(self.names)

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """Targets [T]."""
        return jax.ShapeDtypeStruct((len(self.names),), np.dtype(np.float32))

    def loss(self, logits_BxK: jax.Array, batch: Mapping) -> tuple[Pair, dict]:
        """Returns the loss and its metrics as (total, weight) pairs."""
        weight_B = batch["weight"]
        target_BxT = batch["label"].astype(logits_BxK.dtype)
        loss_B = losses.REGRESSION[self.loss_name](
            logits_BxK, target_BxT, **self.loss_args
        )
        loss = jnp.sum(loss_B * weight_B), jnp.sum(weight_B)
        return loss, {"loss": loss}

    def outputs(self, logits_BxK: jax.Array) -> dict:
        """Returns the predictions."""
        return {"prediction": logits_BxK}

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns what is to be measured, and the mean loss."""
        prediction_BxT, target_BxT = outputs["prediction"], batch["label"]
        loss = LOSS_ON_HOST[self.loss_name]
        return {
            name: metrics.REGRESSION[name](prediction_BxT, target_BxT)
            for name in self.metric_names
            if name != "loss"
        } | {"loss": loss(prediction_BxT, target_BxT, **self.loss_args)}

    def answers(self, outputs: Mapping) -> dict:
        """Returns the predictions."""
        return {"prediction": _widened(outputs["prediction"])}

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits on which R2 has no value."""
        return [
            f"config.task.metrics: 'r2' needs targets that differ, but the split {split!r} "
            f"has {len(label)} examples of the same; choose another split, or leave it out"
            for split, label in labels.items()
            if "r2" in self.metric_names and (label == label[:1]).all(axis=0).any()
        ]

    def records(self, outputs: Mapping) -> list[dict]:
        """Returns the predicted number of each target."""
        return [
            {"prediction": dict(zip(self.names, map(float, row)))}
            for row in outputs["prediction"]
        ]


def make_numbers(
    data: DataSpec,
    *,
    loss: str = "mse",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    class_weights: str = "none",
    metrics: tuple[str, ...],
) -> Numbers:
    """Returns what `config.task` says of numbers.

    Args:
        data: Has their names.
        loss: A name in `losses.REGRESSION`.
        loss_args: Its arguments by name.
        class_weights: 'none': there are no classes.
        metrics: Names in `metrics.REGRESSION`.

    Raises:
        UserError: Something unknown or out of range.
    """
    if class_weights != "none":
        raise UserError(
            f"config.task.class_weights: {class_weights!r}, but the data's labels are "
            "numbers, not classes; leave it at 'none'"
        )
    bound = losses.make_loss("regression", loss, loss_args)
    check_metrics("regression", metrics)
    return Numbers(
        names=data.targets,
        loss_name=loss,
        loss_args=bound.keywords,
        metric_names=metrics,
    )


def logits_asked(asked: int | None, answer: Answer) -> int:
    """Returns how many logits a model gets.

    Args:
        asked: `config.model.classes`.
        answer: Has a need of its own.

    Raises:
        UserError: They are too few, or of numbers too many.
    """
    needed = answer.logits
    if isinstance(answer, Numbers) and (asked or needed) != needed:
        raise UserError(
            f"config.model.classes: {asked}, but the data has {needed} "
            "targets; None takes the data's number."
        )
    if (asked or needed) < needed:
        raise UserError(
            f"config.model.classes: {asked}, but the data has "
            f"{needed} classes; None takes the data's number."
        )
    return asked or needed
