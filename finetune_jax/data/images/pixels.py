"""Pixels of image arrays: their axes, their channels, and the range of their values.

Bytes are scaled to [0, 1] by the tasks, floats are not. So the range is decided over all
splits of a data set, and the inputs of predictions are held to the same decision.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.data.images.decoding import on_white

# A range that ends below these is not evidently that of bytes, or of 16 bits.
_LEAST_FLOAT_BYTES, _LEAST_16_BITS = 128, 2**15
# Bytes that end here are nearly black.
_DARK = 32
# White, by the scale of the values. Standardised values have no white.
_WHITES = {"bytes": 255, "whole": 255, "255": 255, "16 bits": 0xFFFF, "unit": 1}
# Images that are looked at, or converted, at a time.
_PART = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """The decision how the values of a data set's image arrays are read.

    Attributes:
        scale: 'bytes': integers from 0 to 255. 'whole': floats that are such integers,
            read as bytes. '16 bits': integers up to 65535, whose upper 8 bits are read.
            'unit': floats in [0, 1]. '255': other floats up to 255, divided by 255.
            'as they are': floats of which some are negative.
        low: Least value, as given.
        high: Greatest value, as given.
    """

    scale: str
    low: float
    high: float

    @property
    def dtype(self) -> str:
        """Dtype of the images after they were read."""
        return "uint8" if self.scale in ("bytes", "whole", "16 bits") else "float32"


BYTES = Pixels(scale="bytes", low=0, high=255)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """The range of some values.

    Attributes:
        kind: 'integers', 'bytes' or 'floats'.
        dtype: Name of the dtype.
        low: Least value.
        high: Greatest value.
        whole: Whether all values are whole numbers.
    """

    kind: str
    dtype: str
    low: float
    high: float
    whole: bool

    def __str__(self) -> str:
        """Returns the dtype and the range, for messages."""
        return f"{self.dtype} from {self.low:.6g} to {self.high:.6g}"


def extent_of(arrays: Iterable[np.ndarray]) -> Extent:
    """Returns the range of arrays of one kind of number, which are not all empty."""
    low, high, whole, dtypes = np.inf, -np.inf, True, dict[np.dtype, None]()
    for array in arrays:
        dtypes[array.dtype] = None
        is_float = array.dtype.kind == "f"
        for start in range(0, len(array), _PART) if array.size else ():
            part = array[start : start + _PART]
            low, high = min(low, float(part.min())), max(high, float(part.max()))
            whole = whole and (not is_float or bool((part == np.rint(part)).all()))
    kind = "bytes" if set(dtypes) == {np.dtype(np.uint8)} else "integers"
    if any(dtype.kind == "f" for dtype in dtypes):
        kind = "floats"
    name = " and ".join(map(str, dtypes))
    return Extent(kind=kind, dtype=name, low=low, high=high, whole=whole)


def decided(extent: Extent) -> tuple[Pixels | None, str]:
    """Returns how values of a range are read, and a line that tells it.

    Where the range is not clear the first is None, and the line says what to do. The line
    is empty for bytes, and for floats in [0, 1].
    """
    rule = _float_scale if extent.kind == "floats" else _integer_scale
    scale, line = rule(extent)
    if scale is None:
        return None, f"{extent}: {line}"
    lines = [part for part in (line, _darkness(extent, scale)) if part]
    pixels = Pixels(scale=scale, low=extent.low, high=extent.high)
    return pixels, f"{extent}: {'; '.join(lines)}" if lines else ""


def _darkness(extent: Extent, scale: str) -> str:
    """Returns advice for values that are almost black; '' if they are brighter."""
    white, high = _WHITES.get(scale), extent.high
    if white is None or extent.dtype == "bool" or high >= white * _DARK / 256:
        return ""
    if not high:
        return "all values are 0, which is black"
    saved = " as uint8" if white == 255 else ""
    return (
        f"no value is above {high:g}, and {white:g} is white: if {high:g} is, save "
        f"x * ({white:g} / {high:g}){saved}"
    )


def _integer_scale(extent: Extent) -> tuple[str | None, str]:
    if extent.low < 0:
        return None, (
            "negative integers have no known range; save bytes from 0 to 255, or "
            "floats that are standardised"
        )
    if extent.kind == "bytes":
        return "bytes", ""
    if extent.high <= 1:
        plain = extent.dtype == "bool"
        return "unit", "" if plain else "0 is read as black and 1 as white"
    if extent.high <= 255:
        return "bytes", "read as bytes"
    if _LEAST_16_BITS <= extent.high <= 0xFFFF:
        return "16 bits", "the upper 8 of 16 bits are read, as of files"
    return None, (
        "neither bytes nor the whole of 16 bits; save x * (255 / WHITE) as uint8, where "
        "WHITE is the value of white, such as 4095 for 12 bits"
    )


def _float_scale(extent: Extent) -> tuple[str | None, str]:
    if extent.low < 0:
        return "as they are", (
            "taken as they are, as if standardised; config.data.mean and std still apply"
        )
    if extent.high <= 1:
        return "unit", ""
    if not _LEAST_FLOAT_BYTES <= extent.high <= 255:
        return None, (
            "neither from 0 to 1 nor from 0 to 255; save x / WHITE, where WHITE is the "
            "value of white"
        )
    if extent.whole:
        return "whole", "read as bytes"
    return "255", "divided by 255"


def axes_problem(shape: Sequence[int], *, alone: bool = False) -> str | None:
    """Returns why images [N, ...] of a shape cannot be read; None if they can.

    Args:
        shape: Shape of all images.
        alone: Whether a single image [H, W, C] was given, to which an axis was added.
    """
    told = tuple(shape[1:] if alone else shape)
    last = "x.transpose(1, 2, 0)" if alone else "x.transpose(0, 2, 3, 1)"
    if len(shape) == 3 and shape[2] in (1, 2, 3, 4):
        return (
            f"{told}: a single image [H, W, C]? Then x[None]. If they are grey images of "
            f"{shape[2]} columns: x[..., None]"
        )
    if len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3)):
        return None
    if len(shape) != 4:
        return f"{told}: images are [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
    is_first, is_last = shape[1] in (1, 2, 3, 4), shape[3] in (2, 4)
    if is_first and not is_last:
        return f"{told}: the channels come first; they belong last: {last}"
    if is_first:
        return (
            f"{told}: the channels are either first or last; they belong last: {last} if "
            "they are first, else leave out the last, alpha"
        )
    if is_last:
        return None
    hint = ""
    if shape[2] in (1, 3):
        hint = "; if the examples come last: x.transpose(3, 0, 1, 2)"
    return (
        f"{told}: {shape[3]} channels; images have 1 (grey) or 3 (RGB), and alpha "
        f"if they have 2 or 4{hint}"
    )


def _alpha_problem(arrays: Sequence[np.ndarray], pixels: Pixels) -> str | None:
    """Returns why the last channel of images cannot be alpha; None if it can."""
    alpha = extent_of([array[..., -1:] for array in arrays])
    if pixels.scale == "as they are":
        return "4 or 2 channels of standardised values: leave out the last, alpha"
    group = {"16 bits": "wide", "unit": "unit"}.get(pixels.scale, "bytes")
    if not alpha.high or _group(alpha) != group:
        return (
            f"the last channel, alpha, is {alpha}, but the colours are up to "
            f"{pixels.high:g}: save both in one range, or leave alpha out"
        )
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Image arrays as they are read.

    Attributes:
        values: Images [N, H, W, 1 or 3] by split, bytes or float32.
        pixels: How their values were read; None for bytes, or if there are problems.
        warnings: Lines about conversions and assumptions.
        problems: Lines that say why the arrays cannot be used.
    """

    values: Mapping[str, np.ndarray]
    pixels: Pixels | None = None
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def read_images(splits: Mapping[str, np.ndarray]) -> Images:
    """Returns image arrays [N, H, W] or [N, H, W, C] of finite numbers as they are read."""
    arrays = {name: _with_channel_axis(array) for name, array in splits.items()}
    problems = [
        f"split {name!r}: {problem}"
        for name, array in splits.items()
        if (problem := axes_problem(array.shape))
    ]
    filled = {name: array for name, array in arrays.items() if array.size}
    if problems or not filled:
        return Images(values=arrays, problems=tuple(problems))
    colours = {name: _colours(array) for name, array in filled.items()}
    pixels, line = decided(extent_of(colours.values()))
    if pixels is None:
        return Images(values=arrays, problems=(f"images: {line}",))
    if problem := _other_ranges(colours, pixels):
        return Images(values=arrays, problems=(f"images: {problem}",))
    warnings = [f"images: {line}"] if line else []
    with_alpha = [array for array in filled.values() if array.shape[-1] in (2, 4)]
    if with_alpha:
        if problem := _alpha_problem(with_alpha, pixels):
            return Images(values=arrays, problems=(f"images: {problem}",))
        warnings.append(
            f"images: of {with_alpha[0].shape[-1]} channels the last is read as alpha and "
            "laid on white"
        )
    return Images(
        values={name: read_as(array, pixels) for name, array in arrays.items()},
        pixels=None if pixels.scale == "bytes" else pixels,
        warnings=tuple(warnings),
    )


def _with_channel_axis(array: np.ndarray) -> np.ndarray:
    return array[..., None] if array.ndim == 3 else array


def _colours(array: np.ndarray) -> np.ndarray:
    """Returns images without alpha."""
    return array[..., :-1] if array.shape[-1] in (2, 4) else array


def _group(extent: Extent) -> str:
    """Returns the name of the range that values seem to have."""
    if extent.low < 0:
        return "negative"
    return "unit" if extent.high <= 1 else "bytes" if extent.high <= 255 else "wide"


def _other_ranges(splits: Mapping[str, np.ndarray], pixels: Pixels) -> str | None:
    """Returns a problem if the splits differ in the range of their values."""
    extents = {name: extent_of([array]) for name, array in splits.items()}
    kinds = {extent.kind == "floats" for extent in extents.values()}
    groups = {_group(extent) for extent in extents.values()}
    if pixels.scale == "bytes":  # Integers up to 1 may be dark bytes.
        groups -= {"unit"}
    if len(kinds) == 1 and len(groups) <= 1:
        return None
    told = ", ".join(f"{name} {extent}" for name, extent in extents.items())
    return f"the splits differ in their values: {told}; save them alike"


def read_as(array: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Returns images [N, H, W, C] of a range that was decided, alpha laid on white."""
    if pixels.scale == "16 bits":
        array = (array >> 8).astype(np.uint8)
    elif pixels.scale == "255":
        array = (array / 255).astype(np.float32)
    else:
        array = array.astype(pixels.dtype, copy=False)
    if array.shape[-1] not in (2, 4) or not len(array):
        return array
    if array.dtype == np.uint8:
        return np.stack([on_white(image) for image in array])
    alpha = array[..., -1:]
    return array[..., :-1] * alpha + (1 - alpha)


def to_predict(
    array: np.ndarray,
    pixels: Pixels | None,
    dtype: str,
    name: str,
    *,
    alone: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Returns images [N, H, W, C] as a run has read its own, and lines to tell.

    Args:
        array: Images of any numbers.
        pixels: How the run has read its arrays; None where it was files, or is unknown.
        dtype: Dtype of the images that the model takes.
        name: For messages.
        alone: Whether a single image was given, to which an axis was added.

    Raises:
        UserError: The values have not the range of the run's.
    """
    if problem := axes_problem(array.shape, alone=alone):
        raise UserError(f"{name}: {problem}")
    array = _with_channel_axis(array)
    extent, lines = extent_of([_colours(array)]), []
    if pixels is None and dtype == "uint8":
        pixels = BYTES
    if problem := _misfit(extent, pixels):
        raise UserError(
            f"{name}: {extent.dtype}, but the model takes {dtype}: it is {extent}; "
            f"{problem}"
        )
    if pixels is None:
        pixels = Pixels(scale="as they are", low=extent.low, high=extent.high)
    elif dark := _darkness(extent, pixels.scale):
        lines.append(f"{name}: {extent}: {dark}")
    elif pixels.scale == "as they are" and extent.low >= 0:
        lines.append(
            f"{name}: {extent}, nothing below 0; the run's images were from "
            f"{pixels.low:.6g} to {pixels.high:.6g}"
        )
    if array.shape[-1] in (2, 4):
        if problem := _alpha_problem([array], pixels):
            raise UserError(f"{name}: {problem}")
        lines.append(f"{name}: the last channel is read as alpha and laid on white")
    return read_as(array, pixels), lines


def _misfit(extent: Extent, pixels: Pixels | None) -> str | None:
    """Returns advice for values out of the run's range; None if they are in it."""
    is_float, low, high = extent.kind == "floats", extent.low, extent.high
    is_bright = high > 1 or high == 0
    if pixels is None:
        return None if is_float else "save floats, scaled as the run's images were"
    if pixels.scale in ("bytes", "whole"):
        fits = extent.whole and 0 <= low and high <= 255 and extent.dtype != "bool"
        # Of integers up to 1 training reads 1 as white, unless they are bytes.
        is_clear = extent.kind == "bytes" or is_bright
        if fits and is_clear and (not is_float or pixels.scale == "whole"):
            return None
        if is_bright:
            return "save bytes from 0 to 255: np.rint(x).astype('uint8')"
        return "if 1 is white, save np.rint(x * 255).astype('uint8')"
    if pixels.scale == "16 bits":
        fits = not is_float and 0 <= low and (high > 255 or not high) and high <= 0xFFFF
        return (
            None if fits else "save 16 bits from 0 to 65535, as the run's images were"
        )
    if pixels.scale == "as they are":
        margin = pixels.high - pixels.low
        if is_float and pixels.low - margin <= low and high <= pixels.high + margin:
            return None
        return f"the run's images were from {pixels.low:.6g} to {pixels.high:.6g}"
    is_unit, white = pixels.scale == "unit", 1 if pixels.scale == "unit" else 255
    is_binary = is_unit and not is_float and extent.kind != "bytes"
    is_clear = is_unit or is_bright  # Floats up to 1 would be black.
    if (is_float or is_binary) and is_clear and 0 <= low and high <= white:
        return None
    return f"the run's images were floats from 0 to {white}; save them so"
