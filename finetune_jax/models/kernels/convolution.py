"""Convolutions that are fast on CPU, for `nn.Conv(conv_general_dilated=convolve)`.

On CPU, XLA computes a 1x1 convolution two to four times slower than the equal matrix
product, and a depthwise convolution ten times slower than a sum of products. Its gradients
of other convolutions are mostly slower than matrix products; in a loop they take sixteen
times as long and differ in their last bits. Other platforms use XLA's convolutions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.backend import backend
from finetune_jax.models.kernels.depthwise import shifted_products
from finetune_jax.models.kernels.windows import Pads, pixels_met, windows

# Below this number of channels, gradients are wider than images and are not copied.
FEW_CHANNELS = 16
# From this number of weights at one place of the kernel on, products are faster than a
# convolution; measured on two cores.
MANY_WEIGHTS = 256**2


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
    """Returns `jax.lax.conv_general_dilated(...)`, by the fastest implementation.

    Args:
        x_BxHxWxC: Images.
        kernel: Kernel [k, k, C / groups, K].
        strides: Strides of the convolution.
        padding: 'SAME', 'VALID', or pairs of numbers.
        feature_group_count: Number of groups of channels.
        precision: Precision of matrix products.
        **options: Further arguments of `jax.lax.conv_general_dilated`.
    """
    height, width, channels, filters = kernel.shape
    pads = padding
    if isinstance(padding, str):
        sizes = x_BxHxWxC.shape[1:3]
        pads = jax.lax.padtype_to_pads(sizes, (height, width), strides, padding)
    pads = cast(Pads, tuple(map(tuple, pads)))
    strides = cast(tuple[int, int], tuple(strides))
    dilations = (options.get(f"{side}hs_dilation") or (1, 1) for side in "lr")
    is_plain = all(tuple(dilation) == (1, 1) for dilation in dilations)
    is_plain &= min(np.ravel(pads)) >= 0
    is_plain &= options.get("preferred_element_type") is None
    if backend() == "cpu" and is_plain:
        is_pixel = (height, width) == (1, 1) and not np.any(pads)
        if is_pixel and feature_group_count == 1:
            met = x_BxHxWxC[:, :: strides[0], :: strides[1]]
            return jnp.dot(met, kernel[0, 0], precision=precision)
        if channels == 1 and feature_group_count == filters == x_BxHxWxC.shape[-1]:
            return shifted_products(x_BxHxWxC, kernel, strides, pads)
        how = _How(strides, pads, feature_group_count, precision)
        return with_products(x_BxHxWxC, kernel, how)
    return jax.lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        strides,
        padding,
        feature_group_count=feature_group_count,
        precision=precision,
        **options,
    )


class _How(NamedTuple):
    """Static arguments of a convolution."""

    strides: tuple[int, int]
    pads: Pads
    groups: int
    precision: Any


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def with_products(x_BxHxWxC: jax.Array, kernel: jax.Array, how: _How) -> jax.Array:
    """Returns XLA's convolution, with gradients by matrix products.

    Args:
        x_BxHxWxC: Images.
        kernel: Kernel [k, k, C / groups, K].
        how: Static arguments.
    """
    return jax.lax.conv_general_dilated(
        x_BxHxWxC,
        kernel,
        how.strides,
        how.pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=how.groups,
        precision=how.precision,
    )


def _products_forward(x_BxHxWxC, kernel, how):
    return with_products(x_BxHxWxC, kernel, how), (x_BxHxWxC, kernel)


def _products_backward(how, saved, gradient):
    x_BxHxWxC, kernel = saved
    parts = [(x_BxHxWxC, kernel, gradient)]
    if how.groups > 1:
        parts = list(zip(*(jnp.split(a, how.groups, axis=-1) for a in parts[0])))
    of_x = [_gradient_of_x(x.shape, k, g, how) for x, k, g in parts]
    of_kernel = [_gradient_of_kernel(x, k.shape, g, how) for x, k, g in parts]
    of_x, of_kernel = jnp.concatenate(of_x, -1), jnp.concatenate(of_kernel, -1)
    return of_x.astype(x_BxHxWxC.dtype), of_kernel.astype(kernel.dtype)


with_products.defvjp(_products_forward, _products_backward)


def _gradient_of_kernel(
    x_BxHxWxC: jax.Array, shape: tuple[int, ...], gradient: jax.Array, how: _How
) -> jax.Array:
    """Returns the gradient of a kernel of one group."""
    if how.strides == (1, 1) and shape[2] >= FEW_CHANNELS:
        return _in_one(x_BxHxWxC, shape, gradient, how)
    return _row_by_row(x_BxHxWxC, shape, gradient, how)


def _in_one(
    x_BxHxWxC: jax.Array, shape: tuple[int, ...], gradient: jax.Array, how: _How
) -> jax.Array:
    """Returns the gradient of a kernel of stride 1, as one matrix product.

    The images shifted by each row of the kernel are multiplied by the gradient shifted by
    each column: 3 + 3 copies for a 3x3 kernel, instead of 9.
    """
    rows, columns, channels, filters = shape
    height, width = gradient.shape[1:3]
    padded = jnp.pad(x_BxHxWxC, ((0, 0), *how.pads, (0, 0)))
    met = np.arange(height)[:, None] + np.arange(rows)
    images = jnp.swapaxes(jnp.take(padded, met, axis=1, mode="clip"), 2, 3)
    room = columns - 1
    padded = jnp.pad(gradient, ((0, 0), (0, 0), (room, room), (0, 0)))
    met = np.arange(width + room)[:, None] + room - np.arange(columns)
    gradients = jnp.take(padded, met, axis=2, mode="clip")
    found = _product(
        images.reshape(-1, rows * channels),
        gradients.reshape(-1, columns * filters),
        how.precision,
    )
    return jnp.swapaxes(found.reshape(rows, channels, columns, filters), 1, 2)


def _row_by_row(
    x_BxHxWxC: jax.Array, shape: tuple[int, ...], gradient: jax.Array, how: _How
) -> jax.Array:
    """Returns the gradient of a kernel, one matrix product for each of its rows."""
    rows, columns, channels, filters = shape
    met: list[list[jax.Array]] = [[] for _ in range(rows)]
    for row, _, window in windows(x_BxHxWxC, shape, how.strides, how.pads):
        met[row].append(window)
    flat = gradient.reshape(-1, filters)
    images = [
        jnp.concatenate(row, axis=-1).reshape(-1, columns * channels) for row in met
    ]
    found = jnp.stack([_product(flat, one, how.precision) for one in images])
    return jnp.moveaxis(found, 1, -1).reshape(shape)


def _product(left: jax.Array, right: jax.Array, precision: Any) -> jax.Array:
    """Returns the product of a transposed matrix with another."""
    return jax.lax.dot_general(
        left,
        right,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def _gradient_of_x(
    shape: tuple[int, ...], kernel: jax.Array, gradient: jax.Array, how: _How
) -> jax.Array:
    """Returns the gradient of the images of one group.

    With strides, pixels differ in the places of the kernel that reach them. All pixels
    with the same places are computed together: by a convolution of stride 1, or, for
    large kernels, by one matrix product for each place.
    """
    return pixels_met(
        shape,
        kernel.shape,
        how.strides,
        how.pads,
        partial(_of_pixels, kernel=kernel, gradient=gradient, precision=how.precision),
    )


def _of_pixels(
    rows: list[tuple[int, int]],
    columns: list[tuple[int, int]],
    lengths: tuple[int, int],
    *,
    kernel: jax.Array,
    gradient: jax.Array,
    precision: Any,
) -> jax.Array:
    """Returns the gradient of the pixels that the same places of a kernel reach.

    Args:
        rows: Rows of the kernel, each with its offset in the gradient.
        columns: Columns of the kernel, likewise.
        lengths: Number of pixels, down and across.
        kernel: Kernel [k, k, C, K].
        gradient: Gradient of the output, [B, H', W', K].
        precision: Precision of matrix products.
    """
    batch, filters = gradient.shape[0], gradient.shape[-1]
    channels = kernel.shape[2]
    if not rows or not columns:
        return jnp.zeros((batch, *lengths, channels), gradient.dtype)
    padded, begins = gradient, []
    for axis, met in enumerate((rows, columns)):
        low, high = met[0][1], met[-1][1]
        room = [(0, 0)] * 4
        end = high + lengths[axis]
        room[axis + 1] = max(0, -low), max(0, end - gradient.shape[axis + 1])
        padded = jnp.pad(padded, room)
        begins.append(max(0, -low))

    def window(row: tuple[int, int], column: tuple[int, int], *more: int) -> jax.Array:
        top, left = row[1] + begins[0], column[1] + begins[1]
        bottom, right = top + lengths[0], left + lengths[1]
        return padded[:, top : bottom + more[0], left : right + more[1]]

    weights = jnp.swapaxes(kernel, 2, 3)
    if channels * filters >= MANY_WEIGHTS or len(rows) * len(columns) == 1:
        return sum(
            jnp.dot(window(r, c, 0, 0), weights[r[0], c[0]], precision=precision)
            for r in rows
            for c in columns
        )  # type: ignore[return-value]
    chosen = jnp.stack(
        [jnp.stack([weights[r[0], c[0]] for c in columns]) for r in rows]
    )
    reach = rows[-1][1] - rows[0][1], columns[-1][1] - columns[0][1]
    return jax.lax.conv_general_dilated(
        window(rows[0], columns[0], *reach),
        chosen,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
