"""`criteo`: click-through tables as Criteo's display-advertising challenge has them.

A label, 0 or 1, 13 integers and 26 categories, separated by tabs, blank where they are
missing, without a line of names. `config.data.dir` is a file, or a folder with a file for
each split; files of other names are splits of theirs, such as day_0 to day_23.
"""

from finetune_jax.data.tables.schema import Format

KINDS = ("tables",)
NUMBERS = tuple(f"I{index + 1}" for index in range(13))
CATEGORIES = tuple(f"C{index + 1}" for index in range(26))
TABLE = Format(
    suffixes=(".txt", ".tsv", ""),
    delimiter="\t",
    header=("label", *NUMBERS, *CATEGORIES),
    kinds=dict.fromkeys(NUMBERS, "number") | dict.fromkeys(CATEGORIES, "category"),
    label="label",
    missing=("",),
    classes=("0", "1"),
)
