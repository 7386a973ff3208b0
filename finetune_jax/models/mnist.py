"""Models for images of the size of MNIST: `mlp`, 784-64-10, and `cnn`.

Their dense layers fix the size of the images.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.kernels.pooling import max_pool
from finetune_jax.models.layers.heads import check_widths, make_head
from finetune_jax.models.layers.stages import batch_norm, run_stages


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
        size = (self.kernel_size, self.kernel_size)
        x_BxHxWxC = nn.Conv(
            self.width,
            size,
            use_bias=False,
            conv_general_dilated=convolve,
            name="conv",
            **kinds,
        )(x_BxHxWxC)
        norm = batch_norm(name="bn", **kinds)
        x_BxHxWxC = nn.relu(norm(x_BxHxWxC, use_running_average=not train))
        return max_pool(x_BxHxWxC, (2, 2), (2, 2))


class Sequence(nn.Module):
    """Stages one after the other, then the head.

    Attributes:
        convolutions: Widths of the convolutional stages.
        dense: Widths of the dense stages.
        kernel_size: Side of the kernels in pixels.
        classes: Number of logits.
        head: Arguments of the head.
    """

    classes: int
    convolutions: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()
    kernel_size: int = 5
    head_arguments: Any = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        backbone = len(self.convolutions) + len(self.dense)
        return (*(f"stage{index + 1}" for index in range(backbone)), "head")

    def setup(self):
        """Makes one submodule for each stage."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stages = [
            ConvStage(width, self.kernel_size, **kinds) for width in self.convolutions
        ]
        stages += [DenseStage(width, **kinds) for width in self.dense]
        for name, stage in zip(self.stages, stages):
            setattr(self, name, stage)
        self.head = make_head(dict(self.head_arguments), classes=self.classes, **kinds)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        return run_stages(self, x, first=first, last=last, train=train)


def mlp(
    *,
    classes: int,
    head: Mapping[str, Any],
    hidden: tuple[int, ...] = (64,),
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Sequence:
    """Returns dense layers of widths `hidden` with ReLU, then the head."""
    check_widths("config.model.hidden", hidden)
    return Sequence(
        classes=classes,
        dense=tuple(hidden),
        head_arguments=tuple(sorted(head.items())),
        dtype=dtype,
        param_dtype=param_dtype,
    )


def cnn(
    *,
    classes: int,
    head: Mapping[str, Any],
    convolutions: tuple[int, ...] = (32, 64),
    dense: tuple[int, ...] = (1024,),
    kernel_size: int = 5,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Sequence:
    """Returns two blocks of conv, BatchNorm and pooling, a dense layer, and the head."""
    check_widths("config.model.convolutions", convolutions)
    check_widths("config.model.dense", dense)
    check_widths("config.model.kernel_size", (kernel_size,))
    return Sequence(
        classes=classes,
        convolutions=tuple(convolutions),
        dense=tuple(dense),
        kernel_size=kernel_size,
        head_arguments=tuple(sorted(head.items())),
        dtype=dtype,
        param_dtype=param_dtype,
    )


MODELS = {"mlp": mlp, "cnn": cnn}
