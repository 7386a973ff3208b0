"""Weights in several files with an index, such as `model.safetensors.index.json`."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from finetune_jax.core.errors import UserError, raise_if

INDEX = ".index.json"  # End of the names of such files.


def shards_of(index: pathlib.Path) -> dict[str, str]:
    """Returns the file of each tensor, in the folder of the index.

    Raises:
        UserError: The file is not an index, or names files in other folders.
    """
    where = f"config.init.pretrained: {index}"
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: no index of weights: {type(error).__name__}: {error}"
        ) from error
    outside = sorted(
        {f for f in found.values() if pathlib.PurePath(f).name != f or f == ".."}
    )
    if outside or not found:
        files = ", ".join(map(repr, outside[:5])) or "no file"
        raise UserError(
            f"{where}: names {files}; only files in its own folder are allowed"
        )
    return found


def joined(
    index: pathlib.Path, read: Callable[[pathlib.Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the tensors of all files of an index.

    Args:
        index: Path of the index.
        read: Returns the tensors of a file.

    Raises:
        UserError: Lists every missing file, and every tensor that is missing in its file
            or in the index.
    """
    listed = shards_of(index)
    files = sorted(set(listed.values()))
    problems = [
        f"{file}: no such file beside it, with {list(listed.values()).count(file)} tensors"
        for file in files
        if not (index.parent / file).is_file()
    ]
    tensors: dict[str, np.ndarray] = {}
    for file in () if problems else files:
        of_file = read(index.parent / file)
        wanted = {name for name, its_file in listed.items() if its_file == file}
        problems += [f"{n}: not in {file}" for n in sorted(wanted - set(of_file))]
        problems += [
            f"{n}: in {file}, but not in the index"
            for n in sorted(set(of_file) - wanted)
        ]
        tensors |= of_file
    raise_if(
        problems,
        f"config.init.pretrained: {index} does not fit its files:",
        "Download all files of the index again, into one folder.",
    )
    return tensors
