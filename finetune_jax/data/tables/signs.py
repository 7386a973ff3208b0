"""Signs of cells without a value that no cell of a table has."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from finetune_jax.data.reading.arrow import pa, pc
from finetune_jax.data.tables import number_forms
from finetune_jax.data.tables.files import batches
from finetune_jax.data.tables.number_forms import PLAIN, Form, from_entries
from finetune_jax.data.tables.schema import Format, Schema, signs_of


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
                left -= _found(batch, left, kind, schema)
                if not left:
                    return []
    if not left:
        return []
    signs = ", ".join(repr(sign) for sign in schema.missing if sign in left)
    return [
        f"config.data.missing: no cell of the columns is {signs}; look how the files write "
        "cells without a value"
    ]


def _found(batch: Any, left: set[str], kind: Format, schema: Schema) -> set[str]:
    """Returns the signs that cells of a batch of texts have."""
    forms, found = from_entries(schema.forms), set[str]()
    values = {
        sign: number for sign in left for number in number_forms.numbers_of([sign])
    }
    words = [s for s in signs_of(kind, schema) if not number_forms.numbers_of([s])]
    for name, is_number in schema.is_number.items():
        cells = batch.column(name).dictionary
        there = pc.is_in(cells, value_set=pa.array(sorted(left), cells.type))
        found |= set(cells.filter(there).to_pylist())
        if is_number and values:
            numbers = _numbers(cells, forms.get(name, PLAIN), words)
            there = pc.is_in(
                pa.array([*values.values()]), value_set=numbers
            ).to_pylist()
            found |= {sign for sign, is_there in zip(values, there) if is_there}
    return found


def _numbers(cells: Any, form: Form, signs: Sequence[str]) -> Any:
    """Returns the numbers of cells; none if some are dates, as Parquet has."""
    try:
        return pc.add(number_forms.parsed(cells, form, signs), 0.0)  # -0.0 is 0.0.
    except pa.ArrowInvalid:
        return pa.array([], pa.float64())
