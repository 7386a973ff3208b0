"""Convolutions that are fast on CPU too, as `nn.Conv(conv_general_dilated=convolve)`.

On CPU, XLA computes those of one pixel two to four times slower than the matrix product
that they are, and those of single channels ten times slower than a sum of products.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x_BxHxWxC: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Any,
    *,
    feature_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> jax.Array:
    """Returns what `jax.lax.conv_general_dilated` does, computed as is fast.

    Args:
        x_BxHxWxC: Images.
        kernel: [k, k, C / groups, K].
        strides: Of the convolution.
        padding: 'SAME', 'VALID', or numbers.
        feature_group_count: Groups of channels.
        precision: Of matrix products.
        **options: Of `jax.lax.conv_general_dilated`.
    """
    height, width, channels, filters = kernel.shape
    pads = padding
    if isinstance(padding, str):
        sizes = x_BxHxWxC.shape[1:3]
        pads = jax.lax.padtype_to_pads(sizes, (height, width), strides, padding)
    pads = tuple(map(tuple, pads))
    dilations = (options.get(f"{side}hs_dilation") or (1, 1) for side in "lr")
    is_plain = all(tuple(dilation) == (1, 1) for dilation in dilations)
    if jax.default_backend() == "cpu" and is_plain:
        is_pixel = (height, width, *strides) == (1, 1, 1, 1) and not np.any(pads)
        if is_pixel and feature_group_count == 1:
            return jnp.dot(x_BxHxWxC, kernel[0, 0], precision=precision)
        if channels == 1 and feature_group_count == filters == x_BxHxWxC.shape[-1]:
            return shifted_products(x_BxHxWxC, kernel, tuple(strides), pads)
    return jax.lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        strides,
        padding,
        feature_group_count=feature_group_count,
        precision=precision,
        **options,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted_products(
    x_BxHxWxC: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    """Returns a convolution channel by channel, as a sum of shifted images.

    Each is multiplied by one of the kernel's weights; XLA makes one loop of it. The
    gradients are such sums too: that of the input over the gradient spread out by the
    stride, that of the kernel a sum over places for each shift.

    Args:
        x_BxHxWxC: The images.
        kernel: [k, k, 1, C].
        strides: Of the convolution.
        pads: Before and after, of height and width.
    """
    products = (
        _exact(window) * _exact(_weight(kernel, row, column))
        for row, column, window in _windows(x_BxHxWxC, kernel, strides, pads)
    )
    return sum(products).astype(x_BxHxWxC.dtype)  # type: ignore[union-attr]


def _exact(array: jax.Array) -> jax.Array:
    """Returns the array in a type in which sums are not rounded much."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _weight(kernel: jax.Array, row: int, column: int) -> jax.Array:
    """Returns a kernel's weights at one place, [1, 1, 1, C]."""
    return kernel[row : row + 1, column : column + 1]


def _windows(x_BxHxWxC: jax.Array, kernel: jax.Array, strides, pads):
    """Yields (row, column, what this place of the kernel meets)."""
    padded = jnp.pad(x_BxHxWxC, ((0, 0), *pads, (0, 0)))
    rows, columns = kernel.shape[:2]
    reach_down = (padded.shape[1] - rows) // strides[0] * strides[0]
    reach_right = (padded.shape[2] - columns) // strides[1] * strides[1]
    for row in range(rows):
        for column in range(columns):
            yield (
                row,
                column,
                padded[
                    :,
                    row : row + reach_down + 1 : strides[0],
                    column : column + reach_right + 1 : strides[1],
                ],
            )


def _forward(x_BxHxWxC, kernel, strides, pads):
    return shifted_products(x_BxHxWxC, kernel, strides, pads), (x_BxHxWxC, kernel)


def _backward(strides, pads, saved, gradient):
    x_BxHxWxC, kernel = saved
    sums = [
        jnp.sum(_exact(window) * _exact(gradient), axis=(0, 1, 2))
        for _, _, window in _windows(x_BxHxWxC, kernel, strides, pads)
    ]
    of_kernel = jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)
    rows, columns = kernel.shape[:2]
    _, height, width, _ = x_BxHxWxC.shape

    def spread(length: int, size: int, axis: int) -> tuple[int, int, int]:
        before, stride = pads[axis][0], strides[axis]
        reach = (gradient.shape[axis + 1] - 1) * stride
        return size - 1 - before, length - 1 + before - reach, stride - 1

    nothing = (0, 0, 0)
    padding = (nothing, spread(height, rows, 0), spread(width, columns, 1), nothing)
    padded = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), padding)
    of_x = sum(
        _exact(padded[:, row : row + height, column : column + width])
        * _exact(_weight(kernel, rows - 1 - row, columns - 1 - column))
        for row in range(rows)
        for column in range(columns)
    )
    return of_x.astype(x_BxHxWxC.dtype), of_kernel  # type: ignore[union-attr]


shifted_products.defvjp(_forward, _backward)
