"""ResNets for small images: `resnet8`, `resnet20`, `resnet32`, `resnet56`.

Source: He et al. 2016, section 4.2: three stages of n blocks of widths 16, 32, 64, with
shortcuts that have no parameters (option A), for depth 6n + 2.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.models.layers.stages import (
    Blocks,
    GlobalPool,
    Staged,
    batch_norm,
    conv,
    staged,
)
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates

_conv = partial(conv, use_bias=False, kernel_init=nn.initializers.he_normal())


class Stem(nn.Module):
    """Convolution, BatchNorm and ReLU."""

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H, W, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxHxWxC = _conv(self.width, 3, name="conv", **kinds)(x_BxHxWxC)
        norm = batch_norm(name="bn", **kinds)
        return nn.relu(norm(x_BxHxWxC, use_running_average=not train))


class Block(nn.Module):
    """Two convolutions and a shortcut that subsamples and pads channels with zeros.

    Attributes:
        width: Channels.
        stride: Stride of the block.
        rate: Share of the examples whose residual is dropped in training.
    """

    width: int
    stride: int
    rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / stride, W / stride, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(batch_norm, **kinds)
        first = _conv(self.width, 3, stride=self.stride, name="conv1", **kinds)
        y_BxHxWxC = norm(name="bn1")(first(x_BxHxWxC), use_running_average=not train)
        y_BxHxWxC = nn.relu(y_BxHxWxC)
        y_BxHxWxC = _conv(self.width, 3, name="conv2", **kinds)(y_BxHxWxC)
        y_BxHxWxC = norm(name="bn2")(y_BxHxWxC, use_running_average=not train)
        shortcut = x_BxHxWxC[:, :: self.stride, :: self.stride]
        missing = self.width - shortcut.shape[-1]
        shortcut = jnp.pad(
            shortcut, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
        )
        y_BxHxWxC = drop_residual(y_BxHxWxC, self.rate, train=train)
        return nn.relu(y_BxHxWxC + shortcut)


def _resnet(
    blocks: int,
    *,
    classes: int,
    head: Mapping[str, Any],
    stochastic_depth: float = 0.0,
    **kinds: Any,
) -> Staged:
    stages = []
    for index, rates in enumerate(stage_rates(stochastic_depth, (blocks,) * 3)):
        own = []
        for number, rate in enumerate(rates):
            stride = 2 if index and number == 0 else 1
            name = f"block{number + 1}"
            own.append(Block(16 * 2**index, stride, rate, name=name, **kinds))
        stages.append(Blocks(tuple(own), name=f"stage{index + 1}"))
    parts = Stem(16, name="stem", **kinds), *stages, GlobalPool(name="pool")
    return staged(parts, head, classes=classes, **kinds)


MODELS = {
    "resnet8": partial(_resnet, 1),
    "resnet20": partial(_resnet, 3),
    "resnet32": partial(_resnet, 5),
    "resnet56": partial(_resnet, 9),
}
