"""Activations between the dense layers of transformer blocks."""

from functools import partial

import flax.linen as nn
import jax

# 'gelu' is exact; 'gelu_tanh' is its approximation by a hyperbolic tangent.
HIDDEN_ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}
