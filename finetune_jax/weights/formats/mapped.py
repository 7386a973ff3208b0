"""Files as memory that is read when it is looked at: weights are not held twice."""

import io
import math
import mmap
import os
import pathlib
from typing import IO, Any

import numpy as np

# A whole file, mapped, or in memory.
Bytes = bytes | mmap.mmap
# Where arrays begin that jax reads on a CPU where they are, and copies otherwise.
ALIGNED = 64
# Columns that are copied at a time of what lies in another order: as many lines of memory
# as the processor keeps at hand. A third to two thirds of the time; chosen by us.
COLUMNS = 128


def mapped(path: pathlib.Path) -> Bytes:
    """Returns what a file holds.

    Raises:
        OSError: It cannot be opened.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def stream(data: Bytes) -> IO[bytes]:
    """Returns the bytes as a file at its beginning, for sequential reading."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    data.seek(0)
    opened: Any = data
    return opened


def copied(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a copy in the order of its axes, begun where jax needs no other.

    Args:
        array: May lie in any order, such as that of a kernel of torch.
        dtype: Of the copy.
    """
    copy = _aligned(array.shape, dtype)
    if array.flags.c_contiguous:
        copy[...] = array
        return copy
    for start in range(0, array.shape[-1], COLUMNS):
        columns = (..., slice(start, start + COLUMNS))
        copy[columns] = array[columns]
    return copy


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)
