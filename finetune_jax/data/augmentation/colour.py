"""Changes of colour of one image [H, W, C] in [0, 1]."""

import dm_pix
import jax
import jax.numpy as jnp


def color_jitter(
    image_HxWxC: jax.Array,
    rng: jax.Array,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> jax.Array:
    """Returns the image in changed colours, each change of a random strength.

    Factors are uniform between max(0, 1 - strength) and 1 + strength, the shift of hue
    between -hue and hue; 0 changes nothing. The order is that of the arguments, whereas
    torchvision's ColorJitter, the source, draws it: under vmap that would compute every
    change in every place, 16 instead of 4.
    """
    changes = (
        (adjust_brightness, max(0.0, 1 - brightness), 1 + brightness),
        (adjust_contrast, max(0.0, 1 - contrast), 1 + contrast),
        (adjust_saturation, max(0.0, 1 - saturation), 1 + saturation),
        (adjust_hue, -hue, hue),
    )
    for (adjust, low, high), own_rng in zip(changes, jax.random.split(rng, 4)):
        if low < high:
            amount = jax.random.uniform(own_rng, (), image_HxWxC.dtype, low, high)
            image_HxWxC = adjust(image_HxWxC, amount)
    return image_HxWxC


def adjust_brightness(image_HxWxC: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the image times `factor`, clipped."""
    return jnp.clip(image_HxWxC * factor, 0, 1)


def adjust_contrast(image_HxWxC: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the image with distances from its mean grey times `factor`, clipped."""
    mean = jnp.mean(grey(image_HxWxC))
    return jnp.clip(mean + factor * (image_HxWxC - mean), 0, 1)


def adjust_saturation(image_HxWxC: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns the image with distances from its own grey times `factor`, clipped.

    Without three channels there are no colours, and nothing changes.
    """
    grey_HxWx1 = grey(image_HxWxC)
    return jnp.clip(grey_HxWx1 + factor * (image_HxWxC - grey_HxWx1), 0, 1)


def adjust_hue(image_HxWxC: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns the image, hues moved by `shift` of the colour circle, at most a half.

    Without three channels there are no colours, and nothing changes.
    """
    if image_HxWxC.shape[-1] != 3:
        return image_HxWxC
    return jnp.asarray(dm_pix.adjust_hue(image_HxWxC, shift))


def grey(image_HxWxC: jax.Array) -> jax.Array:
    """Returns the image's grey [H, W, 1]; without three channels, the image itself."""
    if image_HxWxC.shape[-1] != 3:
        return image_HxWxC
    return jnp.asarray(dm_pix.rgb_to_grayscale(image_HxWxC))
