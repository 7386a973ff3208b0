"""Digests of weight files, computed beside what else is done."""

import functools
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import IO

from finetune_jax.core.errors import UserError

# Bytes that are read at a time: few turns at the interpreter's lock, and little memory.
_PIECE = 2**22
# One file after the other: the rest of the machine is for what waits for no digest.
_TURN = threading.Lock()


class Digests(Mapping[str, str]):
    """The sha256 of files, by name; to look at one waits for it.

    Raises:
        UserError: When one is looked at: its file cannot be read, or has changed since.
    """

    def __init__(self, found: Mapping[str, Callable[[], str]]):
        """Takes what returns each of them."""
        self._found = found

    def __getitem__(self, name: str) -> str:
        """Returns the sha256 of one file."""
        return self._found[name]()

    def __iter__(self) -> Iterator[str]:
        """Returns the names, and waits for nothing."""
        return iter(self._found)

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self._found)


def gathered(*parts: Mapping[str, str], renamed: Callable[[str], str] = str) -> Digests:
    """Returns all digests of some, by names that may be others, and waits for none."""
    return Digests(
        {
            renamed(name): functools.partial(part.__getitem__, name)
            for part in parts
            for name in part
        }
    )


def digests_of(path: pathlib.Path) -> Digests:
    """Returns the sha256 of a file by its path, which a thread computes.

    Raises:
        OSError: It cannot be opened.
    """
    coming: Future[str] = Future()
    file = path.open("rb")
    before = _version(file)

    def compute():
        try:
            with file, _TURN:
                found = _sha256(file)
                if _version(file) != before:
                    raise OSError("it has changed while it was read")
            coming.set_result(found)
        except OSError as error:
            problem = f"config.init.pretrained: {str(path)!r} cannot be read: {error}"
            coming.set_exception(UserError(problem))
        except Exception as error:  # Whoever waits would wait for ever.
            coming.set_exception(error)

    # Nothing waits for it where a process ends early.
    threading.Thread(target=compute, name="digest", daemon=True).start()
    return Digests({str(path): coming.result})


def _version(file: IO[bytes]) -> tuple[int, int]:
    """Returns what differs once a file was written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _sha256(file: IO[bytes]) -> str:
    """Returns the digest of a file, read and not mapped: it may be cut off meanwhile."""
    digester, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    while count := file.readinto(piece):  # type: ignore[attr-defined]
        digester.update(piece[:count])
    return digester.hexdigest()
