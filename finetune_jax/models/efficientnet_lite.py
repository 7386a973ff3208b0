"""EfficientNet-Lite: `efficientnet_lite0` to `efficientnet_lite4`.

EfficientNets for small devices, without squeeze-and-excitation and with ReLU6. Stem and
head have the same width in all sizes. The padding is TensorFlow's 'SAME', as in the
published weights; with padding='symmetric' it is torch's, whose weights mostly have
BatchNorms with epsilon=1e-5.

Source: Tan & Le 2019, table 1; github.com/tensorflow/tpu, official/efficientnet/lite.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
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
PADDINGS = ("same", "symmetric")


class Variant(NamedTuple):
    """Padding of the convolutions and epsilon of the BatchNorms.

    Attributes:
        padding: One of `PADDINGS`.
        epsilon: Number added to the variance.
    """

    padding: str = "same"
    epsilon: float = 1e-3


class Row(NamedTuple):
    """A stage of the table: repeated blocks, the first of which has the stride."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    width: int


# Tan & Le 2019, table 1, stages 2 to 8.
TABLE = (
    Row(1, 3, 1, 1, 16),
    Row(2, 3, 2, 6, 24),
    Row(2, 5, 2, 6, 40),
    Row(3, 3, 2, 6, 80),
    Row(3, 5, 1, 6, 112),
    Row(4, 5, 2, 6, 192),
    Row(1, 3, 1, 6, 320),
)


def scaled(width: float, depth: float) -> tuple[Row, ...]:
    """Returns the table with its widths and repeats multiplied.

    Widths are rounded to multiples of 8, and down by at most a tenth. The first and the
    last stage keep their repeats.
    """
    rows = []
    for index, row in enumerate(TABLE):
        wanted = row.width * width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        rounded += 8 if rounded < 0.9 * wanted else 0
        is_end = index in (0, len(TABLE) - 1)
        repeats = row.repeats if is_end else math.ceil(row.repeats * depth)
        rows.append(row._replace(width=rounded, repeats=repeats))
    return tuple(rows)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and, if wanted, ReLU6, as a stage.

    Attributes:
        width: Channels.
        size: Side of the kernel in pixels.
        stride: Stride of the convolution.
        variant: Padding of convolutions, epsilon of BatchNorms.
    """

    width: int
    size: int = 1
    stride: int = 1
    variant: Variant = Variant()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / stride, W / stride, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"stride": self.stride, "name": "conv", **kinds}
        y = _conv(self.variant, self.width, self.size, **options)(x_BxHxWxC)
        norm = _norm(self.variant, "bn", kinds)
        return nn.relu6(norm(y, use_running_average=not train))


def _conv(variant: Variant, width: int, size: int, **options: Any) -> nn.Conv:
    padding = "SAME" if variant.padding == "same" else None
    options = {"use_bias": False, "kernel_init": _INIT, **options}
    return conv(width, size, padding=padding, **options)


def _norm(variant: Variant, name: str, kinds: dict[str, Any]) -> nn.BatchNorm:
    return batch_norm(name=name, momentum=0.99, epsilon=variant.epsilon, **kinds)


class Block(nn.Module):
    """An inverted residual: an expansion, a depthwise convolution, a projection.

    Attributes:
        row: Row of the table.
        stride: Stride of the block.
        rate: Share of the examples whose residual is dropped in training. A block without
            a shortcut drops nothing.
        variant: Padding of convolutions, epsilon of BatchNorms.
    """

    row: Row
    stride: int
    rate: float = 0.0
    variant: Variant = Variant()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, H / stride, W / stride, width]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        row, y, variant = self.row, x_BxHxWxC, self.variant

        def norm(name, y):
            return _norm(variant, name, kinds)(y, use_running_average=not train)

        inner = x_BxHxWxC.shape[-1] * row.expansion
        if row.expansion != 1:
            y = _conv(variant, inner, 1, name="expand_conv", **kinds)(y)
            y = nn.relu6(norm("expand_bn", y))
        options = {"feature_group_count": inner, "name": "depthwise_conv", **kinds}
        y = _conv(variant, inner, row.kernel_size, stride=self.stride, **options)(y)
        y = nn.relu6(norm("depthwise_bn", y))
        y = _conv(variant, row.width, 1, name="project_conv", **kinds)(y)
        y = norm("project_bn", y)
        if y.shape != x_BxHxWxC.shape:
            return y
        return drop_residual(y, self.rate, train=train) + x_BxHxWxC


def _efficientnet_lite(
    width: float,
    depth: float,
    *,
    classes: int,
    head: Mapping[str, Any],
    padding: str = "same",
    epsilon: float = 1e-3,
    stochastic_depth: float = 0.0,
    remat: bool = False,
    **kinds: Any,
) -> Staged:
    registry.choose(dict.fromkeys(PADDINGS), padding, "config.model.padding")
    if epsilon <= 0:
        raise UserError(f"config.model.epsilon: {epsilon} is not above 0")
    rows = scaled(width, depth)
    rates = stage_rates(stochastic_depth, [row.repeats for row in rows])
    variant, stages = Variant(padding, epsilon), []
    for index, row in enumerate(rows):
        blocks = []
        for number, rate in enumerate(rates[index]):
            stride = row.stride if number == 0 else 1
            name = f"block{number + 1}"
            blocks.append(Block(row, stride, rate, variant, name=name, **kinds))
        stages.append(Blocks(tuple(blocks), remat, name=f"stage{index + 1}"))
    parts = (
        ConvNorm(32, 3, 2, variant, name="stem", **kinds),
        *stages,
        ConvNorm(1280, variant=variant, name="top", **kinds),
        GlobalPool(name="pool"),
    )
    return staged(parts, head, classes=classes, **kinds)


# Multipliers of width and depth.
MODELS = {
    "efficientnet_lite0": partial(_efficientnet_lite, 1.0, 1.0),
    "efficientnet_lite1": partial(_efficientnet_lite, 1.0, 1.1),
    "efficientnet_lite2": partial(_efficientnet_lite, 1.1, 1.2),
    "efficientnet_lite3": partial(_efficientnet_lite, 1.2, 1.4),
    "efficientnet_lite4": partial(_efficientnet_lite, 1.4, 1.8),
}
