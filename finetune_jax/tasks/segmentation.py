"""Segmentation: a class for every pixel of an image."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.core.metric_names import PER_CLASS
from finetune_jax.core.pytrees import named
from finetune_jax.data.augmentation.masks import IGNORED, make_mask_augment
from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import dtypes, make_model
from finetune_jax.models.fully_convolutional import (
    FullyConvolutional,
    fully_convolutional,
)
from finetune_jax.tasks.objectives import losses, metrics
from finetune_jax.tasks.objectives.metrics import check_metrics
from finetune_jax.tasks.task import EVALUATION, Mode, Task, apply

# Kinds of data and of labels.
ACCEPTS = (("images", "masks"),)
METRICS = ("mean_iou", "pixel_accuracy")
# Of an update all of whose pixels are ignored: no other weight is changed by it.
_NO_WEIGHT = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """A classifier of the pixels of images.

    Attributes:
        models: The one model, under ''; its logits are [B, H, W, K].
        backbone: The classifier that it was made of.
        data: What the examples look like.
        loss_name: A name in `losses.CLASSIFICATION`.
        loss_args: Its arguments.
        label_smoothing: In training only.
        class_weights: Of the pixels of each class in the training loss; empty is 1.
        metric_names: What is measured on a split; 'loss' and the IoU of each class
            always are.
    """

    models: Mapping[str, Any]
    backbone: nn.Module
    data: DataSpec
    loss_name: str = "cross_entropy"
    loss_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    metric_names: tuple[str, ...] = METRICS

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Images as the source gives them, and their masks."""
        return self._batch_spec(self.data.shape)

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same, as large as augmentation takes them."""
        return self._batch_spec(self.data.train_shape)

    def _batch_spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "inputs": jax.ShapeDtypeStruct(shape, np.dtype(self.data.dtype)),
            "mask": jax.ShapeDtypeStruct(shape[:2], np.dtype(np.uint8)),
            "label": jax.ShapeDtypeStruct((), np.dtype(np.int32)),
        }

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""
        x = jnp.zeros((1, *self.data.shape), jnp.float32)
        variables = self.models[""].init(rng, x, train=False)
        # Flax starts running averages in float32, whatever the parameters are.
        batch_stats = jax.tree.map(
            lambda leaf: leaf.astype(self._float()), variables.get("batch_stats", {})
        )
        return variables["params"], batch_stats

    def left_out(self) -> tuple[str, ...]:
        """Returns what weights of the backbone have besides: what ends a classifier."""
        x = jax.ShapeDtypeStruct((1, *self.data.shape), jnp.float32)
        shapes = jax.eval_shape(
            lambda x: self.backbone.init(jax.random.key(0), x, train=False), x
        )
        kept = self.stages[:-1]
        return tuple(name for name in named(shapes) if name.split("/")[1] not in kept)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with images augmented (in training) and normalised.

        Masks are moved as their images are. All of an image without one is ignored.
        """
        inputs = batch["inputs"]
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = inputs / jnp.asarray(255, self._float())
        inputs = inputs.astype(self._float())
        mask = batch.get("mask")
        if mask is None:
            mask = jnp.full(inputs.shape[:3], IGNORED, jnp.uint8)
        if mode != EVALUATION and self.data.augment:
            steps, size = self.data.augment, self.data.shape[:2]
            keys = jax.vmap(lambda place: jax.random.fold_in(rng, place))
            drawn = keys(batch["position"])
            inputs = make_augment(steps, size, fill=self.data.inputs.mean)(
                inputs, drawn
            )
            mask = make_mask_augment(steps, size)(mask, drawn)
        mean, std = (
            jnp.asarray(values, self._float()).reshape(1, 1, 1, -1)
            for values in (self.data.inputs.mean, self.data.inputs.std)
        )
        return {**batch, "inputs": (inputs - mean) / std, "mask": mask}

    def with_features(
        self, params: Any, batch_stats: Any, batch: dict, *, first: str
    ) -> dict:
        """Returns the batch with 'features': a stage's input, and the mask beside it.

        An augmented mask belongs to the features of its image, and is kept with them.
        """
        found = super().with_features(params, batch_stats, batch, first=first)
        features = {"maps": found["features"], "mask": found.pop("mask")}
        return {**found, "features": features}

    def _float(self) -> Any:
        return self.models[""].param_dtype

    def _logits(
        self,
        params: Any,
        batch_stats: Any,
        batch: dict,
        mode: Mode,
        first: str | None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Returns logits [B, H, W, K], masks [B, H, W] and batch statistics."""
        given = batch["features"] if first else batch
        logits_BxHxWxK, batch_stats = apply(
            self,
            "",
            {"params": params, "batch_stats": batch_stats},
            given["maps" if first else "inputs"],
            mode=mode,
            first=first,
            rng=rng,
        )
        return logits_BxHxWxK, given["mask"], batch_stats

    def _losses(
        self, logits_BxHxWxK: jax.Array, mask_BxHxW: jax.Array, smoothing: float = 0.0
    ) -> jax.Array:
        """Returns the loss of each pixel, [B, H, W]; of those ignored it means nothing."""
        classes = logits_BxHxWxK.shape[-1]
        target_NxK = losses.one_hot(
            mask_BxHxW.reshape(-1), classes, logits_BxHxWxK.dtype
        )
        loss_N = losses.CLASSIFICATION[self.loss_name](
            logits_BxHxWxK.reshape(-1, classes),
            losses.smoothed(target_NxK, smoothing),
            **self.loss_args,
        )
        return loss_N.reshape(mask_BxHxW.shape)

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
        """Returns the weighed loss and accuracy of all pixels, as (total, weight) pairs."""
        del fixed, progress
        logits_BxHxWxK, mask_BxHxW, batch_stats = self._logits(
            params, batch_stats, batch, mode, first, rng
        )
        loss_BxHxW = self._losses(logits_BxHxWxK, mask_BxHxW, self.label_smoothing)
        is_counted_BxHxW = mask_BxHxW != IGNORED
        weight_BxHxW = batch["weight"][:, None, None] * is_counted_BxHxW
        right_BxHxW = jnp.argmax(logits_BxHxWxK, axis=-1) == mask_BxHxW
        accuracy = _weighed(right_BxHxW, weight_BxHxW)
        if self.class_weights:
            class_weight_K = jnp.asarray(self.class_weights, weight_BxHxW.dtype)
            weight_BxHxW *= class_weight_K.at[mask_BxHxW].get(mode="fill", fill_value=0)
        loss = _weighed(loss_BxHxW, weight_BxHxW)
        return loss, (batch_stats, {"loss": loss, "pixel_accuracy": accuracy})

    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns predicted masks, and what `metrics` adds up: no logits of pixels.

        'counts' are [B, 3, K], as in `metrics.class_iou`; 'loss' is the sum over the
        pixels of an image.
        """
        del fixed
        logits_BxHxWxK, mask_BxHxW, _ = self._logits(
            params, batch_stats, batch, EVALUATION, first
        )
        # A model may have more logits than the data has classes.
        classes = len(self.data.pixel_classes)
        predicted_BxHxW = jnp.argmax(logits_BxHxWxK[..., :classes], axis=-1)
        is_counted_BxHxW = mask_BxHxW != IGNORED
        is_right_BxHxW = is_counted_BxHxW & (predicted_BxHxW == mask_BxHxW)

        def counted(index_BxHxW: jax.Array, which_BxHxW: jax.Array) -> jax.Array:
            index = jnp.where(which_BxHxW, index_BxHxW, classes)
            flat = index.reshape(index.shape[0], -1)
            return jax.vmap(lambda row: jnp.bincount(row, length=classes))(flat)

        counts = (
            counted(mask_BxHxW, is_right_BxHxW),
            counted(mask_BxHxW, is_counted_BxHxW),
            counted(predicted_BxHxW, is_counted_BxHxW),
        )
        loss_BxHxW = self._losses(logits_BxHxWxK, mask_BxHxW)
        return {
            "prediction": predicted_BxHxW.astype(jnp.uint8),
            "counts": jnp.stack(counts, axis=1).astype(jnp.int32),
            "loss": jnp.sum(loss_BxHxW * is_counted_BxHxW, axis=(1, 2)),
        }

    def answers(self, outputs: dict) -> dict:
        """Returns the predicted masks."""
        return {"prediction": outputs["prediction"]}

    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns what is to be measured, over the pixels of all examples."""
        del batch
        counts = outputs["counts"]
        found = {
            name: metrics.SEGMENTATION[name](counts)
            for name in self.metric_names
            if name != "loss"
        }
        pixels = counts[:, 1].sum(dtype=np.int64)
        found["loss"] = float(outputs["loss"].sum(dtype=np.float64) / max(pixels, 1))
        iou = metrics.class_iou(counts).tolist()
        return found | {
            f"{PER_CLASS}{name}": value
            for name, value in zip(self.data.pixel_classes, iou)
        }

    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns the share of the image of each class that was found, largest first."""
        del batch
        names, found = self.data.pixel_classes, []
        for mask in outputs["prediction"]:
            share = np.bincount(mask.reshape(-1), minlength=len(names)) / mask.size
            order = np.argsort(-share, kind="stable")
            found.append(
                {"share": {names[k]: float(share[k]) for k in order if share[k]}}
            )
        return found

    def masks(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the predicted masks, uint8 [B, H, W]."""
        return outputs["prediction"]


def _weighed(
    value_BxHxW: jax.Array, weight_BxHxW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    weight = jnp.sum(weight_BxHxW)
    # What is ignored may be anything, infinite too.
    total = jnp.sum(jnp.where(weight_BxHxW > 0, value_BxHxW, 0) * weight_BxHxW)
    return total, jnp.where(weight > 0, weight, _NO_WEIGHT)


def make(
    *,
    data: DataSpec,
    model: Mapping[str, Any],
    precision: str,
    loss: str = "cross_entropy",
    loss_args: Mapping[str, Any] = MappingProxyType({}),
    label_smoothing: float = 0.0,
    class_weights: tuple[float, ...] = (),
    metrics: tuple[str, ...] = METRICS,
) -> Segmentation:
    """Returns the task that `config.task` describes.

    Args:
        data: What the examples look like.
        model: The section `config.model`: a classifier, and `taps`, stages whose maps
            have scores of their own.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.CLASSIFICATION`.
        loss_args: Its arguments by name.
        label_smoothing: Share of the target spread over all classes.
        class_weights: Of the pixels of each class; empty is 1 for all.
        metrics: Names in `metrics.SEGMENTATION`.

    Raises:
        UserError: Something unknown or out of range, or data without masks.
    """
    classes = len(data.pixel_classes)
    bound = losses.make_loss("classification", loss, loss_args)
    check_metrics("segmentation", metrics)
    problems = []
    if not 0 <= label_smoothing < 1:
        problems.append(f"config.task.label_smoothing: {label_smoothing}; 0 to 1")
    if class_weights and len(class_weights) != classes:
        problems.append(
            f"config.task.class_weights: {len(class_weights)} numbers, but the data has "
            f"{classes} classes: {', '.join(data.pixel_classes[:20])}"
        )
    if any(not weight >= 0 for weight in class_weights) or (
        class_weights and not any(class_weights)
    ):
        problems.append(
            "config.task.class_weights: at least 0 is needed, and not all 0"
        )
    if problems:
        raise problems_error("config.task does not fit:", problems)
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    make_mask_augment(data.augment, data.shape[:2])
    module, backbone = _made(dict(model), data, precision)
    return Segmentation(
        models={"": module},
        backbone=backbone,
        data=data,
        loss_name=loss,
        loss_args=bound.keywords,
        label_smoothing=label_smoothing,
        class_weights=tuple(map(float, class_weights)),
        metric_names=metrics,
    )


def _made(
    arguments: dict[str, Any], data: DataSpec, precision: str
) -> tuple[Any, nn.Module]:
    """Returns the model, and the classifier that it was made of."""
    classes, found = len(data.pixel_classes), []
    logits = arguments.pop("classes") or classes
    if not classes <= logits <= IGNORED:
        raise UserError(
            f"config.model.classes: {logits}, but the data has {classes} classes of "
            f"pixels; None takes the data's number, and there are {IGNORED} at most"
        )
    kinds = dtypes(precision)
    taps, head = arguments.pop("taps", ()), arguments["head"]
    if not isinstance(taps, tuple):
        raise UserError(f"config.model.taps: {taps!r} is not a tuple of stages")

    def around(backbone: nn.Module) -> FullyConvolutional:
        found.append(backbone)
        return fully_convolutional(
            backbone,
            classes=logits,
            size=(data.shape[0], data.shape[1]),
            taps=taps,
            head=head,
            **kinds,
        )

    name = arguments.pop("name")
    # The classifier's own head is left out: nothing of it is asked for.
    given = {**arguments, "head": {}}
    module = make_model(name, given, around=around, classes=logits, **kinds)
    return module, found[0]
