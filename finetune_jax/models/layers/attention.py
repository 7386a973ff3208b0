"""Attention of all tokens to all tokens, in several heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value layers.

    Attributes:
        heads: Number of heads, a divisor of the width.
        dropout: Rate of dropout of the attention weights.
        kernel_init: Initialiser of the four kernels.
        output: Name of the last layer.
    """

    heads: int
    dropout: float = 0.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    output: str = "out"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, mask_BxT: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        """Returns attended tokens [B, T, D].

        Args:
            x_BxTxD: Tokens.
            mask_BxT: True for tokens that exist; None for all.
            train: Whether dropout runs.
        """
        batch, tokens, width = x_BxTxD.shape
        query, key, value = (
            self._dense(width, name)(x_BxTxD).reshape(batch, tokens, self.heads, -1)
            for name in ("query", "key", "value")
        )
        # Scores in half precision would be too coarse.
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
        return self._dense(width, self.output)(met.reshape(batch, tokens, width))

    def _dense(self, width: int, name: str) -> nn.Dense:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(width, kernel_init=self.kernel_init, name=name, **kinds)


def argument_problems(
    width: int, heads: int, epsilon: float, **rates: float
) -> list[str]:
    """Returns the arguments of a Transformer in `config.model` that are out of range.

    Args:
        width: Width of the tokens.
        heads: Number of attention heads.
        epsilon: Number added to the variance in LayerNorms.
        **rates: Rates of dropout by name.
    """
    problems = [
        f"config.model.{name}: {rate} is not in [0, 1)"
        for name, rate in rates.items()
        if not 0 <= rate < 1
    ]
    if heads < 1 or width % heads:
        problems.append(f"config.model.heads: {heads} does not divide width={width}")
    if epsilon <= 0:
        problems.append(f"config.model.epsilon: {epsilon} is not above 0")
    return problems
