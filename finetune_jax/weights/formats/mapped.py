"""Memory-mapped files: weights are not in memory twice."""

import hashlib
import io
import mmap
import os
import pathlib
from typing import IO, Any

import numpy as np

from finetune_jax.core.array_store import aligned_empty

# A whole file, mapped or in memory.
Bytes = bytes | mmap.mmap
# Columns that are copied at a time from arrays in another order, so that their cache lines
# stay in the cache: a third to two thirds of the time of one copy. Chosen by us.
COLUMNS = 128


def mapped(path: pathlib.Path) -> Bytes:
    """Returns the mapped content of a file.

    Raises:
        OSError: The file cannot be opened.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def sha256_of(path: pathlib.Path) -> str:
    """Returns the sha256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stream(data: Bytes) -> IO[bytes]:
    """Returns the bytes as a file at its beginning, for sequential reading."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    data.seek(0)
    opened: Any = data
    return opened


def copied(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a C-contiguous copy, aligned so that jax need not copy it again.

    Args:
        array: Array of any memory order, such as a transposed kernel.
        dtype: Dtype of the copy.
    """
    copy = aligned_empty(array.shape, dtype)
    if array.flags.c_contiguous:
        copy[...] = array
        return copy
    for start in range(0, array.shape[-1], COLUMNS):
        columns = (..., slice(start, start + COLUMNS))
        copy[columns] = array[columns]
    return copy
