"""Values of categories in new rows that the training rows do not have."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from finetune_jax.data.tables.columns import Columns
from finetune_jax.data.tables.encoding import CHUNK, Fitted
from finetune_jax.data.tables.schema import ROW_MISSING, ROW_UNSEEN, TableSpec

# Share of unknown values above which a line tells them.
_LARGE = 0.2
# Number of values that a line shows.
_SHOWN = 3


@dataclasses.dataclass(kw_only=True)
class Unknown:
    """Counts of the values of each category in encoded rows.

    Attributes:
        spec: Columns of the rows.
        there: Number of values by category, int64 [C].
        unknown: Number of unknown values by category, int64 [C].
    """

    spec: TableSpec
    there: np.ndarray = dataclasses.field(init=False)
    unknown: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        """Begins with no rows."""
        self.there = np.zeros(len(self.spec.categories), np.int64)
        self.unknown = np.zeros_like(self.there)

    def add(self, rows: np.ndarray) -> None:
        """Adds rows as a model takes them, int32 [n, N + M + C]."""
        places = rows[:, len(self.spec.features) :]
        self.there += (places != ROW_MISSING).sum(axis=0)
        self.unknown += (places == ROW_UNSEEN).sum(axis=0)

    def lines(self, path: pathlib.Path) -> list[str]:
        """Returns a line about the categories that have many unknown values, if any.

        Args:
            path: File of the rows.
        """
        counts = zip(self.spec.categories, self.unknown.tolist(), self.there.tolist())
        return _lines(
            path,
            [
                _share(one.name, unknown, there)
                for one, unknown, there in counts
                if unknown > _LARGE * there and not one.hashed
            ],
        )


def held_out_unknown(
    columns: Iterable[Columns], train: np.ndarray, fitted: Fitted
) -> list[str]:
    """Returns a line for each file with many unknown values.

    Only rows outside the training rows count. Categories that are hashed have no unknown
    values.

    Args:
        columns: Columns of all files.
        train: Training rows, indices in the concatenation of all rows.
        fitted: Known values.
    """
    lines, begin, ordered = [], 0, np.sort(train)
    for one in columns:
        first, last = np.searchsorted(ordered, [begin, begin + len(one)])
        is_held = np.ones(len(one), bool)
        is_held[ordered[first:last] - begin] = False
        begin += len(one)
        if is_held.any():
            lines += _lines_of(one, np.flatnonzero(is_held), fitted)
    return lines


def _lines_of(columns: Columns, rows: np.ndarray, fitted: Fitted) -> list[str]:
    """Returns a line about some rows of one file, if many values are unknown."""
    categories = fitted.spec.categories
    counts = [np.zeros(len(columns.values[one.name]) + 1, int) for one in categories]
    for start in range(0, len(rows), CHUNK) if categories else ():
        codes = columns.codes[rows[start : start + CHUNK]] + 1
        for place, count in enumerate(counts):
            count += np.bincount(codes[:, place], minlength=len(count))
    shares = []
    for place, (one, count) in enumerate(zip(categories, counts)):
        values, count = columns.values[one.name], count[1:]
        is_unknown = fitted.rows_of(place, values) == ROW_UNSEEN
        unknown, there = int(count[is_unknown].sum()), int(count.sum())
        if unknown > _LARGE * there and not one.hashed:
            found = np.flatnonzero(is_unknown & (count > 0))[:_SHOWN]
            told = f", such as {_shown(values.take(found))}"
            if len(fitted.known[one.name]):
                told += f", but known are {_shown(fitted.known[one.name])}"
            shares.append(_share(one.name, unknown, there) + told)
    return _lines(columns.path, shares)


def _share(name: str, unknown: int, there: int) -> str:
    share = unknown / there
    return f"{share:.0%} of the values of column {name!r} ({unknown:,} of {there:,})"


def _lines(path: pathlib.Path, shares: Sequence[str]) -> list[str]:
    """Returns a line about a file; none if there are no shares of unknown values."""
    if not shares:
        return []
    more = [f"and of {len(shares) - _SHOWN} more columns"]
    told = [*shares[:_SHOWN], *(more if len(shares) > _SHOWN else [])]
    return [
        f"{path}: rows that are not for training have categories that the training rows "
        f"have too rarely or not at all: {'; '.join(told)}. Look whether they are written "
        "alike"
    ]


def _shown(values: Any) -> str:
    """Returns the first of Arrow's strings, for messages."""
    first: Sequence[str] = values.slice(0, _SHOWN).to_pylist()
    return ", ".join(repr(value[:40]) for value in first)
