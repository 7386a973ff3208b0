"""`ft_transformer`: every number and every category of a table becomes a token.

Source: Gorishniy et al. 2021, section 3.3; github.com/yandex-research/rtdl.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError
from finetune_jax.models.layers.attention import Attention
from finetune_jax.models.layers.heads import check_widths
from finetune_jax.models.layers.stages import Staged, layer_norm, staged
from finetune_jax.models.tabular import (
    ANY_FIELDS,
    Embeddings,
    Fields,
    check_table_model,
)

EPSILON = 1e-5
# Ratio of a block's hidden layer to the width: 4/3, as ReGLU has two of them.
HIDDEN = 4 / 3


def by_width(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Returns random tokens within 1 / sqrt(width)."""
    limit = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class Tokens(nn.Module):
    """A class token, and one token for each number and each category.

    The token of a number is the number times its own vector. All tokens but the first
    have a bias.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Mapping[str, jax.Array], *, train: bool) -> jax.Array:
        """Returns tokens [B, 1 + F + T, D]."""
        del train
        numbers_BxF, embedded_BxTxD = x["numbers"], x["embedded"]
        batch, fields, width = embedded_BxTxD.shape
        numbers = numbers_BxF.shape[1]

        def own(name: str, *shape: int) -> jax.Array:
            found = self.param(name, by_width, (*shape, width), self.param_dtype)
            return found.astype(self.dtype or self.param_dtype)

        tokens_BxTxD = (
            jnp.concatenate(
                [numbers_BxF[..., None] * own("kernel", numbers)[None], embedded_BxTxD],
                axis=1,
            )
            + own("bias", numbers + fields)[None]
        )
        first_Bx1xD = jnp.broadcast_to(own("class_token", 1, 1), (batch, 1, width))
        return jnp.concatenate([first_Bx1xD, tokens_BxTxD], axis=1)


class Block(nn.Module):
    """Attention and two dense layers, each with a LayerNorm before it and a shortcut.

    Attributes:
        heads: Number of attention heads.
        begins: Whether this is the first block, whose attention has no LayerNorm.
        rates: Rates of dropout of attention, of the hidden layer, and of both residuals.
    """

    heads: int
    begins: bool
    rates: tuple[float, float, float]
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool) -> jax.Array:
        """Returns tokens [B, T, D]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        of_attention, of_hidden, of_results = self.rates

        def dropped(y_BxTxF: jax.Array, rate: float) -> jax.Array:
            if not rate:
                return y_BxTxF
            return nn.Dropout(rate)(y_BxTxF, deterministic=not train)

        y = x_BxTxD
        if not self.begins:
            y = layer_norm(name="ln1", epsilon=EPSILON, **kinds)(y)
        attention = Attention(self.heads, of_attention, name="attention", **kinds)
        x_BxTxD = x_BxTxD + dropped(attention(y, train=train), of_results)
        width = x_BxTxD.shape[-1]
        y = layer_norm(name="ln2", epsilon=EPSILON, **kinds)(x_BxTxD)
        y = nn.Dense(2 * int(HIDDEN * width), name="dense1", **kinds)(y)
        value, gate = jnp.split(y, 2, axis=-1)
        y = dropped(value * nn.relu(gate), of_hidden)
        y = nn.Dense(width, name="dense2", **kinds)(y)
        return x_BxTxD + dropped(y, of_results)


class Norm(nn.Module):
    """LayerNorm and ReLU of the first token."""

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, D]."""
        del train
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.relu(layer_norm(name="ln", epsilon=EPSILON, **kinds)(x_BxTxD[:, 0]))


def ft_transformer(
    *,
    classes: int,
    head: Mapping[str, Any],
    numbers: int = 1,
    fields: Fields = ANY_FIELDS,
    width: int = 64,
    layers: int = 3,
    heads: int = 8,
    attention_dropout: float = 0.2,
    dropout: float = 0.1,
    residual_dropout: float = 0.0,
    **kinds: Any,
) -> Staged:
    """Returns a Transformer of a table's columns.

    Args:
        classes: Number of logits.
        head: Arguments of the head.
        numbers: Number of numeric columns in the data.
        fields: Name and number of rows of each embedding.
        width: Width of a token, a multiple of `heads`.
        layers: Number of blocks, each a stage.
        heads: Number of attention heads of a block.
        attention_dropout: Rate of dropout of the attention weights.
        dropout: Rate of dropout after the hidden layer of a block.
        residual_dropout: Rate of dropout after attention and dense layers.
        **kinds: `dtype` and `param_dtype`.

    Raises:
        UserError: An argument is out of range.
    """
    del numbers
    rates = attention_dropout, dropout, residual_dropout
    check_table_model("ft_transformer", width, max(*rates, -min(rates)))
    check_widths("config.model.layers", (layers,))
    check_widths("config.model.heads", (heads,))
    if width % heads:
        raise UserError(
            f"config.model.width: {width} is not a multiple of heads={heads}"
        )
    parts = (
        Embeddings(fields, width, by_width, name="embeddings", **kinds),
        Tokens(name="tokens", **kinds),
        *(
            Block(heads, index == 0, rates, name=f"stage{index + 1}", **kinds)
            for index in range(layers)
        ),
        Norm(name="norm", **kinds),
    )
    return staged(parts, head, classes=classes, **kinds)


MODELS = {"ft_transformer": ft_transformer}
