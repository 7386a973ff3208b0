"""`jsonl`: texts and labels as a JSON object a line.

`config.data.dir` is a folder with train.jsonl, dev.jsonl, test.jsonl, or one file.
"""

from collections.abc import Sequence

from finetune_jax.data.text.files import read_json_lines, read_splits
from finetune_jax.data.text.tokens import Rows

KINDS = ("text",)
READ = read_json_lines


def load_rows(
    directory: str | None, argument: str | None, header: Sequence[str]
) -> dict[str, Rows]:
    """Returns the rows of each split.

    Raises:
        UserError: No such files; or lists all that cannot be read.
    """
    del argument
    return read_splits(directory, ".jsonl", header, READ)
