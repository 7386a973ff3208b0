"""Finds which process writes in a folder that processes may or may not share."""

import contextlib
import os
import pathlib
import secrets

from finetune_jax.parallel import processes


def writes(folder: pathlib.Path) -> bool:
    """Returns whether this process writes in a folder, and others on it only read.

    It is process 0 if all processes see the same folder, else the first one of each host.

    Args:
        folder: Folder, made if need be.
    """
    if processes.count() == 1:
        return True
    token = processes.agreed("a folder", lambda: _made(folder))
    sees = token is not None and (folder / token).is_file()
    host = os.uname().nodename
    found = processes.gathered("a folder", [host, sees])
    if processes.is_first() and token is not None:
        with contextlib.suppress(OSError):
            (folder / token).unlink()
    if all(seen for _, seen in found):
        return processes.is_first()
    return [other for other, _ in found].index(host) == processes.index()


def _made(folder: pathlib.Path) -> str | None:
    """Returns the name of a new file in a folder; None if none can be made."""
    token = f".seen-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    except OSError:
        return None
    return token
