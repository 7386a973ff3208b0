"""Max-pooling whose gradient is fast on CPU too.

XLA's gradient looks for the maximum of one window after another; here each place of the
window is compared with the maximum for all windows at once.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from finetune_jax.models.backend import backend
from finetune_jax.models.windows import Pads, pixels_met, windows

NO_PADS: Pads = ((0, 0), (0, 0))


def max_pool(
    x_BxHxWxC: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    pads: Pads = NO_PADS,
) -> jax.Array:
    """Returns the largest value of each window, as `nn.max_pool` does.

    Of equal values the first, row by row, gets the gradient, as with XLA.

    Args:
        x_BxHxWxC: Images.
        window: Height and width.
        strides: From one window to the next.
        pads: Before and after, of height and width.
    """
    function = _pooled if backend() == "cpu" else _xlas
    return function(x_BxHxWxC, window, strides, pads)


def _xlas(x_BxHxWxC, window, strides, pads):
    return nn.max_pool(
        x_BxHxWxC, window_shape=window, strides=strides, padding=cast(Any, pads)
    )


_pooled = jax.custom_vjp(_xlas, nondiff_argnums=(1, 2, 3))


def _forward(x_BxHxWxC, window, strides, pads):
    y_BxHxWxC = _pooled(x_BxHxWxC, window, strides, pads)
    return y_BxHxWxC, (x_BxHxWxC, y_BxHxWxC)


def _backward(window, strides, pads, saved, gradient):
    x_BxHxWxC, y_BxHxWxC = saved
    taken, given = jnp.zeros(y_BxHxWxC.shape, bool), {}
    least = -jnp.inf
    for row, column, seen in windows(x_BxHxWxC, window, strides, pads, fill=least):
        is_nan = jnp.isnan(seen) & jnp.isnan(y_BxHxWxC)
        first = ((seen == y_BxHxWxC) | is_nan) & ~taken
        given[row, column] = jnp.where(first, gradient, jnp.zeros_like(gradient))
        taken |= first

    def of_pixels(rows, columns, lengths):
        found = jnp.zeros((len(gradient), *lengths, gradient.shape[-1]), gradient.dtype)
        for row, down in rows:
            for column, right in columns:
                found += _shifted(given[row, column], (down, right), lengths)
        return found

    return (pixels_met(x_BxHxWxC.shape, window, strides, pads, of_pixels),)


_pooled.defvjp(_forward, _backward)


def _shifted(array: jax.Array, shifts: tuple[int, int], lengths) -> jax.Array:
    """Returns the stretch of an array from a shift on, zeros beyond its ends."""
    room = [(0, 0, 0)] * 4
    for axis, (shift, length) in enumerate(zip(shifts, lengths), start=1):
        room[axis] = -shift, shift + length - array.shape[axis], 0
    return jax.lax.pad(array, jnp.zeros((), array.dtype), room)
