"""Augmentation of masks: images whose pixels are class indices.

`MOVES` lists what the steps of `config.data.augment` do to the mask of an image, from the
same key: what moves pixels moves those of the mask, what changes colours does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import raise_if
from finetune_jax.data.augmentation import steps as augment

# The index of a pixel that counts nowhere, as in PASCAL VOC.
IGNORED = 255


def palette(classes: int) -> np.ndarray:
    """Returns a colour for each index, uint8 [256, 3]; those without a class are white.

    Args:
        classes: How many there are; the first, mostly the background, is black.

    Source: the colours of PASCAL VOC (VOCdevkit, VOClabelcolormap.m).
    """
    index_N, colours_Nx3 = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            is_set = index_N >> 3 * bit + channel & 1
            colours_Nx3[:, channel] |= (is_set << 7 - bit).astype(np.uint8)
    colours_Nx3[classes:] = 255
    return colours_Nx3


def _resized_crop(
    mask_HxWx1: jax.Array,
    rng: jax.Array,
    min_scale: float = 0.08,
    *,
    size: tuple[int, ...],
) -> jax.Array:
    """Returns the part of a mask that `augment.random_resized_crop` takes of its image."""
    stored = mask_HxWx1.shape[:2]
    corner, sides = augment.random_box(rng, stored, min_scale)
    rows, columns = (
        first + (2 * jnp.arange(length) + 1) * side // (2 * length)
        for first, side, length in zip(corner, sides, size)
    )
    return mask_HxWx1[rows[:, None], columns[None]]


def _same(mask_HxWx1: jax.Array, rng: jax.Array, *arguments: Any) -> jax.Array:
    del rng, arguments
    return mask_HxWx1


# An erased part keeps its classes: its surroundings show them.
MOVES: dict[str, Callable[..., jax.Array]] = {
    "flip": augment.flip,
    "pad_crop": augment.pad_crop,
    "random_crop": augment.random_crop,
    "random_resized_crop": _resized_crop,
    "color_jitter": _same,
    "random_erasing": _same,
}


def make_mask_augment(
    steps: Sequence[Any], size: tuple[int, ...]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function of (masks [B, H, W], keys [B]), the other half of `make_augment`.

    Pixels from outside of an image are ignored.

    Args:
        steps: Steps, as for `make_augment`.
        size: Height and width that the model takes.

    Raises:
        UserError: Lists the steps that move pixels no mask can follow.
    """
    named = [(step,) if isinstance(step, str) else step for step in steps]
    problems = [
        f"config.data.augment[{index}]: {name!r} is not there for masks"
        for index, (name, *_) in enumerate(named)
        if name not in MOVES
    ]
    raise_if(problems, "config.data.augment does not fit:", f"Use {', '.join(MOVES)}.")

    def one(mask_HxW: jax.Array, rng: jax.Array) -> jax.Array:
        # Steps fill with 0, which thus marks ignored pixels.
        mask_HxWx1 = (mask_HxW[..., None] + jnp.uint8(1)).astype(jnp.uint8)
        for index, (name, *arguments) in enumerate(named):
            resizes = augment.AUGMENTATIONS[name].resizes
            options: dict[str, Any] = {"size": size} if resizes else {}
            mask_HxWx1 = MOVES[name](
                mask_HxWx1, jax.random.fold_in(rng, index), *arguments, **options
            )
        return (mask_HxWx1[..., 0] - jnp.uint8(1)).astype(jnp.uint8)

    return jax.vmap(one)
