"""The head of every model: a stack of dense layers behind the last features."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError

ACTIVATIONS = registry.Choices(
    "activation of a head",
    {"relu": nn.relu, "gelu": nn.gelu, "tanh": nn.tanh, "silu": nn.silu},
)
INITIALISERS = registry.Choices(
    "initialiser of a head",
    {
        "zeros": nn.initializers.zeros_init,
        "lecun_normal": nn.initializers.lecun_normal,
        "xavier_uniform": nn.initializers.xavier_uniform,
        "kaiming_normal": nn.initializers.he_normal,
    },
)


class Head(nn.Module):
    """Hidden layers, dropout before the last, and the logits in float32 or better.

    Attributes:
        classes: Number of logits.
        hidden: Widths of the hidden layers; empty by default.
        activation: Activation after each hidden layer.
        dropout: Rate of dropout before the last layer.
        initialiser: Initialiser of the kernels.
    """

    classes: int
    hidden: tuple[int, ...] = ()
    activation: str = "relu"
    dropout: float = 0.0
    initialiser: str = "lecun_normal"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxF: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits [B, K]."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernel_init = INITIALISERS[self.initialiser]()
        x_BxF = x_BxF.reshape(x_BxF.shape[0], -1)
        for index, width in enumerate(self.hidden):
            name = f"hidden{index + 1}"
            x_BxF = nn.Dense(width, kernel_init=kernel_init, name=name, **kinds)(x_BxF)
            x_BxF = ACTIVATIONS[self.activation](x_BxF)
        if self.dropout:
            x_BxF = nn.Dropout(self.dropout)(x_BxF, deterministic=not train)
        # The last layer is cheap, and a loss of rounded logits is inaccurate.
        kinds["dtype"] = self.param_dtype
        return nn.Dense(self.classes, kernel_init=kernel_init, name="logits", **kinds)(
            x_BxF
        )


def make_head(arguments: Mapping[str, Any], **given: Any) -> Head:
    """Returns the head that `config.model.head` describes.

    Raises:
        UserError: Names every argument that does not fit.
    """
    head = registry.call(Head, arguments, "config.model.head", **given)
    registry.choose(ACTIVATIONS, head.activation, "config.model.head.activation")
    registry.choose(INITIALISERS, head.initialiser, "config.model.head.initialiser")
    if not 0 <= head.dropout < 1:
        raise UserError(f"config.model.head.dropout: {head.dropout} is not in [0, 1)")
    check_widths("config.model.head.hidden", head.hidden)
    return head


def check_widths(where: str, widths: Sequence[Any]) -> None:
    """Checks that widths are positive integers.

    Raises:
        UserError: They are not.
    """
    if any(type(width) is not int or width < 1 for width in widths):
        raise UserError(f"{where}: {tuple(widths)!r}; widths are needed")
