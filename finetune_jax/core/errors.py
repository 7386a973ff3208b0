"""Errors of users and of runs, and their messages: key, what was found, what to do."""

import contextlib
import dataclasses
import errno
import re
from collections.abc import Iterable, Iterator, Sequence

_RESUME = "and run again with the same --workdir, from the last checkpoint"
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


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake and the key to blame.

    Attributes:
        key: Config key, relative to the section that is checked or from its root, such as
            'config.data.dir'; '' if no key is to blame.
        text: The value that was found, and what to do.
    """

    key: str
    text: str

    def __str__(self):
        return f"{self.key}: {self.text}" if self.key else self.text

    @classmethod
    def of(cls, message: "Problem | str") -> "Problem":
        """Returns a message as a problem; one that begins with a config key blames it.

        >>> Problem.of("config.data.dir: no folder").key
        'config.data.dir'
        """
        if isinstance(message, Problem):
            return message
        found = re.match(r"(config[\w.\[\]]*): ", message)
        return cls(found[1], message[found.end() :]) if found else cls("", message)

    def under(self, place: str, instead_of: str = "") -> "Problem":
        """Returns the problem with its key, and keys in its text, at another place.

        >>> str(Problem("steps", "0").under("config.plan[1]"))
        'config.plan[1].steps: 0'
        >>> moved = Problem("config.data.dir", "no folder")
        >>> str(moved.under("config.data.domains[0]", "config.data"))
        'config.data.domains[0].dir: no folder'
        """
        if not instead_of:
            inside = f"{place}.{self.key}" if self.key else place
            return self if self.key.startswith("config") else Problem(inside, self.text)
        pattern = rf"\b{re.escape(instead_of)}(?![\w\[])"
        return Problem(
            re.sub(pattern, lambda _: place, self.key),
            re.sub(pattern, lambda _: place, self.text),
        )


class UserError(ValueError):
    """A mistake of the user's; the program ends with status 2 and without traceback.

    Attributes:
        problems: All mistakes of one kind, in order.
        header: First line of the message; '' begins with the first problem.
        advice: Last line of the message; '' for none.
    """

    def __init__(self, *problems: Problem | str, header: str = "", advice: str = ""):
        super().__init__(*problems)
        self.problems = tuple(map(Problem.of, problems))
        self.header, self.advice = header, advice

    def __str__(self):
        lines = [str(problem) for problem in self.problems]
        if self.header:
            lines = [self.header, *(f"  {line}" for line in lines)]
        return "\n".join([*lines, self.advice] if self.advice else lines)


@contextlib.contextmanager
def under(place: str, instead_of: str = "") -> Iterator[None]:
    """Has the user errors of a block blame keys at another place.

    Args:
        place: Key to put before relative keys, such as 'config.plan[0]'.
        instead_of: Key to be replaced by `place`; '' prefixes relative keys only.
    """
    try:
        yield
    except UserError as error:
        if error.header and not instead_of:
            error.header = f"{place}: {error.header}"
            raise
        error.problems = tuple(p.under(place, instead_of) for p in error.problems)
        if instead_of:
            error.header = Problem("", error.header).under(place, instead_of).text
            error.advice = Problem("", error.advice).under(place, instead_of).text
        raise


@contextlib.contextmanager
def collected(problems: list[Problem]) -> Iterator[None]:
    """Appends the problems of a block's user error to a list instead of raising it."""
    try:
        yield
    except UserError as error:
        # The problems of an error with a header do not make sense without it.
        problems += [Problem.of(str(error))] if error.header else error.problems


def raise_if(
    problems: Iterable[Problem | str], header: str = "", advice: str = ""
) -> None:
    """Raises one user error if there are problems.

    Args:
        problems: Problems, in order.
        header: First line of the message; '' begins with the first problem.
        advice: Last line of the message; '' for none.

    Raises:
        UserError: Lists all of them.
    """
    if problems := tuple(problems):
        raise UserError(*problems, header=header, advice=advice)


class DataMissing(UserError):
    """The data of a run is not where the config says, or the config does not say."""


class TrainingError(RuntimeError):
    """A run that cannot continue, such as a non-finite loss; status 1."""


class NotFinite(TrainingError):
    """A run with a non-finite loss or gradient."""


def is_of_disk(error: OSError) -> bool:
    """Returns whether a file could not be written because the disk takes no more."""
    return error.errno in _OF_DISK


def tells_of_disk(error: Exception) -> bool:
    """Returns whether an error says that the disk takes no more, as that of a save does.

    >>> tells_of_disk(TrainingError(f"checkpoint 3 cannot be saved: {_FULL}"))
    True
    """
    if isinstance(error, OSError):
        return is_of_disk(error)
    told = isinstance(error, TrainingError) and str(error)
    return bool(told) and any(advice in told for advice in _OF_DISK.values())


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
