"""`parquet`: tables as Parquet files have them.

`config.data.dir` is a file, or a folder with a file for each split.
"""

from finetune_jax.data.tables.schema import Format

KINDS = ("tables",)
TABLE = Format(suffixes=(".parquet",), delimiter=None)
