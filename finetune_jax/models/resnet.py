"""ResNets for photos as torchvision has them: `resnet18` to `resnet152` and relatives.

Source: He et al. 2016. The stride of a bottleneck is in its 3x3 convolution ("v1.5", as
in torchvision/models/resnet.py), or, with stride_in='1x1', in its first convolution, as in
the paper. ResNeXt: Xie et al. 2017; wide ResNets: Zagoruyko &
Komodakis 2016.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.models.kernels.pooling import max_pool
from finetune_jax.models.layers.stages import (
    Blocks,
    GlobalPool,
    Staged,
    batch_norm,
    conv,
    staged,
)
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates

_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_conv = partial(conv, use_bias=False, kernel_init=_INIT)
# Convolutions that may have the stride of a bottleneck.
STRIDES = ("3x3", "1x1")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a ResNet.

    Attributes:
        blocks: Number of blocks in each of the four stages.
        bottleneck: Whether a block has three convolutions, the last of 4 times the width,
            instead of two.
        groups: Groups of the 3x3 convolution of a bottleneck.
        group_width: Channels of one group in the first stage.
        stride_in: Convolution that has the stride of a bottleneck, one of `STRIDES`.
    """

    blocks: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64
    stride_in: str = "3x3"


class Stem(nn.Module):
    """Convolution of 7x7, BatchNorm, ReLU, and max-pooling."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / 4, W / 4, 64]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxHxWxC = _conv(64, 7, stride=2, name="conv", **kinds)(x_BxHxWxC)
        norm = batch_norm(name="bn", **kinds)
        x_BxHxWxC = nn.relu(norm(x_BxHxWxC, use_running_average=not train))
        return max_pool(x_BxHxWxC, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Block(nn.Module):
    """Two or three convolutions, and a shortcut that is projected where shapes differ.

    Attributes:
        shape: Sizes of the network.
        width: Channels of the stage, before a bottleneck's factor of 4.
        stride: Stride of the block.
        rate: Share of the examples whose residual is dropped in training.
    """

    shape: Shape
    width: int
    stride: int
    rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / stride, W / stride, width (times 4)]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        groups, out = self.shape.groups, self.width
        if self.shape.bottleneck:
            out = 4 * self.width
            inner = self.width * self.shape.group_width // 64 * groups
            strides = {"1x1": (self.stride, 1), "3x3": (1, self.stride)}
            first, second = strides[self.shape.stride_in]
            convolutions = (
                (inner, 1, first, 1), (inner, 3, second, groups), (out, 1, 1, 1),
            )  # fmt: skip
        else:
            convolutions = ((out, 3, self.stride, 1), (out, 3, 1, 1))
        y_BxHxWxC = x_BxHxWxC
        for index, (width, size, stride, parts) in enumerate(convolutions, start=1):
            options = {"feature_group_count": parts, "name": f"conv{index}", **kinds}
            y_BxHxWxC = _conv(width, size, stride=stride, **options)(y_BxHxWxC)
            norm = batch_norm(name=f"bn{index}", **kinds)
            y_BxHxWxC = norm(y_BxHxWxC, use_running_average=not train)
            if index < len(convolutions):
                y_BxHxWxC = nn.relu(y_BxHxWxC)
        if self.stride != 1 or x_BxHxWxC.shape[-1] != out:
            shortcut = _conv(out, 1, stride=self.stride, name="shortcut_conv", **kinds)
            norm = batch_norm(name="shortcut_bn", **kinds)
            x_BxHxWxC = norm(shortcut(x_BxHxWxC), use_running_average=not train)
        y_BxHxWxC = drop_residual(y_BxHxWxC, self.rate, train=train)
        return nn.relu(y_BxHxWxC + x_BxHxWxC)


def _resnet(
    shape: Shape,
    *,
    classes: int,
    head: Mapping[str, Any],
    stride_in: str = "3x3",
    stochastic_depth: float = 0.0,
    remat: bool = False,
    **kinds: Any,
) -> Staged:
    registry.choose(dict.fromkeys(STRIDES), stride_in, "config.model.stride_in")
    if stride_in == "1x1" and not shape.bottleneck:
        raise UserError(
            "config.model.stride_in: '1x1', but this model has no bottlenecks; leave it out"
        )
    shape = dataclasses.replace(shape, stride_in=stride_in)
    stages = []
    for index, rates in enumerate(stage_rates(stochastic_depth, shape.blocks)):
        blocks = []
        for number, rate in enumerate(rates):
            stride = 2 if index and number == 0 else 1
            name = f"block{number + 1}"
            block = Block(shape, 64 * 2**index, stride, rate, name=name, **kinds)
            blocks.append(block)
        stages.append(Blocks(tuple(blocks), remat, name=f"stage{index + 1}"))
    parts = Stem(name="stem", **kinds), *stages, GlobalPool(name="pool")
    return staged(parts, head, classes=classes, **kinds)


MODELS = {
    "resnet18": partial(_resnet, Shape((2, 2, 2, 2), bottleneck=False)),
    "resnet34": partial(_resnet, Shape((3, 4, 6, 3), bottleneck=False)),
    "resnet50": partial(_resnet, Shape((3, 4, 6, 3))),
    "resnet101": partial(_resnet, Shape((3, 4, 23, 3))),
    "resnet152": partial(_resnet, Shape((3, 8, 36, 3))),
    "wide_resnet50_2": partial(_resnet, Shape((3, 4, 6, 3), group_width=128)),
    "resnext50_32x4d": partial(_resnet, Shape((3, 4, 6, 3), groups=32, group_width=4)),
}
