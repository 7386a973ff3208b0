"""Models of stages, and layers that several models have."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.models.kernels.convolution import convolve
from finetune_jax.models.layers.heads import make_head
from finetune_jax.models.layers.sizes import check_pixels


class Staged(nn.Module):
    """A model of stages, one after the other.

    Attributes:
        parts: The stages in order, each with its name; the last is the head.
        remat: Names of the stages that the backward pass computes again.
    """

    parts: tuple[Any, ...]
    remat: tuple[str, ...] = ()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    preserve_adopted_names = True  # Of flax: stages keep their own names.

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        return tuple(part.name for part in self.parts)

    def __getitem__(self, stage: str) -> Any:
        """Returns the module of a stage, with its arguments as attributes."""
        return self.parts[self.stages.index(stage)]

    def setup(self):
        """Makes each stage an attribute of its name."""
        for part in self.parts:
            setattr(self, part.name, part)

    def __call__(self, x, *, first=None, last=None, train: bool):
        """Returns the output of stage `last` for the input of stage `first`."""
        again = self.remat
        return run_stages(self, x, first=first, last=last, train=train, remat=again)


def staged(
    parts: Iterable[nn.Module],
    head: Mapping[str, Any],
    *,
    classes: int,
    remat: tuple[str, ...] = (),
    **kinds: Any,
) -> Staged:
    """Returns a model of stages and a head.

    Args:
        parts: The stages before the head, each with its name.
        head: Arguments of the head, as `config.model.head` has them.
        classes: Number of logits.
        remat: Names of the stages that the backward pass computes again.
        **kinds: `dtype` and `param_dtype`.

    Raises:
        UserError: The head does not take its arguments.
    """
    last = make_head(head, classes=classes, name="head", **kinds)
    return Staged((*parts, last), remat, **kinds)


def run_stages(
    model: nn.Module,
    x: Any,
    *,
    first: str | None,
    last: str | None,
    train: bool,
    remat: Collection[str] = (),
) -> Any:
    """Returns `x` after the stages from `first` to `last`, both included.

    Args:
        model: Module with `stages` and a submodule of each of these names.
        x: Input of stage `first`, a pytree.
        first: First stage; None for the model's first.
        last: Last stage; None for the model's last.
        train: Whether dropout and BatchNorm run in training mode, unless an interceptor
            sets the mode of a stage.
        remat: Stages that the backward pass computes again.

    Raises:
        TooSmall: A stage leaves no pixels of its input.
    """
    names: tuple[str, ...] = model.stages  # type: ignore[attr-defined]
    start = 0 if first is None else names.index(first)
    stop = len(names) if last is None else names.index(last) + 1
    for name in names[start:stop]:
        x = run_block(getattr(model, name), x, train=train, remat=name in remat)
        check_pixels(x, name)
    return x


def run_block(block: nn.Module, x: Any, *, train: bool, remat: bool) -> Any:
    """Returns the output of a stage or of a block in it.

    Args:
        block: Module that takes `x` and `train`.
        x: Input of the block.
        train: Whether the block runs in training mode.
        remat: Whether the backward pass computes the block again from its input.
    """
    # As an argument of `nn.remat`, `train` would be traced.
    call: Any = lambda module, x: module(x, train=train)  # noqa: E731
    return (nn.remat(call) if remat else call)(block, x)


class Blocks(nn.Module):
    """A stage of blocks, one after the other.

    Attributes:
        blocks: The blocks, each with its name.
        remat: Whether the backward pass computes each block again.
    """

    blocks: tuple[nn.Module, ...]
    remat: bool = False

    preserve_adopted_names = True

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        """Returns the output of the last block."""
        for block in self.blocks:
            x = run_block(block, x, train=train, remat=self.remat)
        return x


class GlobalPool(nn.Module):
    """The mean over all places; a stage, so that the maps before it can be taken."""

    has_parameters = False

    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, C]."""
        del train
        return x_BxHxWxC.mean(axis=(1, 2))


class MaskedMean(nn.Module):
    """The mean over the tokens of a text that the mask has."""

    has_parameters = False

    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        """Returns features [B, D] of {'hidden': [B, T, D], 'mask': [B, T]}."""
        del train
        hidden_BxTxD, mask_BxT = x["hidden"], x["mask"].astype(bool)
        kept_BxTxD = jnp.where(mask_BxT[..., None], hidden_BxTxD, 0)
        count_Bx1 = jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)
        return kept_BxTxD.sum(axis=1) / count_Bx1.astype(hidden_BxTxD.dtype)


class Norm(nn.Module):
    """LayerNorm, as a stage.

    Attributes:
        epsilon: Number added to the variance.
    """

    epsilon: float
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns `x` normalised over its last axis."""
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return layer_norm(name="ln", epsilon=self.epsilon, **kinds)(x)


def layer_norm(*, epsilon: float = 1e-6, **options: Any) -> nn.LayerNorm:
    """Returns a LayerNorm over the channels with torch's two-pass variance.

    The fast variance is a difference of means and loses digits.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, **options)


def batch_norm(
    *, momentum: float = 0.9, epsilon: float = 1e-5, **options: Any
) -> nn.BatchNorm:
    """Returns a BatchNorm whose mode is an argument of the call.

    The defaults of momentum and epsilon are torch's (its momentum 0.1 is 0.9 here). Unlike
    torch's, the running variance has no Bessel's correction.
    """
    return nn.BatchNorm(momentum=momentum, epsilon=epsilon, **options)


def conv(
    width: int, size: int, *, stride: int = 1, padding: Any = None, **options: Any
) -> nn.Conv:
    """Returns a convolution with square kernels.

    Args:
        width: Channels of the output.
        size: Side of the kernel in pixels.
        stride: Stride on both axes.
        padding: As in `nn.Conv`; None is torch's, half a kernel on each side.
        **options: Further arguments of `nn.Conv`.
    """
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2 if padding is None else padding,
        conv_general_dilated=convolve,
        **options,
    )
