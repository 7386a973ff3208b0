"""Weights addresses: where weights lie, and how they are read from there.

    zoo:NAME      shipped with this project
    file:PATH     a `.safetensors` file
    orbax:DIR     the workdir of a run, or an orbax checkpoint

Nothing in a weight file is ever executed.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from finetune_jax import lookup
from finetune_jax.errors import UserError

ZOO = pathlib.Path(__file__).parent / "zoo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors by name, as they lie in a file.

    Attributes:
        address: Where they come from.
        tensors: By their names there.
        sha256: Of every file that was read, by path.
    """

    address: str
    tensors: dict[str, np.ndarray]
    sha256: dict[str, str]


def read_weights(address: str) -> Weights:
    """Returns the tensors at an address.

    Raises:
        UserError: No such kind of address, nothing there, or nothing that can be read.
    """
    kind, _, place = address.partition(":")
    if not place:
        raise UserError(
            f"config.init.pretrained: {address!r} is not an address; "
            f"write {', '.join(f'{k}:...' for k in READERS)}"
        )
    return lookup.choose(READERS, kind, "config.init.pretrained")(address, place)


def _zoo(address: str, name: str) -> Weights:
    known = {path.stem: path for path in ZOO.glob("*.safetensors")}
    return _file(address, str(lookup.choose(known, name, "config.init.pretrained")))


def _file(address: str, place: str) -> Weights:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = pathlib.Path(place).expanduser()
    if not path.is_file():
        raise UserError(f"config.init.pretrained: no file {place!r}")
    if path.suffix != ".safetensors":
        raise UserError(f"config.init.pretrained: {place!r} is not a .safetensors file")
    data = path.read_bytes()
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.init.pretrained: {place!r} cannot be read as safetensors "
            f"({len(data)} bytes): {error}. Is it whole?"
        ) from error
    sha256 = {str(path): hashlib.sha256(data).hexdigest()}
    return Weights(address=address, tensors=tensors, sha256=sha256)


def _orbax(address: str, place: str) -> Weights:
    import orbax.checkpoint as ocp

    from finetune_jax.trees import named

    folder = _step_folder(pathlib.Path(place).expanduser())
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore(folder)
    except Exception as error:  # Orbax raises whatever the damage leads to.
        raise UserError(
            f"config.init.pretrained: {folder} is not an orbax checkpoint: {error}"
        ) from error
    wanted = {key: tree[key] for key in ("params", "batch_stats") if key in tree}
    tensors = {name: np.asarray(leaf) for name, leaf in named(wanted or tree).items()}
    sha256 = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Weights(address=address, tensors=tensors, sha256=sha256)


def _step_folder(place: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the arrays: of a run's best checkpoint, or else its last."""
    if not place.is_dir():
        raise UserError(f"config.init.pretrained: no folder {str(place)!r}")
    folder = place.absolute()
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    steps = [p for p in folder.iterdir() if p.name.isdigit() and (p / "state").is_dir()]
    if steps:
        folder = max(steps, key=lambda step: int(step.name))
        best = folder.parent.parent / "result.json"
        if best.is_file():
            import json

            step = json.loads(best.read_text()).get("best_step")
            chosen = folder.parent / str(step)
            folder = chosen if chosen.is_dir() else folder
    return folder / "state" if (folder / "state").is_dir() else folder


READERS = {"zoo": _zoo, "file": _file, "orbax": _orbax}
