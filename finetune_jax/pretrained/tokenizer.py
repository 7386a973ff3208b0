"""The tokenizer of texts: it lies beside the weights that were trained with it."""

import importlib.util
import pathlib

from finetune_jax import lookup
from finetune_jax.errors import UserError
from finetune_jax.pretrained.addresses import READERS, downloaded

FILE = "tokenizer.json"
_KEY = "config.data.tokenizer"


def find_tokenizer(address: str | None, weights: str | None) -> str | None:
    """Returns what the tokenizer.json of a run's texts holds; None if there is none.

    Args:
        address: `config.data.tokenizer`: of the file, or of a folder that has it.
        weights: `config.init.pretrained`, beside which it is looked for.

    Raises:
        UserError: Nothing is at the address, or nothing that can be read.
    """
    given = weights if address is None else address
    if given is None:
        return None
    kind, _, place = given.partition(":")
    if address is None and (kind not in READERS or not place):
        return None  # What is wrong with it is said where weights are read.
    lookup.choose(READERS, kind, _KEY)
    path = _path(kind, place)
    if path is None or not path.is_file():
        if address is None:
            return None
        raise UserError(f"{_KEY}: {address!r}: no {FILE} there")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_KEY}: {path} cannot be read: {error}") from error


def _path(kind: str, place: str) -> pathlib.Path | None:
    """Returns where the file of an address is, whether there is one or not."""
    if kind == "hf":
        parts = place.split("/")
        if len(parts) < 2:
            raise UserError(f"{_KEY}: 'hf:{place}' is not hf:OWNER/REPO")
        folder = "/".join(parts[2:-1])
        name = f"{folder}/{FILE}" if folder else FILE
        return pathlib.Path(downloaded("/".join(parts[:2]), (name,)))
    if kind == "zoo":
        return None
    if kind == "package":
        module, _, inside = place.partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            return None
        path = pathlib.Path(spec.submodule_search_locations[0]) / inside
    else:
        path = pathlib.Path(place).expanduser()
    if path.suffix == ".json":
        return path
    return (path if path.is_dir() else path.parent) / FILE
