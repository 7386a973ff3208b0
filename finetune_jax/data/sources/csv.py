"""`csv`: texts and labels separated by commas, quoted where need be.

`config.data.dir` is a folder with train.csv, dev.csv, test.csv, or one file.
"""

import csv
import functools
from collections.abc import Sequence

from finetune_jax.data.text_files import read_separated, read_splits
from finetune_jax.data.texts import Rows

READ = functools.partial(read_separated, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def load_rows(
    directory: str | None, argument: str | None, header: Sequence[str]
) -> dict[str, Rows]:
    """Returns the rows of each split.

    Raises:
        UserError: No such files, or what of them cannot be read, all at once.
    """
    del argument
    return read_splits(directory, ".csv", header, READ)
