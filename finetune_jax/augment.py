"""Augmentation: pure functions of one image and one key, on the device."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from finetune_jax import lookup
from finetune_jax.errors import UserError


def flip(image_HxWxC: jax.Array, rng: jax.Array) -> jax.Array:
    """Returns the image, mirrored left to right with probability one half."""
    return jnp.where(jax.random.bernoulli(rng), image_HxWxC[:, ::-1], image_HxWxC)


def pad_crop(image_HxWxC: jax.Array, rng: jax.Array, pixels: int = 4) -> jax.Array:
    """Returns the image shifted by up to `pixels` each way, black coming in.

    Source: He et al. 2016, section 4.2.
    """
    border = ((pixels, pixels), (pixels, pixels), (0, 0))
    offset = jax.random.randint(rng, (2,), 0, 2 * pixels + 1)
    start = (offset[0], offset[1], 0)
    padded = jnp.pad(image_HxWxC, border)
    return jax.lax.dynamic_slice(padded, start, image_HxWxC.shape)


AUGMENTATIONS = {"flip": flip, "pad_crop": pad_crop}


def make_augment(
    steps: Sequence[Sequence],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function of (images [B, H, W, C], keys [B]) that applies steps in order.

    Args:
        steps: (name, *arguments) each, such as `("pad_crop", 2)`.

    Raises:
        UserError: No such augmentation, or arguments that it does not take.
    """
    functions = []
    for step in steps:
        step = (step,) if isinstance(step, str) else step
        if not isinstance(step, tuple) or not step or not isinstance(step[0], str):
            raise UserError(
                f"config.data.augment: {step!r} is not a step such as ('pad_crop', 2)"
            )
        name, *arguments = step
        function = lookup.choose(AUGMENTATIONS, name, "config.data.augment")
        if len(arguments) > function.__code__.co_argcount - 2 or not all(
            type(argument) is int and argument >= 0 for argument in arguments
        ):
            raise UserError(
                f"config.data.augment: {name!r} does not take {tuple(arguments)}"
            )
        functions.append((function, arguments))

    def one(image, rng):
        for index, (function, arguments) in enumerate(functions):
            image = function(image, jax.random.fold_in(rng, index), *arguments)
        return image

    return jax.vmap(one)
