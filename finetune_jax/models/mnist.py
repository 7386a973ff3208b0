"""Models for images of the size of MNIST: `mlp`, 784-64-10, and `cnn`.

Their dense layers fix the size of the images.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.models.kernels.pooling import max_pool
from finetune_jax.models.layers.heads import check_widths
from finetune_jax.models.layers.stages import Staged, batch_norm, conv, staged


class DenseStage(nn.Module):
    """A dense layer with ReLU over the flattened input."""

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, F]."""
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxF = x.reshape(x.shape[0], -1)
        return nn.relu(nn.Dense(self.width, name="dense", **kinds)(x_BxF))


class ConvStage(nn.Module):
    """Convolution, BatchNorm, ReLU and 2x2 max-pooling."""

    width: int
    kernel_size: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / 2, W / 2, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"padding": "SAME", "use_bias": False, "name": "conv", **kinds}
        x_BxHxWxC = conv(self.width, self.kernel_size, **options)(x_BxHxWxC)
        norm = batch_norm(name="bn", **kinds)
        x_BxHxWxC = nn.relu(norm(x_BxHxWxC, use_running_average=not train))
        return max_pool(x_BxHxWxC, (2, 2), (2, 2))


def mlp(
    *,
    classes: int,
    head: Mapping[str, Any],
    hidden: tuple[int, ...] = (64,),
    **kinds: Any,
) -> Staged:
    """Returns dense layers of widths `hidden` with ReLU, then the head."""
    check_widths("config.model.hidden", hidden)
    stages = [
        DenseStage(width, name=f"stage{index}", **kinds)
        for index, width in enumerate(hidden, start=1)
    ]
    return staged(stages, head, classes=classes, **kinds)


def cnn(
    *,
    classes: int,
    head: Mapping[str, Any],
    convolutions: tuple[int, ...] = (32, 64),
    dense: tuple[int, ...] = (1024,),
    kernel_size: int = 5,
    **kinds: Any,
) -> Staged:
    """Returns two blocks of conv, BatchNorm and pooling, a dense layer, and the head."""
    check_widths("config.model.convolutions", convolutions)
    check_widths("config.model.dense", dense)
    check_widths("config.model.kernel_size", (kernel_size,))
    stages = [
        ConvStage(width, kernel_size, name=f"stage{index}", **kinds)
        for index, width in enumerate(convolutions, start=1)
    ]
    stages += [
        DenseStage(width, name=f"stage{index}", **kinds)
        for index, width in enumerate(dense, start=len(convolutions) + 1)
    ]
    return staged(stages, head, classes=classes, **kinds)


MODELS = {"mlp": mlp, "cnn": cnn}
