"""Predicted masks as files."""

import pathlib

import numpy as np

from finetune_jax.data.images.decoding import Geometry, oriented_size
from finetune_jax.data.images.mask_files import unfitted, write_mask


class MaskWriter:
    """Writes predicted masks as PNG files of class indices, as large as their images."""

    def __init__(self, folder: pathlib.Path, geometry: Geometry, classes: int):
        """Stores where masks go, how images were resized, and the number of classes.

        The folder is made with the first mask.
        """
        self._folder, self._geometry, self._classes = folder, geometry, classes
        self._names: set[str] = set()

    def write(self, mask: np.ndarray, name: str) -> str:
        """Returns the file of a mask.

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
        write_mask(mask, self._classes, file)
        return str(file)
