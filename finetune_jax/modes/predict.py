"""`--mode=predict`: what the best checkpoint of a run says of new files, as JSONL.

Where predictions are masks, a folder beside it has them as PNG files.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from finetune_jax.config import Config
from finetune_jax.data.dataset import Dataset, dataset_of
from finetune_jax.data.encoding import read_fitted
from finetune_jax.data.images import SUFFIXES, oriented_size
from finetune_jax.data.masks import unfitted, write_mask
from finetune_jax.data.source import ArrayExamples, Source
from finetune_jax.data.sources.folder import files_below
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.table_source import format_of, rows_to_predict
from finetune_jax.data.text_files import inputs_of, read_texts
from finetune_jax.data.texts import Rows, TextOptions
from finetune_jax.data.threads import attempts, check_readable
from finetune_jax.errors import UserError, problems_error
from finetune_jax.modes.options import Options
from finetune_jax.predictor import (
    ARRAYS,
    examples,
    fitted,
    open_predictor,
    read_array,
    run_spec,
    takes_files,
    text_examples,
)

# Files that are decoded before the model sees the first of them.
CHUNK = 1024


def main(config: Config, options: Options) -> int:
    """Writes a line for every input and returns the exit status.

    Raises:
        UserError: Inputs that cannot be read, after all others were predicted.
    """
    workdir = options.workdir
    assert workdir is not None
    spec = run_spec(config, workdir)
    suffixes = _suffixes(config, spec)
    paths = find_inputs(options.inputs, suffixes)
    _check_kinds(paths, spec, suffixes)
    output = _output(options.output or str(workdir / "predictions.jsonl"))
    predictor = open_predictor(config, workdir)
    print(f"checkpoint of step {predictor.step}")
    evaluator, largest = predictor.evaluator, predictor.evaluator.batch_size
    is_of_files = spec.text is None and spec.table is None
    if is_of_files and not any(path.suffix in ARRAYS for path in paths):
        evaluator.batch_size = min(largest, len(paths))
    errors: list[UserError | None] = []
    part, written = output.with_name(f"{output.name}.part"), 0
    masks = MaskWriter(output.with_name(f"{output.stem}_masks"), spec)
    with part.open("w") as file:
        if spec.table is not None:
            found = _tables(paths, config, workdir, errors)
        elif spec.text is not None:
            found = _texts(paths, spec, predictor.encoder, errors)
        else:
            found = _datasets(paths, spec, errors)
        for names, dataset in found:
            if spec.text is not None:  # A program is compiled for each size of batch.
                size = 2 ** (len(dataset) - 1).bit_length()
                evaluator.batch_size = min(largest, size)
            for name, record in zip(names, predictor.records(dataset), strict=True):
                if "mask" in record:
                    record["mask"] = masks.write(record["mask"], name)
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


def find_inputs(
    inputs: Sequence[str], suffixes: Collection[str] = SUFFIXES
) -> list[pathlib.Path]:
    """Returns the files that `--inputs` names; of a folder, all images or texts below it.

    Args:
        inputs: Files and folders.
        suffixes: Of what is looked for in folders.

    Raises:
        UserError: Lists what is not there, and folders without such files.
    """
    kind = "images" if suffixes is SUFFIXES else f"files {', '.join(suffixes)}"
    if not inputs:
        raise UserError("--mode=predict needs --inputs, files or folders")
    found: list[pathlib.Path] = []
    problems = []
    for text in inputs:
        path = pathlib.Path(os.path.expanduser(text))
        if text and path.is_dir():
            inside = [p for p in files_below(path) if p.suffix.lower() in suffixes]
            found += inside
            if not inside:
                problems.append(f"--inputs: no {kind} in {text!r}")
        elif text and path.is_file():
            found.append(path)
        else:
            problems.append(f"--inputs: no file or folder {text!r}")
    if problems:
        raise problems_error("What is to be predicted is not there:", problems)
    return found


def _suffixes(config: Config, spec: DataSpec) -> Collection[str]:
    """Returns what files of inputs end with."""
    if spec.table is not None:
        kind = format_of(config.data.name)
        assert kind is not None
        return kind.suffixes
    return SUFFIXES if spec.text is None else inputs_of(spec.text.options)


def _check_kinds(
    paths: Sequence[pathlib.Path], spec: DataSpec, suffixes: Collection[str]
) -> None:
    """Checks that images are given to models of images, and arrays to the others."""
    if spec.text is not None or spec.table is not None:
        kind = "texts" if spec.text is not None else "table of this kind"
        problems = [
            f"{p}: no {kind}" for p in paths if p.suffix.lower() not in suffixes
        ]
        if problems:
            raise problems_error(
                "--inputs: files that this model does not take:",
                problems,
                f"It takes {', '.join(suffixes)}.",
            )
        return
    files, problems = takes_files(spec), []
    for path in paths:
        if path.suffix in ARRAYS or (files and path.suffix.lower() in SUFFIXES):
            continue
        problems.append(f"{path}: {'no image' if files else 'no array'}")
    if problems:
        kinds = (*(sorted(SUFFIXES) if files else ()), *ARRAYS)
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
        (array, error), *_ = attempts(lambda p: read_array(p, spec), [path])
        errors.append(error)
        if error is None:
            names = [f"{path}#{row}" for row in range(len(array))]
            yield names, examples(array, spec)
    files = (path for path in paths if path.suffix not in ARRAYS)
    while chunk := list(itertools.islice(files, CHUNK)):
        dataset, found = fitted(chunk, spec)
        errors += found
        if dataset is not None:
            good = [str(path) for path, error in zip(chunk, found) if error is None]
            yield good, dataset


def _texts(
    paths: Sequence[pathlib.Path],
    spec: DataSpec,
    encoder: Any,
    errors: list[UserError | None],
) -> Iterator[tuple[list[str], Dataset]]:
    """Yields names and texts file by file; adds an entry a file to errors."""
    assert spec.text is not None
    options = spec.text.options
    for path in paths:
        (found, error), *_ = attempts(
            lambda p: _told(p, options, spec, encoder), [path]
        )
        errors.append(error)
        if error is None:
            rows, dataset = found
            yield [f"{path}#{line}" for line in rows.lines], dataset


def _told(
    path: pathlib.Path, options: TextOptions, spec: DataSpec, encoder: Any
) -> tuple[Rows, Dataset]:
    rows = read_texts(path, options)
    return rows, text_examples(rows, spec, encoder)


def _tables(
    paths: Sequence[pathlib.Path],
    config: Config,
    workdir: pathlib.Path,
    errors: list[UserError | None],
) -> Iterator[tuple[list[str], Dataset]]:
    """Yields names and rows block by block; adds an entry a file to errors."""
    fitted, kind = read_fitted(workdir, "--workdir"), format_of(config.data.name)
    assert kind is not None
    spec = run_spec(config, workdir)
    for path in paths:
        blocks, row = rows_to_predict(path, kind, fitted), 0
        while True:
            (block, error), *_ = attempts(lambda found: next(found, None), [blocks])
            if error is not None or block is None:
                break
            names = [f"{path}#{row + at + 1}" for at in range(len(block))]
            row += len(block)
            label = np.zeros(len(block), np.int32)
            source = Source(
                name=str(path),
                splits={"all": ArrayExamples(values=block, label=label)},
                class_names=(),
                fingerprint=str,
            )
            yield names, dataset_of(source, spec, np.arange(len(block)), label)
        errors.append(error)
