"""What a user did wrong, told in one message: found, where, what to do."""

import errno
from collections.abc import Iterable, Sequence

_RESUME = "and the same command goes on from the last checkpoint"
# Errors of a disk that takes no more, with what to do.
_FULL = f"the disk is full; make room, {_RESUME}"
_READ_ONLY = f"the disk is read-only; make it writable, {_RESUME}"
_OF_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    errno.EROFS: _READ_ONLY,
}
# The same errors in the messages of libraries that raise no OSError.
_IN_WORDS = {
    "No space left on device": _FULL,
    "Disk quota exceeded": _FULL,
    "File too large": _FULL,
    "RESOURCE_EXHAUSTED": _FULL,
    "Read-only file system": _READ_ONLY,
}


class UserError(ValueError):
    """A mistake of the user's; the program ends with status 2 and without traceback."""


class DataMissing(UserError):
    """The data of a run is not where the config says, or the config does not say."""


class TrainingError(RuntimeError):
    """A run that cannot go on, such as a loss that is not finite; status 1."""


class NotFinite(TrainingError):
    """A run whose loss or gradient is not finite."""


def is_of_disk(error: OSError) -> bool:
    """Returns whether a file could not be written because the disk takes no more."""
    return error.errno in _OF_DISK


def why_not_written(error: Exception) -> str:
    """Returns in one line why something could not be written, and what to do.

    >>> why_not_written(OSError(errno.EROFS, "Read-only file system")).split(";")[0]
    'the disk is read-only'
    """
    if isinstance(error, OSError) and error.errno in _OF_DISK:
        return _OF_DISK[error.errno]
    text = str(error)
    known = [advice for words, advice in _IN_WORDS.items() if words in text]
    short = text.partition("\n")[0][:300]
    return (
        known[0] if known else f"{short}; where the disk is full, make room, {_RESUME}"
    )


def first_of(problems: Sequence[str], most: int = 20) -> list[str]:
    """Returns the first problems, and how many more there are."""
    more = len(problems) - most
    return [*problems[:most], *([f"and {more:,} more"] if more > 0 else [])]


def listed(names: Iterable[object], most: int = 20) -> str:
    """Returns the first names in a line, and how many more there are.

    >>> listed("abc"), listed("abc", most=2)
    ('a, b, c', 'a, b, and 1 more')
    """
    return ", ".join(first_of([*map(str, names)], most))


def problems_error(header: str, problems: Iterable[str], advice: str = "") -> UserError:
    """Returns one error that lists every problem, in order, each on its own line."""
    lines = [header, *(f"  {problem}" for problem in problems)]
    return UserError("\n".join([*lines, advice] if advice else lines))
