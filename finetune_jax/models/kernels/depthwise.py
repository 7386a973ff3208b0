"""Depthwise convolutions that are fast on CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from finetune_jax.models.kernels.windows import Pads, windows


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def shifted_products(
    x_BxHxWxC: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    """Returns a depthwise convolution, as a sum of shifted images.

    Each is multiplied by one weight of the kernel; XLA fuses all of it into one loop. The
    gradients are such sums too: that of the input over the gradient dilated by the stride,
    that of the kernel over the places of each shift.

    Args:
        x_BxHxWxC: Images.
        kernel: Kernel [k, k, 1, C].
        strides: Strides of the convolution.
        pads: Padding before and after, of height and width.
    """
    products = (
        _exact(window) * _exact(_weight(kernel, row, column))
        for row, column, window in windows(x_BxHxWxC, kernel.shape, strides, pads)
    )
    return sum(products).astype(x_BxHxWxC.dtype)  # type: ignore[union-attr]


def _exact(array: jax.Array) -> jax.Array:
    """Returns the array in float32 or better, for sums."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _weight(kernel: jax.Array, row: int, column: int) -> jax.Array:
    """Returns a kernel's weights at one place, [1, 1, 1, C]."""
    return kernel[row : row + 1, column : column + 1]


def _forward(x_BxHxWxC, kernel, strides, pads):
    return shifted_products(x_BxHxWxC, kernel, strides, pads), (x_BxHxWxC, kernel)


def _backward(strides, pads, saved, gradient):
    x_BxHxWxC, kernel = saved
    sums = [
        jnp.sum(_exact(window) * _exact(gradient), axis=(0, 1, 2))
        for _, _, window in windows(x_BxHxWxC, kernel.shape, strides, pads)
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
