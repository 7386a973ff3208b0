"""Files of separated values: the line of names, and the sign between the cells."""

import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from finetune_jax.core.errors import UserError
from finetune_jax.core.text_lines import check_begin
from finetune_jax.data.reading.arrow import pa

# Bytes of a file in which its names are looked for.
BEGIN = 2**20
# Signs that stand for the comma of a CSV file in some countries and programs.
_OTHERS = (";", "\t", "|")
# Signs that cannot be seen, at the ends of names.
_UNSEEN = "\ufeff\u200b"
# Python refuses cells of more than 131,072 characters otherwise.
csv.field_size_limit(2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The beginning of a file of separated values.

    Attributes:
        names: Names of the columns, without blanks around them.
        lines: Number of lines before the first row.
        delimiter: Sign between the cells.
        expected: Sign that the kind of file has between the cells.
    """

    names: tuple[str, ...]
    lines: int
    delimiter: str
    expected: str

    def warnings(self, path: pathlib.Path) -> list[str]:
        """Returns a line if the file has another delimiter than its kind."""
        if self.delimiter == self.expected:
            return []
        return [
            f"{path}: separated by {self.delimiter!r}, not {self.expected!r}, and read so"
        ]


def reader_of(file: Any, delimiter: str, quotes: bool) -> Any:
    """Returns the `csv.reader` of a text file that was opened with newline=''.

    A cell that begins with a quotation mark must end with one.
    """
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return csv.reader(file, delimiter=delimiter, quoting=quoting, strict=quotes)  # type: ignore


def head_of(
    path: pathlib.Path, header: Sequence[str], *, delimiter: str, quotes: bool
) -> Head:
    """Returns the names of a file's columns, and how its cells are separated.

    Args:
        path: Path of the file.
        header: `config.data.header`, names of a file that does not begin with them.
        delimiter: Sign that its kind has between the cells. The file may begin with
            another, as 'sep=;'. A comma may be another sign in the file, if that and no
            comma separates the first line.
        quotes: Whether cells may be quoted.

    Raises:
        UserError: The file is empty, not UTF-8, or has a name twice.
    """
    text, own = without_sign(begin_of(path))
    expected, delimiter = delimiter, own or delimiter
    signs = (delimiter, *_OTHERS) if delimiter == "," else (delimiter,)
    found = {sign: first_cells(text, sign, quotes) for sign in signs}

    def fits(sign: str) -> bool:
        count = len(found[sign][0])
        return count == len(header) if header else count > 1

    sign = next(filter(fits, signs), delimiter)
    names, lines = found[sign]
    if header:
        names, lines = list(header), 0
    names = [name.strip().strip(_UNSEEN).strip() for name in names]
    _check(names, path)
    return Head(
        names=tuple(names),
        lines=lines + (own is not None),
        delimiter=sign,
        expected=expected,
    )


def without_sign(text: str) -> tuple[str, str | None]:
    r"""Returns a text without a first line that names the delimiter, as Excel writes it.

    >>> without_sign("sep=;\na;b\n"), without_sign("a,b\n")
    (('a;b\n', ';'), ('a,b\n', None))
    """
    found = re.match(r'"?sep=([,;|\t])"?(\r\n|\n|\r)', text, re.IGNORECASE)
    return (text[found.end() :], found[1]) if found else (text, None)


def begin_of(path: pathlib.Path) -> str:
    """Returns the first text of a file, which may be compressed.

    Raises:
        UserError: The file cannot be read, or is UTF-16.
    """
    try:
        with pa.input_stream(str(path)) as file:
            data = file.read(BEGIN)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    check_begin(data, path)
    return data.decode("utf-8-sig", "surrogateescape")


def first_cells(text: str, delimiter: str, quotes: bool) -> tuple[list[str], int]:
    """Returns the cells of the first line that has any, and the lines up to it."""
    reader = reader_of(io.StringIO(text, newline=""), delimiter, quotes)
    try:
        for cells in reader:
            if cells:
                return cells, reader.line_num
    except csv.Error:  # With another delimiter it may be right.
        pass
    return [], reader.line_num


def _check(names: Sequence[str], path: pathlib.Path) -> None:
    """Checks the names of columns.

    Raises:
        UserError: There are none, one is not UTF-8, or one is there twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}, line 1: not UTF-8; convert the file") from error
    if not names or twice:
        wrong = f"columns twice: {', '.join(map(repr, twice))}" if twice else "empty"
        raise UserError(
            f"{path}: {wrong}; each column needs a name of its own, and config.data.header "
            "names the columns of files that do not begin with them"
        )


def rows_of(file: Any, head: Head, quotes: bool) -> Iterator[tuple[int, list[str]]]:
    """Yields the line in which each row begins, and its cells.

    Args:
        file: Text file, opened with newline=''.
        head: Beginning of the file.
        quotes: Whether cells may be quoted.

    Raises:
        UserError: A quoted cell does not end; names its line.
    """
    reader = reader_of(file, head.delimiter, quotes)
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            why = "a quoted cell does not end where it should" if quotes else error
            raise UserError(f"line {begin}: {why} ({error})") from error
        if cells is None:
            return
        if begin > head.lines and cells:
            yield begin, cells
