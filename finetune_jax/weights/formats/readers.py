"""Formats of weight files: the content of a file decides how it is read."""

import io
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.weights.formats.contents import Contents
from finetune_jax.weights.formats.mapped import Bytes, stream
from finetune_jax.weights.formats.safetensors_file import read_safetensors, taken
from finetune_jax.weights.formats.torch_pickle import read_torch_file

# Takes the bytes of a file, the beginning of error messages, and the requested entry.
Reader = Callable[..., Contents]
# The first bytes of files of torch before 1.6: torch's magic number, pickled.
_OLD_TORCH = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
# The first bytes of files without weights, or with those of other programs.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file; run `git lfs pull`"),
    (b"GGUF", "a GGUF file, whose numbers are quantised"),
    (b"\x89HDF\r\n", "an HDF5 file, such as of Keras; save the weights as .npz"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x93NUMPY", "one array, an .npy file; save all arrays by name with np.savez"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF"),
)
_WEB_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")
_OF_SUFFIX = {
    ".onnx": "an ONNX model; the weights that it came from are needed",
    ".h5": "of Keras or TensorFlow; save the weights as .npz or safetensors",
    ".keras": "of Keras; save the weights as .npz or safetensors",
    ".msgpack": "of flax; save the weights as .npz or safetensors",
    ".pb": "of TensorFlow; save the weights as .npz or safetensors",
    ".tflite": "a TensorFlow Lite program",
    ".gguf": "a GGUF file, whose numbers are quantised",
}


def read_npz(data: Bytes, where: str, entry: str | None = None) -> Contents:
    """Returns the arrays of an .npz file.

    Args:
        data: The whole file.
        where: Beginning of error messages, such as the config key and the path.
        entry: Beginning of the names of the arrays to take; None takes all.

    Raises:
        UserError: The file is damaged, or holds something other than plain arrays.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises many kinds of errors.
        raise UserError(
            f"{where}: cannot be read as an .npz file of plain arrays ({len(data)} "
            f"bytes): {error}"
        ) from error
    return taken(found, entry, where)


FORMATS: dict[str, Reader] = {
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".pth": read_torch_file,
    ".pt": read_torch_file,
    ".bin": read_torch_file,
    ".ckpt": read_torch_file,
}
_NAMES = {
    read_safetensors: "a file of safetensors",
    read_npz: "a file of .npz",
    read_torch_file: "a file of torch.save",
}


def is_weights(path: pathlib.PurePath) -> bool:
    """Returns whether a file's name is that of weights, in lower or upper case."""
    return path.suffix.lower() in FORMATS or path.name.lower().endswith(".pth.tar")


def choose_reader(data: Bytes, path: pathlib.Path) -> tuple[Reader, tuple[str, ...]]:
    """Returns the reader of a file, and a line if the name suggests another one.

    Args:
        data: The whole file.
        path: Path of the file.

    Raises:
        UserError: The file is empty, or has no weights.
    """
    where = f"config.init.pretrained: {path}"
    by_name = FORMATS.get(path.suffix.lower())
    by_content = _by_content(data)
    if by_content is None:
        if told := _other_content(data):
            kind = _NAMES[by_name].split(" ")[-1] if by_name else ""
            reads = f"cannot be read as {kind}: " if kind else ""
            raise UserError(f"{where}: {reads}it is {told}")
        if by_name is None:
            told = _OF_SUFFIX.get(path.suffix.lower())
            raise UserError(
                f"{where}: {f'it is {told}' if told else 'its content is unknown'}; "
                f"weights are in {', '.join(FORMATS)}"
            )
        return by_name, ()
    if by_name in (None, by_content):
        is_named = by_name is not None or is_weights(path)
        notes = () if is_named else (f"read as {_NAMES[by_content]}, by its content",)
        return by_content, notes
    return by_content, (f"is {_NAMES[by_content]} in spite of its name",)


def _by_content(data: Bytes) -> Reader | None:
    if data[:2] == b"PK":
        return _of_archive(data)
    if data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8:
        return read_safetensors
    # The reader reports pickles of other objects.
    return read_torch_file if _OLD_TORCH in data[:32] else None


def _of_archive(data: Bytes) -> Reader | None:
    try:
        with zipfile.ZipFile(stream(data)) as archive:
            names = archive.namelist()
    except Exception:  # The reader reports the damage.
        return None
    if any(name.endswith("data.pkl") for name in names):
        return read_torch_file
    return read_npz if any(name.endswith(".npy") for name in names) else None


def _other_content(data: Bytes) -> str | None:
    """Returns a description of a file without weights; None if it is unknown."""
    start = data[:300]
    if not start:
        return "empty (0 bytes); download or copy it again"
    if start.lstrip().lower().startswith(_WEB_PAGES):
        return "a web page, such as a notice in place of a download; download it again"
    for beginning, told in _BEGINNINGS:
        if start.startswith(beginning):
            return told
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if start[4:8] == b"TFL3":
        return _OF_SUFFIX[".tflite"]
    # The format version, then the name of the producer or the graph.
    if start[:1] == b"\x08" and start[1:2] < b"\x20" and start[2:3] in (b"\x12", b":"):
        return _OF_SUFFIX[".onnx"]
    if not start.strip(b"\0"):
        return "full of zeros, such as after a download that was cut off"
    return None
