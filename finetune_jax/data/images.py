"""Images: files read as a viewer shows them, and resized as torchvision does."""

import dataclasses
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune_jax.errors import UserError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Rec. 601, as Pillow converts colour to grey.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
# Of the longer side to the shorter one; beyond it an image resized by its shorter side
# could fill the memory.
_THIN = 100
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(path: pathlib.Path) -> np.ndarray:
    """Returns the image of a file as a viewer shows it, bytes [H, W, 3] or [H, W, 1].

    It is turned as its EXIF orientation says. What is transparent lies on white; of 16
    bits the upper 8 are kept; palettes, CMYK and bilevel images become RGB or grey. Of an
    animation it is the first image.

    Raises:
        UserError: Names the file, and what is wrong with it.
    """
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
            if pixels > (Image.MAX_IMAGE_PIXELS or pixels):
                raise UserError(
                    f"{path}: {image.width}x{image.height} pixels, more than "
                    f"{Image.MAX_IMAGE_PIXELS}; make it smaller"
                )
            image.load()
            return _as_bytes(_upright(image), path)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        what = f"not an image ({size} bytes)" if size else "an empty file"
        raise UserError(f"{path}: {what}") from error
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to.
        raise UserError(f"{path}: cannot be read: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Broken EXIF data says nothing about the pixels.
        return image


def _as_bytes(image: Image.Image, path: pathlib.Path) -> np.ndarray:
    if image.mode == "I" and image.format == "TIFF":
        raise UserError(f"{path}: grey levels of 32 bits; save it with 8 or 16")
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"{path}: grey levels outside of 16 bits")
        return (values >> 8).astype(np.uint8)[..., None]
    if image.mode == "F":
        raise UserError(
            f"{path}: floating-point pixels, whose range is not known; save it as bytes"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How an image becomes one of a fixed shape.

    Attributes:
        shape: (H, W, C) wanted; C is 1 or 3.
        resize: Of the shorter side, before the centre is cut out; None stretches the
            whole image to the shape.
        interpolation: 'bilinear' or 'bicubic', both antialiased.
    """

    shape: tuple[int, ...]
    resize: int | None = None
    interpolation: str = "bilinear"


def fit(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Returns an image in the shape wanted, as torchvision resizes and crops PIL images.

    Args:
        image: Bytes or float32, [H, W, C].
        geometry: What is wanted.

    Source: torchvision/transforms/functional.py, `resize` and `center_crop`.
    """
    height, width, channels = geometry.shape
    if geometry.resize is None:
        image = _resized(image, (height, width), geometry.interpolation)
    else:
        rows, columns = image.shape[:2]
        short, long = geometry.resize, max(rows, columns)
        long = int(geometry.resize * long / min(rows, columns))
        size = (short, long) if rows <= columns else (long, short)
        image = _resized(image, size, geometry.interpolation)
        top = round((image.shape[0] - height) / 2)
        left = round((image.shape[1] - width) / 2)
        image = image[top : top + height, left : left + width]
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image[..., :1], 3, axis=-1)
    grey = (image[..., :3] @ _LUMINANCE)[..., None]
    return np.round(grey).astype(image.dtype) if image.dtype == np.uint8 else grey


def fit_named(image: np.ndarray, geometry: Geometry, name: str) -> np.ndarray:
    """Returns what `fit` does.

    Raises:
        UserError: Names the image, whose shape cannot be fitted.
    """
    rows, columns = image.shape[:2]
    if geometry.resize is not None and max(rows, columns) > _THIN * min(rows, columns):
        raise UserError(
            f"{name}: {columns}x{rows} pixels; too thin to cut the centre out of"
        )
    return fit(image, geometry)


def _resized(
    image: np.ndarray, size: tuple[int, int], interpolation: str
) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    method, (height, width) = INTERPOLATIONS[interpolation], size
    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize((width, height), method))
    planes = [
        Image.fromarray(np.ascontiguousarray(image[..., plane])).resize(
            (width, height), method
        )
        for plane in range(image.shape[-1])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)
