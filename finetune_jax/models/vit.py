"""Vision Transformers: `vit_tiny_patch16`, `vit_small_patch32`, `vit_base_patch14`, ...

Tiny, small, base and large, with patches of 14, 16 or 32 pixels. Each block is a stage.
Every patch has a position embedding, so all images of a model have one size; published
embeddings are resized when they are loaded.

Source: Dosovitskiy et al. 2021, table 1; tiny and small: Touvron et al. 2021, table 1.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.models.layers.activations import HIDDEN_ACTIVATIONS
from finetune_jax.models.layers.attention import Attention, argument_problems
from finetune_jax.models.layers.stages import Norm, Staged, conv, layer_norm, staged
from finetune_jax.models.layers.stochastic_depth import drop_residual, stage_rates

# Initialiser of dense layers and embeddings; Touvron et al. 2021 and timm.
_INIT = nn.initializers.truncated_normal(0.02)


class Shape(NamedTuple):
    """Sizes of a Vision Transformer."""

    width: int
    depth: int
    heads: int
    patch: int


class Stem(nn.Module):
    """Patches as tokens after a class token, plus position embeddings.

    Attributes:
        shape: Sizes of the network.
        class_token: Whether the model has a class token.
        dropout: Rate of dropout of the tokens.
    """

    shape: Shape
    class_token: bool
    dropout: float
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns tokens [B, T, D].

        Raises:
            UserError: The size of the patches does not divide that of the images.
        """
        size, (width, *_) = self.shape.patch, self.shape
        height, across = x_BxHxWxC.shape[1:3]
        if height % size or across % size or not height * across:
            raise UserError(
                f"config.model.name: patches of {size} pixels do not divide images of "
                f"{height} x {across}; set config.data.image_size to a multiple of {size}"
            )
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        patches = conv(width, size, stride=size, padding="VALID", name="conv", **kinds)
        x_BxHxWxC = patches(x_BxHxWxC)
        x_BxTxD = x_BxHxWxC.reshape(x_BxHxWxC.shape[0], -1, width)
        if self.class_token:
            token = self.param("class_token", _INIT, (1, 1, width), self.param_dtype)
            token = jnp.broadcast_to(token, (x_BxTxD.shape[0], 1, width))
            x_BxTxD = jnp.concatenate([token.astype(x_BxTxD.dtype), x_BxTxD], axis=1)
        shape = (1, *x_BxTxD.shape[1:])
        positions = self.param("position_embedding", _INIT, shape, self.param_dtype)
        x_BxTxD = x_BxTxD + positions.astype(x_BxTxD.dtype)
        if self.dropout:
            x_BxTxD = nn.Dropout(self.dropout)(x_BxTxD, deterministic=not train)
        return x_BxTxD


class Block(nn.Module):
    """Attention and two dense layers, each with a LayerNorm before it and a shortcut.

    Attributes:
        heads: Number of attention heads.
        epsilon: Epsilon of the LayerNorms.
        rates: Rates of dropout, of attention dropout, and of stochastic depth.
        activation: Activation between the dense layers, a key of `HIDDEN_ACTIVATIONS`.
    """

    heads: int
    epsilon: float
    rates: tuple[float, float, float]
    activation: str = "gelu"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool) -> jax.Array:
        """Returns tokens [B, T, D]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dropout, of_attention, of_block = self.rates

        def dropped(y_BxTxF):
            if not dropout:
                return y_BxTxF
            return nn.Dropout(dropout)(y_BxTxF, deterministic=not train)

        y = layer_norm(name="ln1", epsilon=self.epsilon, **kinds)(x_BxTxD)
        attention = Attention(
            self.heads, of_attention, _INIT, name="attention", **kinds
        )
        y = dropped(attention(y, train=train))
        x_BxTxD = x_BxTxD + drop_residual(y, of_block, train=train)
        y = layer_norm(name="ln2", epsilon=self.epsilon, **kinds)(x_BxTxD)
        width = x_BxTxD.shape[-1]
        y = nn.Dense(4 * width, kernel_init=_INIT, name="dense1", **kinds)(y)
        y = dropped(HIDDEN_ACTIVATIONS[self.activation](y))
        y = nn.Dense(width, kernel_init=_INIT, name="dense2", **kinds)(y)
        return x_BxTxD + drop_residual(dropped(y), of_block, train=train)


class Pool(nn.Module):
    """The features of an image: the class token, or the mean of the patches.

    Attributes:
        kind: 'token' or 'mean'.
        class_token: Whether the first token is a class token, which the mean leaves out.
    """

    kind: str
    class_token: bool

    has_parameters = False

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, D]."""
        del train
        if self.kind == "token":
            return x_BxTxD[:, 0]
        return x_BxTxD[:, int(self.class_token) :].mean(axis=1)


# Stages between the blocks and the head, by the argument `pool`.
POOLS = {
    "token": ("norm", "pool"),
    "mean": ("norm", "pool"),
    "mean_norm": ("pool", "pooled_norm"),
}


def _vit(
    shape: Shape,
    *,
    classes: int,
    head: Mapping[str, Any],
    heads: int = 0,
    hidden_activation: str = "gelu",
    pool: str = "token",
    class_token: bool = True,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    epsilon: float = 1e-6,
    remat: bool = False,
    **kinds: Any,
) -> Staged:
    registry.choose(POOLS, pool, "config.model.pool")
    where = "config.model.hidden_activation"
    registry.choose(HIDDEN_ACTIVATIONS, hidden_activation, where)
    shape = shape._replace(heads=heads or shape.heads)
    depth_rates = stage_rates(stochastic_depth, [1] * shape.depth)
    rates = {"dropout": dropout, "attention_dropout": attention_dropout}
    problems = argument_problems(shape.width, shape.heads, epsilon, **rates)
    if pool == "token" and not class_token:
        problems.append(
            "config.model.pool: 'token', but config.model.class_token is False; 'mean' "
            "needs none"
        )
    raise_if(problems, "config.model does not fit:")
    blocks = []
    for index, (rate,) in enumerate(depth_rates):
        own, name = (dropout, attention_dropout, rate), f"block{index + 1}"
        options = {"name": name, **kinds}
        blocks.append(Block(shape.heads, epsilon, own, hidden_activation, **options))
    pooling: dict[str, nn.Module] = {
        "pool": Pool(pool.split("_")[0], class_token, name="pool"),
        "norm": Norm(epsilon, name="norm", **kinds),
        "pooled_norm": Norm(epsilon, name="pooled_norm", **kinds),
    }
    stem = Stem(shape, class_token, dropout, name="stem", **kinds)
    parts = stem, *blocks, *(pooling[name] for name in POOLS[pool])
    again = tuple(block.name for block in blocks) if remat else ()
    return staged(parts, head, classes=classes, remat=again, **kinds)


# Width, depth and heads.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
MODELS = {
    f"vit_{size}_patch{patch}": partial(_vit, Shape(*shape, patch), heads=shape[2])
    for size, shape in SIZES.items()
    for patch in (14, 16, 32)
}
