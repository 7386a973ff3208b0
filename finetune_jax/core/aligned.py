"""Large arrays that a CPU device reads where they lie; of others jax makes a copy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Bytes; XLA asks for it.
ALIGNMENT = 64


def zeros(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns zeros [*shape] that begin at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % ALIGNMENT
    return room[begin : begin + size].view(dtype).reshape(shape)


def concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rows of arrays of one dtype, one after another."""
    count = sum(map(len, parts))
    found = zeros((count, *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=found)
