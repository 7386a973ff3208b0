"""Segmentation: a class for every pixel of an image."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.metric_names import PER_CLASS
from finetune_jax.core.pytrees import named
from finetune_jax.data.augmentation.masks import IGNORED, make_mask_augment
from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.models import dtypes, make_model
from finetune_jax.models.fully_convolutional import fully_convolutional
from finetune_jax.models.peft.lora import LoRA
from finetune_jax.tasks.components.image_inputs import ImageInputs
from finetune_jax.tasks.components.model_set import ModelSet
from finetune_jax.tasks.components.supervised import SupervisedTask
from finetune_jax.tasks.components.targets import measured_names
from finetune_jax.tasks.objectives import losses, metrics
from finetune_jax.tasks.objectives.metrics import check_metrics
from finetune_jax.tasks.task import ExampleScores, LossOutput

# Pairs (kind of data, kind of labels) that the task takes.
ACCEPTS = (("images", "masks"),)
METRICS = ("mean_iou", "pixel_accuracy")
# Weight of an update in which all pixels are ignored: too small to change a sum.
_NO_WEIGHT = 1e-30


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelTarget:
    """A class for every pixel, from logits [B, H, W, K].

    Attributes:
        names: Names of the classes.
        loss_name: A name in `losses.CLASSIFICATION`.
        loss_args: Arguments of the loss.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of each class in the loss; empty weighs all by 1.
        metric_names: Metrics of a split; 'loss' and the IoU of each class are always
            added, and 'cross_entropy' where the loss is another one.
    """

    names: tuple[str, ...]
    loss_name: str
    loss_args: Mapping[str, Any]
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    metric_names: tuple[str, ...] = METRICS

    head_kind = "pixels"

    @property
    def logits(self) -> int:
        """One logit for each class."""
        return len(self.names)

    @property
    def label(self) -> jax.ShapeDtypeStruct:
        """An unused number; the mask is prepared with the image."""
        return jax.ShapeDtypeStruct((), np.dtype(np.int32))

    def _losses(
        self, logits_BxHxWxK: jax.Array, mask_BxHxW: jax.Array, smoothing: float = 0.0
    ) -> jax.Array:
        """Returns the loss of each pixel [B, H, W], undefined for ignored pixels."""
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

    def loss(self, output: jax.Array, batch: Mapping) -> LossOutput:
        """Returns the weighted loss and accuracy of all pixels."""
        logits_BxHxWxK, mask_BxHxW = output, batch["mask"]
        loss_BxHxW = self._losses(logits_BxHxWxK, mask_BxHxW, self.label_smoothing)
        is_counted_BxHxW = mask_BxHxW != IGNORED
        weight_BxHxW = batch["weight"][:, None, None] * is_counted_BxHxW
        right_BxHxW = jnp.argmax(logits_BxHxWxK, axis=-1) == mask_BxHxW
        accuracy = _weighted(right_BxHxW, weight_BxHxW)
        if self.class_weights:
            class_weight_K = jnp.asarray(self.class_weights, weight_BxHxW.dtype)
            weight_BxHxW *= class_weight_K.at[mask_BxHxW].get(mode="fill", fill_value=0)
        loss = _weighted(loss_BxHxW, weight_BxHxW)
        return LossOutput(*loss, {"loss": loss, "pixel_accuracy": accuracy})

    def outputs(self, output: jax.Array, batch: Mapping) -> dict:
        """Returns predicted masks and the sums for the metrics, without pixel logits.

        'counts' are [B, 3, K], as in `metrics.class_iou`; 'loss' and 'cross_entropy' are
        sums over the pixels of an image, and 'loss_weight' is that of their weights.
        """
        logits_BxHxWxK, mask_BxHxW = output, batch["mask"]
        # A model may have more logits than the data has classes.
        classes = len(self.names)
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
        return {
            "prediction": predicted_BxHxW.astype(jnp.uint8),
            "counts": jnp.stack(counts, axis=1).astype(jnp.int32),
            **self._loss_sums(logits_BxHxWxK, mask_BxHxW),
        }

    def _loss_sums(
        self, logits_BxHxWxK: jax.Array, mask_BxHxW: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the sums of an image that the held-out losses are means of."""
        weight_BxHxW = self._weights(mask_BxHxW)
        loss_BxHxW = self._losses(logits_BxHxWxK, mask_BxHxW, self.label_smoothing)
        found = {"loss": jnp.sum(loss_BxHxW * weight_BxHxW, axis=(1, 2))}
        if self.class_weights:
            found["loss_weight"] = jnp.sum(weight_BxHxW, axis=(1, 2))
        if "cross_entropy" in measured_names((), vars(self)):
            plain = dataclasses.replace(self, loss_name="cross_entropy", loss_args={})
            loss_BxHxW = plain._losses(logits_BxHxWxK, mask_BxHxW)
            is_counted_BxHxW = mask_BxHxW != IGNORED
            found["cross_entropy"] = jnp.sum(loss_BxHxW * is_counted_BxHxW, axis=(1, 2))
        return found

    def _weights(self, mask_BxHxW: jax.Array) -> jax.Array:
        """Returns the weight of each pixel in the loss; ignored pixels have 0."""
        is_counted_BxHxW = mask_BxHxW != IGNORED
        if not self.class_weights:
            return is_counted_BxHxW
        class_weight_K = jnp.asarray(self.class_weights, jnp.float32)
        weight_BxHxW = class_weight_K.at[mask_BxHxW].get(mode="fill", fill_value=0)
        return weight_BxHxW * is_counted_BxHxW

    def serving_outputs(self, outputs: Mapping) -> dict:
        """Returns the predicted masks."""
        return {"prediction": outputs["prediction"]}

    def metrics(self, outputs: Mapping, batch: Mapping) -> dict[str, float]:
        """Returns the metrics of a split, over the pixels of all examples."""
        del batch
        counts = outputs["counts"]
        found = {
            name: metrics.SEGMENTATION[name](counts)
            for name in self.metric_names
            if name not in ("loss", "cross_entropy")
        }
        pixels = max(counts[:, 1].sum(dtype=np.int64), 1)
        weight = (
            outputs["loss_weight"].sum(dtype=np.float64) if self.class_weights else 0
        )
        loss, of_all = outputs["loss"].sum(dtype=np.float64), weight or pixels
        found["loss"] = float(loss / of_all)
        if "cross_entropy" in outputs:
            plain = outputs["cross_entropy"].sum(dtype=np.float64)
            found["cross_entropy"] = float(plain / pixels)
        iou = metrics.class_iou(counts).tolist()
        return found | {
            f"{PER_CLASS}{name}": value for name, value in zip(self.names, iou)
        }

    def example_scores(self, outputs: Mapping, batch: Mapping) -> ExampleScores:
        """Returns pixel accuracy and losses of images, scaled to means over all pixels."""
        del batch
        right_B, true_B, _ = outputs["counts"].sum(axis=2, dtype=np.float64).T
        pixels, found = max(true_B.mean(), 1 / len(true_B)), {}
        if "pixel_accuracy" in self.metric_names and true_B.any():
            found["pixel_accuracy"] = right_B / pixels
        weight = (
            outputs["loss_weight"].mean(dtype=np.float64) if self.class_weights else 0
        )
        found["loss"] = outputs["loss"].astype(np.float64) / (weight or pixels)
        if "cross_entropy" in outputs:
            found["cross_entropy"] = outputs["cross_entropy"] / pixels
        return ExampleScores(scores=found)

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns nothing: every metric is defined on every split."""
        del labels
        return []

    def records(self, outputs: Mapping, batch: Mapping) -> list[dict]:
        """Returns the mask and each found class's share of the image, largest first."""
        del batch
        found = []
        for mask in outputs["prediction"]:
            share = np.bincount(mask.reshape(-1), minlength=len(self.names)) / mask.size
            order = np.argsort(-share, kind="stable")
            shares = {self.names[k]: float(share[k]) for k in order if share[k]}
            found.append({"mask": mask, "share": shares})
        return found


def _weighted(
    value_BxHxW: jax.Array, weight_BxHxW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    weight = jnp.sum(weight_BxHxW)
    # The loss of an ignored pixel may be infinite.
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
) -> SupervisedTask:
    """Returns the task that `config.task` describes.

    Args:
        data: Description of the data.
        model: The section `config.model`: a classifier, and `taps`, stages whose maps
            get a classifier of their own.
        precision: 'float32', 'bfloat16' or 'float64'.
        loss: A name in `losses.CLASSIFICATION`.
        loss_args: Arguments of the loss by name.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of the pixels of each class; empty weighs all by 1.
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
    raise_if(problems, "config.task does not fit:")
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    make_mask_augment(data.augment, data.shape[:2])
    module, backbone = _model_and_backbone(dict(model), data, precision)
    unused = functools.partial(_unused, backbone, data.shape, module.stages[:-1])
    return SupervisedTask(
        models=ModelSet(modules={"": module}, carried=("mask",), unused=unused),
        inputs=ImageInputs(data=data, dtype=module.param_dtype),
        target=PixelTarget(
            names=data.pixel_classes,
            loss_name=loss,
            loss_args=bound.keywords,
            label_smoothing=label_smoothing,
            class_weights=tuple(map(float, class_weights)),
            metric_names=metrics,
        ),
    )


def _unused(
    backbone: nn.Module, shape: tuple[int, ...], kept: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns names of the backbone's variables that are not in its kept stages."""
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = jax.eval_shape(
        lambda x: backbone.init(jax.random.key(0), x, train=False), x
    )
    return tuple(name for name in named(shapes) if name.split("/")[1] not in kept)


def _model_and_backbone(
    arguments: dict[str, Any], data: DataSpec, precision: str
) -> tuple[Any, nn.Module]:
    """Returns the model, and the classifier that became its backbone."""
    classes = len(data.pixel_classes)
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

    around = functools.partial(
        fully_convolutional,
        classes=logits,
        size=(data.shape[0], data.shape[1]),
        taps=taps,
        head=head,
        **kinds,
    )
    name = arguments.pop("name")
    # The classifier's own head is not used, so its options stay out.
    given = {**arguments, "head": {}}
    module: Any = make_model(name, given, around=around, classes=logits, **kinds)
    model = module.module if isinstance(module, LoRA) else module
    return module, model.backbone
