"""What tasks do alike with images and vectors: scale, augment, normalise, mix them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax import losses
from finetune_jax.augment import make_augment
from finetune_jax.data.spec import DataSpec
from finetune_jax.errors import UserError
from finetune_jax.mix import mixed
from finetune_jax.tasks.task import EVALUATION, Mode, key_of


def batch_specs(
    data: DataSpec, label: jax.ShapeDtypeStruct, *, training: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of inputs, as the source gives them, and of labels.

    Args:
        data: What the examples look like.
        label: Of one example.
        training: Whether images are as large as augmentation takes them.
    """
    shape = data.train_shape if training else data.shape
    inputs = jax.ShapeDtypeStruct(shape, np.dtype(data.dtype))
    return {"inputs": inputs, "label": label}


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


def prepared(
    batch: dict, rng: jax.Array, mode: Mode, *, data: DataSpec, kind: Any
) -> dict:
    """Returns the batch with inputs augmented (in training) and normalised.

    Args:
        batch: Has 'inputs' and 'position'.
        rng: Key of the update.
        mode: EVALUATION augments nothing.
        data: Says how.
        kind: Dtype of what the models get.
    """
    inputs = batch["inputs"]
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        inputs = inputs / jnp.asarray(255, kind)
    inputs = inputs.astype(kind)
    if mode != EVALUATION and data.augment:
        keys = jax.vmap(lambda place: jax.random.fold_in(rng, place))
        augment = make_augment(data.augment, data.shape[:2], fill=data.mean)
        inputs = augment(inputs, keys(batch["position"]))
    last = (1,) * (inputs.ndim - 1) + (-1,)
    mean = jnp.asarray(data.mean, kind).reshape(last)
    std = jnp.asarray(data.std, kind).reshape(last)
    return {**batch, "inputs": (inputs - mean) / std}


def with_mixtures(
    batch: dict, rng: jax.Array, mode: Mode, *, data: DataSpec, kind: Any
) -> dict:
    """Returns the batch with its examples mixed in training, where `data.mix` says so.

    Then 'target' [B, K] has the shares of the classes.

    Args:
        batch: From `prepared`.
        rng: Key of the update.
        mode: EVALUATION mixes nothing.
        data: Says how.
        kind: Dtype of the target.
    """
    if mode == EVALUATION or not data.mix:
        return batch
    target_BxK = losses.one_hot(batch["label"], len(data.class_names), kind)
    inputs, target_BxK = mixed(
        batch["inputs"], target_BxK, batch["position"], rng, entries=data.mix
    )
    # Who is mixed with what could not be read counts as little.
    both = batch["weight"].reshape(-1, 2).prod(axis=1)
    weight_B = jnp.repeat(both, 2)
    return {**batch, "inputs": inputs, "target": target_BxK, "weight": weight_B}


def check_has_classes(data: DataSpec, task: str) -> None:
    """Checks that the labels of the data are classes of whole examples.

    Args:
        data: What the examples look like.
        task: `config.task.name`, for the message.

    Raises:
        UserError: They are numbers or masks, or the examples are texts.
    """
    where = f"config.task.name: {task!r}, but the data"
    if data.targets:
        raise UserError(
            f"{where}'s labels are not classes but numbers "
            f"({', '.join(data.targets[:20])}): use task.name='regress'"
        )
    if data.pixel_classes:
        raise UserError(
            f"{where} has a mask for each image: use task.name='segmentation'"
        )
    if data.table is not None:
        raise UserError(
            f"config.task.name: {task!r}, but the data is a table: use 'tabular'; or, if "
            "it is texts, name their columns in config.data.text, such as ('sentence',)"
        )
    if data.text is not None:
        raise UserError(f"{where} is text: use 'text'")
