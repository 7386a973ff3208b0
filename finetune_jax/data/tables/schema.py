"""Tables: how files of them are written, and what `config.data` says of their columns."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from finetune_jax.core.errors import Problem, collected, raise_if
from finetune_jax.core.registry import check_regex
from finetune_jax.data.spec import as_tuples
from finetune_jax.data.tables.number_forms import from_entries

KINDS = ("number", "category", "ignore")
# Signs of cells without a value, in files other than Criteo's: those of pandas, and UCI's.
MISSING = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
    "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "?",
)  # fmt: skip
# The same for runs whose schema has version 1.
MISSING_1 = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
# Rows of every embedding that stand for no value of their own.
ROW_MISSING, ROW_UNSEEN, ROWS_BEFORE = 0, 1, 2
# How cells are read, to be raised when that changes; see `Schema.version`.
VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How the files of a kind are written.

    Attributes:
        suffixes: Suffixes of the files in a folder.
        delimiter: Between cells; None is Parquet.
        quotes: Whether cells may be quoted.
        header: Names of the columns, where files never begin with them.
        kinds: Kind of each of these columns.
        label: Name of the label column, where it is fixed.
        missing: Signs of cells without a value.
        classes: The labels that there may be; empty is any.
    """

    suffixes: tuple[str, ...]
    delimiter: str | None
    quotes: bool = False
    header: tuple[str, ...] = ()
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    label: str | None = None
    missing: tuple[str, ...] = MISSING
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Options of `config.data` for tables.

    Attributes:
        label: Name of the column that is to be predicted.
        labels: Kind of labels: 'classes' or 'numbers'.
        header: Names of the columns of files that do not begin with them.
        columns: (regex, kind) pairs, the first that matches counts; the kinds of all
            others are inferred.
        log_columns: Regexes of number columns x that become sign(x) log(1 + |x|).
        missing: Signs of cells without a value, besides those that are known.
        hash_rows: Rows of an embedding that values are hashed into; None has one for each
            value of the training rows.
        min_count: Training rows that a value needs for a row of its own.
        fitted: Workdir of a run whose statistics and vocabularies are continued.
    """

    label: str = "label"
    labels: str = "classes"
    header: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    log_columns: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    hash_rows: int | None = None
    min_count: int = 2
    fitted: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of files that are read.

    Attributes:
        names: All columns of a file without a header line, in order; empty where files
            begin with them.
        numbers: Columns of numbers.
        categories: Columns of categories.
        label: The one to be predicted; None where it is not there.
        labels: 'classes' or 'numbers'.
        forms: How numbers are written that are not plain, from `number_forms.as_entries`.
        missing: Signs of cells without a value, besides those of the files' format.
        version: How cells are read. 1: blanks around categories belong to them, numbers
            are float32. 2: blanks are taken away, numbers are float64.
    """

    names: tuple[str, ...]
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    label: str | None
    labels: str
    forms: tuple[tuple[str, ...], ...] = ()
    missing: tuple[str, ...] = ()
    version: int = 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Input columns, in the order of a row's cells."""
        return (*self.numbers, *self.categories)

    @property
    def is_number(self) -> dict[str, bool]:
        """Whether each column that is read is a number."""
        found = dict.fromkeys(self.numbers, True)
        found |= dict.fromkeys(self.categories, False)
        if self.label is not None:
            found[self.label] = self.labels == "numbers"
        return found


def signs_of(kind: Format, schema: Schema) -> tuple[str, ...]:
    """Returns the signs of cells without a value."""
    is_old = schema.version == 1 and kind.missing == MISSING
    return (*(MISSING_1 if is_old else kind.missing), *schema.missing)


def rule(name: str, kind: str) -> str:
    """Returns how a config gives a column its kind, for messages.

    >>> rule("age", "number")
    "config.data.columns=(('age', 'number'),)"
    """
    try:
        is_plain = re.fullmatch(name, name) is not None
    except re.error:
        is_plain = False
    pattern = name if is_plain else re.escape(name)
    return f"config.data.columns=(({pattern!r}, {kind!r}),)"


def table_options_of(config: Mapping[str, Any], found: Format) -> TableOptions:
    """Returns the table options of `config.data`.

    Args:
        config: The section.
        found: How the files are written.

    Raises:
        UserError: Lists the options that do not fit.
    """
    names = [field.name for field in dataclasses.fields(TableOptions)]
    options = TableOptions(**{name: config[name] for name in names})
    problems, wrong = list[str](), list[Problem]()
    plainly = {"mean": (0.0,), "std": (1.0,), "augment": (), "mix": ()}
    for name, default in plainly.items():
        if config[name] not in (None, default):
            problems.append(
                f"config.data.{name}: {config[name]!r}; columns of tables are "
                "standardised by themselves, and not augmented"
            )
    if options.labels not in ("classes", "numbers"):
        problems.append(
            f"config.data.labels: {options.labels!r}; tables have classes or numbers"
        )
    if found.header and options.header:
        problems.append(f"config.data.header: {config['name']!r} has its own names")
    for entry in options.columns:
        if not (isinstance(entry, tuple) and len(entry) == 2 and entry[1] in KINDS):
            problems.append(
                f"config.data.columns: {entry!r}; (regex, kind) is needed, the kind one "
                f"of {', '.join(KINDS)}"
            )
    if not all(isinstance(sign, str) for sign in options.missing):
        problems.append(
            f"config.data.missing: {options.missing!r}; texts are needed, such as ('-999',)"
        )
    patterns = [e[0] for e in options.columns if isinstance(e, tuple) and e]
    for key, given in (("columns", patterns), ("log_columns", options.log_columns)):
        for pattern in given:
            with collected(wrong):
                check_regex(pattern, f"config.data.{key}")
    raise_if([*problems, *wrong], "config.data does not fit:")
    label = options.label
    if found.label is not None and label == TableOptions().label:
        label = found.label
    # Names have no blanks around them, whatever a file or an older config has.
    return dataclasses.replace(
        options,
        label=label.strip(),
        header=found.header or tuple(name.strip() for name in options.header),
        columns=(
            *((pattern.strip(), kind) for pattern, kind in options.columns),
            *((re.escape(name), kind) for name, kind in found.kinds.items()),
        ),
        log_columns=tuple(pattern.strip() for pattern in options.log_columns),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A column of numbers.

    Attributes:
        name: Name of the column.
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
        name: Name of the column.
        field: The same as names of parameters have it, without '/'.
        rows: Rows of its embedding: missing, unseen, and one for each known value, or
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
    """The part of a spec that tables have: a table as a model takes it.

    A row is int32 [N + M + C]: the bits of N numbers and of M marks of missing ones as
    float32, then the row in each of C embeddings.

    Attributes:
        schema: Schema of its files.
        numbers: Transformed and standardised.
        categories: Encoded.
        digest: Digest of the known values.
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
        """Places of the numbers with a mark that says whether they are missing."""
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
        """Returns a description of the columns, a line each."""
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
            kind, unit = "category,", "known values"
            if one.hashed:
                kind, unit = "hashed into", "rows"
            found.append(
                f"  {_shown(one.name)}: {kind} {one.rows - ROWS_BEFORE:,} {unit}, "
                f"{one.missing:.1%} missing, {one.unseen:.1%} rare"
            )
        return found


def _shown(name: str) -> str:
    """Returns a name on one line, for a list of columns."""
    return " ".join(name.split()) or repr(name)


def table_from_json(plain: Mapping[str, Any]) -> TableSpec:
    """Returns the spec that a manifest has.

    Raises:
        KeyError, TypeError, ValueError: It is not such a thing.
    """
    schema = {key: as_tuples(value) for key, value in plain["schema"].items()}
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
