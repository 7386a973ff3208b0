"""`csv`: texts and labels, or columns of a table, separated by commas.

They are quoted where need be.

`config.data.dir` is a folder with train.csv, dev.csv, test.csv, or one file.
"""

import functools
from collections.abc import Sequence

from finetune_jax.data.tables.schema import Format
from finetune_jax.data.text.files import read_separated, read_splits
from finetune_jax.data.text.tokens import Rows

KINDS = ("text", "tables")
TABLE = Format(suffixes=(".csv",), delimiter=",", quotes=True)
READ = functools.partial(read_separated, delimiter=",", quotes=True)


def load_rows(
    directory: str | None, argument: str | None, header: Sequence[str]
) -> dict[str, Rows]:
    """Returns the rows of each split.

    Raises:
        UserError: No such files; or lists all that cannot be read.
    """
    del argument
    return read_splits(directory, ".csv", header, READ)
