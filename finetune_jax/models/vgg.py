"""VGGs: `vgg11`, `vgg13`, `vgg16`, `vgg19`, and each with BatchNorm, `vgg11_bn`.

Source: Simonyan & Zisserman 2015, table 1, configurations A, B, D and E; pooling to 7x7
for images of any size is torchvision's (torchvision/models/vgg.py).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.models.kernels.pooling import max_pool
from finetune_jax.models.layers.heads import check_widths
from finetune_jax.models.layers.stages import (
    Staged,
    batch_norm,
    conv,
    run_block,
    staged,
)

_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
DENSE = 4096
PLACES = 7  # Height and width of the maps before the dense layers.


class Block(nn.Module):
    """A 3x3 convolution, BatchNorm if wanted, and ReLU.

    Attributes:
        width: Channels.
        normalises: Whether a BatchNorm follows each convolution.
    """

    width: int
    normalises: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H, W, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"kernel_init": _INIT, "name": "conv", **kinds}
        x_BxHxWxC = conv(self.width, 3, **options)(x_BxHxWxC)
        if self.normalises:
            norm = batch_norm(name="bn", **kinds)
            x_BxHxWxC = norm(x_BxHxWxC, use_running_average=not train)
        return nn.relu(x_BxHxWxC)


class Stage(nn.Module):
    """Blocks of one width, and max-pooling.

    Attributes:
        blocks: Number of blocks.
        width: Channels.
        normalises: Whether a BatchNorm follows each convolution.
        remat: Whether the backward pass computes each block again.
    """

    blocks: int
    width: int
    normalises: bool
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / 2, W / 2, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for index in range(self.blocks):
            name = f"block{index + 1}"
            block = Block(self.width, self.normalises, name=name, **kinds)
            x_BxHxWxC = run_block(block, x_BxHxWxC, train=train, remat=self.remat)
        return max_pool(x_BxHxWxC, (2, 2), (2, 2))


class AdaptivePool(nn.Module):
    """Means over a grid of `PLACES` x `PLACES` windows, as torch divides the image."""

    has_parameters = False

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, 7, 7, C]."""
        del train
        for axis in (1, 2):
            if x_BxHxWxC.shape[axis] != PLACES:
                shares = jnp.asarray(_shares(x_BxHxWxC.shape[axis]), x_BxHxWxC.dtype)
                means = jnp.tensordot(x_BxHxWxC, shares, (axis, 1), precision="highest")
                x_BxHxWxC = jnp.moveaxis(means, -1, axis)
        return x_BxHxWxC


def _shares(length: int) -> np.ndarray:
    """Returns the weight of each pixel in each window, [PLACES, length].

    Windows overlap if they do not divide the image: torch's `adaptive_avg_pool2d`.
    """
    shares = np.zeros((PLACES, length))
    for place in range(PLACES):
        start, stop = place * length // PLACES, -(-(place + 1) * length // PLACES)
        shares[place, start:stop] = 1 / (stop - start)
    return shares


class Classifier(nn.Module):
    """Two dense layers, each with ReLU and dropout.

    Attributes:
        width: Width of both layers.
        dropout: Rate after each.
    """

    width: int
    dropout: float
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxF = x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1)
        for name in ("dense1", "dense2"):
            kernel_init = nn.initializers.normal(0.01)
            dense = nn.Dense(self.width, kernel_init=kernel_init, name=name, **kinds)
            x_BxF = nn.relu(dense(x_BxF))
            if self.dropout:
                x_BxF = nn.Dropout(self.dropout)(x_BxF, deterministic=not train)
        return x_BxF


def _vgg(
    shape: tuple[tuple[int, int], ...],
    normalises: bool,
    *,
    classes: int,
    head: Mapping[str, Any],
    dropout: float = 0.5,
    dense: int = DENSE,
    remat: bool = False,
    **kinds: Any,
) -> Staged:
    if not 0 <= dropout < 1:
        raise UserError(f"config.model.dropout: {dropout} is not in [0, 1)")
    check_widths("config.model.dense", (dense,))
    stages = [
        Stage(*sizes, normalises, remat, name=f"stage{index + 1}", **kinds)
        for index, sizes in enumerate(shape)
    ]
    last = Classifier(dense, dropout, name="classifier", **kinds)
    parts = *stages, AdaptivePool(name="pool"), last
    return staged(parts, head, classes=classes, **kinds)


# Blocks of the stages, and their widths.
_SHAPES = {
    name: tuple(zip(blocks, (64, 128, 256, 512, 512)))
    for name, blocks in (
        ("vgg11", (1, 1, 2, 2, 2)),
        ("vgg13", (2, 2, 2, 2, 2)),
        ("vgg16", (2, 2, 3, 3, 3)),
        ("vgg19", (2, 2, 4, 4, 4)),
    )
}
MODELS = {
    **{name: partial(_vgg, shape, False) for name, shape in _SHAPES.items()},
    **{f"{name}_bn": partial(_vgg, shape, True) for name, shape in _SHAPES.items()},
}
