"""Files of safetensors, read without a copy and written with ordinary permissions."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from finetune_jax.core.errors import UserError
from finetune_jax.weights.formats.contents import Contents
from finetune_jax.weights.formats.entries import beginnings, no_entry, under
from finetune_jax.weights.formats.mapped import Bytes

DTYPES = {
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    **{f"{c.upper()}{8 * n}": np.dtype(f"<{c}{n}") for c in "iu" for n in (1, 2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(bool),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


def read_safetensors(data: Bytes, where: str, entry: str | None = None) -> Contents:
    """Returns the tensors without copying them, as the library would.

    Args:
        data: The whole file.
        where: Beginning of error messages, such as the config key and the path.
        entry: Beginning of the names of the tensors to take; None takes all.

    Raises:
        UserError: The file is damaged, or has unsupported numbers.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = _header(data, start)
        _check_numbers(header, where)
        _check_length(header, start, len(data))
        found = {}
        for name, about in header.items():
            dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
            begin, end = (start + offset for offset in about["data_offsets"])
            raw = memoryview(data)[begin:end]
            if not start <= begin <= end <= len(data):
                raise ValueError(f"{name!r} lies outside the file")
            found[name] = np.frombuffer(raw, dtype).reshape(shape)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where}: cannot be read as safetensors ({len(data)} bytes): "
            f"{str(error)[:200]}"
        ) from error
    return taken(found, entry, where)


def taken(tensors: dict[str, np.ndarray], entry: str | None, where: str) -> Contents:
    """Returns the tensors whose names begin with an entry, or all if it is None.

    Raises:
        UserError: No name begins with the entry.
    """
    if entry is None:
        return Contents(tensors=tensors)
    if found := under(tensors, entry):
        note = f"took {entry!r}, as config.init.entry says"
        return Contents(tensors=found, notes=(note,))
    raise no_entry(entry, beginnings([*tensors]), where.partition(": ")[2] or where)


def save_safetensors(
    tensors: Mapping[str, np.ndarray],
    path: pathlib.Path,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a file with the permissions of the umask.

    The library writes a file that only its owner may read.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def _header(data: Bytes, start: int) -> dict[str, Any]:
    if not 10 <= start <= len(data):
        raise ValueError(
            f"its header would take {start - 8} bytes; the file is cut off, or no "
            "safetensors"
        )
    header: dict[str, Any] = json.loads(data[8:start])
    return {name: header[name] for name in header if name != "__metadata__"}


def _check_numbers(header: Mapping[str, Any], where: str) -> None:
    odd = {n: about["dtype"] for n, about in header.items()}
    odd = {name: kind for name, kind in odd.items() if kind not in DTYPES}
    if odd:
        name, kind = next(iter(odd.items()))
        told = "complex numbers" if str(kind).startswith("C") else "unknown numbers"
        raise UserError(
            f"{where}: its tensor {name[:100]!r} has {told} ({str(kind)[:20]}), which no "
            f"model here takes ({len(odd)} of {len(header)} tensors); save it with floats"
        )


def _check_length(header: Mapping[str, Any], start: int, length: int) -> None:
    ends = [about["data_offsets"][1] for about in header.values()]
    wanted = start + max(ends, default=0)
    if wanted > length:
        raise ValueError(
            f"its header says {wanted} bytes, so {wanted - length} are missing; download "
            "or copy it again"
        )
