"""Files as memory that is read when it is looked at: weights are not held twice."""

import io
import mmap
import os
import pathlib
from typing import IO, Any

# A whole file, mapped, or in memory.
Bytes = bytes | mmap.mmap


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
