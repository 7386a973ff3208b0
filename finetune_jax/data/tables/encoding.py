"""Statistics and vocabularies of a table, and rows encoded with them.

A run keeps both, so that later rows are encoded the same, to the bit.
"""

import dataclasses
import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.data.reading.arrow import pa, pc
from finetune_jax.data.tables.columns import Columns, from_bytes, to_bytes
from finetune_jax.data.tables.schema import (
    ROW_MISSING,
    ROW_UNSEEN,
    ROWS_BEFORE,
    Number,
    TableSpec,
    table_from_json,
)

# In the workdir: the values that each category knows.
VOCABULARY = "vocabulary.arrow"
# Whole numbers without and with a fraction, as regexes; others that begin with 0 are names.
WHOLE = "^[+-]?(?:0|[1-9][0-9]*)$"
WITH_FRACTION = "^[+-]?(?:0|[1-9][0-9]*)[.]0*$"
# Rows that are encoded at once.
CHUNK = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """Statistics and vocabularies of a table.

    Attributes:
        spec: Columns of the table.
        known: The values of each category that is not hashed, Arrow's arrays of strings,
            in the order of their rows.
    """

    spec: TableSpec
    known: Mapping[str, Any]

    def encoder(self, values: Mapping[str, Any]) -> "Encoder":
        """Returns the encoder of cells.

        Args:
            values: Values of the codes of each category.
        """
        tables = [
            np.concatenate([[ROW_MISSING], self.rows_of(at, values[one.name])])
            for at, one in enumerate(self.spec.categories)
        ]
        ends = np.cumsum([0, *(len(table) for table in tables)])
        # Codes begin with -1, which is missing.
        return Encoder(
            spec=self.spec,
            rows=np.concatenate([*tables, []]).astype(np.int32),
            begin=(ends[:-1] + 1).astype(np.int64),
        )

    def rows_of(self, place: int, values: Any) -> np.ndarray:
        """Returns the rows of some values in the embedding of a category.

        Args:
            place: Place of the category.
            values: Arrow's array of strings.
        """
        one = self.spec.categories[place]
        if one.hashed:
            size = one.rows - ROWS_BEFORE
            found = (zlib.crc32(v.encode()) % size for v in values.to_pylist())
            return np.fromiter(found, np.int64, len(values)) + ROWS_BEFORE
        known = pc.cast(self.known[one.name], values.type)
        found = pc.index_in(values, value_set=known)
        if self.spec.schema.version > 1:
            found = _whole_found(values, known, found)
        places = pc.fill_null(found, pa.scalar(-1, found.type)).to_numpy()
        return np.where(places < 0, ROW_UNSEEN, places + ROWS_BEFORE)


def _whole_found(values: Any, known: Any, found: Any) -> Any:
    """Returns places in known values, also of '1.0' where '1' is known or the reverse.

    Files have whole numbers with fractions where other rows of a column had no value.

    Args:
        values: Arrow's array of strings.
        known: The known values, also an Arrow array of strings.
        found: Place of each value in the known ones, null where it is unknown.
    """
    # Which values are sought in another form, and how their end is replaced.
    others = [(WITH_FRACTION, "[.]0*$", "")]
    if pc.any(pc.ends_with(known, ".0")).as_py():
        others.append((WHOLE, "$", ".0"))
    for pattern, end, other in others:
        is_sought = pc.and_(
            pc.match_substring_regex(values, pattern), pc.is_null(found)
        )
        if pc.any(is_sought).as_py():
            replaced = pc.replace_substring_regex(values, end, other)
            places = pc.index_in(replaced, value_set=known)
            found = pc.if_else(is_sought, places, found)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encoder of cells as columns have them to rows as a model takes them.

    Attributes:
        spec: Spec of the table.
        rows: Embedding rows of the codes of all categories, one after the other.
        begin: Where those of each category begin; -1 stands before them.
    """

    spec: TableSpec
    rows: np.ndarray
    begin: np.ndarray

    def __call__(self, numbers: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Returns rows, int32 [n, N + M + C].

        Args:
            numbers: Numbers of the columns, float64 [n, N].
            codes: Codes of the columns, int32 [n, C].
        """
        spec, count = self.spec, len(self.spec.numbers)
        if spec.schema.version == 1:  # As former versions did.
            numbers = numbers.astype(np.float32)
        found = np.empty((len(numbers), spec.width), np.int32)
        for begin in range(0, len(numbers), CHUNK):
            part = slice(begin, begin + CHUNK)
            out = found[part]
            values, is_missing = standardised(numbers[part], spec.numbers)
            out[:, :count] = values.view(np.int32)
            marks = is_missing[:, list(spec.marks)].astype(np.float32)
            out[:, count : count + len(spec.marks)] = marks.view(np.int32)
            out[:, len(spec.features) :] = self.rows[codes[part] + self.begin]
        return found


def logarithm(values: np.ndarray) -> np.ndarray:
    """Returns sign(x) log(1 + |x|)."""
    return np.copysign(np.log1p(np.abs(values)), values)


def standardised(
    values: np.ndarray, numbers: Sequence[Number]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers as a model takes them, float32 [n, N], and which are missing.

    Args:
        values: Numbers of the files; a missing one, NaN, becomes 0, the mean.
        numbers: Columns of the numbers.
    """
    wide = values.astype(np.float64)
    logs = [at for at, one in enumerate(numbers) if one.log]
    wide[:, logs] = logarithm(wide[:, logs])
    wide -= np.array([one.mean for one in numbers])
    wide /= np.array([one.std for one in numbers])
    is_missing = np.isnan(wide)
    return np.where(is_missing, 0, wide).astype(np.float32), is_missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Rows of a file as a model takes them, encoded when they are taken.

    Attributes:
        columns: Columns of the file.
        encoder: Encoder of the columns.
    """

    columns: Columns
    encoder: Encoder

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and cells of a row."""
        return len(self.columns), self.encoder.spec.width

    @property
    def dtype(self) -> np.dtype:
        """int32: bits of numbers, then rows of embeddings."""
        return np.dtype(np.int32)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.columns)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns one row, or some."""
        numbers = np.asarray(self.columns.numbers[index])
        codes = np.asarray(self.columns.codes[index])
        found = self.encoder(np.atleast_2d(numbers), np.atleast_2d(codes))
        return found if codes.ndim == 2 else found[0]


def digest_of(known: Mapping[str, Any]) -> str:
    """Returns a digest of the known values."""
    digester = hashlib.sha256()
    for name, values in known.items():
        listed = [name, len(values)]
        digester.update(json.dumps(listed).encode())
        for begin in range(0, len(values), CHUNK):
            part = values.slice(begin, CHUNK).to_pylist()
            digester.update(json.dumps(part).encode())
    return digester.hexdigest()


def write_fitted(workdir: pathlib.Path, fitted: Fitted | None) -> None:
    """Keeps the known values with a run of a table; the rest is in its manifest."""
    if fitted is None:
        return
    part = workdir / f".{VOCABULARY}"
    part.write_bytes(to_bytes(fitted.known).tobytes())
    part.replace(workdir / VOCABULARY)


def read_fitted(workdir: pathlib.Path, where: str) -> Fitted:
    """Returns the statistics and vocabularies that a run has kept.

    Args:
        workdir: Workdir of the run.
        where: Config key of the workdir, for messages.

    Raises:
        UserError: The workdir is no run of a table, or is damaged.
    """
    try:
        plain = json.loads((workdir / "manifest.json").read_text())["data"]["table"]
        fitted = Fitted(
            spec=table_from_json(plain),
            known=from_bytes((workdir / VOCABULARY).read_bytes()),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: {str(workdir)!r} is not the workdir of a run of a table: {error}"
        ) from error
    if digest_of(fitted.known) != fitted.spec.digest:
        raise UserError(
            f"{where}: {workdir / VOCABULARY} is damaged, or of another run"
        )
    return fitted
