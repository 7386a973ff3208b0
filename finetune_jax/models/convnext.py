"""ConvNeXts: `convnext_tiny`, `convnext_small`, `convnext_base`.

Source: Liu et al. 2022, section 2 and appendix A; the layers are in the order of
torchvision/models/convnext.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError
from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.layers.heads import make_head
from finetune_jax.models.layers.stages import (
    GlobalPool,
    layer_norm,
    run_block,
    run_stages,
)
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates

_INIT = nn.initializers.truncated_normal(0.02)  # Liu et al. 2022, appendix A.1.


class Shape(NamedTuple):
    """Sizes of a ConvNeXt: blocks and width of each stage."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]


def _conv(
    width: int,
    size: int,
    name: str,
    kinds: dict[str, Any],
    *,
    stride: int = 1,
    groups: int = 1,
) -> nn.Conv:
    # A kernel as large as the stride covers every pixel once and needs no padding.
    padding = 0 if stride > 1 else size // 2
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=((padding, padding),) * 2,
        feature_group_count=groups,
        kernel_init=_INIT,
        conv_general_dilated=convolve,
        name=name,
        **kinds,
    )


class Stem(nn.Module):
    """Convolution of 4x4 patches, and LayerNorm.

    Attributes:
        width: Channels.
    """

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / 4, W / 4, width]."""
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x_BxHxWxC = _conv(self.width, 4, "conv", kinds, stride=4)(x_BxHxWxC)
        return layer_norm(name="ln", **kinds)(x_BxHxWxC)


class Block(nn.Module):
    """A depthwise convolution and two dense layers, scaled and added to a shortcut.

    Attributes:
        layer_scale: Initial factor of the channels.
        rate: Share of the examples whose residual is dropped in training.
    """

    layer_scale: float
    rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H, W, C]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x_BxHxWxC.shape[-1]
        y = _conv(width, 7, "depthwise_conv", kinds, groups=width)(x_BxHxWxC)
        y = layer_norm(name="ln", **kinds)(y)
        y = nn.Dense(4 * width, kernel_init=_INIT, name="dense1", **kinds)(y)
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(width, kernel_init=_INIT, name="dense2", **kinds)(y)
        scale_init = nn.initializers.constant(self.layer_scale)
        scale = self.param("layer_scale", scale_init, (width,), self.param_dtype)
        y = y * scale.astype(y.dtype).reshape(1, 1, 1, width)
        return x_BxHxWxC + drop_residual(y, self.rate, train=train)


class Stage(nn.Module):
    """Blocks of one width, after a convolution that halves the size, if any.

    Attributes:
        width: Channels.
        halves: Whether this stage does.
        layer_scale: Initial factor of the channels in each block.
        rates: Rates of stochastic depth, one for each block.
        remat: Whether the backward pass computes each block again.
    """

    width: int
    halves: bool
    layer_scale: float
    rates: tuple[float, ...]
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / 2, W / 2, width], or [B, H, W, width] if not halved."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.halves:
            x_BxHxWxC = layer_norm(name="downsample_ln", **kinds)(x_BxHxWxC)
            conv = _conv(self.width, 2, "downsample_conv", kinds, stride=2)
            x_BxHxWxC = conv(x_BxHxWxC)
        for index, rate in enumerate(self.rates):
            block = Block(self.layer_scale, rate, name=f"block{index + 1}", **kinds)
            x_BxHxWxC = run_block(block, x_BxHxWxC, train=train, remat=self.remat)
        return x_BxHxWxC


class Norm(nn.Module):
    """LayerNorm of pooled features, as a stage.

    Attributes:
        epsilon: Number added to the variance.
    """

    epsilon: float
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, C]."""
        del train
        norm = layer_norm(self.dtype, self.param_dtype, "ln", epsilon=self.epsilon)
        return norm(x_BxC)


class ConvNeXt(nn.Module):
    """A ConvNeXt.

    Attributes:
        shape: Sizes of the network.
        classes: Number of logits.
        head_arguments: Arguments of the head, as pairs.
        stochastic_depth: Rate of stochastic depth in the last block.
        layer_scale: Initial factor of the channels in each block.
        epsilon: Epsilon of the last LayerNorm, 1e-12 in transformers. The other LayerNorms
            have 1e-6 everywhere.
        remat: Whether the backward pass computes each block again.
    """

    shape: Shape
    classes: int
    head_arguments: Any = ()
    stochastic_depth: float = 0.0
    layer_scale: float = 1e-6
    epsilon: float = 1e-6
    remat: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    stages = ("stem", "stage1", "stage2", "stage3", "stage4", "pool", "norm", "head")

    def setup(self):
        """Makes one submodule for each stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rates = stage_rates(self.stochastic_depth, self.shape.blocks)
        self.stem = Stem(self.shape.widths[0], **kinds)
        for index, width in enumerate(self.shape.widths):
            stage = Stage(
                width, index > 0, self.layer_scale, rates[index], self.remat, **kinds
            )
            setattr(self, f"stage{index + 1}", stage)
        self.pool = GlobalPool()
        self.norm = Norm(self.epsilon, **kinds)
        self.head = make_head(dict(self.head_arguments), classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        return run_stages(self, x, first=first, last=last, train=train)


def _convnext(
    shape: Shape,
    *,
    classes: int,
    head: Mapping[str, Any],
    stochastic_depth: float = 0.0,
    layer_scale: float = 1e-6,
    epsilon: float = 1e-6,
    remat: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> ConvNeXt:
    stage_rates(stochastic_depth, shape.blocks)  # Checks the rate at once.
    for name, value in (("layer_scale", layer_scale), ("epsilon", epsilon)):
        if value <= 0:
            raise UserError(f"config.model.{name}: {value} is not above 0")
    return ConvNeXt(
        shape,
        classes,
        tuple(sorted(head.items())),
        stochastic_depth,
        layer_scale,
        epsilon,
        remat,
        dtype,
        param_dtype,
    )


MODELS = {
    "convnext_tiny": partial(_convnext, Shape((3, 3, 9, 3), (96, 192, 384, 768))),
    "convnext_small": partial(_convnext, Shape((3, 3, 27, 3), (96, 192, 384, 768))),
    "convnext_base": partial(_convnext, Shape((3, 3, 27, 3), (128, 256, 512, 1024))),
}
