"""Depthwise convolution that is fast on CPU too, where XLA's own is ten times slower."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype


class DepthwiseConv(nn.Module):
    """A convolution of each channel on its own, padded as 'SAME'.

    Its parameter is that of `nn.Conv` with as many groups as channels.

    Attributes:
        size: Of the kernel.
        stride: Of the convolution.
    """

    size: int
    stride: int = 1
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Returns features [B, H / stride, W / stride, C]."""
        shape = (self.size, self.size, 1, x_BxHxWxC.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x_BxHxWxC, kernel = promote_dtype(x_BxHxWxC, kernel, dtype=self.dtype)
        if jax.default_backend() == "cpu":
            return shifted_products(x_BxHxWxC, kernel, self.stride)
        return grouped(x_BxHxWxC, kernel, self.stride)


def grouped(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution as XLA has it, one group a channel."""
    return jax.lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x_BxHxWxC.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted_products(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution as a sum of shifted images, each times a kernel's weight.

    XLA makes one loop of it. Its gradients are such sums too: that of the input over the
    gradient spread out by the stride, that of the kernel a sum over places for each shift.

    Args:
        x_BxHxWxC: The images.
        kernel: [k, k, 1, C].
        stride: Of the convolution.
    """
    size = kernel.shape[0]
    products = (
        window * _weight(kernel, row, column)
        for row, column, window in _windows(x_BxHxWxC, size, stride)
    )
    return sum(products)  # type: ignore[return-value]


def _weight(kernel: jax.Array, row: int, column: int) -> jax.Array:
    """Returns a kernel's weights at one place, [1, 1, 1, C]."""
    return kernel[row : row + 1, column : column + 1]


def _windows(x_BxHxWxC: jax.Array, size: int, stride: int):
    """Yields (row, column, what this place of the kernel meets)."""
    _, height, width, _ = x_BxHxWxC.shape
    pads = _pads(height, size, stride), _pads(width, size, stride)
    padded = jnp.pad(x_BxHxWxC, ((0, 0), *pads, (0, 0)))
    rows, columns = -(-height // stride), -(-width // stride)
    for row in range(size):
        for column in range(size):
            below, right = row + (rows - 1) * stride, column + (columns - 1) * stride
            yield (
                row,
                column,
                padded[:, row : below + 1 : stride, column : right + 1 : stride],
            )


def _pads(length: int, size: int, stride: int) -> tuple[int, int]:
    (pads,) = jax.lax.padtype_to_pads((length,), (size,), (stride,), "SAME")
    return pads


def _forward(x_BxHxWxC, kernel, stride):
    return shifted_products(x_BxHxWxC, kernel, stride), (x_BxHxWxC, kernel)


def _backward(stride, saved, gradient):
    x_BxHxWxC, kernel = saved
    size = kernel.shape[0]
    sums = [
        jnp.sum(window * gradient, axis=(0, 1, 2))
        for _, _, window in _windows(x_BxHxWxC, size, stride)
    ]
    of_kernel = jnp.stack(sums).reshape(kernel.shape)

    def spread(length: int, axis: int) -> tuple[int, int, int]:
        before, _ = _pads(length, size, stride)
        reach = (gradient.shape[axis] - 1) * stride
        return size - 1 - before, length - 1 + before - reach, stride - 1

    _, height, width, _ = x_BxHxWxC.shape
    nothing = (0, 0, 0)
    padding = (nothing, spread(height, 1), spread(width, 2), nothing)
    padded = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), padding)
    of_x = sum(
        padded[:, row : row + height, column : column + width]
        * _weight(kernel, size - 1 - row, size - 1 - column)
        for row in range(size)
        for column in range(size)
    )
    return of_x, of_kernel


shifted_products.defvjp(_forward, _backward)
