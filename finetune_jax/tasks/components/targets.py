"""Prediction targets: classes, or the real numbers of `regression`.

A target turns the output of a model into losses, metrics and predictions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import model_of
from finetune_jax.tasks.components.regression import RegressionTarget, regression_target
from finetune_jax.tasks.objectives import losses, metrics, thresholds
from finetune_jax.tasks.objectives.metrics import check_metrics
from finetune_jax.tasks.task import ExampleScores, LossOutput


class Target(Protocol):
    """Computes losses, metrics and predictions from the output of a model."""

    @property
    def head_kind(self) -> str:
        """The kind of prediction, as in `Task`."""
        ...

    @property
    def logits(self) -> int:
        """The number of outputs that the target needs."""
        ...

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the label of one example."""
        ...

    def loss(self, output: Any, batch: Mapping) -> LossOutput:
        """Returns the weighted loss and training metrics, without batch statistics."""
        ...

    def outputs(self, output: Any, batch: Mapping) -> dict:
        """Returns the rows from which metrics and records are computed."""
        ...

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns the metrics of a split from the rows of all examples."""
        ...

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns the scores of single examples, as `Task.example_scores`."""
        ...

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns the outputs of an exported model, none in bfloat16."""
        ...

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the metrics that are undefined on some splits, given their labels."""
        ...

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns the prediction for each example."""
        ...


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options of `config.task` for labels that are classes or numbers.

    Attributes:
        loss: A name in `losses.CLASSIFICATION` or, for numbers, `losses.REGRESSION`; None
            is cross entropy or the squared error.
        loss_args: Arguments of the loss by name.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: 'none', or 'balanced': the loss of an example has the weight
            N / (K n), where n of the N training examples have its class, one of K.
        top_k: Number of classes in a prediction.
        threshold_rule: For two classes, the rule that chooses the decision threshold on
            validation: 'f1' has the highest F1, 'precision=0.9' and 'specificity=0.95'
            the lowest threshold that reaches the value, 'recall=0.9' the highest. None
            predicts the class with the highest probability.
        metrics: Names in `metrics.METRICS`, or top_K_accuracy and
            sensitivity_at_specificity_N with any number; None takes the default of the
            task.
    """

    loss: str | None = None
    loss_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label_smoothing: float = 0.0
    class_weights: str = "none"
    top_k: int = 5
    threshold_rule: str | None = None
    metrics: tuple[str, ...] | None = None


def _balanced(data: DataSpec) -> tuple[float, ...]:
    """Source: scikit-learn's class_weight='balanced'."""
    mean = data.train_examples / len(data.class_names)
    return tuple(mean / count for count in data.train_counts)


CLASS_WEIGHTS = {"none": lambda data: (), "balanced": _balanced}


def measured_names(names: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the metrics of a split of classes.

    Args:
        names: Metrics that `config.task` asks for.
        options: Options of the target or of `config.task`; those of a task of several
            domains are in 'of_args'.
    """
    options = {**options, **dict(options.get("of_args", {}))}
    loss = options.get("loss_name", options.get("loss")) or "cross_entropy"
    smoothing = options.get("label_smoothing", 0.0)
    weights = options.get("class_weights", ())
    is_other = loss in losses.CLASSIFICATION and not losses.is_cross_entropy(
        loss, smoothing, weights
    )
    added = ("loss", "cross_entropy") if is_other else ("loss",)
    return tuple(dict.fromkeys((*names, *added)))


def _class_shares(batch: Mapping[str, jax.Array], logits_BxK: jax.Array) -> jax.Array:
    """Returns the target share of each class: of mixed examples, else one-hot labels."""
    classes, dtype = logits_BxK.shape[-1], logits_BxK.dtype
    if "target" not in batch:
        return losses.one_hot(batch["label"], classes, dtype)
    # A model may have more logits than the data has classes.
    absent = classes - batch["target"].shape[-1]
    return jnp.pad(batch["target"], ((0, 0), (0, absent))).astype(dtype)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassTarget:
    """One class per example.

    Attributes:
        names: Names of the classes.
        loss_name: A name in `losses.CLASSIFICATION`.
        loss_args: Arguments of the loss.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of each class in the loss; empty weighs all by 1.
        top_k: Number of classes in a prediction.
        metric_names: Metrics of a split; 'loss' is always added, and 'cross_entropy' where
            the loss is another one.
        threshold_rule: Rule that chooses the threshold, as in `TargetOptions`.
        threshold: Smallest probability from which the second class is predicted; None
            predicts the class with the highest one.
    """

    head_kind = "classes"

    names: tuple[str, ...]
    loss_name: str
    loss_args: Mapping[str, Any]
    label_smoothing: float
    class_weights: tuple[float, ...]
    top_k: int
    metric_names: tuple[str, ...]
    threshold_rule: str | None = None
    threshold: float | None = None

    @property
    def logits(self) -> int:
        """One logit for each class."""
        return len(self.names)

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """A class index."""
        return jax.ShapeDtypeStruct((), np.dtype(np.int32))

    def loss(self, output: jax.Array, batch: Mapping) -> LossOutput:
        """Returns the weighted loss and the accuracy."""
        logits_BxK, weight_B, label_B = output, batch["weight"], batch["label"]
        loss_B = self._losses(logits_BxK, batch)
        right_B = jnp.argmax(logits_BxK, axis=-1) == label_B
        accuracy = jnp.sum(right_B * weight_B), jnp.sum(weight_B)
        weight_B = self.weights(logits_BxK, batch)
        loss = jnp.sum(loss_B * weight_B), jnp.sum(weight_B)
        return LossOutput(*loss, {"loss": loss, "accuracy": accuracy})

    def _losses(self, logits_BxK: jax.Array, batch: Mapping) -> jax.Array:
        """Returns the loss of each example, [B], without its weight."""
        target_BxK = _class_shares(batch, logits_BxK)
        return losses.CLASSIFICATION[self.loss_name](
            logits_BxK,
            losses.smoothed(target_BxK, self.label_smoothing),
            **self.loss_args,
        )

    def weights(self, logits_BxK: jax.Array, batch: Mapping) -> jax.Array:
        """Returns the weight of each example in the loss, including its class weight."""
        weight_B = batch["weight"]
        if self.class_weights:
            class_weight_1xK = jnp.asarray(self.class_weights, weight_B.dtype)[None]
            target_BxK = _class_shares(batch, logits_BxK)
            target_BxK = target_BxK[:, : len(self.class_weights)]
            weight_B *= jnp.sum(target_BxK * class_weight_1xK, axis=-1)
        return weight_B

    def outputs(self, output: jax.Array, batch: Mapping) -> dict:
        """Returns the logits."""
        del batch
        return {"logits": output}

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns the metrics of a split; 'loss' is the loss that is trained."""
        logits_BxK, label_B = self._known(outputs["logits"]), batch["label"]
        found = {
            name: metrics.metric(name)(logits_BxK, label_B)
            for name in measured_names(self.metric_names, vars(self))
        }
        if self._has_other_loss:
            loss = self.loss(*_unweighted(logits_BxK, label_B))
            found["loss"] = float(loss.total) / float(loss.weight)
        if self.threshold is not None:
            score_B = metrics.probabilities(logits_BxK)[:, 1]
            found |= thresholds.metrics_at(self.threshold, score_B, label_B)
        return found

    @property
    def _has_other_loss(self) -> bool:
        """Whether the loss is another one than the cross entropy of the labels."""
        return "cross_entropy" in measured_names((), vars(self))

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns the scores of single examples, and predicted classes."""
        logits_BxK, label_B = self._known(outputs["logits"]), batch["label"]
        found = {
            name: rows(logits_BxK, label_B)
            for name in measured_names(self.metric_names, vars(self))
            if (rows := metrics.example_scores("classification", name))
        }
        if self._has_other_loss:
            logits_BxK, rows = _unweighted(logits_BxK, label_B)
            weight_B = np.asarray(self.weights(logits_BxK, rows), np.float64)
            loss_B = np.asarray(self._losses(logits_BxK, rows), np.float64)
            found["loss"] = loss_B * weight_B / weight_B.mean()
        return ExampleScores(scores=found, predicted=self._chosen(outputs))

    def _chosen(self, outputs: Mapping) -> np.ndarray:
        """Returns the predicted class of each example."""
        logits_BxK = self._known(outputs["logits"])
        if self.threshold is not None:
            return (metrics.probabilities(logits_BxK)[:, 1] >= self.threshold) * 1
        return np.argmax(logits_BxK, axis=-1)

    def choose_threshold(self, outputs: Mapping, batch: Mapping) -> float:
        """Returns the threshold that the rule chooses on the rows of all examples."""
        assert self.threshold_rule is not None
        score_B = metrics.probabilities(self._known(outputs["logits"]))[:, 1]
        rule = thresholds.Rule.from_text(self.threshold_rule)
        return rule.choose(score_B, batch["label"])

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns logits and probabilities of the data's classes."""
        logits_BxK = losses.widened(self._known(outputs["logits"]))
        return {"logits": logits_BxK, "probabilities": jax.nn.softmax(logits_BxK)}

    def _known(self, logits_BxK: Any) -> Any:
        """Returns the logits of the data's classes; a model may have more."""
        return logits_BxK[:, : len(self.names)]

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits without a class that a metric or the threshold needs."""
        ranking = [n for n in self.metric_names if metrics.needs_every_class(n)]
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
            if self.threshold_rule and split == "validation" and absent:
                problems.append(
                    f"{thresholds.KEY}: {self.threshold_rule!r} needs examples of both "
                    f"classes, but the split 'validation' has none of {absent[0]}; "
                    "choose another split"
                )
        if self.threshold_rule and labels and "validation" not in labels:
            problems.append(
                f"{thresholds.KEY}: {self.threshold_rule!r} chooses on one split "
                f"'validation', but there are {', '.join(labels)}; leave it at None"
            )
        return problems

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns the predicted class, and those of the highest probabilities.

        With a threshold, the predicted class need not be the first of them.
        """
        del batch
        probability_BxK = metrics.probabilities(self._known(outputs["logits"]))
        top_BxK = np.argsort(-probability_BxK, axis=-1)[:, : self.top_k]
        names, chosen_B, said = self.names, top_BxK[:, 0], {}
        if self.threshold is not None:
            chosen_B, said = self._chosen(outputs), {"threshold": self.threshold}
        return [
            {
                "class": names[chosen],
                **said,
                "top": [{"class": names[k], "probability": float(row[k])} for k in top],
            }
            for row, top, chosen in zip(probability_BxK, top_BxK, chosen_B)
        ]


def _unweighted(
    logits_BxK: np.ndarray, label_B: np.ndarray
) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Returns logits and a batch of examples that all count alike."""
    weight_B = np.ones(len(label_B), logits_BxK.dtype)
    rows = {"label": label_B, "weight": weight_B}
    return losses.widened(jnp.asarray(logits_BxK)), rows


def class_target(
    data: DataSpec, options: TargetOptions, defaults: tuple[str, ...]
) -> ClassTarget:
    """Returns the target of classes that `config.task` describes.

    Args:
        data: Has the classes.
        options: Options of `config.task`.
        defaults: Metrics if the options name none.

    Raises:
        UserError: Something unknown or out of range.
    """
    loss, smoothing = options.loss or "cross_entropy", options.label_smoothing
    names = defaults if options.metrics is None else options.metrics
    bound = losses.make_loss("classification", loss, options.loss_args)
    check_metrics("classification", names, len(data.class_names))
    registry.choose(CLASS_WEIGHTS, options.class_weights, "config.task.class_weights")
    if not 0 <= smoothing < 1:
        raise UserError(f"config.task.label_smoothing: {smoothing}; 0 to 1")
    if options.top_k < 1:
        raise UserError(f"config.task.top_k: {options.top_k}; at least 1 is needed")
    if (rule := options.threshold_rule) is not None:
        thresholds.Rule.from_text(rule)
        if len(data.class_names) != 2:
            raise UserError(
                f"{thresholds.KEY}: {rule!r} needs 2 classes, the data has "
                f"{len(data.class_names)}; leave it at None"
            )
    return ClassTarget(
        names=data.class_names,
        loss_name=loss,
        loss_args=bound.keywords,
        label_smoothing=smoothing,
        class_weights=CLASS_WEIGHTS[options.class_weights](data),
        top_k=options.top_k,
        threshold_rule=rule,
        metric_names=names,
    )


def class_or_regression_target(
    data: DataSpec, options: TargetOptions, defaults: Mapping[str, tuple[str, ...]]
) -> ClassTarget | RegressionTarget:
    """Returns the target of the data's labels.

    Args:
        data: Has names of classes or of numbers.
        options: Options of `config.task`.
        defaults: Default metrics of 'classes' and of 'numbers'.

    Raises:
        UserError: Something unknown or out of range.
    """
    if data.labels == "numbers":
        return regression_target(data, options, defaults["numbers"])
    return class_target(data, options, defaults["classes"])


def model_for(
    target: ClassTarget | RegressionTarget,
    model: Mapping[str, Any],
    *,
    precision: str,
    **given: Any,
) -> nn.Module:
    """Returns the model of a section like `config.model`, with the target's outputs.

    Args:
        target: What is predicted.
        model: The section.
        precision: 'float32', 'bfloat16' or 'float64'.
        **given: Further arguments of the model.

    Raises:
        UserError: Too few classes or another number of targets in `config.model.classes`,
            or an unknown model or argument.
    """
    asked, needed = model["classes"], target.logits
    count = asked or needed
    is_regression = isinstance(target, RegressionTarget)
    if count < needed or (is_regression and count != needed):
        raise UserError(
            f"config.model.classes: {asked}, but the data has {needed} "
            f"{'targets' if is_regression else 'classes'}; None takes the data's number."
        )
    return model_of(model, classes=count, precision=precision, **given)
