"""RandAugment: random operations of one strength on one image.

Source: Cubuk et al. 2020, with the operations and magnitudes of torchvision's
RandAugment.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.data.augmentation.colour import grey

MAX_MAGNITUDE = 30
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
TABLES = ("Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = ("Identity", *MOVES, *BLENDS, *TABLES)
LEVELS = 256


def rand_augment(
    image_HxWxC: jax.Array, rng: jax.Array, num_ops: int = 2, magnitude: int = 9
) -> jax.Array:
    """Returns the image after `num_ops` operations, each drawn from all.

    Shears, translations, rotations, and changes of brightness, colour, contrast and
    sharpness go either way with probability one half.

    The price: under vmap every branch is computed for every image, so the operations
    share their work. One costs a resampling (nearest pixel, black coming in), a blend
    and a table of 256 levels, which of them is taken in the end.
    """
    draws = jax.random.randint(rng, (num_ops, 2), 0, jnp.array([[len(OPERATIONS), 2]]))
    for draw in draws:
        image_HxWxC = operate(image_HxWxC, draw[0], draw[1], magnitude=magnitude)
    return image_HxWxC


def operate(
    image_HxWxC: jax.Array,
    operation: jax.Array,
    negative: jax.Array,
    *,
    magnitude: int,
) -> jax.Array:
    """Returns the image after one operation.

    Blends are of floats; torchvision rounds them down to bytes.

    Args:
        image_HxWxC: The image.
        operation: Place in `OPERATIONS`; may be traced.
        negative: 1 for the other direction, 0 else; may be traced.
        magnitude: 0 to 30.
    """
    matrix_2x3 = _matrices(image_HxWxC.shape, magnitude)[negative, operation]
    moved_HxWxC = _resample(image_HxWxC, matrix_2x3.astype(image_HxWxC.dtype))
    factor = 1 + jnp.array([1, -1])[negative] * 0.9 * magnitude / MAX_MAGNITUDE
    first = 1 + len(MOVES)
    blended_HxWxC = _blend(
        image_HxWxC, operation - first, factor.astype(image_HxWxC.dtype)
    )
    first += len(BLENDS)
    mapped_HxWxC = _look_up(image_HxWxC, operation - first, magnitude)
    # Without an operation the resampling is exact.
    coloured_HxWxC = jnp.where(operation < first, blended_HxWxC, mapped_HxWxC)
    return jnp.where(operation <= len(MOVES), moved_HxWxC, coloured_HxWxC)


def _matrices(shape: tuple[int, ...], magnitude: int) -> jax.Array:
    """Returns where each operation takes a pixel from, [2, operations, 2, 3].

    The first axis is for both directions. The matrices are for places (x, y, 1)
    relative to the image's centre; shears keep its upper left corner.
    """
    height, width, _ = shape
    table = np.tile(np.eye(2, 3), (2, len(OPERATIONS), 1, 1))
    for row, sign in zip(table, (1, -1)):
        strength = sign * magnitude / MAX_MAGNITUDE
        named = dict(zip(OPERATIONS, row))
        shear, angle = 0.3 * strength, math.radians(30 * strength)
        named["ShearX"][0, 1:] = shear, shear * height / 2
        named["ShearY"][1, [0, 2]] = shear, shear * width / 2
        named["TranslateX"][0, 2] = -int(150 / 331 * width * strength)
        named["TranslateY"][1, 2] = -int(150 / 331 * height * strength)
        turn = math.cos(angle), math.sin(angle)
        named["Rotate"][:, :2] = [[turn[0], -turn[1]], [turn[1], turn[0]]]
    return jnp.asarray(table)


def _resample(image_HxWxC: jax.Array, matrix_2x3: jax.Array) -> jax.Array:
    """Returns the image whose pixels come from where the matrix says, or are 0."""
    height, width, channels = image_HxWxC.shape
    y_HxW, x_HxW = jnp.meshgrid(
        jnp.arange(height, dtype=matrix_2x3.dtype) - (height - 1) / 2,
        jnp.arange(width, dtype=matrix_2x3.dtype) - (width - 1) / 2,
        indexing="ij",
    )
    column_HxW, row_HxW = (
        jnp.round(x_HxW * a + y_HxW * b + (c + (length - 1) / 2)).astype(int)
        for (a, b, c), length in zip(matrix_2x3, (width, height))
    )
    there_HxW = (row_HxW >= 0) & (row_HxW < height)
    there_HxW &= (column_HxW >= 0) & (column_HxW < width)
    place_HxW = jnp.where(there_HxW, row_HxW * width + column_HxW, 0)
    taken_HxWxC = image_HxWxC.reshape(-1, channels)[place_HxW]
    return jnp.where(there_HxW[..., None], taken_HxWxC, 0)


def _blend(image_HxWxC: jax.Array, which: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the image with distances from another image times `factor`, clipped.

    Args:
        image_HxWxC: The image.
        which: Place in `BLENDS`; the other image is black, the image's grey, its mean
            grey, or blurred.
        factor: Not negative.
    """
    grey_HxWx1 = grey(image_HxWxC)
    constant = jnp.where(which == BLENDS.index("Contrast"), jnp.mean(grey_HxWx1), 0)
    flat_HxWx1 = jnp.where(which == BLENDS.index("Color"), grey_HxWx1, constant)
    is_sharper = which == BLENDS.index("Sharpness")
    other_HxWxC = jnp.where(is_sharper, _blurred(image_HxWxC), flat_HxWx1)
    return jnp.clip(other_HxWxC + factor * (image_HxWxC - other_HxWxC), 0, 1)


def _blurred(image_HxWxC: jax.Array) -> jax.Array:
    """Returns means over 3 x 3 pixels, the middle weighing 5; the border stays.

    Source: Pillow's ImageFilter.SMOOTH.
    """
    rows = image_HxWxC[:-2] + image_HxWxC[1:-1] + image_HxWxC[2:]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = (around + 4 * image_HxWxC[1:-1, 1:-1]) / 13
    return image_HxWxC.at[1:-1, 1:-1].set(inner)


def _look_up(image_HxWxC: jax.Array, which: jax.Array, magnitude: int) -> jax.Array:
    """Returns the image rounded to 256 levels, each mapped to another of its channel.

    Args:
        image_HxWxC: The image.
        which: Place in `TABLES`.
        magnitude: 0 to 30.
    """
    channels = image_HxWxC.shape[-1]
    level_HxWxC = jnp.round(image_HxWxC * (LEVELS - 1)).astype(int)
    level_HxWxC = jnp.clip(level_HxWxC, 0, LEVELS - 1)
    # Tables are addressed as vectors: two indices, checked, take three times as long.
    place_HxWxC = level_HxWxC * channels + jnp.arange(channels)[None, None]
    count = jnp.zeros(LEVELS * channels, int)
    count = count.at[place_HxWxC].add(1, mode="promise_in_bounds")
    count_LxC = count.reshape(LEVELS, channels)
    fixed = [
        jnp.broadcast_to(table_L[:, None], count_LxC.shape)
        for table_L in _fixed_tables(magnitude)
    ]
    table_LxC = jnp.stack([*fixed, _stretched(count_LxC), _equalised(count_LxC)])[which]
    table = (table_LxC.astype(image_HxWxC.dtype) / (LEVELS - 1)).reshape(-1)
    return table.at[place_HxWxC].get(mode="promise_in_bounds")


def _fixed_tables(magnitude: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tables [L] of Posterize and Solarize."""
    level_L = np.arange(LEVELS)
    bits = 8 - round(4 * magnitude / MAX_MAGNITUDE)
    threshold = (LEVELS - 1) * (1 - magnitude / MAX_MAGNITUDE)
    inverted_L = np.where(level_L >= threshold, LEVELS - 1 - level_L, level_L)
    return level_L & -(2 ** (8 - bits)), inverted_L


def _stretched(count_LxC: jax.Array) -> jax.Array:
    """Returns the table [L, C] that stretches what occurs to 0 and 255: AutoContrast."""
    low_1xC = jnp.argmax(count_LxC > 0, axis=0)[None]
    high_1xC = LEVELS - 1 - jnp.argmax(count_LxC[::-1] > 0, axis=0)[None]
    level_Lx1 = jnp.arange(LEVELS)[:, None]
    range_1xC = high_1xC - low_1xC
    stretched = (level_Lx1 - low_1xC) * (LEVELS - 1) // jnp.maximum(range_1xC, 1)
    return jnp.where(range_1xC > 0, stretched, level_Lx1)


def _equalised(count_LxC: jax.Array) -> jax.Array:
    """Returns the table [L, C] that makes all levels about as frequent: Equalize."""
    before_LxC = jnp.cumsum(count_LxC, axis=0) - count_LxC
    # All but the pixels of the highest level that occurs.
    most_1xC = jnp.max(jnp.where(count_LxC > 0, before_LxC, 0), axis=0, keepdims=True)
    step_1xC = most_1xC // (LEVELS - 1)
    equal_LxC = (before_LxC + step_1xC // 2) // jnp.maximum(step_1xC, 1)
    level_Lx1 = jnp.arange(LEVELS)[:, None]
    return jnp.where(step_1xC > 0, jnp.clip(equal_LxC, 0, LEVELS - 1), level_Lx1)
