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
from finetune_jax.models.layers.stages import (
    GlobalPool,
    Norm,
    Staged,
    conv,
    layer_norm,
    run_block,
    staged,
)
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates

_INIT = nn.initializers.truncated_normal(0.02)  # Liu et al. 2022, appendix A.1.
_conv = partial(conv, kernel_init=_INIT)
# A kernel as large as the stride covers every pixel once and needs no padding.
_patches = partial(_conv, padding=0)


class Shape(NamedTuple):
    """Sizes of a ConvNeXt: blocks and width of each stage."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]


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
        x_BxHxWxC = _patches(self.width, 4, stride=4, name="conv", **kinds)(x_BxHxWxC)
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
        options = {"feature_group_count": width, "name": "depthwise_conv", **kinds}
        y = _conv(width, 7, **options)(x_BxHxWxC)
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
            options = {"name": "downsample_conv", **kinds}
            x_BxHxWxC = _patches(self.width, 2, stride=2, **options)(x_BxHxWxC)
        for index, rate in enumerate(self.rates):
            block = Block(self.layer_scale, rate, name=f"block{index + 1}", **kinds)
            x_BxHxWxC = run_block(block, x_BxHxWxC, train=train, remat=self.remat)
        return x_BxHxWxC


def _convnext(
    shape: Shape,
    *,
    classes: int,
    head: Mapping[str, Any],
    stochastic_depth: float = 0.0,
    layer_scale: float = 1e-6,
    epsilon: float = 1e-6,
    remat: bool = False,
    **kinds: Any,
) -> Staged:
    rates = stage_rates(stochastic_depth, shape.blocks)
    for name, value in (("layer_scale", layer_scale), ("epsilon", epsilon)):
        if value <= 0:
            raise UserError(f"config.model.{name}: {value} is not above 0")
    stages = [
        Stage(
            width, at > 0, layer_scale, rates[at], remat, name=f"stage{at + 1}", **kinds
        )
        for at, width in enumerate(shape.widths)
    ]
    parts = (
        Stem(shape.widths[0], name="stem", **kinds),
        *stages,
        GlobalPool(name="pool"),
        # Its epsilon is 1e-12 in transformers. The other LayerNorms have 1e-6 everywhere.
        Norm(epsilon, name="norm", **kinds),
    )
    return staged(parts, head, classes=classes, **kinds)


MODELS = {
    "convnext_tiny": partial(_convnext, Shape((3, 3, 9, 3), (96, 192, 384, 768))),
    "convnext_small": partial(_convnext, Shape((3, 3, 27, 3), (96, 192, 384, 768))),
    "convnext_base": partial(_convnext, Shape((3, 3, 27, 3), (128, 256, 512, 1024))),
}
