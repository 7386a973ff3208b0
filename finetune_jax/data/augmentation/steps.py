"""Augmentation: pure functions of one image and one key, on the device.

Images are floats in [0, 1]. `AUGMENTATIONS` lists the steps by the names that they have
in `config.data.augment`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.data.augmentation.colour import color_jitter
from finetune_jax.data.augmentation.rand_augment import MAX_MAGNITUDE, rand_augment

# Source: torchvision's RandomResizedCrop.
MAX_ASPECT = 4 / 3
TRIES = 10
# Source: torchvision's RandomErasing.
ERASED_ASPECTS = (0.3, 3.3)


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


def random_crop(
    image_HxWxC: jax.Array, rng: jax.Array, *, size: tuple[int, ...]
) -> jax.Array:
    """Returns a part of the image from a random place, `size` (height, width) large."""
    height, width, channels = image_HxWxC.shape
    room = jnp.array([height - size[0], width - size[1]])
    corner = jax.random.randint(rng, (2,), 0, room + 1)
    start = (corner[0], corner[1], 0)
    return jax.lax.dynamic_slice(image_HxWxC, start, (*size, channels))


def random_resized_crop(
    image_HxWxC: jax.Array,
    rng: jax.Array,
    min_scale: float = 0.08,
    *,
    size: tuple[int, ...],
) -> jax.Array:
    """Returns a random part of the image (see `random_box`), resized to `size`.

    Source: Szegedy et al. 2015, section 6, as torchvision's RandomResizedCrop.
    """
    corner, sides = random_box(rng, image_HxWxC.shape[:2], min_scale)
    return resized_crop(image_HxWxC, corner, sides, size=size)


def random_box(
    rng: jax.Array, stored: tuple[int, ...], min_scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns (top, left) and (height, width) of a random part of an image, in pixels.

    The area is uniform between `min_scale` and 1 of the image's, width / height
    log-uniform between 3/4 and 4/3. What does not fit is drawn again, as torchvision
    does; where none of ten fits, it is the largest part between these ratios.

    Args:
        rng: A key.
        stored: Height and width of the image.
        min_scale: Above 0, at most 1.
    """
    height, width = stored
    # One draw for all ten tries and the place: more draws take twice as long to
    # compile, and a loop would run under vmap as long as its slowest image.
    uniform = jax.random.uniform(rng, (TRIES + 1, 2))
    area = height * width * (min_scale + (1 - min_scale) * uniform[:-1, 0])
    aspect = jnp.exp(math.log(MAX_ASPECT) * (2 * uniform[:-1, 1] - 1))
    drawn = jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)], axis=1)
    tallest = min(height, round(width * MAX_ASPECT))
    widest = min(width, round(height * MAX_ASPECT))
    # The first that fits is taken; the last always does.
    last = jnp.array([[tallest, widest]])
    sides = jnp.concatenate([jnp.round(drawn).astype(int), last])
    whole = jnp.array([stored])
    fits = jnp.all((sides >= 1) & (sides <= whole), axis=1)
    chosen = sides[jnp.argmax(fits)]
    places = whole[0] - chosen + 1
    return jnp.floor(uniform[-1] * places).astype(int), chosen


def inside_box(
    stored: tuple[int, ...], corner: jax.Array, sides: jax.Array
) -> jax.Array:
    """Returns which pixels of an image lie in a box, bools [H, W].

    Args:
        stored: Height and width of the image.
        corner: Top and left of the box.
        sides: Height and width of the box.
    """
    rows, columns = (
        (jnp.arange(length) >= first) & (jnp.arange(length) < first + side)
        for length, first, side in zip(stored, corner, sides)
    )
    return jnp.outer(rows, columns)


def resized_crop(
    image_HxWxC: jax.Array,
    corner: jax.Array,
    sides: jax.Array,
    *,
    size: tuple[int, ...],
) -> jax.Array:
    """Returns a part of the image, resized bilinearly with antialiasing.

    Args:
        image_HxWxC: The image.
        corner: Top and left of the part, in pixels; may be traced.
        sides: Its height and width, in pixels; may be traced.
        size: Height and width of the result.
    """
    corner, sides = jnp.asarray(corner), jnp.asarray(sides)
    mask_HxW = inside_box(image_HxWxC.shape[:2], corner, sides)
    mask_HxWx1 = mask_HxW[..., None].astype(image_HxWxC.dtype)
    scale = (jnp.array(size) / sides).astype(image_HxWxC.dtype)

    def resample(x_HxWxC: jax.Array) -> jax.Array:
        return jax.image.scale_and_translate(
            x_HxWxC,
            (*size, x_HxWxC.shape[-1]),
            (0, 1),
            scale,
            -corner.astype(scale.dtype) * scale,
            method="linear",
        )

    # The filter reaches over the edge of the part; what it finds there must not count.
    return resample(image_HxWxC * mask_HxWx1) / resample(mask_HxWx1)


def random_erasing(
    image_HxWxC: jax.Array,
    rng: jax.Array,
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 0.33,
    *,
    fill: Sequence[float] = (0.0,),
) -> jax.Array:
    """Returns the image, with that probability a random box of it replaced by `fill`.

    The box is of a share of the image's area that is uniform between `min_area` and
    `max_area`, height / width log-uniform between 0.3 and 3.3. What does not fit is
    drawn again; where none of ten fits, nothing is erased.

    Source: Zhong et al. 2020, as torchvision's RandomErasing. That one erases with 0
    after normalising; with the data's mean as `fill`, so does this one before it.
    """
    stored_1x2 = jnp.array([image_HxWxC.shape[:2]])
    # One draw for all ten tries, the place and whether to erase: see `random_box`.
    uniform = jax.random.uniform(rng, (TRIES + 2, 2))
    share = min_area + (max_area - min_area) * uniform[:TRIES, 0]
    area = image_HxWxC.shape[0] * image_HxWxC.shape[1] * share
    low, high = map(math.log, ERASED_ASPECTS)
    aspect = jnp.exp(low + (high - low) * uniform[:TRIES, 1])
    drawn = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], axis=1)
    sides = jnp.round(drawn).astype(int)
    fits = jnp.all(sides < stored_1x2, axis=1)
    chosen = sides[jnp.argmax(fits)]
    corner = jnp.floor(uniform[TRIES] * (stored_1x2[0] - chosen + 1)).astype(int)
    box_HxW = inside_box(image_HxWxC.shape[:2], corner, chosen)
    erased_HxWx1 = (box_HxW & fits.any() & (uniform[-1, 0] < probability))[..., None]
    fill_1x1xC = jnp.asarray(fill, image_HxWxC.dtype).reshape(1, 1, -1)
    return jnp.where(erased_HxWx1, fill_1x1xC, image_HxWxC)


def _check_areas(
    probability: float = 0.5, min_area: float = 0.02, max_area: float = 0.33
) -> str | None:
    del probability
    if min_area <= max_area:
        return None
    return f"min_area {min_area} is above max_area {max_area}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """A number that a step takes.

    Attributes:
        name: Name of the function's argument.
        low: The smallest that is allowed, unless `above`.
        high: The largest that is allowed.
        above: Whether it must be larger than `low`.
        whole: Whether it must be an int.
    """

    name: str
    low: float = 0.0
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def accepts(self, value: Any) -> bool:
        """Returns whether `value` is such a number."""
        if type(value) not in ((int,) if self.whole else (int, float)):
            return False
        enough = value > self.low if self.above else value >= self.low
        return enough and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        """Returns the allowed range.

        >>> str(Argument(name="min_scale", high=1, above=True))
        'a number above 0, up to 1'
        """
        kind = "a whole number" if self.whole else "a number"
        start = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        end = "" if self.high == math.inf else f", up to {self.high:g}"
        return f"{kind} {start}{end}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A step that `config.data.augment` can name.

    Attributes:
        function: Function of the image, the key and at most the arguments.
        arguments: Arguments that the user may give, in this order; all have defaults.
        resizes: Whether `function` takes `size` and returns images of that size.
        fills: Whether it takes `fill`, the value of erased pixels.
        check: Returns the problem of the arguments together, or None.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[Argument, ...] = ()
    resizes: bool = False
    fills: bool = False
    check: Callable[..., str | None] = lambda *arguments: None


AUGMENTATIONS = registry.Choices(
    "augmentation step",
    {
        "flip": Augmentation(function=flip),
        "pad_crop": Augmentation(
            function=pad_crop, arguments=(Argument(name="pixels", whole=True),)
        ),
        "random_crop": Augmentation(function=random_crop, resizes=True),
        "random_resized_crop": Augmentation(
            function=random_resized_crop,
            arguments=(Argument(name="min_scale", high=1, above=True),),
            resizes=True,
        ),
        "color_jitter": Augmentation(
            function=color_jitter,
            arguments=(
                Argument(name="brightness"),
                Argument(name="contrast"),
                Argument(name="saturation"),
                Argument(name="hue", high=0.5),
            ),
        ),
        "random_erasing": Augmentation(
            function=random_erasing,
            arguments=(
                Argument(name="probability", high=1),
                Argument(name="min_area", high=1, above=True),
                Argument(name="max_area", high=1, above=True),
            ),
            fills=True,
            check=_check_areas,
        ),
        "rand_augment": Augmentation(
            function=rand_augment,
            arguments=(
                Argument(name="num_ops", low=1, whole=True),
                Argument(name="magnitude", high=MAX_MAGNITUDE, whole=True),
            ),
        ),
    },
)


def make_augment(
    steps: Sequence[Any],
    size: tuple[int, ...] | None = None,
    stored: tuple[int, ...] | None = None,
    fill: Sequence[float] = (0.0,),
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function of (images [B, H, W, C], keys [B]) that applies steps in order.

    Args:
        steps: (name, *arguments) each, such as `("pad_crop", 2)`.
        size: Height and width that the model takes; None keeps that of the images.
        stored: Height and width of the images, to be checked; None checks nothing.
        fill: Value of erased pixels, one or one for each channel.

    Raises:
        UserError: No such augmentation, or arguments that it does not take; names all.
            Or images that do not come out in `size`.
    """
    steps = [(step,) if isinstance(step, str) else step for step in steps]
    problems = []
    for index, step in enumerate(steps):
        where = f"config.data.augment[{index}]"
        problems += step_problems(where, step, AUGMENTATIONS, ("pad_crop", 2))
    raise_if(problems, "config.data.augment does not fit:")
    if size and stored:
        _check_size([name for name, *_ in steps], size, stored)

    def one(image_HxWxC: jax.Array, rng: jax.Array) -> jax.Array:
        for index, (name, *arguments) in enumerate(steps):
            step = AUGMENTATIONS[name]
            options: dict[str, Any] = {"fill": fill} if step.fills else {}
            if step.resizes:
                options["size"] = size or image_HxWxC.shape[:2]
            image_HxWxC = step.function(
                image_HxWxC, jax.random.fold_in(rng, index), *arguments, **options
            )
        return image_HxWxC

    return jax.vmap(one)


def step_problems(
    where: str, step: Any, known: Mapping[str, Any], example: tuple
) -> list[str]:
    """Returns the problems of one step.

    Args:
        where: The config key.
        step: (name, *arguments), as the user wrote it.
        known: Objects with `arguments` and `check`, by name.
        example: A valid step.
    """
    if not isinstance(step, tuple) or not step or not isinstance(step[0], str):
        return [f"{where}: {step!r} is not a step such as {example}"]
    name, *values = step
    try:
        found = registry.choose(known, name, where)
    except UserError as error:
        return [str(error)]
    taken = found.arguments
    problems = [
        f"{where}: {name!r} with {argument.name} {value!r}; {argument} is needed"
        for argument, value in zip(taken, values)
        if not argument.accepts(value)
    ]
    if len(values) > len(taken):
        names = ", ".join(argument.name for argument in taken) or "no argument"
        problems.append(f"{where}: {name!r} with {len(values)} values; takes {names}")
    if not problems and (together := found.check(*values)):
        problems.append(f"{where}: {name!r} with {together}")
    return problems


def _check_size(
    names: Sequence[str], size: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    """Raises a UserError unless images of `stored` leave the steps in `size`."""
    shown, wanted = ("x".join(map(str, sides)) for sides in (stored, size))
    where = f"config.data.train_size: {shown}, but the model takes {wanted}"
    resizing = [name for name in names if AUGMENTATIONS[name].resizes]
    if tuple(stored) != tuple(size) and not resizing:
        known = [repr(n) for n, step in AUGMENTATIONS.items() if step.resizes]
        raise UserError(
            f"{where}, and no step of config.data.augment crops to that; add one of "
            f"{', '.join(known)}, or store images in the model's size."
        )
    if resizing[:1] == ["random_crop"] and any(s < m for s, m in zip(stored, size)):
        raise UserError(
            f"{where}, and 'random_crop' cannot enlarge; at least {wanted} is needed, "
            "or 'random_resized_crop' instead."
        )
