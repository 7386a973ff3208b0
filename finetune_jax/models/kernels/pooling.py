"""Max-pooling whose gradient is fast on CPU.

XLA's gradient searches the maximum of one window after another; here it is found for all
windows at once. Other platforms use XLA's.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.core.backend import backend
from finetune_jax.models.kernels.windows import Pads, pixels_met, windows

NO_PADS: Pads = ((0, 0), (0, 0))


def max_pool(
    x_BxHxWxC: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    pads: Pads = NO_PADS,
) -> jax.Array:
    """Returns the largest value of each window, as `nn.max_pool` does.

    Of equal values, the first one row by row gets the gradient, as in XLA.

    Args:
        x_BxHxWxC: Images.
        window: Height and width.
        strides: Strides of the windows.
        pads: Padding before and after, of height and width.
    """
    function = _pooled if backend() == "cpu" else _xlas
    return function(x_BxHxWxC, window, strides, pads)


def _xlas(x_BxHxWxC, window, strides, pads):
    return nn.max_pool(
        x_BxHxWxC, window_shape=window, strides=strides, padding=cast(Any, pads)
    )


_pooled = jax.custom_vjp(_xlas, nondiff_argnums=(1, 2, 3))


def _forward(x_BxHxWxC, window, strides, pads):
    return _pooled(x_BxHxWxC, window, strides, pads), x_BxHxWxC


def _backward(window, strides, pads, x_BxHxWxC, gradient):
    # Comparing values with the maximum of the forward pass would be wrong: XLA may compute
    # the values again in another order, and then none is equal to it.
    met = list(windows(x_BxHxWxC, window, strides, pads, fill=-jnp.inf))
    place = jnp.argmax(jnp.stack([seen for *_, seen in met]), axis=0)
    given = {
        (row, column): jnp.where(place == index, gradient, jnp.zeros_like(gradient))
        for index, (row, column, _) in enumerate(met)
    }

    def of_pixels(rows, columns, lengths):
        found = jnp.zeros((len(gradient), *lengths, gradient.shape[-1]), gradient.dtype)
        for row, down in rows:
            for column, right in columns:
                found += _shifted(given[row, column], (down, right), lengths)
        return found

    return (pixels_met(x_BxHxWxC.shape, window, strides, pads, of_pixels),)


_pooled.defvjp(_forward, _backward)


def _shifted(array: jax.Array, shifts: tuple[int, int], lengths) -> jax.Array:
    """Returns `lengths` of an array from a shift on, with zeros beyond its ends."""
    room = [(0, 0, 0)] * 4
    for axis, (shift, length) in enumerate(zip(shifts, lengths), start=1):
        room[axis] = -shift, shift + length - array.shape[axis], 0
    return jax.lax.pad(array, jnp.zeros((), array.dtype), room)
