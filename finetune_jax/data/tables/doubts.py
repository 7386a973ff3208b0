"""Doubts about columns of a table and signs of missing values, each with advice."""

import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.data.reading.arrow import pa, pc
from finetune_jax.data.tables.encoding import WITH_FRACTION
from finetune_jax.data.tables.files import batches
from finetune_jax.data.tables.number_forms import (
    PLAIN,
    Form,
    form_of,
    from_entries,
    is_any_number,
    numbers_of,
    parsed,
)
from finetune_jax.data.tables.schema import Format, Schema, rule, signs_of

# Values of a category that are looked at.
LOOKED_AT = 2000
# From so many rows on, whole numbers without gaps count them.
_FEWEST_ROWS = 10
# float64 has all whole numbers up to here.
EXACT = 2.0**53
_DAY = r"(\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_NAMED = rf"(\d{{1,2}}[ .-]+{_MONTH}[ ,-]*\d{{2,4}}|{_MONTH} \d{{1,2}},? \d{{4}})"
_TIME = r"\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?( ?[ap]m)?( ?(z|utc|[+-]\d{2}:?\d{2}))?"
_DATE = re.compile(rf"({_DAY}|{_NAMED})([ t,]+{_TIME})?|{_TIME}", re.IGNORECASE)
_IDENTIFIER = re.compile(
    r"(.*[_\W])?(id|idx|index|key|row|number|no|nr)", re.IGNORECASE
)
_NAME = re.compile(r"[+-]?0\d")
_UNNAMED = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


def form_doubts(schema: Schema, is_told: Callable[[str], bool]) -> list[str]:
    """Returns the columns that are read as numbers without signs around them.

    Args:
        schema: The columns.
        is_told: Whether the config gives a column its kind.
    """
    found = []
    for name, form in from_entries(schema.forms).items():
        said = f"column {name!r} is read as numbers {form}"
        if name == schema.label:
            found.append(f"{said}; if that is wrong, write plain numbers in the file")
        elif not is_told(name):
            found.append(
                f"{said}; {rule(name, 'category')} takes its values for names, and "
                f"{rule(name, 'number')} says that they are numbers"
            )
    return found


def number_doubt(name: str, files: Sequence[np.ndarray], largest: float) -> str | None:
    """Returns why a column of numbers may say nothing or something else.

    Args:
        name: Name of the column.
        files: First numbers of the column in each file.
        largest: Largest absolute number of the training rows.
    """
    out = f"{rule(name, 'ignore')} leaves it out"
    kept = f"{rule(name, 'number')} keeps it without a warning"
    if sum(map(len, files)) >= _FEWEST_ROWS and all(map(_has_no_gaps, files)):
        return f"column {name!r} counts the rows; {out}, and {kept}"
    if _UNNAMED.fullmatch(name):
        return f"column {name!r} has no name and may be an index; {out}, and {kept}"
    if _IDENTIFIER.fullmatch(name) and all(map(_is_distinct, files)):
        return (
            f"column {name!r} has another whole number in every row and may be an "
            f"identifier; {out}, and {kept}"
        )
    if all(map(_are_days, files)):
        return (
            f"column {name!r} seems to have dates such as {files[0][0]:.0f}, whose "
            f"differences are no numbers of days; write days in the file, or {out}, and "
            f"{kept}"
        )
    if largest > EXACT:
        return (
            f"column {name!r} has numbers beyond 2**53, whose last digits are lost; if "
            f"they are identifiers, {out}, or {rule(name, 'category')} has a row for each"
        )
    return None


def _has_no_gaps(numbers: np.ndarray) -> bool:
    """Returns whether numbers are whole, and have each between two limits once."""
    return bool((np.diff(np.sort(numbers)) == 1).all() and (numbers % 1 == 0).all())


def _is_distinct(numbers: np.ndarray) -> bool:
    whole = (numbers % 1 == 0).all()
    return bool(whole and len(np.unique(numbers)) == len(numbers) >= _FEWEST_ROWS)


def _are_days(numbers: np.ndarray) -> bool:
    """Returns whether numbers such as 20240131 are days of a calendar."""
    month, day = numbers // 100 % 100, numbers % 100
    is_day = (numbers % 1 == 0) & (numbers > 19000100) & (numbers < 21001232)
    is_day &= (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    return bool(
        (is_day | np.isnan(numbers)).all() and is_day[:1].all() and len(numbers)
    )


def category_doubt(
    name: str,
    values: Any,
    counts: np.ndarray,
    rows: int,
    files: Mapping[pathlib.Path, Any],
    *,
    is_told: bool = False,
) -> str | None:
    """Returns why a column of categories may be something else.

    Args:
        name: Name of the column.
        values: Different values of the training rows, Arrow's array of strings.
        counts: Number of rows that have each.
        rows: Number of training rows.
        files: All values by file, Arrow's arrays of strings.
        is_told: Whether the config says that it is a category.
    """
    order = np.argsort(-counts, kind="stable")[:LOOKED_AT]
    looked = values.take(order).to_pylist()
    is_number = np.array([is_any_number(value) for value in looked])
    most = len(values) > max(rows // 2, 20)
    number = rule(name, "number")
    many = f"{len(values):,} different values in {rows:,} training rows"
    is_plain = form_of(looked) == PLAIN
    # Numbers with zeros before them are names.
    is_other = is_plain and not is_told and not any(map(_NAME.match, looked))
    others = _others(files) if is_other else ""
    if most and is_plain and not others:
        return (
            f"column {name!r} is a category of {many}, all of them numbers; if it measures "
            f"something, {number} says so"
        )
    if is_told:
        return None
    out = f"{rule(name, 'ignore')} leaves it out"
    kept = f"{rule(name, 'category')} keeps it without a warning"
    if all(map(_DATE.fullmatch, looked)):
        return (
            f"column {name!r} has dates or times such as {looked[0]!r}, taken for "
            "categories, of which others in new rows are unknown; write numbers, such as "
            f"seconds since 1970 or the month, in the file, or {out}; {kept}"
        )
    if others:
        return (
            f"column {name!r} is a category, though its training rows are plain numbers, "
            f"as others are not: {others}; if it measures something, write them alike, or "
            f"{number} says so; {kept}"
        )
    if doubt := _number_doubt(name, looked, counts[order], is_number):
        return f"{doubt}; {kept}"
    if most and counts[counts <= 1].sum() > rows / 2:
        return (
            f"column {name!r} is a category of {many}, so that nearly all are too rare to "
            f"be learned; {out}, or {number} if it measures something; {kept}"
        )
    return None


def _number_doubt(
    name: str,
    looked: Sequence[str],
    counts: np.ndarray,
    is_number: np.ndarray,
) -> str | None:
    """Returns that categories could be numbers, all or most of them."""
    # Numbers with zeros before them are names.
    if any(map(_NAME.match, looked)):
        return None
    number = rule(name, "number")
    told = form_of(looked, told=True)
    # Values that begin with letters are rather names, such as 'person5'.
    if told is not None and not any(map(str.isalpha, told.before)):
        return (
            f"column {name!r} is a category, but could be {f'numbers {told}'.strip()}: if "
            f"it measures something, {number} says so"
        )
    if is_number.all():
        return (
            f"column {name!r} is a category of numbers that are not written alike, such as "
            f"{looked[0]!r}; if it measures something, write them alike"
        )
    share = counts[is_number].sum() / max(counts.sum(), 1)
    if share < 0.5 or is_number.sum() < 3:
        return None
    others = [value for value, is_ in zip(looked, is_number) if not is_][:3]
    return (
        f"column {name!r} is a category, but {share:.0%} of its values are numbers; others "
        f"are {', '.join(map(repr, others))}. If it measures something, write these as "
        f"numbers, or say by config.data.missing={tuple(others)!r} that such cells have no "
        f"value; {number} says that all others are numbers"
    )


def _others(files: Mapping[pathlib.Path, Any]) -> str:
    """Returns a description of numbers that are not plain."""
    found = []
    for path, values in files.items():
        texts = values.to_pylist()
        others = (v for v in texts if not PLAIN.fits(v) or _NAME.match(v))
        found += [f"{path} has {one[:40]!r}" for one in itertools.islice(others, 1)]
    return ", ".join(found)


def line_break_doubt(name: str, values: Any) -> str | None:
    """Returns that cells have several lines, as a quotation mark too many makes."""
    found = values.filter(pc.match_substring_regex(values, "[\r\n]"))
    if not len(found):
        return None
    return (
        f"column {name!r} has {len(found):,} values of several lines, such as "
        f"{found[0].as_py()[:40]!r}; look whether a quotation mark in the file has no other"
    )


def fraction_doubt(name: str, values: Any) -> str | None:
    """Returns that whole numbers are there with a fraction and without."""
    found = values.filter(pc.match_substring_regex(values, WITH_FRACTION))
    if not len(found):
        return None
    plain = pc.replace_substring_regex(found, "[.]0*$", "")
    plain = plain.filter(pc.is_in(plain, value_set=values))
    if not len(plain):
        return None
    return (
        f"column {name!r} has {len(plain):,} whole numbers with a fraction and without, "
        f"such as '{plain[0]}' and '{plain[0]}.0', which are different categories; write "
        "them alike"
    )


def says_nothing(name: str, why: str) -> str:
    """Returns that a column has one value, or none."""
    return (
        f"column {name!r} {why} in all training rows and says nothing; "
        f"{rule(name, 'ignore')} leaves it out"
    )


def sign_doubts(
    paths: Sequence[pathlib.Path], kind: Format, schema: Schema
) -> list[str]:
    """Returns a line about the signs of `config.data.missing` that match no cell.

    The files are read until all signs are found.

    Args:
        paths: The files.
        kind: How they are written.
        schema: Columns of the files, with the signs.
    """
    left = {sign for sign in schema.missing if sign not in kind.missing}
    # Cells with the signs would be null otherwise.
    texts = dataclasses.replace(
        schema,
        numbers=(),
        categories=schema.inputs,
        labels="classes",
        forms=(),
        missing=(),
    )
    for path in paths if left else ():
        with contextlib.closing(batches(path, kind, texts)) as blocks:
            for batch in blocks:
                left -= _signs_in(batch, left, kind, schema)
                if not left:
                    return []
    if not left:
        return []
    signs = ", ".join(repr(sign) for sign in schema.missing if sign in left)
    return [
        f"config.data.missing: no cell of the columns is {signs}; look how the files write "
        "cells without a value"
    ]


def _signs_in(batch: Any, left: set[str], kind: Format, schema: Schema) -> set[str]:
    """Returns the signs that cells of a batch of texts have."""
    forms, found = from_entries(schema.forms), set[str]()
    values = {sign: number for sign in left for number in numbers_of([sign])}
    words = [s for s in signs_of(kind, schema) if not numbers_of([s])]
    for name, is_number in schema.is_number.items():
        cells = batch.column(name).dictionary
        there = pc.is_in(cells, value_set=pa.array(sorted(left), cells.type))
        found |= set(cells.filter(there).to_pylist())
        if is_number and values:
            numbers = _numbers_in(cells, forms.get(name, PLAIN), words)
            there = pc.is_in(pa.array([*values.values()]), value_set=numbers)
            found |= {sign for sign, is_ in zip(values, there.to_pylist()) if is_}
    return found


def _numbers_in(cells: Any, form: Form, signs: Sequence[str]) -> Any:
    """Returns the numbers of cells; none if some are dates, as Parquet has."""
    try:
        return pc.add(parsed(cells, form, signs), 0.0)  # -0.0 is 0.0.
    except pa.ArrowInvalid:
        return pa.array([], pa.float64())
