"""Sliding windows over images, and which places of a window reach a pixel."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

Pads = tuple[tuple[int, int], tuple[int, int]]


def windows(
    x_BxHxWxC: jax.Array,
    shape: Sequence[int],
    strides: tuple[int, int],
    pads: Pads,
    *,
    fill: float = 0.0,
) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (row, column, pixels at this place of each window [B, H', W', C]).

    Args:
        x_BxHxWxC: Images.
        shape: Rows and columns of the window.
        strides: Strides of the windows.
        pads: Padding before and after, of height and width.
        fill: Value of the padding.
    """
    padded = jnp.pad(x_BxHxWxC, ((0, 0), *pads, (0, 0)), constant_values=fill)
    rows, columns = shape[:2]
    reach_down = (padded.shape[1] - rows) // strides[0] * strides[0]
    reach_right = (padded.shape[2] - columns) // strides[1] * strides[1]
    for row in range(rows):
        down = slice(row, row + reach_down + 1, strides[0])
        for column in range(columns):
            right = slice(column, column + reach_right + 1, strides[1])
            yield row, column, padded[:, down, right]


def pixels_met(
    shape: tuple[int, ...],
    window: Sequence[int],
    strides: tuple[int, int],
    pads: Pads,
    function: Callable[..., jax.Array],
) -> jax.Array:
    """Returns images, computed in groups of pixels that the same places of a window reach.

    Args:
        shape: Shape of the images.
        window: Rows and columns of the window.
        strides: Strides of the windows.
        pads: Padding before and after, of height and width.
        function: Takes the rows of the window that reach the pixels of a group, as pairs
            (row, number of the window that reaches the first pixel), in the order of
            these numbers; the same of columns; and the number of pixels, down and across.
            Returns the pixels [B, h, w, C].
    """
    batch, height, width, channels = shape
    lengths = (-(-height // strides[0]), -(-width // strides[1]))

    def met(axis: int, residue: int) -> list[tuple[int, int]]:
        before, stride = pads[axis][0], strides[axis]
        places = reversed(range(window[axis]))
        shifts = [(place, residue + before - place) for place in places]
        return [(p, shift // stride) for p, shift in shifts if shift % stride == 0]

    rows = [
        jnp.stack(
            [
                function(met(0, row), met(1, column), lengths)
                for column in range(strides[1])
            ],
            axis=3,
        )
        for row in range(strides[0])
    ]
    whole = jnp.stack(rows, axis=2).reshape(
        batch, lengths[0] * strides[0], lengths[1] * strides[1], channels
    )
    return whole[:, :height, :width]
