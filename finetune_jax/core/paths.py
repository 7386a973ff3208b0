"""Paths that users give: home folders and environment variables in them."""

import os
import pathlib
import re

from finetune_jax.core.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)


def user_path(text: str | os.PathLike[str], where: str = "") -> pathlib.Path:
    """Returns the path that a user means.

    `~` and `~user` are home folders, `$NAME` and `${NAME}` environment variables. A path
    with '$' that exists as it is given, or whose folder with '$' does, stays as given; so
    does an existing path such as '~notes' that names no user. A relative path stays
    relative, and bytes that are not UTF-8 stay in it as surrogates.

    Args:
        text: Path as given in a config, on the command line or in Python.
        where: Config key or flag that begins a message.

    Raises:
        UserError: An environment variable is not set, or a user is unknown.
    """
    given = os.fspath(text)
    at_home = os.path.expanduser(given)
    problems = []
    if at_home.startswith("~") and not os.path.lexists(given):
        user = at_home.partition("/")[0]
        problems.append(
            f"the user {user[1:]!r} is unknown; write ./{user} for a file of that name"
        )
    if "$" not in at_home or _is_literal(at_home):
        found = at_home
    else:
        names = [bare or braced for bare, braced in _VARIABLE.findall(at_home)]
        problems += [
            f"the environment variable {name!r} is not set; set it, or write the path "
            "in full"
            for name in dict.fromkeys(names)
            if name not in os.environ
        ]
        found = _VARIABLE.sub(
            lambda match: os.environ.get(match[1] or match[2], ""), at_home
        )
    if problems:
        prefix = f"{where}: " if where else ""
        raise UserError(f"{prefix}{given!r}: {'; '.join(problems)}")
    return pathlib.Path(found)


def existing(text: str, where: str) -> str:
    """Returns a path as it is given, after a check that it exists.

    Args:
        text: Path as a user gives it; see `user_path`.
        where: Config key or flag that begins a message.

    Raises:
        UserError: Nothing is there, or an environment variable is not set.
    """
    found = user_path(text, where)
    if not found.exists():
        meant = "" if text == str(found) else f", which is {printable(found)},"
        raise UserError(f"{where}: {text!r}{meant} does not exist")
    return text


def printable(text: str | os.PathLike[str]) -> str:
    """Returns a path or a line as every terminal and file of UTF-8 takes it.

    Bytes that are not UTF-8 become escapes with a backslash; all else stays.
    """
    return os.fspath(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _is_literal(text: str) -> bool:
    """Returns whether '$' is part of the name of a file or of its folder."""
    if os.path.lexists(text):
        return True
    folder = os.path.dirname(text)
    return "$" in folder and os.path.isdir(folder)
