"""Initial values that are not drawn where only their shapes are asked for.

Of what is traced for the shapes of a large model, random numbers would be half.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_ONLY_SHAPES = contextvars.ContextVar("only_shapes", default=False)


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Has initialisers that are `drawn` give zeros; nothing traced within is to be used."""
    before = _ONLY_SHAPES.set(True)
    try:
        yield
    finally:
        _ONLY_SHAPES.reset(before)


def drawn(initialiser: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an initialiser that draws nothing where only shapes are asked for."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        if _ONLY_SHAPES.get():
            return jnp.zeros(shape, dtype)
        return initialiser(key, shape, dtype)

    return init
