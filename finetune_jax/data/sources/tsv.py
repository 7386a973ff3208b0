"""`tsv`: texts and labels separated by tabs, without quotes.

`config.data.dir` is a folder with train.tsv, dev.tsv, test.tsv, or one file.
"""

import functools

from finetune_jax.data.tables.schema import Format
from finetune_jax.data.text.files import read_separated

KINDS = ("text", "tables")
TABLE = Format(suffixes=(".tsv",), delimiter="\t")
READ = functools.partial(read_separated, delimiter="\t", quotes=False)
SUFFIX = ".tsv"
