"""`--mode=predict`: what the best checkpoint of a run says of new files, as JSONL.

Where predictions are masks, a folder beside it has them as PNG files.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from finetune_jax.config import Config
from finetune_jax.data.dataset import Dataset, dataset_of, no_data
from finetune_jax.data.images import SUFFIXES, oriented_size, read_image
from finetune_jax.data.masks import unfitted, write_mask
from finetune_jax.data.source import array_source
from finetune_jax.data.sources.folder import files_below
from finetune_jax.data.spec import DataSpec, spec_from_json
from finetune_jax.data.threads import attempts, check_readable
from finetune_jax.errors import UserError, problems_error
from finetune_jax.modes.options import Options
from finetune_jax.run import best_state
from finetune_jax.setup import make_setup
from finetune_jax.workdir import read_manifest

ARRAYS = (".npy", ".npz")
# Files that are decoded before the model sees the first of them.
CHUNK = 1024


def main(config: Config, options: Options) -> int:
    """Writes a line for every input and returns the exit status.

    Raises:
        UserError: Inputs that cannot be read, after all others were predicted.
    """
    workdir = options.workdir
    assert workdir is not None
    paths = find_inputs(options.inputs)
    spec = run_spec(config, workdir)
    _check_kinds(paths, spec)
    output = _output(options.output or str(workdir / "predictions.jsonl"))
    setup = make_setup(config, no_data(spec))
    evaluator, placed, step = best_state(setup, workdir)
    print(f"checkpoint of step {step}")
    if not any(path.suffix in ARRAYS for path in paths):
        evaluator.batch_size = min(evaluator.batch_size, len(paths))
    errors: list[UserError | None] = []
    part, written = output.with_name(f"{output.name}.part"), 0
    masks = MaskWriter(output.with_name(f"{output.stem}_masks"), spec)
    with part.open("w") as file:
        for names, dataset in _datasets(paths, spec, errors):
            outputs = evaluator.outputs(placed, dataset)
            records = setup.task.records(outputs, {})
            found = setup.task.masks(outputs)
            if found is not None:
                records = [
                    {"mask": masks.write(mask, name), **record}
                    for record, mask, name in zip(records, found, names)
                ]
            for name, record in zip(names, records):
                file.write(json.dumps({"file": name, **record}) + "\n")
                written += 1
    part.replace(output)
    print(f"{written:,} predictions in {output}")
    check_readable(errors, f"The other {written:,} are in {output}.")
    return 0


class MaskWriter:
    """Writes predicted masks as PNG files of class indices, as large as their images."""

    def __init__(self, folder: pathlib.Path, spec: DataSpec):
        """Takes where they go, made with the first of them, and what the data look like."""
        self._folder, self._spec = folder, spec
        self._taken: set[str] = set()

    def write(self, mask: np.ndarray, name: str) -> str:
        """Returns the file of a mask.

        Args:
            mask: uint8 [H, W].
            name: Of its image, a file, or such as 'x.npy#3'.
        """
        self._folder.mkdir(exist_ok=True)
        path, stem = pathlib.Path(name), pathlib.Path(name).stem
        if path.suffix.lower() in SUFFIXES:
            geometry = self._spec.geometry(training=False)
            assert geometry is not None
            mask = unfitted(mask, geometry, oriented_size(path))
        else:
            stem = path.name.replace("#", "_")
        unique, number = stem, 1
        while unique in self._taken:
            number += 1
            unique = f"{stem}_{number}"
        self._taken.add(unique)
        file = self._folder / f"{unique}.png"
        write_mask(mask, len(self._spec.pixel_classes), file)
        return str(file)


def _output(text: str) -> pathlib.Path:
    """Returns where predictions go.

    Raises:
        UserError: No file can be written there.
    """
    path = pathlib.Path(text).resolve()
    if not path.parent.is_dir():
        raise UserError(f"--output: no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        raise UserError(f"--output: {text!r} is not a plain file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: {str(path.parent)!r} cannot be written to")
    return path


def find_inputs(inputs: Sequence[str]) -> list[pathlib.Path]:
    """Returns the files that `--inputs` names; of a folder, all images below it.

    Raises:
        UserError: Lists what is not there, and folders without images.
    """
    if not inputs:
        raise UserError("--mode=predict needs --inputs, files or folders")
    found: list[pathlib.Path] = []
    problems = []
    for text in inputs:
        path = pathlib.Path(os.path.expanduser(text))
        if text and path.is_dir():
            inside = [p for p in files_below(path) if p.suffix.lower() in SUFFIXES]
            found += inside
            if not inside:
                problems.append(f"--inputs: no images in {text!r}")
        elif text and path.is_file():
            found.append(path)
        else:
            problems.append(f"--inputs: no file or folder {text!r}")
    if problems:
        raise problems_error("What is to be predicted is not there:", problems)
    return found


def run_spec(config: Config, workdir: pathlib.Path) -> DataSpec:
    """Returns what the data of a run look like, without the data.

    Raises:
        UserError: The run does not say.
    """
    looks = (read_manifest(workdir) or {}).get("data")
    try:
        return spec_from_json(looks or {}, config.data)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"--workdir: {workdir}/manifest.json does not say what the data look like; "
            "it is of an older version, or damaged"
        ) from error


def _check_kinds(paths: Sequence[pathlib.Path], spec: DataSpec) -> None:
    """Checks that images are given to models of images, and arrays to the others."""
    takes_files = len(spec.shape) == 3 and spec.dtype == "uint8"
    problems = []
    for path in paths:
        if path.suffix in ARRAYS or (takes_files and path.suffix.lower() in SUFFIXES):
            continue
        problems.append(f"{path}: {'no image' if takes_files else 'no array'}")
    if problems:
        kinds = (*(sorted(SUFFIXES) if takes_files else ()), *ARRAYS)
        raise problems_error(
            "--inputs: files that this model does not take:",
            problems,
            f"It takes {', '.join(kinds)}; its inputs are {spec.dtype} {spec.shape}.",
        )


def _datasets(
    paths: Sequence[pathlib.Path], spec: DataSpec, errors: list[UserError | None]
) -> Iterator[tuple[list[str], Dataset]]:
    """Yields names and examples, some files at a time; adds an entry a file to errors."""
    for path in (path for path in paths if path.suffix in ARRAYS):
        (array, error), *_ = attempts(lambda p: _read_array(p, spec), [path])
        errors.append(error)
        if error is None:
            names = [f"{path}#{row}" for row in range(len(array))]
            yield names, _dataset(array, spec)
    # Photos are fitted here already.
    fitted = dataclasses.replace(spec, resize=None)
    files = (path for path in paths if path.suffix not in ARRAYS)
    while chunk := list(itertools.islice(files, CHUNK)):
        found = attempts(lambda p: _read_photo(p, spec), chunk)
        errors += [error for _, error in found]
        good = [row for row, (_, error) in enumerate(found) if error is None]
        if good:
            images = np.stack([found[row][0] for row in good])
            yield [str(chunk[row]) for row in good], _dataset(images, fitted)


def _dataset(inputs: np.ndarray, spec: DataSpec) -> Dataset:
    label = np.zeros(len(inputs), np.int32)
    source = array_source("inputs", {"all": (inputs, label)})
    return dataset_of(source, spec, np.arange(len(inputs)), label)


def _read_photo(path: pathlib.Path, spec: DataSpec) -> np.ndarray:
    return read_image(path, spec.geometry(training=False))


def _read_array(path: pathlib.Path, spec: DataSpec) -> np.ndarray:
    """Returns inputs [N, ...] of an `.npy` file, or the array `x` of an `.npz` file."""
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        array = loaded["x"] if path.suffix == ".npz" else loaded
    except Exception as error:  # NumPy raises whatever the damage leads to.
        raise UserError(f"{path}: cannot be read: {error}") from error
    if len(spec.shape) == 3 and array.ndim == 3:
        array = array[..., None]
    is_image = len(spec.shape) == 3 and array.ndim == 4 and array.shape[-1] in (1, 3)
    if not len(array) or not (is_image or array.shape[1:] == spec.shape):
        raise UserError(f"{path}: {array.shape}, but the model takes {spec.shape} each")
    if array.dtype != np.dtype(spec.dtype) and (
        is_image or array.dtype.kind not in "uif"
    ):
        raise UserError(f"{path}: {array.dtype}, but the model takes {spec.dtype}")
    return array
