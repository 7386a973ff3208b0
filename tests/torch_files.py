"""Writes files as `torch.save` does, without torch; and files that it never writes.

A pickle is spelled out, because Python's own pickler would import what it names.
"""

import dataclasses
import io
import struct
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


@dataclasses.dataclass(frozen=True)
class Name:
    """A global: `module name`."""

    full: str


@dataclasses.dataclass(frozen=True)
class Call:
    """The result of a global called with values."""

    name: Name
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Reference:
    """A persistent id."""

    identity: tuple


@dataclasses.dataclass(frozen=True)
class Raw:
    """Instructions as they are."""

    instructions: bytes


def pickled(value):
    """Returns the pickle of a value that is made of plain data and the above."""
    return b"\x80\x02" + _instructions(value) + b"."


def _instructions(value):
    match value:
        case Raw():
            return value.instructions
        case Name():
            return b"c" + value.full.replace(" ", "\n").encode() + b"\n"
        case Call():
            return _instructions(value.name) + _instructions(value.arguments) + b"R"
        case Reference():
            return _instructions(value.identity) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(digits)]) + digits
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(_instructions, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_instructions, value)) + b"e"
        case dict():
            items = [_instructions(part) for item in value.items() for part in item]
            return b"}(" + b"".join(items) + b"u"
    raise TypeError(f"cannot write a {type(value).__name__}")


def described(key, array, *, legacy=False, **lies):
    """Returns the call that rebuilds an array; `lies` replace what it says."""
    steps = tuple(step // array.itemsize for step in array.strides)
    said = {"offset": 0, "size": array.shape, "stride": steps, "count": array.size}
    said |= lies
    storage = Name(f"torch {STORAGES[array.dtype.name]}")
    identity = ("storage", storage, key, "cpu", said["count"])
    place = Reference((*identity, None) if legacy else identity)
    hooks = Call(Name("collections OrderedDict"), ())
    return Call(
        Name("torch._utils _rebuild_tensor_v2"),
        (place, said["offset"], said["size"], said["stride"], False, hooks),
    )


def zipped(value, storages=(), *, extra=(), compression=zipfile.ZIP_STORED):
    """Returns an archive with the pickle of a value, or with a pickle given as bytes."""
    pickle = value if isinstance(value, bytes) else pickled(value)
    entries = {"data.pkl": pickle, "byteorder": b"little", **dict(extra)}
    entries |= {f"data/{i}": array.tobytes() for i, array in enumerate(storages)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {**entries, "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def write_zip(tensors):
    """Returns a file in the format of torch 1.6 with a state dict of arrays."""
    storages = [np.asarray(array, order="C") for array in tensors.values()]
    calls = [described(str(i), array) for i, array in enumerate(storages)]
    return zipped(dict(zip(tensors, calls)), storages)


def write_legacy(tensors):
    """Returns the same in the format before that."""
    storages = [np.asarray(array, order="C") for array in tensors.values()]
    keys = [str(94_000 + i) for i in range(len(storages))]
    calls = [described(key, a, legacy=True) for key, a in zip(keys, storages)]
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (MAGIC, 1001, system, dict(zip(tensors, calls)), keys)
    contents = [struct.pack("<q", a.size) + a.tobytes() for a in storages]
    return b"".join([*map(pickled, parts), *contents])


def with_code():
    """Returns a file that makes the folder `code-was-run` if it is unpickled."""
    return zipped({"weight": Call(Name("os mkdir"), ("code-was-run",))})


def with_objects(tensors):
    """Returns a training checkpoint: tensors, averaged ones, and objects beside them."""
    arrays = [np.asarray(array, order="C") for array in tensors.values()] * 2
    calls = [described(str(i), array) for i, array in enumerate(arrays)]
    namespace = b"cargparse\nNamespace\n)\x81}X\x02\x00\x00\x00lrK\x01sb"
    checkpoint = {
        "state_dict": dict(zip(tensors, calls)),
        "ema": {"module": dict(zip(tensors, calls[len(tensors) :]))},
        "args": Raw(namespace),
        "path": Call(Name("pathlib PosixPath"), ("/", "tmp")),
        "history": [Raw(b"ccollections\nOrderedDict\n)}\x92"), {"a": (1, None)}],
    }
    return zipped(checkpoint, arrays)
