"""Preprocessing of images and feature vectors: their part of a spec, and its checks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.data.images.pixels import Pixels
from finetune_jax.data.source import Source
from finetune_jax.data.spec import DataSpec, as_tuples

# Largest mean and deviation of values in [0, 1] that is plausible; chosen by us.
_LARGEST = 2
# Largest magnitude of standardised values that is plausible; chosen by us.
_LARGEST_STANDARDISED = 30
# Keys of `config.data` that are fields of `ArraySpec`.
KEYS = ("mean", "std", "resize", "interpolation", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """The part of a spec that images and feature vectors have.

    Attributes:
        mean: Subtracted from the inputs; one number or one for each channel.
        std: The inputs are divided by it.
        resize: Length of an image's shorter side before its centre is cut out; None
            stretches the image.
        interpolation: 'bilinear' or 'bicubic'.
        decode: 'fast' or 'exact', for training images; all others are decoded exactly.
        pixels: How the values of image arrays were read; None for bytes and vectors.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    resize: int | None = None
    interpolation: str = "bilinear"
    decode: str = "exact"
    pixels: Pixels | None = None


def array_spec(section: Mapping[str, Any], pixels: Pixels | None = None) -> ArraySpec:
    """Returns the preprocessing that `config.data` describes; None is the default.

    Args:
        section: `config.data`, or an entry of it with the same keys.
        pixels: How the values of image arrays were read.
    """
    given = {k: as_tuples(section[k]) for k in KEYS if section[k] is not None}
    return ArraySpec(**given, pixels=pixels)


def check_preprocessing(spec: DataSpec) -> None:
    """Checks that the preprocessing fits the inputs.

    Raises:
        UserError: Lists all that does not.
    """
    given: ArraySpec = spec.inputs
    problems = [
        f"config.data.{name}: {len(value)} numbers, but inputs have {spec.shape[-1]} "
        f"channels; give one number, one for each channel, or None for the default. If "
        f"the config is made for other data: --config.data.{name}=None"
        for name, value in (("mean", given.mean), ("std", given.std))
        if len(value) not in (1, spec.shape[-1])
    ]
    scale = given.pixels and given.pixels.scale
    if spec.dtype == "uint8" or scale in ("unit", "255"):
        problems += [
            f"config.data.{name}: {tuple(value)}, but images are scaled to [0, 1] first; "
            "divide it by 255"
            for name, value in (("mean", given.mean), ("std", given.std))
            if max(value) > _LARGEST
        ]
    if problem := not problems and _magnitude_problem(given):
        problems.append(problem)
    if len(spec.shape) != 3:
        values = {"augment": spec.augment, "resize": given.resize}
        problems += [
            f"config.data.{name}: the data has no images"
            for name, value in values.items()
            if value
        ]
    elif spec.dtype != "uint8" and (named := _need_bytes(spec.augment)):
        problems.append(
            f"config.data.augment: {', '.join(named)} needs bytes, whose range is known; "
            f"the data is {spec.dtype}"
        )
    elif given.resize is not None and given.resize < max(spec.shape[:2]):
        problems.append(
            f"config.data.resize: {given.resize}, but {spec.shape[0]}x{spec.shape[1]} is "
            "cut out of the resized image; make it at least as large, or None"
        )
    raise_if(problems, "The preprocessing does not fit the data:")


def _magnitude_problem(given: ArraySpec) -> str | None:
    """Returns a problem if images with negative values are far from standardised."""
    if given.pixels is None or given.pixels.scale != "as they are":
        return None
    low, high = given.pixels.low, given.pixels.high
    mean, std = np.asarray(given.mean), np.asarray(given.std)
    left = np.abs([(low - mean) / std, (high - mean) / std]).max()
    if max(-low, high) <= _LARGEST_STANDARDISED or left <= _LARGEST_STANDARDISED:
        return None
    return (
        f"config.data.mean and std: images from {low:.6g} to {high:.6g} are neither "
        f"standardised nor become so (up to {left:.6g} after both); give their mean and "
        "standard deviation, or save the images as bytes, or as floats from 0 to 1"
    )


def _need_bytes(augment: tuple) -> list[str]:
    """Returns the steps of augmentation that need to know the range of the values."""
    names = [step[0] for step in augment if isinstance(step, tuple) and step]
    return [name for name in names if name in ("color_jitter", "rand_augment")]


def arrays_to_json(spec: DataSpec) -> dict[str, Any]:
    """Returns the preprocessing for a manifest, by the keys of `config.data`."""
    plain = dataclasses.asdict(spec.inputs)
    return {key: value for key, value in plain.items() if key in KEYS or value}


def domain_spec(
    spec: DataSpec, source: Source, given: Mapping[str, Any], where: str
) -> DataSpec:
    """Returns the spec of other arrays, in the shape that a run's model takes.

    Args:
        spec: Description of the run's data.
        source: The other data.
        given: Values of 'mean', 'std' and 'resize', None for the default.
        where: Config entry of the other data, for messages.

    Raises:
        UserError: The model cannot take the arrays.
    """
    for shape in {part.shape for part in source.splits.values()}:
        axes = 3 if shape is None else len(shape)  # Images of several sizes.
        if axes != len(spec.shape) or (axes == 1 and shape != spec.shape):
            raise UserError(
                f"{where}name: its examples are {shape or 'images'}, and the model "
                f"takes {spec.shape}"
            )
    own: ArraySpec = spec.inputs
    found = DataSpec(
        kind=spec.kind,
        shape=spec.shape,
        train_shape=spec.shape,
        dtype=next(iter(source.splits.values())).dtype,
        inputs=array_spec(
            {**dict.fromkeys(KEYS), **given, "interpolation": own.interpolation},
            source.pixels,
        ),
        class_names=source.class_names,
    )
    check_preprocessing(found)
    return found
