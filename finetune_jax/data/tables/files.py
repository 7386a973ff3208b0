"""The files of a table: their columns, and their rows, a block after the other.

Files are read by pyarrow, in all threads, and never as a whole. A number that is missing
is null or NaN, a category that is missing is null.
"""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import os
import pathlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.registry import closest
from finetune_jax.data.reading.arrow import pa, pc
from finetune_jax.data.reading.separated import (
    Head,
    begin_of,
    first_cells,
    head_of,
    rows_of,
    without_sign,
)
from finetune_jax.data.tables import number_forms
from finetune_jax.data.tables.faults import faults
from finetune_jax.data.tables.number_forms import PLAIN, Form
from finetune_jax.data.tables.schema import (
    VERSION,
    Format,
    Schema,
    TableOptions,
    signs_of,
)

# Bytes from which columns are inferred, and of a block, which fits into a cache.
LOOKED_AT, BLOCK = 2**20, 2**21
# At most; a few blocks of each are in memory.
THREADS = 8
# Numbers such as 00123 are names.
_LEADING_ZERO = r"^[+-]?0\d"


def columns_of(path: pathlib.Path, kind: Format, header: Sequence[str]) -> list[str]:
    """Returns the names of the columns of a file.

    Raises:
        UserError: The file is empty, cannot be read, or has a name twice.
    """
    if kind.delimiter is not None:
        return list(table_head(path, kind, header).names)
    names = list(_parquet(path).schema_arrow.names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{path}: columns twice: {', '.join(map(repr, twice))}; each column needs a "
            "name of its own"
        )
    return names


def table_head(path: pathlib.Path, kind: Format, header: Sequence[str]) -> Head:
    """Returns the beginning of a file of separated values.

    Raises:
        UserError: The file is empty, not UTF-8, or has a name twice.
    """
    assert kind.delimiter is not None
    return head_of(path, header, delimiter=kind.delimiter, quotes=kind.quotes)


def cells_in(path: pathlib.Path, kind: Format, header: Sequence[str]) -> int:
    """Returns the number of cells in the first line of a file without names."""
    delimiter = table_head(path, kind, header).delimiter
    begin, _ = without_sign(begin_of(path))
    return len(first_cells(begin, delimiter, kind.quotes)[0])


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
            f"{closest(options.label, first) or '.'} There are: {', '.join(first)}."
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
    advice = ""
    if kind.delimiter is not None and not kind.header:
        advice = (
            "config.data.header names the columns of files that do not begin with "
            "them; if these are texts, name their columns in config.data.text."
        )
    raise_if(problems, "The columns do not fit:", advice)
    kinds = {name: given_kind(name, kind, options) for name in first}
    kinds.pop(options.label)
    forms = _forms(paths, kind, options, kinds)
    kinds = {n: k or ("number" if n in forms else "category") for n, k in kinds.items()}
    return Schema(
        names=tuple(options.header),
        numbers=tuple(n for n in kinds if kinds[n] == "number"),
        categories=tuple(n for n in kinds if kinds[n] == "category"),
        label=options.label,
        labels=options.labels,
        forms=number_forms.as_entries(forms),
        missing=tuple(options.missing),
        version=VERSION,
    )


def given_kind(name: str, kind: Format, options: TableOptions) -> str | None:
    """Returns the kind that the config or the format gives a column; None infers it."""
    for pattern, wanted in options.columns:
        if re.fullmatch(pattern, name):
            return wanted
    return kind.kinds.get(name)


def _forms(
    paths: Sequence[pathlib.Path],
    kind: Format,
    options: TableOptions,
    kinds: Mapping[str, str | None],
) -> dict[str, Form]:
    """Returns how the columns are written that are numbers, by the beginning of files.

    Args:
        paths: The files.
        kind: How they are written.
        options: Options of the data.
        kinds: Kinds of the columns but the label; None infers one.
    """
    told = {name for name, given in kinds.items() if given == "number"}
    if options.labels == "numbers":
        told.add(options.label)
    told -= kind.kinds.keys()  # Their form is known.
    wanted = [n for n in kinds if kinds[n] is None]
    wanted += [n for n in kinds if n in told] + [n for n in told if n not in kinds]
    cells: dict[str, list] = {name: [] for name in wanted}
    others, commas = set(), False
    for path in paths if wanted else ():
        if kind.delimiter is not None:
            commas |= table_head(path, kind, options.header).delimiter == ";"
        own, no_text = _first_cells(path, kind, options, wanted)
        others |= no_text
        for name, values in own.items():
            cells[name].append(values)
    signs = (*kind.missing, *options.missing)
    found = {}
    for name in wanted:
        form = _form_of(cells[name], signs, told=name in told, commas=commas)
        if name not in others and (form is not None or name in told):
            found[name] = form or PLAIN
    return found


def _form_of(
    parts: Sequence[Any], signs: Sequence[str], *, told: bool, commas: bool
) -> Form | None:
    """Returns how the cells of a column are written; None if they are no numbers."""
    if not parts:
        return PLAIN
    values = pc.unique(pa.chunked_array(parts, pa.string()))
    try:
        number_forms.parsed(values, PLAIN, signs)
        if commas and pc.any(pc.match_substring_regex(values, "[.][0-9]{3}")).as_py():
            raise pa.ArrowInvalid("points may be between thousands")
        usual = pc.utf8_trim_whitespace(values)
        names = pc.any(pc.match_substring_regex(usual, _LEADING_ZERO)).as_py()
        return None if names and not told else PLAIN
    except pa.ArrowInvalid:
        pass
    texts = [
        text
        for text in values.to_pylist()
        if text is not None and not number_forms.is_missing(text, signs)
    ]
    return number_forms.form_of(texts, told=told, commas=commas)


def _first_cells(
    path: pathlib.Path, kind: Format, options: TableOptions, names: Sequence[str]
) -> tuple[dict[str, Any], set[str]]:
    """Returns different texts of columns in the beginning of a file, Arrow's strings.

    Also the names of columns that are neither texts nor numbers, such as dates; numbers
    of Parquet have no texts.
    """
    if kind.delimiter is None:
        schema = _parquet(path).schema_arrow
        is_number = [pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal]
        types = {name: schema.field(name).type for name in names}
        numbers = {n for n in names if any(is_(types[n]) for is_ in is_number)}
        names = [n for n in names if n not in numbers and _is_text(types[n])]
        others = types.keys() - numbers - set(names)
    else:
        others = set()
    if not names:
        return {}, others
    schema = Schema(
        names=tuple(options.header),
        numbers=(),
        categories=tuple(names),
        label=None,
        labels="classes",
        version=VERSION,
    )
    with contextlib.closing(batches(path, kind, schema, block=LOOKED_AT)) as blocks:
        table = next(blocks, None)
    if table is None:
        return {}, others
    return {name: table.column(name).dictionary for name in names}, others


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def batches(
    path: pathlib.Path, kind: Format, schema: Schema, *, block: int = BLOCK
) -> Generator[Any]:
    """Yields the rows of a file as pyarrow's RecordBatches of the schema's columns.

    Numbers are float64, all others dictionaries of strings.

    Args:
        path: The file.
        kind: How it is written.
        schema: Columns of the file.
        block: Bytes that are read at once.

    Raises:
        UserError: Lists lines that have not as many values as columns, are no UTF-8, or
            no numbers where numbers belong.
    """
    if kind.delimiter is None:
        found = _parquet_batches(path, schema, block)
    else:
        found = _separated_texts(path, kind, schema, block)
    try:
        for batch in found:
            yield _read_batch(batch, kind, schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise UserError(
            *_found_faults(path, kind, schema)
            # The rows that it counts are those of a block.
            or [re.sub(r"Row #\d+: ", "", str(error))],
            header=f"{path} cannot be read:",
            advice="Mend these lines. A column of names is one by config.data.columns="
            "(('NAME', 'category'),); config.data.missing=('unknown',) lists signs of "
            "cells without a value; config.data.header names the columns of files that do "
            "not begin with them.",
        ) from error


def _found_faults(path: pathlib.Path, kind: Format, schema: Schema) -> list[str]:
    if kind.delimiter is None:
        return []
    head, signs = table_head(path, kind, schema.names), signs_of(kind, schema)
    with pa.input_stream(str(path)) as stream:
        file = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        rows = rows_of(file, head, kind.quotes)
        return faults(rows, _names(head.names, schema), _forms_in(schema), signs)


def _forms_in(schema: Schema) -> dict[str, Form]:
    """Returns the form of each column of numbers."""
    forms = number_forms.from_entries(schema.forms)
    return {n: forms.get(n, PLAIN) for n, is_ in schema.is_number.items() if is_}


def _names(found: Sequence[str], schema: Schema) -> list[str]:
    """Returns a file's names of columns as a schema has them, perhaps with blanks."""
    known = {name.strip(): name for name in schema.is_number}
    return [known.get(name, name) for name in found]


def _read_batch(batch: Any, kind: Format, schema: Schema) -> Any:
    """Returns a batch whose numbers and categories are read from texts.

    Raises:
        ArrowInvalid: A cell of a column of numbers is none.
    """
    forms, signs, arrays = _forms_in(schema), signs_of(kind, schema), []
    for name in schema.is_number:
        column = batch.column(name)
        if name in forms and pa.types.is_string(column.type):
            column = number_forms.parsed(column, forms[name], signs)
        elif name not in forms and name not in kind.kinds and schema.version > 1:
            column = _trimmed(column, signs)
        if name in forms:
            column = number_forms.without(column, schema.missing)
        arrays.append(column)
    return pa.record_batch(arrays, names=list(schema.is_number))


def _trimmed(column: Any, signs: Sequence[str]) -> Any:
    """Returns a dictionary-encoded column without blanks around its values."""
    values = pc.utf8_trim_whitespace(column.dictionary)
    is_missing = pc.is_in(values, value_set=pa.array(signs, values.type))
    if not pc.any(is_missing).as_py() and values.equals(column.dictionary):
        return column
    values = pc.if_else(is_missing, pa.scalar(None, values.type), values)
    own = pc.dictionary_encode(values)
    codes = pc.take(own.indices, column.indices)
    return pa.DictionaryArray.from_arrays(codes, own.dictionary)


def _separated_texts(
    path: pathlib.Path, kind: Format, schema: Schema, block: int
) -> Iterator[Any]:
    """Yields the rows of a file; numbers of no known form are texts still."""
    from pyarrow import csv as arrow_csv

    text = pa.dictionary(pa.int32(), pa.string())
    head = table_head(path, kind, schema.names)
    names = _names(head.names, schema)
    kinds = {
        name: (pa.float64() if name in kind.kinds else pa.string())
        if is_number
        else text
        for name, is_number in schema.is_number.items()
    }
    parse = arrow_csv.ParseOptions(
        delimiter=head.delimiter,
        quote_char='"' if kind.quotes else False,
        newlines_in_values=kind.quotes,
    )
    convert = arrow_csv.ConvertOptions(
        column_types=kinds,
        include_columns=list(kinds),
        null_values=list(signs_of(kind, schema)),
        strings_can_be_null=True,
    )
    first = arrow_csv.ReadOptions(
        column_names=names,
        skip_rows=head.lines,
        block_size=block,
        use_threads=kind.quotes,  # Else the blocks are parsed at the same time.
    )
    if kind.quotes:  # Where a line ends is known from all that is before it.
        with arrow_csv.open_csv(path, first, parse, convert) as reader:
            yield from (batch for batch in reader if batch.num_rows)
        return
    other = arrow_csv.ReadOptions(
        column_names=names, block_size=block, use_threads=False
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
    """Yields the content of a file without quotes in blocks of whole lines.

    All but the first begin with the end of the line before, which means nothing there,
    so that no text of theirs is taken for the mark that a file may begin with.

    Args:
        file: Whose `read` gives bytes.
        size: Most bytes of a block; an empty file has one empty block.

    Raises:
        ArrowInvalid: A line is longer.
    """
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
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from error


def _parquet_batches(path: pathlib.Path, schema: Schema, block: int) -> Iterator[Any]:
    """Yields the rows of a file; numbers that are written as texts are texts still."""
    wanted, kinds = schema.is_number, _parquet(path).schema_arrow
    rows = max(block // (16 * max(len(wanted), 1)), 1024)

    def read(name: str, column: Any) -> Any:
        if not wanted[name]:
            return pc.dictionary_encode(pc.cast(column, pa.string()))
        if _is_text(kinds.field(name).type):
            return pc.cast(column, pa.string())
        if pa.types.is_temporal(column.type):
            is_short = column.type.bit_width == 32
            column = pc.cast(column, pa.int32() if is_short else pa.int64())
        return pc.cast(column, pa.float64(), safe=False)

    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=rows, columns=list(wanted)):
            arrays = [read(name, batch.column(name)) for name in wanted]
            yield pa.record_batch(arrays, names=list(wanted))
