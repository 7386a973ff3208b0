"""What the rest of the program knows of a table: its columns as a model takes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from finetune_jax.data.tables.number_forms import from_entries
from finetune_jax.data.tables.schema import Schema

# Rows of every embedding that stand for no value of their own.
ROW_MISSING, ROW_UNSEEN, ROWS_BEFORE = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A column of numbers.

    Attributes:
        name: Of the column.
        log: Whether x becomes sign(x) log(1 + |x|) before anything else.
        mean: Subtracted then; that of the training rows.
        std: Divided by.
        missing: Share of training rows that have none. Where it is not 0, models also
            get whether there is one.
    """

    name: str
    log: bool
    mean: float
    std: float
    missing: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """A column of categories.

    Attributes:
        name: Of the column.
        field: The same as names of parameters have it, without '/'.
        rows: Of its embedding: missing, unseen, and one for each value that is known, or
            into which values are hashed.
        hashed: Whether values are hashed.
        missing: Share of training rows that have none.
        unseen: Share of training rows whose value is too rare for a row of its own.
    """

    name: str
    field: str
    rows: int
    hashed: bool
    missing: float
    unseen: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table as a model takes it.

    A row is int32 [N + M + C]: the bits of N numbers and of M marks of missing ones as
    float32, then the row in each of C embeddings.

    Attributes:
        schema: Of its files.
        numbers: Transformed and standardised.
        categories: Encoded.
        digest: Of all that values are known as.
    """

    schema: Schema
    numbers: tuple[Number, ...]
    categories: tuple[Category, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as the fingerprint of the data has it.

        That of a run of an older version has no fields that came later.
        """
        plain = dataclasses.asdict(self)
        if self.schema.version == 1:
            for key in ("forms", "missing", "version"):
                del plain["schema"][key]
        return plain

    @property
    def marks(self) -> tuple[int, ...]:
        """Places of the numbers of which models are told whether they are missing."""
        return tuple(at for at, one in enumerate(self.numbers) if one.missing)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the numbers that a model gets."""
        marked = (f"{self.numbers[at].name} is missing" for at in self.marks)
        return (*(one.name for one in self.numbers), *marked)

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Name and rows of each embedding."""
        return tuple((one.field, one.rows) for one in self.categories)

    @property
    def width(self) -> int:
        """Cells of a row as a model takes it."""
        return len(self.features) + len(self.categories)

    def lines(self) -> list[str]:
        """Returns what a person wants to know of the columns, a line each."""
        found = [
            f"{self.schema.label!r} is predicted from columns, {len(self.numbers)} of "
            f"numbers, {len(self.categories)} of categories:"
        ]
        forms = from_entries(self.schema.forms)
        for one in self.numbers:
            log = "log, " if one.log else ""
            form = f"{forms[one.name]}, " if one.name in forms else ""
            found.append(
                f"  {_shown(one.name)}: number, {form}{log}mean {one.mean:.4g}, deviation "
                f"{one.std:.4g}, {one.missing:.1%} missing"
            )
        for one in self.categories:
            kind = "hashed into" if one.hashed else "category,"
            found.append(
                f"  {_shown(one.name)}: {kind} {one.rows - ROWS_BEFORE:,} rows, "
                f"{one.missing:.1%} missing, {one.unseen:.1%} rare"
            )
        return found


def _shown(name: str) -> str:
    """Returns a name on one line, for a list of columns."""
    return " ".join(name.split()) or repr(name)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def table_from_json(plain: Mapping[str, Any]) -> TableSpec:
    """Returns the spec that a manifest has.

    Raises:
        KeyError, TypeError, ValueError: It is not such a thing.
    """
    schema = {key: _as_tuples(value) for key, value in plain["schema"].items()}
    spec = TableSpec(
        schema=Schema(**schema),
        numbers=tuple(Number(**one) for one in plain["numbers"]),
        categories=tuple(Category(**one) for one in plain["categories"]),
        digest=plain["digest"],
    )
    names = (*(n.name for n in spec.numbers), *(c.name for c in spec.categories))
    if names != spec.schema.inputs:
        raise ValueError("the columns of a table do not fit one another")
    return spec
