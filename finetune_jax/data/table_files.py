"""The files of a table: their columns, and their rows, a block after the other.

Files are read by pyarrow, in all threads, and never as a whole. A number that is missing
is NaN, a category that is missing has no value.
"""

import collections
import concurrent.futures
import csv
import io
import itertools
import os
import pathlib
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from finetune_jax.data.table_faults import faults
from finetune_jax.data.tables import Format, Schema, TableOptions
from finetune_jax.errors import UserError, problems_error
from finetune_jax.lookup import closest

# Bytes from which columns are inferred, and of a block, which fits into a cache.
LOOKED_AT, BLOCK = 2**20, 2**21
# At most; a few blocks of each are in memory.
THREADS = 8
# Numbers such as 00123 are names.
_LEADING_ZERO = r"^[+-]?0\d"


def columns_of(path: pathlib.Path, kind: Format, header: Sequence[str]) -> list[str]:
    """Returns the names of the columns of a file.

    Raises:
        UserError: It is empty, no such file, or has a name twice.
    """
    if kind.delimiter is None:
        return list(_parquet(path).schema_arrow.names)
    if header:
        return list(header)
    with path.open("rb") as file:
        line = file.readline()
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line 1: not UTF-8; convert the file") from error
    names = next(_reader(io.StringIO(text), kind), [])
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        wrong = f"columns twice: {', '.join(twice)}" if twice else "empty"
        raise UserError(
            f"{path}: {wrong}; config.data.header names the columns of files that do "
            "not begin with them"
        )
    return names


def _reader(file: Any, kind: Format) -> Any:
    quoting = csv.QUOTE_MINIMAL if kind.quotes else csv.QUOTE_NONE
    return csv.reader(file, delimiter=kind.delimiter or ",", quoting=quoting)  # type: ignore


def infer_schema(
    paths: Sequence[pathlib.Path], kind: Format, options: TableOptions
) -> Schema:
    """Returns the columns of files that belong together.

    A column is a number where all that was looked at is, in all files, and none begins
    with a zero as names do.

    Raises:
        UserError: Lists columns in which the files differ, a label that is not there, and
            rules that match no column.
    """
    named = {path: columns_of(path, kind, options.header) for path in paths}
    first, problems = named[paths[0]], []
    for path in paths[1:]:
        for name in sorted(set(first) ^ set(named[path])):
            has, lacks = (paths[0], path) if name in first else (path, paths[0])
            problems.append(f"{lacks}: no column {name!r}, which {has} has")
    if options.label not in first:
        problems.append(
            f"config.data.label: no column {options.label!r}"
            f"{closest(options.label, first)} There are: {', '.join(first)}."
        )
    for key, patterns in (
        ("columns", [pattern for pattern, _ in options.columns]),
        ("log_columns", options.log_columns),
    ):
        problems += [
            f"config.data.{key}: {pattern!r} matches no column{closest(pattern, first)}"
            for pattern in patterns
            if not any(re.fullmatch(pattern, name) for name in first)
        ]
    if problems:
        advice = ""
        if kind.delimiter is not None and not kind.header:
            advice = (
                "config.data.header names the columns of files that do not begin with "
                "them; if these are texts, name their columns in config.data.text."
            )
        raise problems_error("The columns do not fit:", problems, advice)
    given = {name: _given_kind(name, kind, options) for name in first}
    unknown = [n for n in first if given[n] is None and n != options.label]
    for path in paths if unknown else ():
        for name in _not_numbers(path, kind, options, unknown):
            given[name] = "category"
    kinds = {n: given[n] or "number" for n in first if n != options.label}
    return Schema(
        names=tuple(options.header),
        numbers=tuple(n for n in kinds if kinds[n] == "number"),
        categories=tuple(n for n in kinds if kinds[n] == "category"),
        label=options.label,
        labels=options.labels,
    )


def _given_kind(name: str, kind: Format, options: TableOptions) -> str | None:
    for pattern, wanted in options.columns:
        if re.fullmatch(pattern, name):
            return wanted
    return kind.kinds.get(name)


def _not_numbers(
    path: pathlib.Path, kind: Format, options: TableOptions, names: Sequence[str]
) -> list[str]:
    """Returns the columns of which the beginning of a file has what is no number."""
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # Its functions are made when it is imported.
    if kind.delimiter is None:
        schema = _parquet(path).schema_arrow
        is_number = [pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal]
        return [
            n for n in names if not any(is_(schema.field(n).type) for is_ in is_number)
        ]
    schema = Schema(
        names=tuple(options.header),
        numbers=(),
        categories=tuple(names),
        label=None,
        labels="classes",
    )
    found = []
    table = next(iter(batches(path, kind, schema, block=LOOKED_AT)), None)
    for name in names if table is not None else ():
        values = table.column(name).dictionary  # type: ignore[union-attr]
        try:
            pc.cast(values, pa.float64())
            if pc.any(pc.match_substring_regex(values, _LEADING_ZERO)).as_py():
                found.append(name)
        except pa.ArrowInvalid:
            found.append(name)
    return found


def batches(
    path: pathlib.Path, kind: Format, schema: Schema, *, block: int = BLOCK
) -> Generator[Any]:
    """Yields the rows of a file as pyarrow's RecordBatches of the schema's columns.

    Numbers are float32, all others dictionaries of strings.

    Args:
        path: Of the file.
        kind: How it is written.
        schema: Its columns.
        block: Bytes that are read at once.

    Raises:
        UserError: Lists lines that have not as many values as columns, are no UTF-8, or
            no numbers where numbers belong.
    """
    import pyarrow as pa

    read = _parquet_batches if kind.delimiter is None else _separated_batches
    try:
        yield from read(path, kind, schema, block)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise problems_error(
            f"{path} cannot be read:",
            _found_faults(path, kind, schema)
            # The rows that it counts are those of a block.
            or [re.sub(r"Row #\d+: ", "", str(error))],
            "Mend these lines; a column of names is one by config.data.columns="
            "(('NAME', 'category'),), and config.data.header names the columns of files "
            "that do not begin with them.",
        ) from error


def _found_faults(path: pathlib.Path, kind: Format, schema: Schema) -> list[str]:
    if kind.delimiter is None:
        return []
    names = schema.names or columns_of(path, kind, ())
    numbers = [name for name, is_number in schema.is_number.items() if is_number]
    begin = 0 if schema.names else 1
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return faults(_reader(file, kind), names, numbers, kind.missing, begin)


def _separated_batches(
    path: pathlib.Path, kind: Format, schema: Schema, block: int
) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    text = pa.dictionary(pa.int32(), pa.string())
    names = schema.names or columns_of(path, kind, ())
    kinds = {n: pa.float32() if is_ else text for n, is_ in schema.is_number.items()}
    parse = arrow_csv.ParseOptions(
        delimiter=kind.delimiter or ",",
        quote_char='"' if kind.quotes else False,
        newlines_in_values=kind.quotes,
    )
    convert = arrow_csv.ConvertOptions(
        column_types=kinds,
        include_columns=list(kinds),
        null_values=list(kind.missing),
        strings_can_be_null=True,
    )
    first = arrow_csv.ReadOptions(
        column_names=list(names),
        skip_rows=0 if schema.names else 1,
        block_size=block,
        use_threads=kind.quotes,  # Else the blocks are parsed at the same time.
    )
    if kind.quotes:  # Where a line ends is known from all that is before it.
        with arrow_csv.open_csv(path, first, parse, convert) as reader:
            yield from (batch for batch in reader if batch.num_rows)
        return
    other = arrow_csv.ReadOptions(
        column_names=list(names), block_size=block, use_threads=False
    )

    def parsed(content: memoryview, options: Any) -> list:
        file = pa.BufferReader(pa.py_buffer(content))
        return arrow_csv.read_csv(file, options, parse, convert).to_batches()

    count, coming = min(len(os.sched_getaffinity(0)), THREADS), collections.deque()
    threads = concurrent.futures.ThreadPoolExecutor(count)
    try:
        with pa.input_stream(path) as file:
            for content, options in zip(
                _blocks(file, block), itertools.chain([first], itertools.repeat(other))
            ):
                coming.append(threads.submit(parsed, content, options))
                if len(coming) > 2 * count:
                    yield from coming.popleft().result()
        while coming:
            yield from coming.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _blocks(file: Any, size: int) -> Iterator[memoryview]:
    """Yields what a file without quotes holds, cut where lines end.

    All but the first begin with the end of the line before, which means nothing there,
    so that no text of theirs is taken for the mark that a file may begin with.

    Args:
        file: Whose `read` gives bytes.
        size: Of the blocks, at most; an empty file has one, which is empty.

    Raises:
        ArrowInvalid: A line is longer.
    """
    import pyarrow as pa

    rest = b""
    while more := file.read(size - len(rest)):
        content = rest + more
        end = max(content.rfind(b"\n"), content.rfind(b"\r"))
        if end < 1:
            if len(content) == size:
                raise pa.ArrowInvalid(f"a line is longer than {size:,} bytes")
            rest = content
            continue
        yield memoryview(content)[: end + 1]
        rest = content[end:]
    yield memoryview(rest)


def _parquet(path: pathlib.Path) -> Any:
    """Returns a Parquet file.

    Raises:
        UserError: It is none.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from error


def _parquet_batches(
    path: pathlib.Path, kind: Format, schema: Schema, block: int
) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # Its functions are made when it is imported.
    del kind
    wanted = schema.is_number
    rows = max(block // (16 * max(len(wanted), 1)), 1024)
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=rows, columns=list(wanted)):
            arrays = [
                pc.cast(batch.column(name), pa.float32(), safe=False)
                if is_number
                else pc.dictionary_encode(pc.cast(batch.column(name), pa.string()))
                for name, is_number in wanted.items()
            ]
            yield pa.record_batch(arrays, names=list(wanted))
