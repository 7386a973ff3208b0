"""`tsv`: texts and labels separated by tabs, without quotes.

`config.data.dir` is a folder with train.tsv, dev.tsv, test.tsv, or one file.
"""

import functools
from collections.abc import Sequence

from finetune_jax.data.tables.schema import Format
from finetune_jax.data.text.files import read_separated, read_splits
from finetune_jax.data.text.tokens import Rows

KINDS = ("text", "tables")
TABLE = Format(suffixes=(".tsv",), delimiter="\t")
READ = functools.partial(read_separated, delimiter="\t", quotes=False)


def load_rows(
    directory: str | None, argument: str | None, header: Sequence[str]
) -> dict[str, Rows]:
    """Returns the rows of each split.

    Raises:
        UserError: No such files; or lists all that cannot be read.
    """
    del argument
    return read_splits(directory, ".tsv", header, READ)
