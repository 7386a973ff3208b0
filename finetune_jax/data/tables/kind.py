"""Tables as a kind of data."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core.errors import UserError, listed
from finetune_jax.core.paths import printable
from finetune_jax.data.dataset import Data, Dataset, unlabelled
from finetune_jax.data.kind import (
    Example,
    FileRule,
    Kind,
    Opened,
    Resources,
    suffix_rule,
)
from finetune_jax.data.reading.threads import attempts
from finetune_jax.data.spec import DataSpec
from finetune_jax.data.tables.decoding import decoded
from finetune_jax.data.tables.encoding import (
    VOCABULARY,
    Fitted,
    read_fitted,
    write_fitted,
)
from finetune_jax.data.tables.schema import (
    Format,
    TableSpec,
    table_from_json,
    table_options_of,
)
from finetune_jax.data.tables.source import format_of, load_table, rows_to_predict
from finetune_jax.data.tables.unknown import Unknown

# Most columns that a line lists.
_NAMES = 12


class Tables(Kind):
    """Rows of named columns: numbers and categories, int32 [F]; see `TableSpec`."""

    keys = (
        "label", "labels", "header", "columns", "log_columns", "missing", "hash_rows",
        "min_count", "fitted",
    )  # fmt: skip
    absent = "{name} is no table"
    hint = "; if it is texts, name their columns in config.data.text, such as ('sentence',)"

    def claims(self, section: Mapping[str, Any]) -> bool:
        """Returns whether no columns of texts are named."""
        return not section["text"]

    def open(self, section: Mapping[str, Any], resources: Resources) -> Opened:
        """Returns the table that `config.data` describes."""
        form = format_of(section["name"])
        return load_table(
            section["name"],
            section["dir"],
            form,
            table_options_of(section, form),
            section["cache_dir"],
            resources.fitted,
        )

    def inputs_from_json(self, plain: Mapping[str, Any], section: Mapping) -> TableSpec:
        """Returns the columns."""
        return table_from_json(plain["table"])

    def inputs_to_json(self, spec: DataSpec) -> dict[str, Any]:
        """Returns the columns."""
        return {"table": dataclasses.asdict(spec.inputs)}

    def reader(
        self, spec: DataSpec, section: Mapping[str, Any], workdir: pathlib.Path
    ) -> "TableReader":
        """Returns the reader of files like those of the run."""
        fitted = read_fitted(workdir, "--workdir")
        return TableReader(spec=spec, form=format_of(section["name"]), fitted=fitted)

    def describe(self, spec: DataSpec) -> str:
        """Returns that an example is a row."""
        return "rows of a table"

    def columns(self, spec: DataSpec) -> str:
        """Returns the columns by kind, with the share of missing values."""
        table: TableSpec = spec.inputs
        parts = []
        kinds = {"number": table.numbers, "category": table.categories}
        for kind, columns in kinds.items():
            names = [
                f"{one.name} ({one.missing:.1%} missing)" if one.missing else one.name
                for one in columns
            ]
            label = f"{len(names)} {kind} column{'' if len(names) == 1 else 's'}"
            parts.append(f"{label}: {listed(names, _NAMES)}" if names else label)
        return "; ".join(parts)

    def lines(self, spec: DataSpec) -> list[str]:
        """Returns the columns with their statistics, one a line."""
        return spec.inputs.lines()

    def examples(
        self, data: Data, dataset: Dataset, positions: np.ndarray
    ) -> list[Example] | None:
        """Returns the values of the columns, as the model can tell them apart."""
        if data.fitted is None:
            return None
        rows = dataset.take(positions)["inputs"]
        return [Example(columns=cells) for cells in decoded(rows, data.fitted)]

    def restore(self, workdir: pathlib.Path) -> Fitted | None:
        """Returns the statistics and vocabularies of a run, if it has any."""
        is_there = (workdir / VOCABULARY).is_file()
        return read_fitted(workdir, "--workdir") if is_there else None

    def save(self, workdir: pathlib.Path, fitted: Fitted) -> None:
        """Writes the vocabularies; the rest is in the manifest."""
        write_fitted(workdir, fitted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableReader:
    """Reader of rows to predict.

    Attributes:
        spec: Description of the run's data.
        form: How files are written.
        fitted: Statistics and vocabularies of the run.
    """

    spec: DataSpec
    form: Format
    fitted: Fitted

    @property
    def files(self) -> FileRule:
        """Files of tables."""
        return suffix_rule(self.form.suffixes, "tables of this kind")

    def read(
        self, paths: Sequence[pathlib.Path], errors: list[UserError | None]
    ) -> Iterator[tuple[list[str], Dataset]]:
        """Yields the names of rows and the rows, block by block."""
        for path in paths:
            blocks, row = rows_to_predict(path, self.form, self.fitted), 0
            unknown = Unknown(spec=self.fitted.spec)
            while True:
                (block, error), *_ = attempts(lambda found: next(found, None), [blocks])
                if error is not None or block is None:
                    break
                names = [f"{path}#{row + at + 1}" for at in range(len(block))]
                row += len(block)
                unknown.add(block)
                yield names, unlabelled(block, self.spec, name=str(path))
            for line in unknown.lines(path):
                print(f"warning: {printable(line)}")
            errors.append(error)

    def convert(self, given: Any) -> tuple[bool, list[tuple[Sequence[int], Dataset]]]:
        """Refuses Python objects.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "pipeline: rows of a table are predicted from files: --mode=predict "
            f"--inputs=FILE, {' or '.join(filter(None, self.form.suffixes))}"
        )


KIND = Tables()
