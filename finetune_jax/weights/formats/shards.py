"""Weights in several files, which an index lists: `model.safetensors.index.json`."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from finetune_jax.core.errors import UserError, problems_error

INDEX = ".index.json"  # How the names of such files end.


def shards_of(index: pathlib.Path) -> dict[str, str]:
    """Returns the name of the file, beside the index, that each tensor is in.

    Raises:
        UserError: It is no such index, or names files elsewhere.
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
        raise UserError(f"{where}: names {files}; files beside it are needed")
    return found


def joined(
    index: pathlib.Path, read: Callable[[pathlib.Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the tensors of all files of an index.

    Args:
        index: Where it is.
        read: Returns the tensors of one file.

    Raises:
        UserError: Lists every file that is missing, every tensor that is in another file
            than the index says, and every one that it does not list.
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
    if problems:
        raise problems_error(
            f"config.init.pretrained: {index} does not fit its files:",
            problems,
            "Download all files of the index again, into one folder.",
        )
    return tensors
