"""Other domains made of a data set: the same images inverted, rotated or noisy.

`config.data.shift` is a tuple of steps that every image of all splits takes, in order,
after it was read and fitted and before any augmentation:

    data.shift = (("rotate", 30.0), ("invert",), ("noise", 0.2))

A step depends on the image and its place in its split alone, so that an image is the same
in every epoch and in every run.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from finetune_jax.core import registry
from finetune_jax.core.errors import raise_if
from finetune_jax.core.registry import closest
from finetune_jax.data.images.decoding import Geometry
from finetune_jax.data.source import ExampleReader, Source

_WHERE = "config.data.shift"


def invert(image_HxWxC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the negative of an image of bytes."""
    del rng
    return 255 - image_HxWxC


def rotate(
    image_HxWxC: np.ndarray, rng: np.random.Generator, degrees: float
) -> np.ndarray:
    """Returns an image turned counterclockwise about its centre, black where it was not."""
    del rng
    channels = map(Image.fromarray, np.moveaxis(image_HxWxC, -1, 0))
    method = Image.Resampling.BILINEAR
    turned = [np.asarray(one.rotate(degrees, resample=method)) for one in channels]
    return np.stack(turned, axis=-1)


def noise(image_HxWxC: np.ndarray, rng: np.random.Generator, std: float) -> np.ndarray:
    """Returns an image with Gaussian noise on every value.

    Args:
        image_HxWxC: Bytes or float32.
        rng: Generator of this image.
        std: Deviation of the noise; 1 is the range of bytes, or the unit of other numbers.
    """
    drawn_HxWxC = rng.normal(0.0, std, image_HxWxC.shape)
    if image_HxWxC.dtype != np.uint8:
        return image_HxWxC + drawn_HxWxC.astype(image_HxWxC.dtype)
    return np.clip(np.rint(image_HxWxC + 255 * drawn_HxWxC), 0, 255).astype(np.uint8)


# Functions with the names of their numbers.
SHIFTS = registry.Choices(
    "shift",
    {
        "invert": (invert, ()),
        "rotate": (rotate, ("degrees",)),
        "noise": (noise, ("std",)),
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiftedExamples:
    """The images of a split, shifted.

    Attributes:
        given: The images in the source.
        steps: Steps of the shift.
        split: Name of the split, from which noise is drawn.
    """

    given: ExampleReader
    steps: tuple[tuple, ...]
    split: str

    @property
    def label(self) -> np.ndarray:
        """The labels, unchanged."""
        return self.given.label

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of an image, unchanged."""
        return self.given.shape

    @property
    def dtype(self) -> str:
        """Dtype of an image."""
        return self.given.dtype

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.given)

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns an image, fitted and then shifted."""
        image = self.given.read(index, geometry)
        rng = np.random.default_rng((zlib.crc32(self.split.encode()), index))
        for name, *numbers in self.steps:
            function, _ = SHIFTS[name]
            image = function(image, rng, *numbers)
        return image

    def name(self, index: int) -> str:
        """Returns the name of the image."""
        return self.given.name(index)


def shifted(source: Source, steps: Sequence[Any]) -> Source:
    """Returns a source whose images have been shifted.

    Raises:
        UserError: Lists unknown steps, and steps that the data cannot take.
    """
    raise_if(_problems(source, steps), f"The data {source.name} cannot be shifted:")
    splits: Mapping[str, ExampleReader] = {
        split: ShiftedExamples(given=examples, steps=tuple(steps), split=split)
        for split, examples in source.splits.items()
    }
    return dataclasses.replace(
        source,
        splits=splits,
        fingerprint=lambda: f"{source.fingerprint()}, {tuple(steps)!r}",
    )


def _problems(source: Source, steps: Sequence[Any]) -> list[str]:
    problems = []
    for index, step in enumerate(steps):
        where = f"{_WHERE}[{index}]"
        if not isinstance(step, tuple) or not step or step[0] not in SHIFTS:
            name = step[0] if isinstance(step, tuple) and step else step
            problems.append(
                f"{where}: {step!r} is no step{closest(str(name), SHIFTS) or '.'} "
                f"There are: {', '.join(SHIFTS)}."
            )
            continue
        name, *numbers = step
        wanted = SHIFTS[name][1]
        if len(numbers) != len(wanted) or any(
            type(number) not in (int, float) for number in numbers
        ):
            problems.append(f"{where}: {step!r}; ({name!r}, {', '.join(wanted)})")
        elif name == "noise" and not 0 <= numbers[0] < np.inf:
            problems.append(f"{where}: {numbers[0]}; 0 or more is needed")
        dtypes = {examples.dtype for examples in source.splits.values()}
        if name == "invert" and dtypes != {"uint8"}:
            found = ", ".join(sorted(dtypes))
            problems.append(
                f"{where}: 'invert' needs bytes, whose range is known; these are {found}"
            )
    shapes = [examples.shape for examples in source.splits.values()]
    if source.pixel_classes or any(s is not None and len(s) != 3 for s in shapes):
        kind = "its images have masks" if source.pixel_classes else "it has no images"
        problems.append(f"{_WHERE}: {kind}")
    return problems
