"""Running stages of a model, and layers that several models have."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.models.layers.sizes import check_pixels


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


def layer_norm(
    dtype: Any, param_dtype: Any, name: str, *, epsilon: float = 1e-6
) -> nn.LayerNorm:
    """Returns a LayerNorm over the channels with torch's two-pass variance."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def batch_norm(
    dtype: Any,
    param_dtype: Any,
    name: str | None = None,
    *,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> nn.BatchNorm:
    """Returns a BatchNorm whose mode is an argument of the call.

    The defaults of momentum and epsilon are torch's (its momentum 0.1 is 0.9 here). Unlike
    torch's, the running variance has no Bessel's correction.
    """
    return nn.BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )
