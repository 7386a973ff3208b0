"""What a user did wrong, told in one message: found, where, what to do."""

import errno
from collections.abc import Iterable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AFTER_DISK_FULL = "make room, and the same command goes on from the last checkpoint"


class UserError(ValueError):
    """A mistake of the user's; the program ends with status 2 and without traceback."""


class DataMissing(UserError):
    """The data of a run is not where the config says, or the config does not say."""


class TrainingError(RuntimeError):
    """A run that cannot go on, such as a loss that is not finite; status 1."""


class NotFinite(TrainingError):
    """A run whose loss or gradient is not finite."""


def problems_error(header: str, problems: Iterable[str], advice: str = "") -> UserError:
    """Returns one error that lists every problem, in order, each on its own line."""
    lines = [header, *(f"  {problem}" for problem in problems)]
    return UserError("\n".join([*lines, advice] if advice else lines))
