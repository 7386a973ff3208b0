"""What all models share: running some of their stages, and normalising."""

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
        model: Has `stages`, and a submodule of each of these names.
        x: Input of stage `first`; whatever passes between stages is a pytree.
        first: None is the model's first stage.
        last: None is the model's last stage.
        train: Whether dropout and BatchNorm run as in training, where nothing sets it
            stage by stage.
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
    """Returns the output of a block of a stage, or of a stage.

    Args:
        block: Takes `x` and `train`.
        x: Its input.
        train: Whether it runs as in training.
        remat: Whether the backward pass computes it again, and keeps its input alone.
    """
    # Given as an argument, `train` would be traced.
    call: Any = lambda module, x: module(x, train=train)  # noqa: E731
    return (nn.remat(call) if remat else call)(block, x)


class GlobalPool(nn.Module):
    """The mean over all places; a stage of its own, so that maps stay reachable."""

    has_parameters = False

    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, C]."""
        del train
        return x_BxHxWxC.mean(axis=(1, 2))


class MaskedMean(nn.Module):
    """The mean over the tokens of a text; what the mask leaves out counts nothing."""

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
    """Returns a LayerNorm over the channels, as exact as torch's."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


class BatchNorm(nn.BatchNorm):
    """Flax's; while a model is initialised it makes its variables and computes nothing.

    Most of what is traced for the shapes of a ResNet would be the arithmetic of its
    BatchNorms, on which no initial value depends.
    """

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        """Returns `x` normalised, or, while variables are made, as it is."""
        if not self.is_initializing():
            return super().__call__(x, use_running_average, mask=mask)
        shape = (x.shape[self.axis],)
        self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        self.param("scale", self.scale_init, shape, self.param_dtype)
        self.param("bias", self.bias_init, shape, self.param_dtype)
        return x


def batch_norm(
    dtype: Any,
    param_dtype: Any,
    name: str | None = None,
    *,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> BatchNorm:
    """Returns a BatchNorm whose mode is given at the call, as the policy of a phase needs.

    Momentum and epsilon are torch's (0.1 there is 0.9 here). The running variance is that
    of the batch without Bessel's correction, unlike torch's.
    """
    return BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )
