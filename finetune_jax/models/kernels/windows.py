"""Windows over images: what each of their places meets, and which places meet a pixel."""

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
    """Yields (row, column, what this place of a window meets, [B, H', W', C]).

    Args:
        x_BxHxWxC: The images.
        shape: Of the window: rows, columns.
        strides: From one window to the next.
        pads: Before and after, of height and width.
        fill: What is beyond the edges.
    """
    padded = jnp.pad(x_BxHxWxC, ((0, 0), *pads, (0, 0)), constant_values=fill)
    rows, columns = shape[:2]
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


def pixels_met(
    shape: tuple[int, ...],
    window: Sequence[int],
    strides: tuple[int, int],
    pads: Pads,
    function: Callable[..., jax.Array],
) -> jax.Array:
    """Returns images put together from the pixels that meet the same places of a window.

    Args:
        shape: Of the images.
        window: Its rows and columns.
        strides: From one window to the next.
        pads: Before and after, of height and width.
        function: Takes what rows meet, (place of the window, number of the window for the
            first of the pixels), numbers growing; the same of columns; and how many
            pixels there are, down and across. Returns them, [B, h, w, C].
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
