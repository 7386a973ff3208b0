"""What is wrong with a file of separated values, line by line."""

import csv
from collections.abc import Collection, Iterator, Sequence
from typing import Any

# So many are listed.
MOST = 20


def faults(
    reader: Any,
    names: Sequence[str],
    numbers: Collection[str],
    missing: Collection[str],
    begin: int,
) -> list[str]:
    """Returns the first lines that cannot be read, and what is wrong with each.

    Args:
        reader: From `csv.reader`, of text decoded with 'surrogateescape'.
        names: Of the columns.
        numbers: Those that hold numbers.
        missing: What stands for nothing.
        begin: Lines before the first row.
    """
    found: list[str] = []
    places = [at for at, name in enumerate(names) if name in numbers]
    for line, cells in _lines(reader):
        if isinstance(cells, str):
            return [*found, f"line {line}: {cells}"]
        if line > begin and cells:
            found += [
                f"line {line}: {text}" for text in _wrong(cells, names, places, missing)
            ]
        if len(found) >= MOST:
            return [*found[:MOST], "and perhaps more"]
    return found


def _lines(reader: Any) -> Iterator[tuple[int, Any]]:
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, str(error)
            return
        if cells is None:
            return
        yield reader.line_num, cells


def _wrong(
    cells: Sequence[str],
    names: Sequence[str],
    numbers: Sequence[int],
    missing: Collection[str],
) -> list[str]:
    if len(cells) != len(names):
        return [f"{len(cells)} values, but there are {len(names)} columns"]
    found = []
    for name, cell in zip(names, cells):
        try:
            cell.encode()
        except UnicodeEncodeError:
            found.append(f"{name!r} is not UTF-8")
    for place in numbers:
        cell = cells[place]
        try:
            if cell not in missing:
                float(cell)
        except ValueError:
            found.append(f"{names[place]!r} is {cell[:40]!r}, not a number")
    return found
