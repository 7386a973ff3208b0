"""Lines of a file of separated values that cannot be read, and why."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from finetune_jax.core.errors import UserError
from finetune_jax.data.tables.number_forms import Form, is_missing

# Number of lines that are listed.
MOST = 20


def faults(
    rows: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
    numbers: Mapping[str, Form],
    missing: Collection[str],
) -> list[str]:
    """Returns the first lines that cannot be read, and what is wrong with each.

    Args:
        rows: From `separated.rows_of`, of text decoded with 'surrogateescape'.
        names: Names of the columns.
        numbers: Forms of the columns of numbers.
        missing: Signs of cells without a value.
    """
    found: list[str] = []
    places = {at: numbers[name] for at, name in enumerate(names) if name in numbers}
    try:
        for line, cells in rows:
            wrong = _wrong(cells, names, places, missing)
            found += [f"line {line}: {text}" for text in wrong]
            if len(found) >= MOST:
                return [*found[:MOST], "and perhaps more"]
    except UserError as error:
        return [*found, str(error)]
    return found


def _wrong(
    cells: Sequence[str],
    names: Sequence[str],
    numbers: Mapping[int, Form],
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
    for place, form in numbers.items():
        cell = cells[place]
        if not is_missing(cell, missing) and not _is_number(cell, form):
            said = f" {form}".rstrip()
            found.append(f"{names[place]!r} is {cell[:40]!r}, not a number{said}")
    return found


def _is_number(cell: str, form: Form) -> bool:
    if form.fits(cell):
        return True
    # These are refused elsewhere, or are missing.
    return cell.strip().lower().lstrip("+-") in ("inf", "infinity", "nan")
