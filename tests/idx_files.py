"""Files as MNIST has them."""

import gzip
import struct


def write_idx(path, array, kind=0x08):
    header = struct.pack(">HBB", 0, kind, array.ndim)
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
