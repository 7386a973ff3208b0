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
from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.kernels.pooling import max_pool
from finetune_jax.models.layers.heads import make_head
from finetune_jax.models.layers.stages import (
    GlobalPool,
    batch_norm,
    run_block,
    run_stages,
)
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates

_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


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


def _conv(
    width: int,
    size: int,
    stride: int,
    name: str,
    kinds: dict[str, Any],
    groups: int = 1,
) -> nn.Conv:
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=_INIT,
        conv_general_dilated=convolve,
        name=name,
        **kinds,
    )


class Stem(nn.Module):
    """Convolution of 7x7, BatchNorm, ReLU, and max-pooling."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / 4, W / 4, 64]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxHxWxC = _conv(64, 7, 2, "conv", kinds)(x_BxHxWxC)
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
            conv = _conv(width, size, stride, f"conv{index}", kinds, parts)
            norm = batch_norm(name=f"bn{index}", **kinds)
            y_BxHxWxC = norm(conv(y_BxHxWxC), use_running_average=not train)
            if index < len(convolutions):
                y_BxHxWxC = nn.relu(y_BxHxWxC)
        if self.stride != 1 or x_BxHxWxC.shape[-1] != out:
            x_BxHxWxC = _conv(out, 1, self.stride, "shortcut_conv", kinds)(x_BxHxWxC)
            norm = batch_norm(name="shortcut_bn", **kinds)
            x_BxHxWxC = norm(x_BxHxWxC, use_running_average=not train)
        y_BxHxWxC = drop_residual(y_BxHxWxC, self.rate, train=train)
        return nn.relu(y_BxHxWxC + x_BxHxWxC)


class Stage(nn.Module):
    """Blocks of one width; the first may halve the size.

    Attributes:
        shape: Sizes of the network.
        index: Number of the stage, from 0.
        rates: Rates of stochastic depth, one for each block.
        remat: Whether the backward pass computes each block again.
    """

    shape: Shape
    index: int
    rates: tuple[float, ...]
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns the features of the stage."""
        for number, rate in enumerate(self.rates):
            block = Block(
                self.shape,
                64 * 2**self.index,
                2 if self.index and number == 0 else 1,
                rate,
                self.dtype,
                self.param_dtype,
                name=f"block{number + 1}",
            )
            x_BxHxWxC = run_block(block, x_BxHxWxC, train=train, remat=self.remat)
        return x_BxHxWxC


class ResNet(nn.Module):
    """A ResNet for photos.

    Attributes:
        shape: Sizes of the network.
        classes: Number of logits.
        head_arguments: Arguments of the head, as pairs.
        stochastic_depth: Rate of stochastic depth in the last block.
        remat: Whether the backward pass computes each block again.
    """

    shape: Shape
    classes: int
    head_arguments: Any = ()
    stochastic_depth: float = 0.0
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    stages = ("stem", "stage1", "stage2", "stage3", "stage4", "pool", "head")

    def setup(self):
        """Makes one submodule for each stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rates = stage_rates(self.stochastic_depth, self.shape.blocks)
        self.stem = Stem(**kinds)
        self.stage1 = Stage(self.shape, 0, rates[0], self.remat, **kinds)
        self.stage2 = Stage(self.shape, 1, rates[1], self.remat, **kinds)
        self.stage3 = Stage(self.shape, 2, rates[2], self.remat, **kinds)
        self.stage4 = Stage(self.shape, 3, rates[3], self.remat, **kinds)
        self.pool = GlobalPool()
        self.head = make_head(dict(self.head_arguments), classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        return run_stages(self, x, first=first, last=last, train=train)


def _resnet(
    shape: Shape,
    *,
    classes: int,
    head: Mapping[str, Any],
    stride_in: str = "3x3",
    stochastic_depth: float = 0.0,
    remat: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> ResNet:
    registry.choose(dict.fromkeys(STRIDES), stride_in, "config.model.stride_in")
    if stride_in == "1x1" and not shape.bottleneck:
        raise UserError(
            "config.model.stride_in: '1x1', but this model has no bottlenecks; leave it out"
        )
    shape = dataclasses.replace(shape, stride_in=stride_in)
    stage_rates(stochastic_depth, shape.blocks)  # Checks the rate at once.
    arguments = tuple(sorted(head.items()))
    return ResNet(
        shape, classes, arguments, stochastic_depth, remat, dtype, param_dtype
    )


MODELS = {
    "resnet18": partial(_resnet, Shape((2, 2, 2, 2), bottleneck=False)),
    "resnet34": partial(_resnet, Shape((3, 4, 6, 3), bottleneck=False)),
    "resnet50": partial(_resnet, Shape((3, 4, 6, 3))),
    "resnet101": partial(_resnet, Shape((3, 4, 23, 3))),
    "resnet152": partial(_resnet, Shape((3, 8, 36, 3))),
    "wide_resnet50_2": partial(_resnet, Shape((3, 4, 6, 3), group_width=128)),
    "resnext50_32x4d": partial(_resnet, Shape((3, 4, 6, 3), groups=32, group_width=4)),
}
