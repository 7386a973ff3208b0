"""Images: files read as a viewer shows them, and resized as torchvision does."""

import contextlib
import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from finetune_jax.core.errors import UserError
from finetune_jax.data.images.image_formats import image_formats

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Rec. 601, as Pillow converts colour to grey.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
# Largest ratio of the sides; beyond it an image resized by its shorter side could fill the
# memory.
_THIN = 100
SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# Operations that make an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats whose decoder does not change size or orientation that the header says. The
# decoder of TIFF turns the image itself.
_SIZED_BY_HEADER = ("BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP")
# Orientations that swap the sides, and those that put the file's last column or row at
# the left or at the top.
_SWAPPED, _ENDS_LEFT, _ENDS_ABOVE = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How an image becomes one of a fixed shape.

    Attributes:
        shape: (H, W, C) wanted; C is 1 or 3.
        resize: Length of the shorter side before the centre is cut out; None stretches the
            whole image to the shape.
        interpolation: 'bilinear' or 'bicubic', both antialiased.
        decode: 'exact' gives torchvision's bits. 'fast' decodes a JPEG at a half, a
            quarter or an eighth of its size if that is no smaller than what it is resized
            to, and resizes only what is cut out: a few grey levels off.
    """

    shape: tuple[int, ...]
    resize: int | None = None
    interpolation: str = "bilinear"
    decode: str = "exact"

    def changes(self, shape: tuple[int, ...]) -> bool:
        """Returns whether an image of such a shape is changed."""
        return shape != self.shape or self.resize is not None

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Returns (width, height) to which an image is resized.

        Source: torchvision/transforms/functional.py, `resize`.
        """
        if self.resize is None:
            return self.shape[1], self.shape[0]
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width < height else (long, self.resize)

    def cut_of(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Returns (left, top, right, bottom) of the part cut out of a resized image.

        Source: torchvision/transforms/functional.py, `center_crop`.
        """
        height, width = self.shape[:2]
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return left, top, left + width, top + height


def read_image(
    file: pathlib.Path | bytes | Image.Image,
    geometry: Geometry | None = None,
    *,
    name: str | None = None,
    upright: bool = True,
) -> np.ndarray:
    """Returns the image of a file as a viewer shows it, bytes [H, W, 3] or [H, W, 1].

    As `read_sized`, without the size.
    """
    return read_sized(file, geometry, name=name, upright=upright)[0]


def read_sized(
    file: pathlib.Path | bytes | Image.Image,
    geometry: Geometry | None = None,
    *,
    name: str | None = None,
    upright: bool = True,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the image of a file as a viewer shows it, and its width and height.

    The image is bytes [H, W, 3] or [H, W, 1]; the size is that before it is fitted.

    It is turned by its EXIF orientation. Transparent pixels lie on white; the upper 8 of 16
    bits are kept; palettes, CMYK and bilevel images become RGB or grey. An animation gives
    its first image.

    Args:
        file: Where it is, its bytes, or what Pillow opened already.
        geometry: Geometry to fit the image to; None keeps its size and channels.
        name: For messages; by default the path.
        upright: Whether the EXIF orientation counts.

    Raises:
        UserError: Names the file and its problem.
    """
    name = name or str(file)
    try:
        with opened(file) as image:
            pixels = image.width * image.height
            if pixels > (Image.MAX_IMAGE_PIXELS or pixels):
                raise UserError(
                    f"{name}: {image.width}x{image.height} pixels, more than "
                    f"{Image.MAX_IMAGE_PIXELS}; make it smaller"
                )
            if geometry is not None:
                return _read_fitted(image, geometry, name=name, upright=upright)
            image.load()
            turn = orientation_of(image) if upright else 1
            size = _turned_size(image.size, turn)
            return _pixels(_plain(_turned(image, turn), name)), size
    except UserError:
        raise
    except UnidentifiedImageError as error:
        assert not isinstance(file, Image.Image)
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        what = f"not an image ({size} bytes)" if size else "an empty file"
        raise UserError(f"{name}: {what}") from error
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to.
        raise UserError(f"{name}: cannot be read: {error}") from error


def oriented_size(file: pathlib.Path) -> tuple[int, int]:
    """Returns the width and height that `read_sized` returns for a file."""
    with opened(file) as image:
        if image.format not in _SIZED_BY_HEADER:
            image.load()
        return _turned_size(image.size, orientation_of(image))


def opened(
    file: pathlib.Path | bytes | Image.Image,
) -> contextlib.AbstractContextManager[Image.Image]:
    """Returns the context of an opened image; what Pillow opened before stays open."""
    if isinstance(file, Image.Image):
        return contextlib.nullcontext(file)
    content = io.BytesIO(file) if isinstance(file, bytes) else file
    return Image.open(content, formats=image_formats())


def _read_fitted(
    image: Image.Image, geometry: Geometry, *, name: str, upright: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns an opened image in the shape wanted, and its size before that."""
    _check_not_thin(*image.size, geometry, name)
    whole, drafted, is_fast = image.size, None, geometry.decode == "fast"
    if is_fast:  # The orientation is unknown yet; a square is large enough either way.
        side = max(geometry.shape[:2])
        stretched = geometry.resize is None
        least = (side, side) if stretched else geometry.size_of(*whole)
        drafted = image.draft(None, least)
    image.load()
    # A reduced image's last column and row may lie partly outside of the photo.
    inside = drafted[1][2:] if drafted else image.size
    whole = whole if drafted else image.size
    turn = orientation_of(image) if upright else 1
    image = _plain(_turned(image, turn), name)
    whole, inside = _turned_size(whole, turn), _turned_size(inside, turn)
    size = geometry.size_of(*whole)
    cut = geometry.cut_of(size)
    method = INTERPOLATIONS[geometry.interpolation]
    if is_fast:
        x = image.width - inside[0] if turn in _ENDS_LEFT else 0
        y = image.height - inside[1] if turn in _ENDS_ABOVE else 0
        scale = inside[0] / size[0], inside[1] / size[1]
        left, right = (x + place * scale[0] for place in cut[::2])
        top, bottom = (y + place * scale[1] for place in cut[1::2])
        shape = geometry.shape[1], geometry.shape[0]
        image = image.resize(shape, method, (left, top, right, bottom))
    else:
        image = image.resize(size, method).crop(cut)
    return _with_channels(_pixels(image), geometry.shape[2]), whole


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of a loaded image: 2 to 8, or 1, which is upright."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    except Exception:  # Broken EXIF data says nothing about the pixels.
        return 1


def _turned_size(size: tuple[Any, Any], orientation: int) -> tuple[Any, Any]:
    return (size[1], size[0]) if orientation in _SWAPPED else size


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image, name: str) -> Image.Image:
    """Returns an image in mode RGB or L.

    Raises:
        UserError: The range of its values is unknown.
    """
    if image.mode == "I" and image.format == "TIFF":
        raise UserError(f"{name}: grey levels of 32 bits; save it with 8 or 16")
    if image.mode in SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"{name}: grey levels outside of 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise UserError(
            f"{name}: floating-point pixels, whose range is not known; save it as bytes"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    wanted = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns the bytes of an image in mode RGB or L, [H, W, 3] or [H, W, 1]."""
    values = np.asarray(image)
    return values if image.mode == "RGB" else values[..., None]


def on_white(image: np.ndarray) -> np.ndarray:
    """Returns an image of bytes, grey or RGB with alpha, with its alpha laid on white."""
    channels = image.shape[-1] - 1
    above = Image.fromarray(np.ascontiguousarray(image)).convert("RGBA")
    white = Image.new("RGBA", above.size, "white")
    plain = Image.alpha_composite(white, above).convert("RGB")
    return np.asarray(plain)[..., :channels]


def fit(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Returns an image in the shape wanted, as torchvision resizes and crops PIL images.

    Args:
        image: Bytes or float32, [H, W, C]; bytes of 2 or 4 channels have alpha.
        geometry: Geometry to fit the image to.
    """
    if image.dtype == np.uint8 and image.shape[-1] in (2, 4):
        image = on_white(image)
    width, height = size = geometry.size_of(image.shape[1], image.shape[0])
    left, top, right, bottom = geometry.cut_of(size)
    image = _resized(image, (height, width), geometry.interpolation)
    return _with_channels(image[top:bottom, left:right], geometry.shape[2])


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image[..., :1], 3, axis=-1)
    grey = (image[..., :3] @ _LUMINANCE)[..., None]
    return np.round(grey).astype(image.dtype) if image.dtype == np.uint8 else grey


def fit_named(image: np.ndarray, geometry: Geometry, name: str) -> np.ndarray:
    """Returns an image fitted to a geometry, as `fit` does.

    Raises:
        UserError: Names the image, whose shape cannot be fitted.
    """
    _check_not_thin(image.shape[1], image.shape[0], geometry, name)
    return fit(image, geometry)


def _check_not_thin(width: int, height: int, geometry: Geometry, name: str) -> None:
    if geometry.resize is not None and max(width, height) > _THIN * min(width, height):
        raise UserError(
            f"{name}: {width}x{height} pixels; too thin to cut the centre out of"
        )


def _resized(
    image: np.ndarray, size: tuple[int, int], interpolation: str
) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    method, size = INTERPOLATIONS[interpolation], (size[1], size[0])
    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize(size, method))
    planes = map(np.ascontiguousarray, np.moveaxis(image, -1, 0))
    resized = [np.asarray(Image.fromarray(one).resize(size, method)) for one in planes]
    return np.stack(resized, axis=-1)
