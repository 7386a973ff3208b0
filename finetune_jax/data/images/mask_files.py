"""Masks of photos: read from PNG files, fitted with their image, and written."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from finetune_jax.core.errors import UserError
from finetune_jax.data.augmentation.masks import IGNORED, palette
from finetune_jax.data.images.decoding import (
    SIXTEEN_BIT,
    Geometry,
    orientation_of,
    oriented_size,
    read_sized,
)

Colour = tuple[int, int, int]
_INDEXED = ("P", "L", "1")
_SHOWN = 10


def read_mask(
    path: pathlib.Path, classes: int, colours: Mapping[Colour, int]
) -> np.ndarray:
    """Returns the mask of a file, class indices uint8 [H, W].

    Args:
        path: A PNG file.
        classes: How many there are; `IGNORED` is allowed besides.
        colours: The index of each colour; empty where masks hold indices themselves.

    Raises:
        UserError: Names the file and its problem.
    """
    try:
        with Image.open(path) as image:
            if image.format != "PNG":
                raise UserError(
                    f"{path}: a mask in the format {image.format}, which may have "
                    "changed its values; save masks as PNG"
                )
            image.load()
            if (turn := orientation_of(image)) != 1:
                raise UserError(
                    f"{path}: a mask with the EXIF orientation {turn}; save it upright, "
                    "as a viewer shows its image, without EXIF data"
                )
            if image.mode in _INDEXED or image.mode in SIXTEEN_BIT:
                values = np.asarray(image).astype(np.int64)
            else:
                values = _indices(np.asarray(image.convert("RGB")), colours, path)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to.
        raise UserError(f"{path}: cannot be read: {error}") from error
    there = np.unique(values)
    if len(beyond := there[(there >= classes) & (there != IGNORED)]):
        listed = ", ".join(map(str, beyond[:_SHOWN]))
        raise UserError(
            f"{path}: indices {listed}, but there are {classes} classes, 0 to "
            f"{classes - 1}, and {IGNORED} for what is ignored"
        )
    if there.tolist() == [IGNORED]:
        raise UserError(f"{path}: all pixels are ignored; leave the image out")
    return values.astype(np.uint8)


def _indices(
    pixels_HxWx3: np.ndarray, colours: Mapping[Colour, int], path: pathlib.Path
) -> np.ndarray:
    """Returns the index of each pixel's colour.

    Raises:
        UserError: Lists colours that no class has.
    """
    if not colours:
        raise UserError(
            f"{path}: a mask in colours, but classes.csv gives classes none; write "
            "rows such as road,128,64,128 in it, or save masks as class indices"
        )
    code_HxW = pixels_HxWx3.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    found, place_HxW = np.unique(code_HxW, return_inverse=True)
    known = {(r << 16) + (g << 8) + b: index for (r, g, b), index in colours.items()}
    if unknown := [code for code in found.tolist() if code not in known]:
        listed = ", ".join(f"({c >> 16}, {c >> 8 & 255}, {c & 255})" for c in unknown)
        raise UserError(f"{path}: colours that no class has: {listed[:300]}")
    table = np.array([known[code] for code in found.tolist()])
    return table[place_HxW].reshape(code_HxW.shape)


def fit_mask(mask_HxW: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Returns a mask in the shape wanted of its image, by nearest neighbours."""
    size = geometry.size_of(mask_HxW.shape[1], mask_HxW.shape[0])
    image = Image.fromarray(mask_HxW).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image.crop(geometry.cut_of(size)))


def unfitted(
    mask_HxW: np.ndarray, geometry: Geometry, size: tuple[int, int]
) -> np.ndarray:
    """Returns a mask in the size of the image that was fitted; ignored where it was cut.

    Args:
        mask_HxW: Mask of the fitted shape.
        geometry: Geometry that the image was fitted to.
        size: Width and height of the image.
    """
    resized = geometry.size_of(*size)
    canvas = Image.new("L", resized, IGNORED)
    canvas.paste(Image.fromarray(mask_HxW), geometry.cut_of(resized)[:2])
    return np.asarray(canvas.resize(size, Image.Resampling.NEAREST))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskFiles:
    """The images and masks of one split; read when asked for.

    Attributes:
        images: Files.
        masks: Files, one for each.
        classes: How many there are.
        colours: Class index of each colour, as for `read_mask`.
    """

    images: tuple[pathlib.Path, ...]
    masks: tuple[pathlib.Path, ...]
    classes: int
    colours: Mapping[Colour, int]

    shape = None
    dtype = "uint8"

    @property
    def label(self) -> np.ndarray:
        """Zeros: an image has no class of its own."""
        return np.zeros(len(self.images), np.int32)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.images)

    def read(self, index: int, geometry: Geometry | None = None) -> np.ndarray:
        """Returns one image, bytes [H, W, C + 1]: the last channel is its mask."""
        image, size = read_sized(self.images[index], geometry)
        mask = read_mask(self.masks[index], self.classes, self.colours)
        if size != mask.shape[::-1]:
            shown = "x".join(map(str, mask.shape[::-1]))
            raise UserError(
                f"{self.masks[index]}: {shown} pixels, but its image "
                f"{self.images[index]} has {size[0]}x{size[1]}"
            )
        return with_mask(image, mask if geometry is None else fit_mask(mask, geometry))

    def name(self, index: int) -> str:
        """Returns the path of one image."""
        return str(self.images[index])


def with_mask(image_HxWxC: np.ndarray, mask_HxW: np.ndarray) -> np.ndarray:
    """Returns an image whose last channel is its mask, [H, W, C + 1]."""
    return np.concatenate([image_HxWxC, mask_HxW[..., None]], axis=-1)


class MaskWriter:
    """Writes predicted masks as PNG files of class indices, as large as their images."""

    def __init__(self, folder: pathlib.Path, geometry: Geometry, classes: int):
        """Stores where masks go, how images were resized, and the number of classes.

        The folder is made with the first mask.
        """
        self._folder, self._geometry, self._classes = folder, geometry, classes
        self._names: set[str] = set()

    def write(self, mask: np.ndarray, name: str) -> str:
        """Returns the file of a mask, whose pixels are class indices, shown in colours.

        Args:
            mask: Class indices, uint8 [H, W].
            name: Name of its image, a file, or such as 'x.npy#3'.
        """
        self._folder.mkdir(exist_ok=True)
        path, stem = pathlib.Path(name), pathlib.Path(name).stem
        if path.is_file():
            mask = unfitted(mask, self._geometry, oriented_size(path))
        else:
            stem = path.name.replace("#", "_")
        unique, number = stem, 1
        while unique in self._names:
            number += 1
            unique = f"{stem}_{number}"
        self._names.add(unique)
        file = self._folder / f"{unique}.png"
        image = Image.fromarray(mask)
        image.putpalette(palette(self._classes).tobytes())
        image.save(file, format="png")
        return str(file)
