"""Tables as memory-mapped columns: converted once, cached by the file's content.

A row has its numbers, float64, NaN where they are missing, and a code for each category,
int32, -1 where it is missing. The values of the codes lie beside them, in Arrow's own
format; the label too has a code, or the bits of a float32.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.array_store import ABOUT, discard, sha256_of, write_table
from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.machine import cache_folder
from finetune_jax.core.paths import user_path
from finetune_jax.data.labels import class_name, spelling_of
from finetune_jax.data.reading.arrow import pa
from finetune_jax.data.tables.files import batches
from finetune_jax.data.tables.schema import Format, Schema

# Blocks whose values are given codes at once, while the next are read.
GROUP = 32
# Version of the format; to be raised when it changes.
VERSION = 3
MISSING = -1
# Numbers, codes of categories, labels, and the values of codes.
FILES = ("0.bin", "1.bin", "2.bin", "3.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """One file's rows.

    Attributes:
        path: The file.
        numbers: float64 [N, F], mapped; see above.
        codes: int32 [N, C], mapped.
        label: int32 [N]: a code, or the bits of a number; zeros where there is none.
        values: Values of the codes of each category, and of the label: Arrow's
            arrays of strings.
        sha256: Digest of the file.
    """

    path: pathlib.Path
    numbers: np.ndarray
    codes: np.ndarray
    label: np.ndarray
    values: Mapping[str, Any]
    sha256: str

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.label)


def open_columns(
    path: pathlib.Path, kind: Format, schema: Schema, cache_dir: str | None
) -> Columns:
    """Returns a file's columns, converted if they were not before.

    Args:
        path: The file.
        kind: How it is written.
        schema: Columns of the file.
        cache_dir: `config.data.cache_dir`.

    Raises:
        UserError: The file cannot be read or changes meanwhile, or its columns cannot be
            kept.
    """
    folder = (
        user_path(cache_dir, "config.data.cache_dir") if cache_dir else cache_folder()
    ) / "columns"
    before = _state(path)
    stopped, beside = threading.Event(), concurrent.futures.ThreadPoolExecutor(1)
    with beside, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(stopped.set)
        digest = beside.submit(_digest, path, stopped)

        def named() -> tuple[pathlib.Path, dict[str, Any]]:
            about = {
                "version": VERSION,
                "file": digest.result(),
                "schema": dataclasses.asdict(schema),
                "format": [kind.delimiter, kind.quotes, list(kind.missing)],
            }
            if _state(path) != before:
                raise UserError(f"{path}: changed while it was read; run again")
            key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
            return folder / key[:32], {**about, "of": str(path), "bytes": before[0]}

        found = None
        if _may_be_there(folder, before[0]):
            found = _found(path, named()[0], schema, digest.result(), verify=True)
        if found is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # Before it is known where to, as that takes reading the file once.
                with contextlib.closing(_converted(path, kind, schema)) as rows:
                    place, is_ours = write_table(folder, len(FILES), rows, named)
            except OSError as error:
                raise UserError(
                    f"config.data.cache_dir: the columns of {path} cannot be kept in "
                    f"{folder}: {error}"
                ) from error
            # Columns that were just written are not digested again.
            found = _found(path, place, schema, digest.result(), verify=not is_ours)
            if found is None:
                raise UserError(f"{place}: the columns written there cannot be read")
    if not len(found):
        raise UserError(f"{path}: no rows")
    return found


def _state(path: pathlib.Path) -> tuple[int, ...]:
    """Returns a file's size, and what else is another once the file is changed."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino


def _digest(path: pathlib.Path, stopped: threading.Event) -> str:
    """Returns a file's sha256; nobody waits for it once it shall stop.

    Raises:
        UserError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while not stopped.is_set() and (part := file.read(2**20)):
                digest.update(part)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def _may_be_there(folder: pathlib.Path, size: int) -> bool:
    """Returns whether a file of so many bytes may have been converted before."""

    def fits(about: pathlib.Path) -> bool:
        try:
            return json.loads(about.read_text())["bytes"] == size
        except Exception:  # Whatever the damage leads to, or there is no size.
            return True

    return any(fits(about) for about in folder.glob(f"*/{ABOUT}"))


def _found(
    path: pathlib.Path,
    place: pathlib.Path,
    schema: Schema,
    sha256: str,
    *,
    verify: bool,
) -> Columns | None:
    """Returns columns that are there and whole; others are taken away.

    Args:
        path: The file.
        place: Place of its columns.
        schema: Schema of the file.
        sha256: Digest of the file.
        verify: Whether their digests are looked at.
    """
    try:
        wanted = json.loads((place / ABOUT).read_text())["sha256"]
        files = [_mapped(place / name) for name in FILES]
        if verify and [sha256_of(file) for file in files] != wanted:
            raise ValueError("changed since it was written")
        label = files[2].view(np.int32)
        rows = len(label)
        return Columns(
            path=path,
            numbers=files[0].view(np.float64).reshape(rows, len(schema.numbers)),
            codes=files[1].view(np.int32).reshape(rows, len(schema.categories)),
            label=label,
            values=from_bytes(files[3]),
            sha256=sha256,
        )
    except FileNotFoundError:
        pass
    except Exception:  # Whatever the damage leads to.
        discard(place)
    return None


def _mapped(file: pathlib.Path) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, np.uint8)
    return np.memmap(file, np.uint8, mode="r")


def _converted(
    path: pathlib.Path, kind: Format, schema: Schema
) -> Generator[list[np.ndarray]]:
    """Yields numbers, codes, labels and, at the end, the values of codes, as written.

    Raises:
        UserError: The file cannot be read; or names numbers that are infinite, and rows
            without a label or with one that may not be.
    """
    label, nothing = schema.label, np.zeros(0, np.uint8)
    coded = [name for name, is_number in schema.is_number.items() if not is_number]
    values: dict[str, Any] = {}
    row, problems = 0, []
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for group in _groups(path, kind, schema):

            def recoded(name: str, group: list = group) -> list[np.ndarray]:
                columns = [batch.column(name) for batch in group]
                codes, values[name] = _coded(columns, values.get(name))
                return codes

            codes = dict(zip(coded, threads.map(recoded, coded)))
            first, labels = row, [np.zeros(0, np.int32)]
            # The rows of a block are written while they are in a cache.
            for at, batch in enumerate(group):
                own = {name: found[at] for name, found in codes.items()}
                numbers, places = cells_of(batch, schema, own)
                labels.append(np.zeros(len(numbers), np.int32))
                if label is not None:
                    labels[-1] = own[label] if label in own else _bits(batch[label])
                problems += infinite(numbers, schema, row)
                row += len(numbers)
                yield [numbers, places, labels[-1], nothing]
            whole = np.concatenate(labels)
            problems += _label_problems(whole, schema, values, kind, first)
            if len(problems) > 20:
                break
    more = ["and perhaps more"] if len(problems) > 20 else []
    raise_if(problems[:20] + more, f"{path} cannot be used:")
    # In an order of which threads decide nothing.
    values = {name: values[name] for name in coded if name in values}
    yield [nothing, nothing, nothing, to_bytes(values)]


def _groups(path: pathlib.Path, kind: Format, schema: Schema) -> Iterator[list]:
    """Yields some blocks of a file after the other; the next are read meanwhile."""
    blocks = batches(path, kind, schema)

    def some() -> list:
        return list(itertools.islice(blocks, GROUP))

    reading = concurrent.futures.ThreadPoolExecutor(1)
    with contextlib.closing(blocks), reading:
        coming = reading.submit(some)
        while group := coming.result():
            coming = reading.submit(some)
            yield group


def cells_of(
    batch: Any, schema: Schema, codes: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of a batch, float64 [n, F], and its codes, int32 [n, C].

    Args:
        batch: Batch of rows.
        schema: The columns.
        codes: Codes of the categories.
    """
    numbers = np.empty((batch.num_rows, len(schema.numbers)), np.float64)
    places = np.empty((batch.num_rows, len(schema.categories)), np.int32)
    for place, name in enumerate(schema.numbers):
        numbers[:, place] = _numbers(batch.column(name))
    for place, name in enumerate(schema.categories):
        places[:, place] = codes[name]
    return numbers, places


def _numbers(column: Any) -> np.ndarray:
    """Returns numbers, NaN for missing ones, float64 [n]."""
    return column.to_numpy(zero_copy_only=False)


def _bits(column: Any) -> np.ndarray:
    """Returns the bits of numbers as float32, int32 [n]."""
    with np.errstate(over="ignore"):  # Infinities are refused later.
        return _numbers(column).astype(np.float32).view(np.int32)


def codes_of(column: Any) -> np.ndarray:
    """Returns the codes of a dictionary-encoded column, int32 [n]."""
    return column.indices.fill_null(MISSING).to_numpy(zero_copy_only=False)


def _coded(columns: Sequence[Any], known: Any) -> tuple[list[np.ndarray], Any]:
    """Returns the codes of stretches of a column, and the values of the codes.

    Args:
        columns: Dictionary-encoded, one stretch after the other.
        known: Values of the codes so far; new values follow. None is no value.
    """
    if known is None:
        known = columns[0].dictionary
    # Known values come first and keep their codes.
    nothing = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), known)
    both = pa.chunked_array([nothing, *columns]).unify_dictionaries()
    codes = [codes_of(chunk) for chunk in both.chunks[1:]]
    return codes, both.chunk(0).dictionary


def infinite(numbers: np.ndarray, schema: Schema, row: int) -> list[str]:
    """Returns the numbers that are infinite, or would be as float32.

    Args:
        numbers: Numbers of some rows, float64 [n, F].
        schema: The columns.
        row: Number of rows before them.
    """
    infinite = np.abs(numbers) > np.finfo(np.float32).max
    return [
        f"row {row + at + 1}: {schema.numbers[place]!r} is infinite, or too large"
        for at, place in np.argwhere(infinite)[:20]
    ]


def _label_problems(
    labels: np.ndarray,
    schema: Schema,
    values: Mapping[str, Any],
    kind: Format,
    row: int,
) -> list[str]:
    """Returns the rows without a label, or with one that may not be."""
    name = schema.label
    if name is None:
        return []
    if schema.labels == "numbers":
        wrong = ~np.isfinite(labels.view(np.float32))
        return [
            f"row {row + at + 1}: {name!r} is no number that is finite"
            for at in np.flatnonzero(wrong)[:20]
        ]
    text = [str(value) for value in values[name].to_pylist()]
    names = [spelling_of(value) and class_name(value) for value in text]
    allowed = [n is not None and n in (kind.classes or (n,)) for n in names]
    wrong = ~np.array([*allowed, False])[labels]  # -1 is the last.
    return [
        f"row {row + at + 1}: {name!r} is "
        + (
            f"{text[labels[at]]!r}; one of {', '.join(kind.classes)} is needed"
            if labels[at] >= 0 and names[labels[at]] is not None
            else "missing"
        )
        for at in np.flatnonzero(wrong)[:20]
    ]


def to_bytes(values: Mapping[str, Any]) -> np.ndarray:
    """Returns arrays of strings as a file of Arrow's has them, uint8."""
    lists = {
        name: pa.LargeListArray.from_arrays([0, len(array)], array)
        for name, array in values.items()
    }
    sink = pa.BufferOutputStream()
    table = pa.table(lists)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return np.frombuffer(sink.getvalue(), np.uint8)


def from_bytes(content: np.ndarray | bytes) -> dict[str, Any]:
    """Returns the arrays of strings that `to_bytes` wrote."""
    table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
    return {
        name: table.column(name).chunk(0).flatten() if table.num_rows else pa.array([])
        for name in table.column_names
    }
