"""Text files as tables: found by split, decoded, and cut into rows."""

import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_jax.core import registry
from finetune_jax.core.errors import DataMissing, UserError, first_of, raise_if
from finetune_jax.core.text_lines import decoded, lines_of
from finetune_jax.data import sources
from finetune_jax.data.reading.files import (
    SPLITS,
    FileNotes,
    data_place,
    not_used,
    visible,
)
from finetune_jax.data.reading.separated import (
    begin_of,
    first_cells,
    head_of,
    rows_of,
    without_sign,
)
from finetune_jax.data.source import Source
from finetune_jax.data.text.source import check_texts, text_source
from finetune_jax.data.text.tokens import Rows, TextOptions, TextSpec

# Sources by the suffix of files of texts to predict; '.txt' has a text a line.
INPUTS = {".txt": None, ".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}
# Questions have passages, so that they take several columns.
QUESTIONS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "squad"}
Reader = Callable[[pathlib.Path, Sequence[str]], Rows]


def load_texts(
    name: str, directory: str | None, options: TextOptions, tokenizer: str | None
) -> tuple[Source, TextSpec]:
    """Returns the source of texts that `config.data` describes.

    Args:
        name: `config.data.name`.
        directory: `config.data.dir`.
        options: Options of the texts.
        tokenizer: Text of a tokenizer.json.

    Raises:
        UserError: No such source, or its data cannot be read or used.
    """
    module, _, argument = name.partition(":")
    found = registry.module(sources, module, "config.data.name")
    if hasattr(found, "READ"):
        rows = read_splits(directory, found.SUFFIX, options.header, found.READ)
    else:
        rows = found.load_rows(directory, argument or None, options.header)
    title = f"{name} {directory or ''}".strip()
    source, spec = text_source(title, rows, options, tokenizer)
    if hasattr(found, "READ"):
        used = {pathlib.Path(part.where) for part in rows.values()}
        source = dataclasses.replace(source, not_used=not_used(directory, used))
    return source, spec


def read_splits(
    directory: str | None, suffix: str, header: Sequence[str], read: Reader
) -> dict[str, Rows]:
    """Returns the rows by split of the folder or file `config.data.dir`.

    A file alone is the split 'all', to be cut.

    Args:
        directory: The folder, or the file.
        suffix: Suffix of the files.
        header: Names of the columns; empty where files begin with them.
        read: Reads one file.

    Raises:
        UserError: No such files; or lists all that cannot be read.
    """
    needed = f"the folder of the {suffix} files is needed"
    place = data_place(directory, needed, "file or folder")
    if place.is_file():
        return {"all": read(place, header)}
    notes = FileNotes()
    problems = notes.problems
    files = [
        path
        for path in visible(place, notes)
        if path.is_file() and path.suffix.lower() == suffix
    ]
    found: dict[str, Rows] = {}
    for path in files:
        split = SPLITS.get(re.sub(r"-v[\d.]+$", "", path.stem.lower()))
        if split is None and len(files) == 1:
            split = "all"
        if split is None or split in found:
            names = ", ".join(f"{name}{suffix}" for name in SPLITS)
            problems.append(
                f"{path}: {'a split of its own is needed' if split is None else split}"
                f"; the files of splits are called {names}, one for each"
            )
            continue
        try:
            found[split] = read(path, header)
        except UserError as error:
            problems.append(str(error))
    if not files:
        raise DataMissing(f"config.data.dir: no {suffix} files in {directory!r}")
    if found and not problems and not {"train", "all"} & set(found):
        problems.append(f"{place}: no train{suffix}")
    raise_if(problems, f"config.data.dir: {directory} cannot be used:")
    return found


def read_separated(
    path: pathlib.Path, header: Sequence[str], *, delimiter: str, quotes: bool
) -> Rows:
    """Returns the rows of a file of separated values.

    Raises:
        UserError: Not UTF-8, a name twice, or lists the rows that have not as many values
            as columns.
    """
    text = io.StringIO(decoded(path), newline="")
    head = head_of(path, header, delimiter=delimiter, quotes=quotes)
    columns, cells, lines, problems = list(head.names), [], [], []
    try:
        for line, values in rows_of(text, head, quotes):
            if len(values) != len(columns):
                problems.append(
                    f"{path}, line {line}: {len(values)} values, but there are "
                    f"{len(columns)} columns ({', '.join(columns[:20])})"
                )
            else:
                cells.append(dict(zip(columns, values)))
                lines.append(line)
    except UserError as error:
        problems.append(f"{path}, {error}")
    if problems:
        advice = "config.data.header names the columns of files without such a line."
        raise UserError("\n  ".join([*first_of(problems), advice]))
    return Rows(
        where=str(path),
        columns=columns,
        cells=cells,
        lines=lines,
        warnings=tuple(head.warnings(path)),
    )


def read_json_lines(path: pathlib.Path, header: Sequence[str]) -> Rows:
    """Returns the rows of a file that has a JSON object a line.

    Raises:
        UserError: Not UTF-8, or lists the lines that hold something else.
    """
    if header:
        raise UserError(
            "config.data.header: lines of JSON name their values themselves"
        )
    cells: list[Mapping[str, Any]] = []
    lines, problems = [], []
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}, line {number}: not JSON: {error}")
            continue
        if not isinstance(value, dict):
            problems.append(f"{path}, line {number}: not an object: {line[:40]!r}")
            continue
        cells.append(value)
        lines.append(number)
    if problems:
        raise UserError("\n  ".join(first_of(problems)))
    columns = list(dict.fromkeys(name for row in cells for name in row))
    return Rows(where=str(path), columns=columns, cells=cells, lines=lines)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: A name is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names twice: {', '.join(map(repr, twice))}")
    return found


def inputs_of(options: TextOptions) -> dict[str, str | None]:
    """Returns suffixes of files whose texts can be predicted, and how they are read."""
    return {**(QUESTIONS if options.labels == "answers" else INPUTS)}


def read_texts(path: pathlib.Path, options: TextOptions) -> Rows:
    """Returns the rows of a file, which have texts and need no labels.

    Args:
        path: The file; its suffix, one of `inputs_of`, says how it is read.
        options: Options of the training data; a file of separated values may have
            all its columns, or those of the texts alone.

    Raises:
        UserError: The file cannot be read; or lists missing columns and empty texts.
    """
    kind = inputs_of(options)[path.suffix.lower()]
    if kind is None:
        lines = lines_of(decoded(path), path)
        column = options.text[0]
        rows = Rows(
            where=str(path),
            columns=(column,),
            cells=[{column: line} for line in lines],
            lines=range(1, len(lines) + 1),
        )
    else:
        read = registry.module(sources, kind, "--inputs").READ
        header = options.header if kind in ("tsv", "csv") else ()
        if header and _has_texts_alone(path, kind, options):
            header = options.text
        rows = read(path, header)
    check_texts(rows, options)
    return rows


def _has_texts_alone(path: pathlib.Path, kind: str, options: TextOptions) -> bool:
    """Returns whether a file without names has the columns of texts alone."""
    delimiter, quotes = {"tsv": "\t", "csv": ","}[kind], kind == "csv"
    begin, _ = without_sign(begin_of(path))
    cells, _ = first_cells(begin, delimiter, quotes)
    if len(cells) != len(options.text):
        return False
    # A text may have semicolons, but not as many in all lines.
    head = head_of(path, options.header, delimiter=delimiter, quotes=quotes)
    lines = [line for line in begin.split("\n")[:-1] or [begin] if line.strip()]
    return head.delimiter == delimiter or not all(
        len(first_cells(line, head.delimiter, quotes)[0]) == len(options.header)
        for line in lines
    )
