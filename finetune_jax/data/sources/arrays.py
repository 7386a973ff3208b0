"""`arrays`: an `.npz` file of inputs and labels.

It holds `x` and `y`, to be cut into splits here, or `x_train`, `y_train`, `x_test`, ...
for each split that it has. Integers and text in `y` are classes, whose `class_names` may
stand beside them and give their order; floating-point numbers [N] or [N, T] are what
regression predicts, and `target_names` may stand beside them. Images are [N, H, W, 1 or 3],
bytes or floats; what else is read, and how, is in `data/pixels.py`.
"""

import pathlib

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.data.images.array_files import read_arrays
from finetune_jax.data.reading.files import data_place
from finetune_jax.data.source import Source, array_source

INPUTS = ("x", "inputs", "images", "image", "features")
LABELS = ("y", "labels", "label")


def load(directory: str | None = None, argument: str | None = None) -> Source:
    """Returns the splits of the file `config.data.dir`.

    Raises:
        UserError: No such file, or none that this reads; nothing in it is executed.
    """
    del argument
    path = data_place(directory, "arrays needs an .npz file", "file")
    arrays = read_arrays(path)
    if "" in arrays:
        raise UserError(
            f"config.data.dir: {path}: one array without labels; save both in one file: "
            "np.savez('data.npz', x=x, y=y)"
        )
    return array_source(f"arrays {path}", *_splits(path, arrays))


def _splits(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> tuple:
    names = [arrays.pop(key, None) for key in ("class_names", "target_names")]
    inputs: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        kind, _, split = name.partition("_")
        table = inputs if kind in INPUTS else labels if kind in LABELS else None
        if table is None:
            raise UserError(
                f"{path}: {name!r} is neither inputs nor labels; "
                "x and y, or x_train, y_train, x_test, ... are needed"
            )
        table[split or "all"] = array
    problems = [
        f"split {split!r} has {'labels' if split in labels else 'inputs'} only"
        for split in sorted(inputs.keys() ^ labels.keys())
    ]
    if not inputs:
        problems.append("no inputs")
    if "all" in inputs and len(inputs) > 1:
        problems.append("x beside x_SPLIT: have one or the other")
    raise_if(problems, f"{path} cannot be used:")
    splits = {split: (inputs[split], labels[split]) for split in inputs}
    return splits, *(None if n is None else _texts(n, path) for n in names)


def _texts(names: np.ndarray, path: pathlib.Path) -> list[str]:
    """Returns the names in an array.

    Raises:
        UserError: They are not UTF-8.
    """
    try:
        return [
            name.decode() if isinstance(name, bytes) else str(name)
            for name in names.reshape(-1)
        ]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: names that are not UTF-8: {error}") from error
