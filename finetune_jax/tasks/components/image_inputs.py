"""What tasks do alike with images and vectors: scale, augment, normalise, mix them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.data.augmentation.mixup import check_mix, mixed
from finetune_jax.data.augmentation.steps import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.tasks.objectives import losses
from finetune_jax.tasks.task import EVALUATION, Mode, Task, key_of


class Normalised(Task):
    """A task whose inputs are images or vectors, which are augmented and normalised.

    Attributes:
        data: What the examples look like.
        answer: Says what a label is.
    """

    data: DataSpec
    answer: Any

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs as the source gives them, and labels."""
        return self._spec(self.data.shape)

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same; images as large as augmentation takes them."""
        return self._spec(self.data.train_shape)

    def _spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        inputs = jax.ShapeDtypeStruct(shape, np.dtype(self.data.dtype))
        return {"inputs": inputs, "label": self.answer.label}

    @property
    def kind(self) -> Any:
        """Dtype of parameters, and of what the models get."""
        module: Any = next(iter(self.models.values()))
        return module.param_dtype

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics; each model has its own key."""
        return random_variables(self.models, self.data.shape, rng, self.kind)

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs augmented (in training) and normalised."""
        data, kind, inputs = self.data, self.kind, batch["inputs"]
        if jnp.issubdtype(inputs.dtype, jnp.integer):
            inputs = inputs / jnp.asarray(255, kind)
        inputs = inputs.astype(kind)
        if mode != EVALUATION and data.augment:
            keys = jax.vmap(lambda place: jax.random.fold_in(rng, place))
            augment = make_augment(data.augment, data.shape[:2], fill=data.inputs.mean)
            inputs = augment(inputs, keys(batch["position"]))
        last = (1,) * (inputs.ndim - 1) + (-1,)
        mean = jnp.asarray(data.inputs.mean, kind).reshape(last)
        std = jnp.asarray(data.inputs.std, kind).reshape(last)
        return {**batch, "inputs": (inputs - mean) / std}


class Mixed(Normalised):
    """One whose labels are classes, and whose examples may be mixed."""

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch with inputs augmented (in training) and normalised.

        Where examples are mixed, 'target' [B, K] has the shares of the classes.
        """
        batch, data = super().prepare(batch, rng, mode), self.data
        if mode == EVALUATION or not data.mix:
            return batch
        target_BxK = losses.one_hot(batch["label"], len(data.class_names), self.kind)
        inputs, target_BxK = mixed(
            batch["inputs"], target_BxK, batch["position"], rng, entries=data.mix
        )
        # Who is mixed with what could not be read counts as little.
        both = batch["weight"].reshape(-1, 2).prod(axis=1)
        weight_B = jnp.repeat(both, 2)
        return {**batch, "inputs": inputs, "target": target_BxK, "weight": weight_B}


def random_variables(
    models: Mapping[str, nn.Module], shape: tuple[int, ...], rng: jax.Array, kind: Any
) -> tuple[Any, Any]:
    """Returns random parameters and batch statistics of models that take such inputs.

    Args:
        models: By prefix.
        shape: Of one example.
        rng: Each model draws with a key of its own.
        kind: Dtype of batch statistics.
    """
    params, batch_stats, x = {}, {}, jnp.zeros((1, *shape), jnp.float32)
    for prefix, module in models.items():
        variables = module.init(key_of(rng, prefix), x, train=False)
        # Flax starts running averages in float32, whatever the parameters are.
        averages = jax.tree.map(
            lambda leaf: leaf.astype(kind), variables.get("batch_stats", {})
        )
        if not prefix:
            return variables["params"], averages
        params[prefix] = variables["params"]
        if averages:
            batch_stats[prefix] = averages
    return params, batch_stats


def check_classified(data: DataSpec) -> None:
    """Checks that augmentation and mixing fit the examples.

    Raises:
        UserError: An unknown step, or one that does not fit.
    """
    make_augment(data.augment, data.shape[:2], data.train_shape[:2])
    check_mix(data.mix, data.shape)
