"""Statistics and known values of the columns of a table, from its training rows."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, raise_if
from finetune_jax.core.paths import user_path
from finetune_jax.data.reading.arrow import pa, pc
from finetune_jax.data.tables import doubts
from finetune_jax.data.tables.columns import Columns
from finetune_jax.data.tables.encoding import Fitted, digest_of, logarithm, read_fitted
from finetune_jax.data.tables.schema import (
    ROWS_BEFORE,
    Category,
    Number,
    Schema,
    TableOptions,
    TableSpec,
)

# Rows that are read at once.
CHUNK = 2**17


def fit(
    columns: Sequence[Columns],
    train: np.ndarray,
    schema: Schema,
    options: TableOptions,
) -> tuple[Fitted, list[str]]:
    """Returns the statistics and known values of columns, and warnings.

    Args:
        columns: Columns of all files.
        train: The training rows, indices in the concatenation of all rows.
        schema: The columns.
        options: Options of the data; they may name a run whose statistics and known
            values are continued.

    Raises:
        UserError: A column is another in that run, or it cannot be read.
    """
    former, where = None, "config.data.fitted"
    if options.fitted is not None:
        former = read_fitted(user_path(options.fitted, where), where)
    ordered = np.sort(train)

    def is_told(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern, _ in options.columns)

    numbers, odd = _numbers(columns, ordered, schema, options, is_told)
    counts = code_counts(columns, ordered, schema)
    categories, known, rare = _categories(
        columns, counts, len(train), schema, options, is_told
    )
    warnings = [*doubts.form_doubts(schema, is_told), *odd, *rare]
    if former is not None:
        numbers, known = _continued(numbers, known, former, options)
    rows = {name: len(values) + ROWS_BEFORE for name, values in known.items()}
    categories = tuple(
        dataclasses.replace(one, rows=rows.get(one.name, one.rows))
        for one in categories
    )
    spec = TableSpec(
        schema=schema, numbers=numbers, categories=categories, digest=digest_of(known)
    )
    return Fitted(spec=spec, known=known), warnings


def _parts(
    columns: Sequence[Columns], ordered: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the file and the rows in it of some rows after the other."""
    begin = 0
    for at, one in enumerate(columns):
        first, last = np.searchsorted(ordered, [begin, begin + len(one)])
        for start in range(first, last, CHUNK):
            yield at, ordered[start : min(start + CHUNK, last)] - begin
        begin += len(one)


def _numbers(
    columns: Sequence[Columns],
    ordered: np.ndarray,
    schema: Schema,
    options: TableOptions,
    is_told: Callable[[str], bool],
) -> tuple[tuple[Number, ...], list[str]]:
    """Returns the statistics of the numbers, and warnings."""
    names = schema.numbers
    logs = [
        any(re.fullmatch(pattern, name) for pattern in options.log_columns)
        for name in names
    ]
    count, mean, square = (np.zeros(len(names)) for _ in range(3))
    least, most = (np.full(len(names), sign * np.inf) for sign in (1, -1))
    for at, rows in _parts(columns, ordered) if names else ():
        values = columns[at].numbers[rows]
        least = np.fmin(least, np.fmin.reduce(values, axis=0))
        most = np.fmax(most, np.fmax.reduce(values, axis=0))
        values[:, logs] = logarithm(values[:, logs])
        is_there = ~np.isnan(values)
        found = is_there.sum(axis=0)
        own = np.where(is_there, values, 0).sum(axis=0) / np.maximum(found, 1)
        spread = (np.where(is_there, values - own, 0) ** 2).sum(axis=0)
        # Statistics of two parts become one: Chan et al. 1979.
        total, shift = np.maximum(count + found, 1), own - mean
        mean = mean + np.where(found > 0, shift * found / total, 0)
        square = (
            square + spread + np.where(found > 0, shift**2 * count * found / total, 0)
        )
        count = count + found
    std = np.sqrt(square / np.maximum(count, 1))
    is_constant = least >= most  # The deviation may be off by rounding.
    missing = 1 - count / len(ordered)
    numbers = tuple(
        Number(
            name=name,
            log=logs[at],
            mean=float(mean[at]),
            std=1.0 if is_constant[at] else float(std[at]),
            missing=float(missing[at]),
        )
        for at, name in enumerate(names)
    )
    warnings = []
    for at, name in enumerate(names):
        largest = max(abs(least[at]), abs(most[at]))
        # Beyond, different numbers may have become one.
        is_exact = is_told(name) or not count[at] or largest <= doubts.EXACT
        if is_constant[at] and is_exact and (not count[at] or not missing[at]):
            why = "has one value" if count[at] else "has no value"
            warnings.append(doubts.says_nothing(name, why))
        elif not is_told(name):
            files = [one.numbers[:CHUNK, at] for one in columns]
            warnings.append(doubts.number_doubt(name, files, largest))
    return numbers, [text for text in warnings if text]


def code_counts(
    columns: Sequence[Columns], ordered: np.ndarray, schema: Schema
) -> list[list[np.ndarray]]:
    """Returns how often each code of each category occurs, by file; -1 comes first.

    Args:
        columns: Columns of all files.
        ordered: Rows to count, ascending indices in the concatenation of all rows.
        schema: The columns.
    """
    found = [
        [np.zeros(len(one.values[name]) + 1, np.int64) for name in schema.categories]
        for one in columns
    ]
    for at, rows in _parts(columns, ordered) if schema.categories else ():
        codes = columns[at].codes[rows]
        for place, counts in enumerate(found[at]):
            counts += np.bincount(codes[:, place] + 1, minlength=len(counts))
    return found


def _categories(
    columns: Sequence[Columns],
    counts: Sequence[Sequence[np.ndarray]],
    train: int,
    schema: Schema,
    options: TableOptions,
    is_told: Callable[[str], bool],
) -> tuple[tuple[Category, ...], dict[str, Any], list[str]]:
    """Returns the categories, their known values, and warnings."""
    categories, known, warnings = [], {}, []
    fields = _fields(schema.categories)
    for place, name in enumerate(schema.categories):
        # Each value with its count, of all files.
        table = pa.table(
            {
                "value": pa.concat_arrays(
                    [pc.cast(one.values[name], pa.large_string()) for one in columns]
                ),
                "count": np.concatenate([own[place][1:] for own in counts]),
            }
        )
        if len(columns) > 1:
            table = table.group_by("value", use_threads=False).aggregate(
                [("count", "sum")]
            )
            table = table.rename_columns(["value", "count"])
        occurs = table.column("count").to_numpy()
        values = table.column("value").combine_chunks()
        is_known = occurs >= options.min_count
        missing = sum(int(own[place][0]) for own in counts)
        if options.hash_rows is None:
            known[name] = values.filter(pa.array(is_known))
        categories.append(
            Category(
                name=name,
                field=fields[place],
                rows=ROWS_BEFORE + (options.hash_rows or int(is_known.sum())),
                hashed=options.hash_rows is not None,
                missing=missing / train,
                unseen=0.0
                if options.hash_rows
                else float(occurs[~is_known].sum() / train),
            )
        )
        is_there = occurs > 0
        if is_there.sum() + (missing > 0) <= 1:
            why = "has one value" if is_there.any() else "has no value"
            warnings.append(doubts.says_nothing(name, why))
        else:
            there, told = values.filter(pa.array(is_there)), is_told(name)
            files = {one.path: one.values[name] for one in columns}
            doubt = doubts.category_doubt(
                name, there, occurs[is_there], train, files, is_told=told
            )
            warnings.append(doubts.fraction_doubt(name, there))
            warnings += [doubt, None if told else doubts.line_break_doubt(name, there)]
    return tuple(categories), known, [text for text in warnings if text]


def _fields(names: Sequence[str]) -> list[str]:
    """Returns names of parameters for columns.

    Raises:
        UserError: Two would have the same.
    """
    fields = [re.sub(r"[/\s]+", "_", name) or "unnamed" for name in names]
    twice = [name for name, field in zip(names, fields) if fields.count(field) > 1]
    if twice:
        raise UserError(
            f"The columns {', '.join(map(repr, twice))} differ in '/' and blanks only, "
            "which parameters cannot have in their names; rename them"
        )
    return fields


def _continued(
    numbers: tuple[Number, ...],
    known: Mapping[str, Any],
    former: Fitted,
    options: TableOptions,
) -> tuple[tuple[Number, ...], dict[str, Any]]:
    """Returns the statistics of a former run, and its known values before new ones.

    Raises:
        UserError: A column is another there.
    """
    theirs = {one.name: one for one in former.spec.numbers}
    coded = {one.name: one for one in former.spec.categories}
    problems = [
        f"{one.name!r} is a number here, a category there"
        for one in numbers
        if one.name in coded
    ]
    problems += [
        f"{name!r} is a category here, a number there"
        for name in known
        if name in theirs
    ]
    problems += [
        f"{name!r} is {'hashed' if one.hashed else 'not hashed'} there, unlike here"
        for name, one in coded.items()
        if one.hashed != (options.hash_rows is not None)
        or (one.hashed and one.rows != ROWS_BEFORE + (options.hash_rows or 0))
    ]
    raise_if(problems, f"config.data.fitted: {options.fitted} does not fit:")
    joined = dict(known)
    for name in known:
        if name in former.known:
            before = pc.cast(former.known[name], pa.large_string())
            is_new = pc.invert(pc.is_in(known[name], value_set=before))
            joined[name] = pa.concat_arrays([before, known[name].filter(is_new)])
    return tuple(theirs.get(one.name, one) for one in numbers), joined
