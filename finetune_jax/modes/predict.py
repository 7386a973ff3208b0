"""`--mode=predict`: what the best checkpoint of a run says of new files, as JSONL.

Where predictions are masks, a folder beside it has them as PNG files.
"""

import itertools
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune_jax.config import Config
from finetune_jax.core.errors import UserError, problems_error
from finetune_jax.core.paths import printable, user_path
from finetune_jax.data.dataset import Dataset, dataset_of
from finetune_jax.data.files import Unused, files_below
from finetune_jax.data.images.decoding import oriented_size
from finetune_jax.data.images.depth import depth_warnings
from finetune_jax.data.images.image_formats import why_no_image
from finetune_jax.data.images.mask_files import unfitted, write_mask
from finetune_jax.data.source import ArrayExamples, Source
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.tables.encoding import read_fitted
from finetune_jax.data.tables.source import format_of, rows_to_predict
from finetune_jax.data.tables.unknown import Unknown
from finetune_jax.data.text.files import inputs_of, read_texts
from finetune_jax.data.text.token_counts import counts_for
from finetune_jax.data.text.tokens import Rows, TextOptions
from finetune_jax.data.threads import attempts, check_readable
from finetune_jax.inference.predictor import (
    ARRAYS,
    examples,
    fitted,
    open_predictor,
    read_array,
    run_spec,
    takes_files,
    text_examples,
)
from finetune_jax.modes.options import Options

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
    paths, told = find_inputs(options.inputs, _kind(config, spec))
    output = _output(options.output or workdir / "predictions.jsonl")
    for line in told:
        print(printable(line))
    predictor = open_predictor(config, workdir)
    print(f"checkpoint of step {predictor.step}")
    is_of_files = spec.text is None and spec.table is None
    if is_of_files and not any(map(_is_array, paths)):
        predictor = predictor.with_batch_size(len(paths))
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
            of_size = predictor
            if spec.text is not None:  # A program is compiled for each batch size.
                of_size = predictor.with_batch_size(
                    2 ** (len(dataset) - 1).bit_length()
                )
            for name, record in zip(names, of_size.records(dataset), strict=True):
                if "mask" in record:
                    record["mask"] = masks.write(record["mask"], name)
                file.write(json.dumps({"file": name, **record}) + "\n")
                written += 1
    part.replace(output)
    print(f"{written:,} predictions in {printable(output)}")
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
        if path.is_file():
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


def _output(given: str | pathlib.Path) -> pathlib.Path:
    """Returns where predictions go.

    Raises:
        UserError: No file can be written there.
    """
    path = user_path(given, "--output").resolve()
    if not path.parent.is_dir():
        raise UserError(f"--output: no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        raise UserError(f"--output: {str(given)!r} is not a plain file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: {str(path.parent)!r} cannot be written to")
    return path


class Kind(NamedTuple):
    """Files that a model takes.

    Attributes:
        name: Name of such files, in the plural.
        why_not: Returns why a file is not one of them; None if it is.
        why_not_named: The same of a file that `--inputs` names itself.
        advice: End of the message about files that are not.
    """

    name: str
    why_not: Callable[[pathlib.Path], str | None]
    why_not_named: Callable[[pathlib.Path], str | None]
    advice: str


def find_inputs(
    inputs: Sequence[str], kind: Kind
) -> tuple[list[pathlib.Path], list[str]]:
    """Returns the files that `--inputs` names, and lines about those not used.

    Args:
        inputs: Files and folders; of a folder, all files of the kind below it are used.
        kind: Files that the model takes.

    Raises:
        UserError: Lists what is not there, folders without such files, and files that the
            model does not take.
    """
    if not inputs:
        raise UserError("--mode=predict needs --inputs, files or folders")
    found: list[pathlib.Path] = []
    lines, missing, refused = [], [], []
    for text in inputs:
        path = user_path(text, "--inputs")
        if text and path.is_dir():
            inside, told = _inside(path, text, kind)
            found += inside
            lines += told
            if not inside:
                missing += [f"--inputs: no {kind.name} in {text!r}", *told]
        elif text and path.is_file():
            if reason := kind.why_not_named(path):
                refused.append(f"{path}: {reason}")
            found.append(path)
        else:
            missing.append(f"--inputs: no file or folder {text!r}")
    if missing:
        raise problems_error("What is to be predicted is not there:", missing)
    if refused:
        raise problems_error(
            "--inputs: files that this model does not take:", refused, kind.advice
        )
    if kind.why_not is why_no_image:
        images = [path for path in found if not _is_array(path)]
        lines += [f"warning: {line}" for line in depth_warnings("--inputs", images)]
    return found, lines


def _inside(
    folder: pathlib.Path, text: str, kind: Kind
) -> tuple[list[pathlib.Path], list[str]]:
    """Returns the files of a kind below a folder, and lines about all others."""
    problems: list[str] = []
    unused, inside = Unused(), []
    for path in files_below(folder, problems, unused):
        if reason := kind.why_not(path):
            unused.add(path, reason)
        else:
            inside.append(path)
    return inside, [*unused.lines(text), *problems]


def _kind(config: Config, spec: DataSpec) -> Kind:
    """Returns the kind of files that a run predicts."""
    if spec.table is not None:
        table = format_of(config.data.name)
        assert table is not None
        return _kind_of_suffixes(table.suffixes, "tables of this kind")
    if spec.text is not None:
        return _kind_of_suffixes(inputs_of(spec.text.options), "texts")
    inputs = f"its inputs are {spec.dtype} {spec.shape}."
    if not takes_files(spec):
        return _kind_of_suffixes(ARRAYS, "arrays", inputs)
    return Kind(
        name="images",
        why_not=why_no_image,
        why_not_named=lambda path: None if _is_array(path) else why_no_image(path),
        advice=f"It takes images, {' and '.join(ARRAYS)}; {inputs}",
    )


def _kind_of_suffixes(suffixes: Collection[str], what: str, more: str = "") -> Kind:
    listed = ", ".join(suffix or "without suffix" for suffix in suffixes)

    def why_not(path: pathlib.Path) -> str | None:
        return None if path.suffix.lower() in suffixes else f"no {what}"

    advice = f"It takes {listed}{f'; {more}' if more else '.'}"
    return Kind(f"files {listed}", why_not, why_not, advice)


def _is_array(path: pathlib.Path) -> bool:
    return path.suffix.lower() in ARRAYS


def _datasets(
    paths: Sequence[pathlib.Path], spec: DataSpec, errors: list[UserError | None]
) -> Iterator[tuple[list[str], Dataset]]:
    """Yields names and examples, some files at a time; adds an entry a file to errors."""
    for path in filter(_is_array, paths):
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always", UserWarning)
            (array, error), *_ = attempts(lambda p: read_array(p, spec), [path])
        for doubt in doubts:
            print(f"warning: {printable(str(doubt.message))}")
        errors.append(error)
        if error is None:
            names = [f"{path}#{row}" for row in range(len(array))]
            yield names, examples(array, spec)
    files = itertools.filterfalse(_is_array, paths)
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
    counts = counts_for(encoder, options.max_tokens)
    dataset = text_examples(rows, spec, encoder, counts)
    for line in counts.lines():
        print(f"warning: {printable(f'{path}: {line}')}")
    return rows, dataset


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
        unknown = Unknown(spec=fitted.spec)
        while True:
            (block, error), *_ = attempts(lambda found: next(found, None), [blocks])
            if error is not None or block is None:
                break
            names = [f"{path}#{row + at + 1}" for at in range(len(block))]
            row += len(block)
            unknown.add(block)
            label = np.zeros(len(block), np.int32)
            source = Source(
                name=str(path),
                splits={"all": ArrayExamples(values=block, label=label)},
                class_names=(),
                fingerprint=str,
            )
            yield names, dataset_of(source, spec, np.arange(len(block)), label)
        for line in unknown.lines(path):
            print(f"warning: {printable(line)}")
        errors.append(error)
