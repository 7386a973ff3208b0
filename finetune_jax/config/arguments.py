"""The argument of a config file: a place of data, and variants, separated by commas."""

import pathlib
from collections.abc import Sequence


def place_and_variants(arg: str, known: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the place that an argument names, '' without one, and its variants.

    Args:
        arg: Argument of `get_config`.
        known: Variants of the config; any other word is the place.

    Raises:
        ValueError: There are two places, one of which may be a misspelt variant.

    >>> place_and_variants("photos,tiny", ("finetune", "tiny"))
    ('photos', ['tiny'])
    """
    words = arg.split(",")
    place, *more = [word for word in words if word not in known] or [""]
    if more:
        variants = " and ".join(known)
        raise ValueError(
            f"{place!r} and {more[0]!r}: give one place; the variants are {variants}"
        )
    return place, [word for word in words if word in known]


def format_of(place: str, formats: Sequence[str]) -> str:
    """Returns the format of a file, or of the files in a folder, by suffix.

    Args:
        place: File or folder, which need not be there.
        formats: Formats to choose from; the first one is the default.

    >>> format_of("rows.parquet", ("csv", "parquet")), format_of("", ("csv", "tsv"))
    ('parquet', 'csv')
    """
    path = pathlib.Path(place).expanduser()
    files = sorted(path.iterdir()) if place and path.is_dir() else [path]
    suffixes = [file.suffix.lower().removeprefix(".") for file in files]
    return next((suffix for suffix in suffixes if suffix in formats), formats[0])
