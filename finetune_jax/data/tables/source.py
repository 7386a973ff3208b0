"""From files of a table to a source of rows as a model takes them."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import (
    DataMissing,
    Problem,
    UserError,
    collected,
    raise_if,
)
from finetune_jax.data import sources
from finetune_jax.data.kind import Opened, Prepared
from finetune_jax.data.labels import MANY_CLASSES, classes_of
from finetune_jax.data.reading.files import (
    SPLITS,
    FileNotes,
    data_place,
    not_used,
    visible,
)
from finetune_jax.data.rounding import may_lose, rounding_doubt
from finetune_jax.data.source import ArrayExamples, Source
from finetune_jax.data.tables.columns import (
    Columns,
    cells_of,
    codes_of,
    infinite,
    open_columns,
)
from finetune_jax.data.tables.doubts import sign_doubts
from finetune_jax.data.tables.encoding import Encoded, Fitted
from finetune_jax.data.tables.files import (
    batches,
    cells_in,
    columns_of,
    infer_schema,
    table_head,
)
from finetune_jax.data.tables.schema import Format, Schema, TableOptions
from finetune_jax.data.tables.statistics import fit
from finetune_jax.data.tables.unknown import held_out_unknown


def format_of(name: str) -> Format:
    """Returns how the files of a source of tables are written.

    Args:
        name: `config.data.name`.
    """
    module = registry.module(sources, name.partition(":")[0], "config.data.name")
    return module.TABLE


def load_table(
    name: str,
    directory: str | None,
    kind: Format,
    options: TableOptions,
    cache_dir: str | None,
    saved: Fitted | None = None,
) -> Opened:
    """Returns the table that `config.data` describes; its inputs are not encoded yet.

    Args:
        name: `config.data.name`.
        directory: `config.data.dir`: a file, or a folder with one for each split.
        kind: How they are written.
        options: Options of the data.
        cache_dir: `config.data.cache_dir`.
        saved: Statistics of a run, whose columns are read as before; None infers them.

    Raises:
        UserError: No such files, columns that do not fit, rows that cannot be read, all
            at once.
    """
    files = _files(name, directory, kind)
    if saved is None:
        schema = infer_schema(list(files.values()), kind, options)
    else:
        schema = saved.spec.schema
        absent = [
            f"{path}: {text}"
            for path in files.values()
            for text in _absent(path, kind, schema.names, schema.is_number)
        ]
        raise_if(absent, "The columns are not those of the run:")
    if not schema.inputs:
        raise UserError(
            f"{directory}: no columns but the label; nothing to predict from"
        )
    splits, problems = {}, list[Problem]()
    for split, path in files.items():
        with collected(problems):
            splits[split] = open_columns(path, kind, schema, cache_dir)
    raise_if(problems)
    source = _labelled(f"{name} {directory}", splits, schema)
    warnings: list[str] = []
    for path in files.values() if kind.delimiter is not None else ():
        warnings += table_head(path, kind, schema.names).warnings(path)
    warnings += _label_doubts(splits, kind, schema)
    warnings += sign_doubts(list(files.values()), kind, schema)
    source = dataclasses.replace(
        source,
        warnings=(*source.warnings, *warnings),
        not_used=not_used(directory, set(files.values())),
    )

    def prepare(train: np.ndarray) -> Prepared:
        fitted, doubts = saved, list[str]()
        if fitted is None:
            fitted, doubts = fit(list(splits.values()), train, schema, options)
        return _prepared(source, splits, train, fitted, doubts)

    return Opened(kind="tables", source=source, prepare=prepare)


def _prepared(
    source: Source,
    columns: Mapping[str, Columns],
    train: np.ndarray,
    fitted: Fitted,
    doubts: Sequence[str],
) -> Prepared:
    """Returns the encoded rows.

    Args:
        source: Source of the labels.
        columns: Columns by split.
        train: The training rows, indices in the concatenation of the splits.
        fitted: Statistics and vocabularies.
        doubts: Warnings about them.
    """
    splits = {}
    for split, one in columns.items():
        rows: Any = Encoded(columns=one, encoder=fitted.encoder(one.values))
        splits[split] = ArrayExamples(values=rows, label=source.splits[split].label)
    unknown = held_out_unknown(list(columns.values()), train, fitted)
    spec = json.dumps(fitted.spec.to_json(), sort_keys=True)
    content = f"{source.fingerprint()} {spec}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    shape = (fitted.spec.width,)
    return Prepared(
        source=dataclasses.replace(source, splits=splits, fingerprint=lambda: digest),
        shape=shape,
        train_shape=shape,
        inputs=fitted.spec,
        fitted=fitted,
        warnings=(*doubts, *unknown),
    )


def _label_doubts(
    splits: Mapping[str, Columns], kind: Format, schema: Schema
) -> list[str]:
    """Returns that labels are numbers that float32 does not tell apart.

    The files are read once more if that is possible, as float64.
    """
    label = schema.label
    if schema.labels != "numbers" or label is None:
        return []
    rounded = [one.label.view(np.float32) for one in splits.values()]
    if not may_lose(np.concatenate(rounded)):
        return []
    alone = dataclasses.replace(schema, numbers=(), categories=())
    labels = [
        batch.column(label).to_numpy(zero_copy_only=False)
        for one in splits.values()
        for batch in batches(one.path, kind, alone)
    ]
    doubt = rounding_doubt(np.concatenate(labels), f"config.data.label: {label!r}")
    return [doubt] if doubt else []


def _absent(
    path: pathlib.Path, kind: Format, header: Sequence[str], wanted: Iterable[str]
) -> list[str]:
    """Returns a line for each of some columns that a file does not have."""
    there = [name.strip() for name in columns_of(path, kind, header)]
    return [
        f"no column {name!r}{registry.closest(name, there)}"
        for name in wanted
        if name.strip() not in there
    ]


def _files(name: str, directory: str | None, kind: Format) -> dict[str, pathlib.Path]:
    """Returns the files by split, 'train' first; a file alone is 'all'.

    Raises:
        UserError: There are none, or two of the same split.
    """
    needed = f"the file or folder of {name!r} is needed"
    place = data_place(directory, needed, "file or folder")
    if place.is_file():
        return {"all": place}
    found, notes = dict[str, pathlib.Path](), FileNotes()
    for path in visible(place, notes):
        if not path.is_file() or path.suffix.lower() not in kind.suffixes:
            continue
        split = SPLITS.get(path.stem.lower(), path.stem)
        if split in found:
            notes.problems.append(
                f"{path}: the split {split!r} is {found[split].name} already"
            )
        elif any(sign in split for sign in "[]+: "):
            notes.problems.append(
                f"{path}: a split cannot have '[', ']', '+', ':' or a blank"
            )
        found[split] = path
    if not found:
        suffixes = " or ".join(suffix or "without one" for suffix in kind.suffixes)
        raise DataMissing(f"config.data.dir: no files {suffixes} in {directory!r}")
    raise_if(notes.problems, f"config.data.dir: {directory} cannot be used:")
    return dict(sorted(found.items(), key=lambda item: item[0] != "train"))


def _labelled(name: str, splits: Mapping[str, Columns], schema: Schema) -> Source:
    """Returns the source of the labels.

    Raises:
        UserError: They are a single class, or nearly every row has a class of its own.
    """
    assert schema.label is not None
    classes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    content = " ".join(f"{s}={columns.sha256}" for s, columns in splits.items())
    if schema.labels == "numbers":
        labels = {
            split: columns.label.view(np.float32).reshape(-1, 1)
            for split, columns in splits.items()
        }
    else:
        text = {
            split: [str(value) for value in columns.values[schema.label].to_pylist()]
            for split, columns in splits.items()
        }
        counts: collections.Counter[str] = collections.Counter()
        for split, values in text.items():
            times = np.bincount(splits[split].label, minlength=len(values))
            counts.update(dict(zip(values, times.tolist())))
        rows = sum(map(len, splits.values()))
        if len(counts) > max(MANY_CLASSES, rows // 2):
            raise UserError(
                f"config.data.label: {schema.label!r} has {len(counts):,} different "
                f"values in {rows:,} rows; if it is a number, "
                "config.data.labels='numbers' says so"
            )
        found = classes_of(counts, f"config.data.label: {schema.label!r}")
        raise_if(found.problems, f"The data {name} cannot be used:")
        classes, warnings = found.names, found.warnings
        labels = {
            split: found.of(values)[splits[split].label]
            for split, values in text.items()
        }
    return Source(
        name=name,
        splits={
            split: ArrayExamples(values=columns.codes, label=labels[split])
            for split, columns in splits.items()
        },
        class_names=classes,
        targets=(schema.label,) if schema.labels == "numbers" else (),
        warnings=warnings,
        fingerprint=lambda: content,
    )


def rows_to_predict(
    path: pathlib.Path, kind: Format, fitted: Fitted
) -> Iterator[np.ndarray]:
    """Yields rows as a model takes them, of a file with or without labels, by blocks.

    Args:
        path: The file.
        kind: How it is written.
        fitted: Statistics and vocabularies of the run.

    Raises:
        UserError: Lists columns that are missing, and rows that cannot be read or have
            numbers that are infinite or too large.
    """
    schema = dataclasses.replace(fitted.spec.schema, label=None)
    header = schema.names
    if header and kind.delimiter is not None:
        own = fitted.spec.schema.label
        others = tuple(name for name in header if name != own)
        if cells_in(path, kind, header) == len(others):
            header, schema = others, dataclasses.replace(schema, names=others)
    raise_if(_absent(path, kind, header, schema.inputs), f"{path} cannot be predicted:")
    row = 0
    for batch in batches(path, kind, schema):
        columns = {name: batch.column(name) for name in schema.categories}
        codes = {name: codes_of(column) for name, column in columns.items()}
        encoder = fitted.encoder({n: c.dictionary for n, c in columns.items()})
        numbers, places = cells_of(batch, schema, codes)
        problems = infinite(numbers, schema, row)
        with np.errstate(over="ignore"):  # Refused below.
            encoded = encoder(numbers, places)
        problems = problems or _overflown(encoded, schema, row)
        raise_if(problems, f"{path} cannot be predicted:")
        row += len(encoded)
        yield encoded


def _overflown(encoded: np.ndarray, schema: Schema, row: int) -> list[str]:
    """Returns the numbers of rows that are not finite once they are standardised."""
    numbers = encoded[:, : len(schema.numbers)].view(np.float32)
    return [
        f"row {row + at + 1}: {schema.numbers[place]!r} is too large beside the numbers "
        "of the training rows"
        for at, place in np.argwhere(~np.isfinite(numbers))[:20]
    ]
