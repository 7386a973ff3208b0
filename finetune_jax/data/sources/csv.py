"""`csv`: texts and labels, or columns of a table, separated by commas.

They are quoted where need be.

`config.data.dir` is a folder with train.csv, dev.csv, test.csv, or one file.
"""

import functools

from finetune_jax.data.tables.schema import Format
from finetune_jax.data.text.files import read_separated

KINDS = ("text", "tables")
TABLE = Format(suffixes=(".csv",), delimiter=",", quotes=True)
READ = functools.partial(read_separated, delimiter=",", quotes=True)
SUFFIX = ".csv"
