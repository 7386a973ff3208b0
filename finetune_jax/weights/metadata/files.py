"""Files beside weights, or at their own address."""

import pathlib

from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.weights.addresses import READERS, downloaded, package_folder


def path_beside(address: str, name: str) -> pathlib.Path | None:
    """Returns the path of a file beside an address, which may not exist.

    Args:
        address: Address of weights or of a folder.
        name: Name of the file.

    Raises:
        UserError: The file cannot be downloaded from the hub.
    """
    kind, _, place = address.partition(":")
    if kind not in READERS or kind == "zoo" or not place:
        return None
    if kind == "hf":
        parts = place.split("/")
        if len(parts) < 2:
            raise UserError(f"{address!r} is not hf:OWNER/REPO")
        inside = str(pathlib.PurePosixPath("/".join(parts[2:-1]), name))
        return pathlib.Path(downloaded("/".join(parts[:2]), (inside,)))
    if kind == "package":
        module, _, inside = place.partition("/")
        root = package_folder(module)
        if root is None:
            return None
        path = root / inside
    else:
        path = user_path(place, address)
    return (path if path.is_dir() else path.parent) / name


def read_beside(address: str, name: str) -> str | None:
    """Returns the text of a file beside an address; None if it does not exist.

    Raises:
        UserError: The file cannot be read, or downloaded from the hub.
    """
    path = path_beside(address, name)
    if path is None or not path.is_file():
        return None
    try:
        # `read_text` would turn carriage returns into ends of lines.
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
