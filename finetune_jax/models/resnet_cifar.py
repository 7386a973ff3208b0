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

from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.layers.heads import make_head
from finetune_jax.models.layers.stages import GlobalPool, batch_norm, run_stages
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates


def _conv3x3(width: int, stride: int, name: str, kinds: dict[str, Any]) -> nn.Conv:
    return nn.Conv(
        width,
        (3, 3),
        strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=convolve,
        name=name,
        **kinds,
    )


class Stem(nn.Module):
    """Convolution, BatchNorm and ReLU."""

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H, W, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxHxWxC = _conv3x3(self.width, 1, "conv", kinds)(x_BxHxWxC)
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
        y_BxHxWxC = _conv3x3(self.width, self.stride, "conv1", kinds)(x_BxHxWxC)
        y_BxHxWxC = norm(name="bn1")(y_BxHxWxC, use_running_average=not train)
        y_BxHxWxC = nn.relu(y_BxHxWxC)
        y_BxHxWxC = _conv3x3(self.width, 1, "conv2", kinds)(y_BxHxWxC)
        y_BxHxWxC = norm(name="bn2")(y_BxHxWxC, use_running_average=not train)
        shortcut = x_BxHxWxC[:, :: self.stride, :: self.stride]
        missing = self.width - shortcut.shape[-1]
        shortcut = jnp.pad(
            shortcut, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
        )
        y_BxHxWxC = drop_residual(y_BxHxWxC, self.rate, train=train)
        return nn.relu(y_BxHxWxC + shortcut)


class Stage(nn.Module):
    """Blocks of one width; the first may halve the size.

    Attributes:
        rates: Rates of stochastic depth, one for each block.
        width: Channels.
        stride: Stride of the first block.
    """

    rates: tuple[float, ...]
    width: int
    stride: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / stride, W / stride, width]."""
        for index, rate in enumerate(self.rates):
            x_BxHxWxC = Block(
                self.width,
                self.stride if index == 0 else 1,
                rate,
                self.dtype,
                self.param_dtype,
                name=f"block{index + 1}",
            )(x_BxHxWxC, train=train)
        return x_BxHxWxC


class ResNetCifar(nn.Module):
    """A ResNet for small images, of depth 6 * blocks + 2.

    Attributes:
        blocks: Number of blocks in each of the three stages.
        classes: Number of logits.
        head_arguments: Arguments of the head, as pairs.
        stochastic_depth: Rate of stochastic depth in the last block.
    """

    blocks: int
    classes: int
    head_arguments: Any = ()
    stochastic_depth: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    stages = ("stem", "stage1", "stage2", "stage3", "pool", "head")

    def setup(self):
        """Makes one submodule for each stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rates = stage_rates(self.stochastic_depth, (self.blocks,) * 3)
        self.stem = Stem(16, **kinds)
        self.stage1 = Stage(rates[0], 16, 1, **kinds)
        self.stage2 = Stage(rates[1], 32, 2, **kinds)
        self.stage3 = Stage(rates[2], 64, 2, **kinds)
        self.pool = GlobalPool()
        self.head = make_head(dict(self.head_arguments), classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        return run_stages(self, x, first=first, last=last, train=train)


def _resnet(
    blocks: int,
    *,
    classes: int,
    head: Mapping[str, Any],
    stochastic_depth: float = 0.0,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> ResNetCifar:
    stage_rates(stochastic_depth, (blocks,))  # Checks the rate at once.
    arguments = tuple(sorted(head.items()))
    return ResNetCifar(blocks, classes, arguments, stochastic_depth, dtype, param_dtype)


MODELS = {
    "resnet8": partial(_resnet, 1),
    "resnet20": partial(_resnet, 3),
    "resnet32": partial(_resnet, 5),
    "resnet56": partial(_resnet, 9),
}
