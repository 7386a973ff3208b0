"""Files of NumPy arrays; nothing in them is executed."""

import pathlib

import numpy as np

from finetune_jax.core.errors import UserError


def read_arrays(path: pathlib.Path, only: str | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz` file by name; that of an `.npy` file is ''.

    Args:
        path: File of arrays.
        only: Name of the array that is wanted; the others are read where it is absent.

    Raises:
        UserError: Names the file and its problem.
    """
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                return {"": file}
            names = [name for name in file.files if name == only] or file.files
            return {name: _array(path, file, name) for name in names}
    except UserError:
        raise
    except Exception as error:  # NumPy raises whatever the damage leads to.
        raise UserError(f"{path}: {_reason(error)}") from error


def _array(path: pathlib.Path, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        raise UserError(f"{path}: {name!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if "Object arrays" in str(error):
        return (
            "an array of Python objects, which are not read; save numbers or text, such "
            "as np.array(list(x)) of images alike in shape, or y.astype(str)"
        )
    if "pickled data" in str(error):
        return "not an .npz file of plain arrays, nor an .npy file"
    return f"not an .npz file of plain arrays: {error}"
