"""`scenes:NAME`: images composed of those of another source, with the masks that follow.

`scenes:digits` has handwritten digits, `scenes:idx` what lies in the folder
`config.data.dir`. They are made here, so that segmentation can be shown and tested
without a download; results on them say nothing about photos.

An image is three times as large as those it is composed of. One to four objects, each
from an example drawn at random, lie on noise and do not overlap. A pixel has an object's
class where the object is at least half as bright as it can be, and is ignored where it
is fainter but not black, as the outlines of PASCAL VOC are. A split's objects are from
the source's examples of that split alone, and there are as many images as examples.
"""

import dataclasses
import hashlib
import zlib

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.data.augmentation.masks import IGNORED
from finetune_jax.data.images.decoding import Geometry, fit_named
from finetune_jax.data.images.mask_files import fit_mask, with_mask
from finetune_jax.data.source import ArrayExamples, Source
from finetune_jax.data.splits import named_splits

MASKS = True
SIDE = 3  # Side of the image, in objects.
MOST_OBJECTS = 4
TRIES = 20
NOISE = 64  # Grey levels, uniform from 0.
VERSION = 1  # To be counted up when the images change.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """The images of one split, composed when asked for.

    Attributes:
        split: Name of the split; with the number of an image, it is the random seed.
        objects: Bytes [N, H, W, C], as they are in the source.
        kinds: Class index of each.
    """

    split: str
    objects: np.ndarray
    kinds: np.ndarray

    dtype = "uint8"

    @property
    def label(self) -> np.ndarray:
        """Zeros: an image has no class of its own."""
        return np.zeros(len(self), np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image, without its mask."""
        _, height, width, channels = self.objects.shape
        return SIDE * height, SIDE * width, channels

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.objects)

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns one image, bytes [H, W, C + 1]: the last channel is its mask."""
        image, mask = self._composed(index)
        if geometry is not None:
            image = fit_named(image, geometry, self.name(index))
            mask = fit_mask(mask, geometry)
        return with_mask(image, mask)

    def name(self, index: int) -> str:
        """Returns split and number of one image."""
        return f"{self.split} {index}"

    def _composed(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([zlib.crc32(self.split.encode()), index])
        height, width = self.objects.shape[1:3]
        image = rng.integers(0, NOISE, self.shape, np.uint8)
        mask = np.zeros(self.shape[:2], np.uint8)
        taken = np.zeros(self.shape[:2], bool)
        for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
            chosen = rng.integers(len(self.objects))
            for _ in range(TRIES):
                corner = rng.integers(0, [(SIDE - 1) * height, (SIDE - 1) * width])
                place = tuple(slice(c, c + s) for c, s in zip(corner, (height, width)))
                if not taken[place].any():
                    break
            else:
                continue
            brightness = self.objects[chosen].max(axis=-1)
            image[place] = np.maximum(image[place], self.objects[chosen])
            kind = 1 + self.kinds[chosen]
            mask[place] = np.where(brightness >= 128, kind, IGNORED * (brightness > 0))
            taken[place] = True
        return image, mask


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits 'train', 'validation' and 'test', or those of the source.

    Raises:
        UserError: No such source, or one that has not small images of classes in memory.
    """
    from finetune_jax.data import sources

    name, _, rest = (argument or "").partition(":")
    module = registry.module(sources, name, "config.data.name, scenes:")
    source = module.load(directory, rest or None)
    parts = list(source.splits.values())
    if not source.class_names or not all(
        isinstance(part, ArrayExamples)
        and part.values.ndim == 4
        and part.dtype == "uint8"
        for part in parts
    ):
        raise UserError(
            f"config.data.name: scenes:{argument}: {source.name} has no arrays of images "
            "with classes, such as those of digits or idx"
        )
    if len(source.class_names) >= IGNORED:
        raise UserError(
            f"config.data.name: scenes:{argument}: {len(source.class_names)} classes; "
            f"masks have {IGNORED - 1} besides the background"
        )
    values = np.concatenate([part.values for part in parts])
    label = {split: part.label for split, part in source.splits.items()}
    kinds = np.concatenate(list(label.values()))
    splits = {
        split: Scenes(split=split, objects=values[indices], kinds=kinds[indices])
        for split, indices in named_splits(label, 0).items()
        if split != "all"
    }

    def fingerprint() -> str:
        about = source.fingerprint(), SIDE, MOST_OBJECTS, TRIES, NOISE, VERSION
        return hashlib.sha256(str(about).encode()).hexdigest()

    return Source(
        name=f"scenes of {source.name}",
        splits=splits,
        class_names=(),
        pixel_classes=("background", *source.class_names),
        fingerprint=fingerprint,
        warnings=source.warnings,
        not_used=source.not_used,
    )
