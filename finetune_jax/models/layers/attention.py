"""Attention of all tokens to all tokens, in several heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Self-attention, with layers of their own for queries, keys and values.

    Attributes:
        heads: They divide the width.
        dropout: Rate at which what a token attends to is left out.
        kernel_init: Of the four layers.
    """

    heads: int
    dropout: float = 0.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, mask_BxT: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        """Returns what the tokens attend to, [B, T, D].

        Args:
            x_BxTxD: The tokens.
            mask_BxT: Which of them there are; None is all.
            train: Whether attention is dropped.
        """
        batch, tokens, width = x_BxTxD.shape
        query, key, value = (
            self._dense(width, name)(x_BxTxD).reshape(batch, tokens, self.heads, -1)
            for name in ("query", "key", "value")
        )
        # Scores of half precision would be too coarse to be told apart.
        wide = jnp.promote_types(query.dtype, jnp.float32)
        scores_BxNxTxS = jnp.einsum(
            "btnh,bsnh->bnts", query, key, preferred_element_type=wide
        )
        scores_BxNxTxS = scores_BxNxTxS * query.shape[-1] ** -0.5
        if mask_BxT is not None:
            is_there = mask_BxT.astype(bool)[:, None, None, :]
            scores_BxNxTxS = jnp.where(is_there, scores_BxNxTxS, jnp.finfo(wide).min)
        share = jax.nn.softmax(scores_BxNxTxS, axis=-1).astype(value.dtype)
        if self.dropout:
            share = nn.Dropout(self.dropout)(share, deterministic=not train)
        met = jnp.einsum("bnts,bsnh->btnh", share, value)
        return self._dense(width, "out")(met.reshape(batch, tokens, width))

    def _dense(self, width: int, name: str) -> nn.Dense:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(width, kernel_init=self.kernel_init, name=name, **kinds)
