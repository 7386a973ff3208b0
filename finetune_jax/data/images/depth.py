"""Images of 16 bits whose values need fewer, such as those of 12-bit cameras."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from finetune_jax.core.paths import printable
from finetune_jax.data.images.decoding import SIXTEEN_BIT, opened

# Files of a data set whose headers are read.
SAMPLE = 32
# Images that need 15 bits are half as bright, which photos may be.
_SUSPECT = 14
_BYTE = 8


def depth_warnings(
    where: str, images: Sequence[pathlib.Path | Image.Image]
) -> tuple[str, ...]:
    """Returns a line if all 16-bit images of a sample would become almost black.

    Args:
        where: Config key or folder that begins the line.
        images: Image files, or what Pillow opened or made.
    """
    step = max(len(images) // SAMPLE, 1)
    found = [bits for image in images[::step][:SAMPLE] if (bits := _bits(image))]
    if not found or max(found) > _SUSPECT:
        return ()
    bits, count = max(found), len(found)
    counted = "1 image" if count == 1 else f"{count} images"
    return (
        f"{printable(where)}: {counted} of 16 bits in a sample, "
        f"all with values below {2**bits:,} ({bits} bits); the upper 8 of 16 bits are "
        f"used, so that they become almost black; multiply their values by "
        f"{2 ** (16 - bits)} and save them again",
    )


def bytes_problem(image: Image.Image) -> str | None:
    """Returns a problem if an image of 16 or 32 bits holds bytes, which would be black."""
    bits = _bits(image)
    if not 0 < bits <= _BYTE:
        return None
    return (
        f"mode {image.mode}, whose white is 65535, with values up to "
        f"{int(np.asarray(image).max())}; if 255 is white, give "
        "Image.fromarray(np.asarray(image).astype('uint8'))"
    )


def _bits(file: pathlib.Path | Image.Image) -> int:
    """Returns the number of bits that a 16-bit image needs; 0 of all other files."""
    try:
        with opened(file) as image:
            if image.mode not in SIXTEEN_BIT:
                return 0
            return int(np.asarray(image).max()).bit_length()
    except Exception:  # A file that cannot be read is named when it is read.
        return 0
