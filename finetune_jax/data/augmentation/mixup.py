"""MixUp and CutMix: pairs of training examples become mixtures of one another.

They act on a batch after the augmentation of its single examples. Pairs are examples 2i
and 2i + 1 of an update, neighbours in a shuffled order, and keys depend on i alone: so
nothing depends on devices and micro-batches, as long as each holds whole pairs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import raise_if
from finetune_jax.data.augmentation.steps import Argument, inside_box, step_problems

# The key of an update folded with a number that no place in a batch has: those are the
# keys of augmentation.
OWN_KEY = np.uint32(2**32 - 1)


def mixup(
    rng: jax.Array, shape: tuple[int, ...], alpha: float = 0.2
) -> tuple[jax.Array, jax.Array]:
    """Returns the share of itself that an example keeps, everywhere and in the target.

    Source: Zhang et al. 2018.

    Args:
        rng: A key.
        shape: Shape of the inputs of an example.
        alpha: The share is distributed as Beta(alpha, alpha).
    """
    share = symmetric_beta(rng, alpha)
    return jnp.broadcast_to(share, (1,) * len(shape)), share


def cutmix(
    rng: jax.Array, shape: tuple[int, ...], alpha: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns which pixels [H, W, 1] an image keeps, as 0 and 1, and their share.

    The others, a box of the image's ratio, come from its partner. The box's area is a
    share of the image that is distributed as Beta(alpha, alpha), its centre uniform;
    what of it lies outside is cut off.

    Source: Yun et al. 2019, algorithm A1, as torchvision's CutMix.
    """
    height, width, _ = shape
    share_rng, place_rng = jax.random.split(rng)
    half = jnp.sqrt(1 - symmetric_beta(share_rng, alpha)) / 2
    stored = jnp.array([height, width])
    centre = jax.random.randint(place_rng, (2,), 0, stored)
    reach = (half * stored).astype(int)
    low = jnp.maximum(centre - reach, 0)
    sides = jnp.minimum(centre + reach, stored) - low
    box_HxWx1 = inside_box((height, width), low, sides)[..., None]
    return 1.0 - box_HxWx1, 1 - jnp.prod(sides) / (height * width)


def symmetric_beta(rng: jax.Array, alpha: float) -> jax.Array:
    """Returns a number distributed as Beta(alpha, alpha).

    Without a loop, whereas `jax.random.beta` rejects, which under vmap takes as long as
    the slowest draw, and compiles five times as long.

    Source: Devroye 1996, Random variate generation in one line of code: a variable of
    Student's t with 2 alpha degrees of freedom, by Bailey's polar method, made a beta.
    """
    uniform = jax.random.uniform(rng, (2,))
    cosine = jnp.cos(2 * math.pi * uniform[1])
    squared = jnp.expm1(-jnp.log(uniform[0]) / alpha) * cosine**2
    return 0.5 + 0.5 * jnp.sign(cosine) / jnp.sqrt(1 + 1 / squared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A way of mixing that `config.data.mix` can name.

    Attributes:
        function: Function of the key, the input shape and at most alpha; its result
            has as many axes as the inputs, and no axis.
        arguments: Arguments that the user may give.
        check: Always None; one argument cannot contradict itself.
        needs_images: Whether the inputs must be images.
    """

    function: Callable[..., tuple[jax.Array, jax.Array]]
    arguments: tuple[Argument, ...] = (Argument(name="alpha", above=True),)
    check: Callable[..., str | None] = lambda *arguments: None
    needs_images: bool = False


MIXTURES = registry.Choices(
    "mixture",
    {
        "mixup": Mixture(function=mixup),
        "cutmix": Mixture(function=cutmix, needs_images=True),
    },
)


def mixed(
    inputs: jax.Array,
    target_BxK: jax.Array,
    position_B: jax.Array,
    rng: jax.Array,
    *,
    entries: Sequence[Any],
) -> tuple[jax.Array, jax.Array]:
    """Returns inputs and targets, examples 2i and 2i + 1 mixed with one another.

    Each pair is mixed in one of the ways given, drawn with equal probability.

    Args:
        inputs: [B, ...], B being even.
        target_BxK: Class probabilities, rows that sum to 1.
        position_B: The place of each example in the update; the first one is even.
        rng: Key of the update.
        entries: (name, *arguments) each, such as `("cutmix", 1.0)`.
    """
    entries = [(e,) if isinstance(e, str) else e for e in entries]
    shape, rng = inputs.shape[1:], jax.random.fold_in(rng, OWN_KEY)

    def draw(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        own_rng = jax.random.fold_in(rng, pair)
        which_rng = jax.random.fold_in(own_rng, len(entries))
        which = jax.random.randint(which_rng, (), 0, len(entries))
        drawn = []
        for index, (name, *arguments) in enumerate(entries):
            entry_rng = jax.random.fold_in(own_rng, index)
            drawn.append(MIXTURES[name].function(entry_rng, shape, *arguments))
        kept, share = zip(*drawn)
        whole = jnp.broadcast_shapes(*(k.shape for k in kept))
        kept = jnp.stack([jnp.broadcast_to(k, whole) for k in kept])
        return kept[which], jnp.stack(share)[which]

    kept, share_P = jax.vmap(draw)(position_B[::2] // 2)
    inputs = _swap(inputs, kept)
    return inputs, _swap(target_BxK, share_P[:, None])


def _swap(rows: jax.Array, kept: jax.Array) -> jax.Array:
    """Returns rows [B, ...], of each only a share [B / 2, ...], the rest its partner's."""
    pairs = rows.reshape(-1, 2, *rows.shape[1:])
    kept = kept[:, None].astype(rows.dtype)
    return (kept * pairs + (1 - kept) * pairs[:, ::-1]).reshape(rows.shape)


def check_mix(entries: Sequence[Any], shape: tuple[int, ...]) -> None:
    """Checks `config.data.mix` against the inputs of an example.

    Raises:
        UserError: Names all entries that cannot be run.
    """
    entries = [(e,) if isinstance(e, str) else e for e in entries]
    problems = []
    for index, entry in enumerate(entries):
        where = f"config.data.mix[{index}]"
        found = step_problems(where, entry, MIXTURES, ("mixup", 0.2))
        if not found and MIXTURES[entry[0]].needs_images and len(shape) != 3:
            found = [f"{where}: {entry[0]!r} needs images, inputs are {shape}; 'mixup'"]
        problems += found
    raise_if(problems, "config.data.mix does not fit:")
