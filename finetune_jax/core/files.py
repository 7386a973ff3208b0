"""Writes files whole or not at all, and reads JSON."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import BinaryIO


def write_text(path: pathlib.Path, text: str, *, by_many: bool = False) -> None:
    r"""Writes a file so that a kill leaves the old one or the new one, whole.

    It is UTF-8 whatever the machine's locale. Bytes of file names that are not UTF-8 are
    written as `\udce9`.

    Args:
        path: Path of the file.
        text: Its content.
        by_many: Whether several processes may write it at the same time.

    Raises:
        OSError: It cannot be written; names the file.
    """
    encoded = text.encode("utf-8", errors="backslashreplace")
    write_bytes(path, lambda file: file.write(encoded), by_many=by_many)


def write_bytes(
    path: pathlib.Path, write: Callable[[BinaryIO], object], *, by_many: bool = False
) -> None:
    """Writes a file of bytes whole or not at all.

    Args:
        path: Path of the file.
        write: Writes the content into an open file.
        by_many: Whether several processes may write it at the same time.

    Raises:
        OSError: It cannot be written; names the file.
    """
    own = f".{os.uname().nodename}-{os.getpid()}" if by_many else ""
    part = path.with_name(f"{path.name}{own}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:  # That of a full disk names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def bytes_below(folder: pathlib.Path) -> int:
    """Returns the number of bytes of all files below a folder; 0 if there is none."""
    total = 0
    # Another process may delete files and folders; `walk` passes over such folders.
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


def write_json(
    path: pathlib.Path, values: dict | list, *, by_many: bool = False
) -> None:
    """Writes a dict, or a list, as JSON, whole or not at all; see `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n", by_many=by_many)
