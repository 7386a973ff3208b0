"""From rows as a model takes them back to the values of columns, for the report."""

import math

import numpy as np

from finetune_jax.data.tables.encoding import Fitted
from finetune_jax.data.tables.schema import (
    ROW_MISSING,
    ROW_UNSEEN,
    ROWS_BEFORE,
    Category,
    Number,
)

MISSING = "missing"


def decoded(rows: np.ndarray, fitted: Fitted) -> list[tuple[tuple[str, str], ...]]:
    """Returns pairs (column, value) of each row, as far as a row still has the value.

    Args:
        rows: int32 [n, N + M + C], as `TableSpec` has them.
        fitted: Statistics and vocabularies of the table.
    """
    spec = fitted.spec
    count, features = len(spec.numbers), len(spec.features)
    numbers = np.ascontiguousarray(rows[:, :features]).view(np.float32)
    is_missing = np.zeros((len(rows), count), bool)
    is_missing[:, list(spec.marks)] = numbers[:, count:] != 0
    found = []
    for row, missing, places in zip(numbers, is_missing, rows[:, features:]):
        cells = [
            (one.name, MISSING if absent else _number(float(value), one))
            for one, value, absent in zip(spec.numbers, row, missing)
        ]
        cells += [
            (one.name, _category(int(place), one, fitted))
            for one, place in zip(spec.categories, places)
        ]
        found.append(tuple(cells))
    return found


def _number(standardised: float, column: Number) -> str:
    """Returns the number of a cell, with the digits that float32 keeps."""
    value = standardised * column.std + column.mean
    if column.log:
        value, digits = math.copysign(math.expm1(abs(value)), value), 4
    else:
        digits = 4 - math.floor(math.log10(column.std))
    # Without the sign of -0.0.
    return f"{round(value, digits) + 0.0:.{5 if column.log else 10}g}"


def _category(row: int, column: Category, fitted: Fitted) -> str:
    """Returns the value of a cell, or why its row of the embedding has none."""
    if row == ROW_MISSING:
        return MISSING
    if column.hashed:
        return f"row {row - ROWS_BEFORE} of {column.rows - ROWS_BEFORE}"
    if row == ROW_UNSEEN:
        return "rare or unknown"
    return str(fitted.known[column.name][row - ROWS_BEFORE].as_py())
