"""`idx`: a folder of IDX files as MNIST and Fashion-MNIST are published, gzipped or not.

Source: http://yann.lecun.com/exdb/mnist, "the IDX file format".
"""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from finetune_jax.core.errors import DataMissing, UserError
from finetune_jax.core.paths import user_path
from finetune_jax.data.source import Source, array_source

SPLITS = {"train": "train", "test": "t10k"}
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Returns the array of an IDX file, `.gz` or not.

    Raises:
        UserError: Not an IDX file, or one cut short.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise UserError(f"{path}: not an IDX file")
    dtype, axes = np.dtype(_DTYPES[data[2]]), data[3]
    start = 4 + 4 * axes
    if len(data) < start:
        raise UserError(f"{path}: cut short in its header")
    shape = struct.unpack(f">{axes}I", data[4:start])
    wanted = start + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(data) != wanted:
        raise UserError(
            f"{path}: its header says {shape}, {wanted} bytes, but it has {len(data)}"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits 'train' and 'test' of the folder `config.data.dir`.

    Raises:
        UserError: Names every file that is missing.
    """
    del argument
    if directory is None:
        raise DataMissing("config.data.dir: idx needs the folder of the IDX files")
    folder = user_path(directory, "config.data.dir")
    splits, missing = {}, []
    for split, prefix in SPLITS.items():
        paths = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            plain = folder / f"{prefix}-{kind}"
            packed = folder / f"{prefix}-{kind}.gz"
            found = next((path for path in (plain, packed) if path.is_file()), None)
            missing += [] if found else [f"{plain} or {packed.name}"]
            paths.append(found)
        splits[split] = paths
    if missing:
        raise DataMissing(
            "\n  ".join([f"config.data.dir: {directory} lacks files of idx:", *missing])
        )
    return array_source(
        f"idx {directory}",
        {
            split: (read_idx(images), read_idx(labels))
            for split, (images, labels) in splits.items()
        },
    )
