"""Classification: one label an example."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import lookup, losses, metrics
from finetune_jax.augment import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.errors import UserError
from finetune_jax.metrics import check_metrics
from finetune_jax.mix import check_mix, mixed
from finetune_jax.models import make_model
from finetune_jax.tasks.task import EVALUATION, Mode, Task, apply


def _equal(data: DataSpec) -> tuple[float, ...]:
    del data
    return ()


def _balanced(data: DataSpec) -> tuple[float, ...]:
    """Source: scikit-learn's class_weight='balanced'."""
    mean = data.train_examples / len(data.class_names)
    return tuple(mean / count for count in data.train_counts)


METRICS = ("accuracy", "loss")
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
class Classify(Task):
    """A classifier of images or feature vectors.

    Attributes:
        models: The one model, under ''.
        data: What the examples look like.
        loss_name: A name in `losses.CLASSIFICATION`.
        loss_args: Its arguments.
        label_smoothing: In training only.
        class_weights: Of the examples of each class in the training loss; empty is 1.
        top_k: Classes that a prediction names.
        metric_names: What is measured on a split; 'loss' always is.
    """

    models: Mapping[str, nn.Module]
    data: DataSpec
    loss_name: str = "cross_entropy"
    loss_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    top_k: int = 5
    metric_names: tuple[str, ...] = METRICS

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs as the source gives them, and class indices."""
        return {
            "inputs": jax.ShapeDtypeStruct(self.data.shape, np.dtype(self.data.dtype)),
            "label": jax.ShapeDtypeStruct((), np.dtype(np.int32)),
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
        """Returns the batch with inputs augmented (in training) and normalised.

        Where examples are mixed, 'target' [B, K] has the shares of the classes.
        """
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
        batch = {**batch, "inputs": (inputs - mean) / std}
        if mode != EVALUATION and self.data.mix:
            classes = len(self.data.class_names)
            target_BxK = losses.one_hot(batch["label"], classes, self._float())
            batch["inputs"], batch["target"] = mixed(
                batch["inputs"],
                target_BxK,
                batch["position"],
                rng,
                entries=self.data.mix,
            )
            # Who is mixed with what could not be read counts as little.
            both = batch["weight"].reshape(-1, 2).prod(axis=1)
            batch["weight"] = jnp.repeat(both, 2)
        return batch

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
        logits_BxK, batch_stats = apply(
            self,
            "",
            {"params": params, "batch_stats": batch_stats},
            batch["features" if first else "inputs"],
            mode=mode,
            first=first,
            rng=rng,
        )
        weight_B, label_B = batch["weight"], batch["label"]
        target_BxK = _target(batch, logits_BxK)
        loss_B = losses.CLASSIFICATION[self.loss_name](
            logits_BxK,
            losses.smoothed(target_BxK, self.label_smoothing),
            **self.loss_args,
        )
        right_B = jnp.argmax(logits_BxK, axis=-1) == label_B
        accuracy = jnp.sum(right_B * weight_B), jnp.sum(weight_B)
        if self.class_weights:
            class_weight_1xK = jnp.asarray(self.class_weights, weight_B.dtype)[None]
            target_BxK = target_BxK[:, : len(self.class_weights)]
            weight_B *= jnp.sum(target_BxK * class_weight_1xK, axis=-1)
        loss = jnp.sum(loss_B * weight_B), jnp.sum(weight_B)
        return loss, (batch_stats, {"loss": loss, "accuracy": accuracy})

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
        logits_BxK, _ = apply(
            self,
            "",
            {"params": params, "batch_stats": batch_stats},
            batch["features" if first else "inputs"],
            mode=EVALUATION,
            first=first,
        )
        return {"logits": logits_BxK}

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured; 'loss' is the unsmoothed cross entropy."""
        logits_BxK, label_B = self._known(outputs["logits"]), batch["label"]
        return {
            name: metrics.metric(name)(logits_BxK, label_B)
            for name in dict.fromkeys((*self.metric_names, "loss"))
        }

    def answers(self, outputs: dict) -> dict:
        """Returns logits and probabilities of the data's classes."""
        logits_BxK = self._known(outputs["logits"])
        # Programs without this one's libraries know no bfloat16.
        widest = jnp.promote_types(logits_BxK.dtype, jnp.float32)
        logits_BxK = logits_BxK.astype(widest)
        return {"logits": logits_BxK, "probabilities": jax.nn.softmax(logits_BxK)}

    def _known(self, logits_BxK: Any) -> Any:
        """Returns the logits of the data's classes; a model may have more."""
        return logits_BxK[:, : len(self.data.class_names)]

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the splits that lack a class without which a metric has no value."""
        ranking = [name for name in self.metric_names if name in metrics.RANKING]
        problems = []
        for split, label in labels.items():
            there = set(label.tolist())
            absent = [n for k, n in enumerate(self.data.class_names) if k not in there]
            problems += [
                f"config.task.metrics: {name!r} needs examples of every class, but "
                f"the split {split!r} has none of {', '.join(absent[:20])}; choose "
                "another split, or leave the metric out"
                for name in ranking
                if absent
            ]
        return problems

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the class names of the highest probabilities, best first."""
        del batch
        probability_BxK = metrics.probabilities(self._known(outputs["logits"]))
        top_BxK = np.argsort(-probability_BxK, axis=-1)[:, : self.top_k]
        names = self.data.class_names
        return [
            {
                "class": names[top[0]],
                "top": [{"class": names[k], "probability": float(row[k])} for k in top],
            }
            for row, top in zip(probability_BxK, top_BxK)
        ]


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
    if data.targets:
        raise UserError(
            f"config.task.name: 'classify', but the data's labels are not classes but "
            f"numbers ({', '.join(data.targets[:20])}): use task.name='regress'"
        )
    if data.pixel_classes:
        raise UserError(
            "config.task.name: 'classify', but the data has a mask for each image: use "
            "task.name='segmentation'"
        )
    bound = losses.make_loss("classification", loss, loss_args)
    check_metrics("classification", metrics, len(data.class_names))
    lookup.choose(CLASS_WEIGHTS, class_weights, "config.task.class_weights")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"config.task.label_smoothing: {label_smoothing}; 0 to 1")
    if top_k < 1:
        raise UserError(f"config.task.top_k: {top_k}; at least 1 is needed")
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    check_mix(data.mix, data.shape)
    arguments = {**model}
    classes = arguments.pop("classes") or len(data.class_names)
    if classes < len(data.class_names):
        raise UserError(
            f"config.model.classes: {classes}, but the data has "
            f"{len(data.class_names)} classes; None takes the data's number."
        )
    module = make_model(
        arguments.pop("name"),
        arguments,
        classes=classes,
        dtype=jnp.dtype(precision),
        param_dtype=jnp.dtype("float64" if precision == "float64" else "float32"),
    )
    return Classify(
        models={"": module},
        data=data,
        loss_name=loss,
        loss_args=bound.keywords,
        label_smoothing=label_smoothing,
        class_weights=CLASS_WEIGHTS[class_weights](data),
        top_k=top_k,
        metric_names=metrics,
    )
