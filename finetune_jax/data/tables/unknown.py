"""Values of categories in new rows that the training rows do not have."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_jax.data.tables.columns import Columns
from finetune_jax.data.tables.encoding import Fitted
from finetune_jax.data.tables.schema import ROW_MISSING, ROW_UNSEEN, TableSpec
from finetune_jax.data.tables.statistics import code_counts

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
    columns: Sequence[Columns], train: np.ndarray, fitted: Fitted
) -> list[str]:
    """Returns a line for each file with many unknown values.

    Only rows outside the training rows count. Categories that are hashed have no unknown
    values.

    Args:
        columns: Columns of all files.
        train: Training rows, indices in the concatenation of all rows.
        fitted: Known values.
    """
    is_held = np.ones(sum(map(len, columns)), bool)
    is_held[train] = False
    counts = code_counts(columns, np.flatnonzero(is_held), fitted.spec.schema)
    return [
        line
        for one, own in zip(columns, counts)
        for line in _lines(one.path, _shares(one, own, fitted))
    ]


def _shares(
    columns: Columns, counts: Sequence[np.ndarray], fitted: Fitted
) -> list[str]:
    """Returns the categories of a file that have many unknown values.

    Args:
        columns: Columns of the file.
        counts: From `code_counts`, for each category.
        fitted: Known values.
    """
    shares = []
    for place, (one, count) in enumerate(zip(fitted.spec.categories, counts)):
        values, count = columns.values[one.name], count[1:]
        if one.hashed or not count.any():
            continue
        is_unknown = fitted.rows_of(place, values) == ROW_UNSEEN
        unknown, there = int(count[is_unknown].sum()), int(count.sum())
        if unknown > _LARGE * there:
            found = np.flatnonzero(is_unknown & (count > 0))[:_SHOWN]
            told = f", such as {_shown(values.take(found))}"
            if len(fitted.known[one.name]):
                told += f", but known are {_shown(fitted.known[one.name])}"
            shares.append(_share(one.name, unknown, there) + told)
    return shares


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
