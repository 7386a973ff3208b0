"""Images of 16 bits whose values need fewer, such as those of 12-bit cameras."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from finetune_jax.data.image_formats import image_formats
from finetune_jax.data.images import SIXTEEN_BIT
from finetune_jax.paths import printable

# Files of a data set whose headers are read.
SAMPLE = 32
# Images that need 15 bits are half as bright, which photos may be.
_SUSPECT = 14


def depth_warnings(where: str, paths: Sequence[pathlib.Path]) -> tuple[str, ...]:
    """Returns a line if all 16-bit images of a sample would become almost black.

    Args:
        where: Config key or folder that begins the line.
        paths: Image files.
    """
    step = max(len(paths) // SAMPLE, 1)
    found = [bits for path in paths[::step][:SAMPLE] if (bits := _bits(path))]
    if not found or max(found) > _SUSPECT:
        return ()
    bits, count = max(found), len(found)
    images = "1 image" if count == 1 else f"{count} images"
    return (
        f"{printable(where)}: {images} of 16 bits in a sample, "
        f"all with values below {2**bits:,} ({bits} bits); the upper 8 of 16 bits are "
        f"used, so that they become almost black; multiply their values by "
        f"{2 ** (16 - bits)} and save them again",
    )


def _bits(path: pathlib.Path) -> int:
    """Returns the number of bits that a 16-bit image needs; 0 of all other files."""
    try:
        with Image.open(path, formats=image_formats()) as image:
            if image.mode not in SIXTEEN_BIT:
                return 0
            return int(np.asarray(image).max()).bit_length()
    except Exception:  # A file that cannot be read is named when it is read.
        return 0
