"""Inputs that are images or vectors: scaled, augmented, normalised and mixed."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.data.augmentation.masks import IGNORED, make_mask_augment
from finetune_jax.data.augmentation.mixup import check_mix, mixed
from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.models.modes import EVALUATION, Mode
from finetune_jax.tasks.objectives import losses


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Images or feature vectors; images may have masks, which are augmented alike.

    Attributes:
        data: Description of the data.
        dtype: Dtype of the parameters, which the models get their inputs in.
    """

    data: DataSpec
    dtype: Any

    def spec(self, *, training: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns inputs as the source stores them, and masks if there are any."""
        shape = self.data.train_shape if training else self.data.shape
        found = {"inputs": jax.ShapeDtypeStruct(shape, np.dtype(self.data.dtype))}
        if self.data.labels == "masks":
            found["mask"] = jax.ShapeDtypeStruct(shape[:2], np.dtype(np.uint8))
        return found

    def example(self) -> jax.Array:
        """Returns one input of zeros."""
        return jnp.zeros((1, *self.data.shape), jnp.float32)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs augmented (in training) and normalised.

        If examples are mixed, 'target' [B, K] has the shares of the classes. An image
        without a mask gets one in which every pixel is ignored.
        """
        data, kind, inputs = self.data, self.dtype, batch["inputs"]
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = inputs / jnp.asarray(255, kind)
        inputs = inputs.astype(kind)
        if data.labels == "masks" and "mask" not in batch:
            mask = jnp.full(inputs.shape[:3], IGNORED, jnp.uint8)
            batch = {**batch, "mask": mask}
        if mode != EVALUATION and data.augment:
            size = data.shape[:2]
            keys = jax.vmap(lambda place: jax.random.fold_in(rng, place))
            drawn = keys(batch["position"])
            inputs = make_augment(data.augment, size, fill=data.inputs.mean)(
                inputs, drawn
            )
            if data.labels == "masks":
                mask = make_mask_augment(data.augment, size)(batch["mask"], drawn)
                batch = {**batch, "mask": mask}
        last = (1,) * (inputs.ndim - 1) + (-1,)
        mean = jnp.asarray(data.inputs.mean, kind).reshape(last)
        std = jnp.asarray(data.inputs.std, kind).reshape(last)
        batch = {**batch, "inputs": (inputs - mean) / std}
        is_mixed = mode != EVALUATION and data.mix and data.class_names
        return self._mixed(batch, rng) if is_mixed else batch

    def _mixed(self, batch: dict, rng: jax.Array) -> dict:
        target_BxK = losses.one_hot(
            batch["label"], len(self.data.class_names), self.dtype
        )
        inputs, target_BxK = mixed(
            batch["inputs"], target_BxK, batch["position"], rng, entries=self.data.mix
        )
        # An example mixed with an unreadable one also has weight 0.
        both = batch["weight"].reshape(-1, 2).prod(axis=1)
        weight_B = jnp.repeat(both, 2)
        return {**batch, "inputs": inputs, "target": target_BxK, "weight": weight_B}


def check_classified(data: DataSpec) -> None:
    """Checks that augmentation and mixing fit the examples.

    Raises:
        UserError: An unknown step, or one that does not fit.
    """
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    check_mix(data.mix, data.shape)
