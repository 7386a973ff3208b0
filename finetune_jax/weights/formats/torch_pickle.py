"""Reads files of `torch.save` without torch and without running code.

Such a file has a pickle that describes tensors, and the bytes of the tensors. Python's own
unpickler calls the functions that a pickle names. The machine here knows only instructions
that build data. A global is only a name; the names in `CALLS` stand for functions of this
module that describe a tensor. Any other object becomes `Opaque`, with its name and without
its contents. Nothing is imported or called. Bytes are read after the pickle has ended.
"""

import dataclasses
import io
import pickletools
import struct
import zipfile
import zlib
from typing import IO, Any

import ml_dtypes
import numpy as np

from finetune_jax.core.errors import UserError
from finetune_jax.weights.formats.contents import (
    Contents,
    listed_classes,
    named_network,
)
from finetune_jax.weights.formats.entries import Opaque, Unfit, choose_entry
from finetune_jax.weights.formats.mapped import Bytes, stream

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
ADVICE = "Save only the model's state_dict() with torch.save, or as safetensors."
# More than any list of tensors needs, and few enough to fit into memory.
MAX_INSTRUCTIONS = 2**22
# An expanded tensor is larger than its storage, so a small file could claim any size.
MAX_GROWTH, MAX_GROWTH_BYTES = 4, 2**26

# Type checkers do not know the dtypes that ml_dtypes adds to numpy by name.
DTYPES = {
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name, name))
    for name in "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 "
    "float8_e4m3fnuz float8_e5m2fnuz bool int64 int32 int16 int8 uint64 uint32 uint16 "
    "uint8".split()
}
STORAGES = {
    f"torch.{kind}Storage": DTYPES[f"torch.{name}"]
    for kind, name in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8")),
        *(("BFloat16", "bfloat16"), ("Byte", "uint8"), ("Bool", "bool")),
        # Untyped: counted in bytes, the tensor has the dtype.
        *(("Untyped", "uint8"), ("storage.Untyped", "uint8")),
    )
}

# Supported instructions, by their effect.
IGNORED = {"PROTO", "FRAME"}
LITERALS = set(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
FRESH = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict} | {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_SET": lambda: Opaque("builtins.set"),
}
# Number of values from the top of the stack; None for all since the last mark.
TAKEN = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BUILD": 1} | {
    **{"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None},
    **{"STACK_GLOBAL": 2, "BINPERSID": 1, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3},
    **{"OBJ": None, "ADDITEMS": None, "FROZENSET": None, "POP_MARK": None},
}

# Bytes of storages by key, without copies.
Held = dict[str, memoryview]


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    start_bytes: int
    length_bytes: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(data: Bytes, where: str, entry: str | None = None) -> Contents:
    """Returns the tensors of the state dict in a file of `torch.save`, by name.

    Reads the format of torch 1.6 and the older one. Of a checkpoint it takes the model's
    state dict, without objects other than tensors and without the prefixes of wrappers.
    Several names of one tensor share one array.

    Args:
        data: The whole file.
        where: Beginning of error messages, such as the config key and the path.
        entry: Name of the checkpoint's entry; None takes the usual one.

    Raises:
        UserError: The file is damaged, was not written by `torch.save`, holds no tensors
            or several state dicts, or claims more bytes than it has.
    """
    try:
        read = _read_zip if data[:2] == b"PK" else _read_legacy
        top, held, is_swapped = read(data)
        limit_bytes = MAX_GROWTH * len(data) + MAX_GROWTH_BYTES
        chosen = choose_entry(top, entry, lambda value: isinstance(value, _Tensor))
        return Contents(
            tensors=_arrays(chosen.tensors, held, is_swapped, limit_bytes),
            notes=chosen.notes,
            class_names=listed_classes(top),
            arch=named_network(top),
        )
    except Unfit as error:
        raise UserError(f"{where}: {error}. {ADVICE}") from None
    except UserError:
        raise
    except Exception as error:  # Damage can raise any error, that of memory too.
        raise UserError(
            f"{where}: cannot be read as a file of torch.save ({len(data)} bytes): "
            f"{type(error).__name__}: {str(error)[:200]}. Is the file whole? If so: "
            f"{ADVICE}"
        ) from error


def _read_zip(data: Bytes) -> tuple[Any, Held, bool]:
    """Returns the pickled object, the storages' bytes, and whether bytes are swapped."""
    with zipfile.ZipFile(stream(data)) as archive:
        infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1 or len(entries) < len(infos):
        raise Unfit("it is a zip archive, but not one that torch.save wrote")
    folder = pickles[0].removesuffix("data.pkl")
    if any(n.startswith((f"{folder}code/", f"{folder}constants.pkl")) for n in entries):
        raise Unfit("it is a TorchScript archive, which holds a program; none is run")
    order = b"little"
    if f"{folder}byteorder" in entries:
        order = bytes(_entry(data, entries[f"{folder}byteorder"]))
    if order not in (b"little", b"big"):
        raise Unfit(f"its byteorder is {order[:20]!r}, neither little nor big")
    machine = _Machine()
    top = machine.run(io.BytesIO(_entry(data, entries[pickles[0]])))
    places = {key: f"{folder}data/{key}" for key in machine.storages}
    held = {k: _entry(data, entries[p]) for k, p in places.items() if p in entries}
    return top, held, order == b"big"


def _entry(data: Bytes, info: zipfile.ZipInfo) -> memoryview:
    """Returns the bytes of an entry without decompression, so that none can grow."""
    name = info.filename[:100]
    is_stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    if not is_stored or info.compress_size != info.file_size:
        raise Unfit(f"its entry {name!r} is compressed, which torch.save never does")
    header = struct.unpack_from("<4s22xHH", data, info.header_offset)
    start = info.header_offset + 30 + header[1] + header[2]
    content = memoryview(data)[start : start + info.file_size]
    if header[0] != b"PK\x03\x04" or len(content) != info.file_size:
        raise Unfit(f"its entry {name!r} lies outside the file")
    if zlib.crc32(content) != info.CRC:
        raise Unfit(f"the checksum of its entry {name!r} is wrong")
    return content


def _read_legacy(data: Bytes) -> tuple[Any, Held, bool]:
    """Returns the pickled object, the storages' bytes, and False for swapped bytes."""
    file = stream(data)
    machine = _Machine()
    if machine.run(file) != MAGIC or machine.run(file) != PROTOCOL:
        kinds = ", ".join(map(repr, list(machine.kinds)[:3]))
        raise Unfit(
            f"it is a pickle{f' of {kinds}' if kinds else ''}, but not one that torch.save "
            "wrote; code in a file is never run"
        )
    # A description of the writing machine; numbers are always little-endian.
    _Machine().run(file)
    machine = _Machine()
    top = machine.run(file)
    keys = _as(list, _Machine().run(file))
    held: Held = {}
    position = file.tell()
    for key in keys:
        if not isinstance(key, str) or key not in machine.storages:
            raise Unfit("it lists a storage that no tensor has")
        (count,) = struct.unpack_from("<q", data, position)
        start, itemsize = position + 8, machine.storages[key].dtype.itemsize
        position = start + count * itemsize
        if not start <= position <= len(data):
            raise Unfit(f"it ends before its storage {key[:100]!r} does")
        held[key] = memoryview(data)[start:position]
    return top, held, False


class _Machine:
    """Runs a pickle, with instructions that only build data.

    Attributes:
        storages: Storages by key, as first described in the pickle.
        kinds: Names of unknown classes and functions, in order.
    """

    def __init__(self):
        self.storages: dict[str, _Storage] = {}
        self.kinds: dict[str, None] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left = MAX_INSTRUCTIONS

    def run(self, file: IO[bytes]) -> Any:
        """Returns the pickled object and leaves the file at its end."""
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            self._spend(1)
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            elif name in LITERALS:
                self._stack.append(argument)
            elif name in FRESH:
                self._stack.append(FRESH[name]())
            elif name in TAKEN:
                self._apply(name, self._take(TAKEN[name]))
            elif name == "MARK":
                self._below.append(self._stack)
                self._stack = []
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                place = len(self._memo) if name == "MEMOIZE" else argument
                self._memo[place] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name == "GLOBAL":
                module, _, member = argument.partition(" ")
                self._stack.append(self._global(module, member))
            elif name == "INST":
                self._take(None)
                self._stack.append(self._opaque(argument.replace(" ", ".", 1)))
            elif name == "POP":
                self._pop()
            elif name not in IGNORED:
                raise Unfit(f"its pickle has {name}, which describes no tensor")
        raise Unfit("its pickle has no end")

    def _spend(self, instructions: int):
        self._left -= instructions
        if self._left < 0:
            raise Unfit(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    def _take(self, count: int | None) -> list[Any]:
        if count is None:
            items, self._stack = self._stack, self._below.pop()
            return items
        return [self._stack.pop() for _ in range(count)][::-1]

    def _pop(self):
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._below.pop()

    def _opaque(self, kind: str) -> Opaque:
        kind = kind[:100]
        self.kinds[kind] = None
        return Opaque(kind)

    def _global(self, module: Any, name: Any) -> "_Global | Opaque":
        full = f"{_as(str, module)}.{_as(str, name)}"
        if full in CALLS or full in STORAGES or full in DTYPES:
            return _Global(full)
        return self._opaque(full)

    def _apply(self, name: str, items: list[Any]):
        if name.startswith("TUPLE"):
            self._stack.append(tuple(items))
        elif name.startswith("APPEND"):
            if not isinstance(self._stack[-1], Opaque):
                _as(list, self._stack[-1]).extend(items)
        elif name.startswith("SETITEM"):
            if not isinstance(self._stack[-1], Opaque):
                _as(dict, self._stack[-1]).update(_dict(zip(items[::2], items[1::2])))
        elif name == "STACK_GLOBAL":
            self._stack.append(self._global(*items))
        elif name == "BINPERSID":
            self._stack.append(self._referred(_as(tuple, items[0])))
        elif name in ("NEWOBJ", "NEWOBJ_EX", "OBJ"):
            self._stack.append(self._opaque(_name(items[0])))
        elif name == "FROZENSET":
            self._stack.append(self._opaque("builtins.frozenset"))
        elif name == "REDUCE":
            self._stack.append(self._called(items[0], items[1]))
        else:
            # BUILD sets attributes, such as a state dict's `_metadata`. They are ignored,
            # as they would let a file change objects of this program. Elements of sets
            # and popped values are ignored, too.
            assert name in ("BUILD", "ADDITEMS", "POP_MARK")

    def _referred(self, identity: tuple) -> "_Storage | Opaque":
        # Torch before 1.6 stores the source of a module's class with the class.
        if len(identity) == 4 and identity[0] == "module":
            return self._opaque(_name(identity[1]))
        storage = _storage(*identity)
        self.storages.setdefault(storage.key, storage)
        return storage

    def _called(self, called: Any, arguments: Any) -> Any:
        if isinstance(called, Opaque):
            return self._opaque(called.kind)
        name, arguments = _as(_Global, called).name, _as(tuple, arguments)
        # A short instruction can go through a long list.
        lists = [a for a in arguments if isinstance(a, list | tuple | dict)]
        self._spend(sum(map(len, lists)))
        return CALLS[name](*arguments)


def _name(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.kind
    return _as(_Global, value).name


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        found, wanted = type(value).__name__, kind.__name__
        raise Unfit(f"its pickle has a {found} for a {wanted}")
    return value


def _dict(pairs: Any = ()) -> dict[str, Any]:
    # Names are strings, or numbers of classes. Hashing a deep tuple would overflow the
    # stack of the process.
    return {
        str(key): value
        for key, value in pairs
        if isinstance(key, str) or (type(key) is int and isinstance(value, str))
    }


def _counts(numbers: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 2**63 for n in _as(tuple, numbers)):
        raise Unfit("a size, stride or offset is not a number from 0 to 2**63 - 1")
    return numbers


def _storage(kind: str, dtype: Any, key: Any, place: Any, count: int, view: Any = None):
    del place  # The device of the storage.
    if kind != "storage" or not isinstance(key, str):
        raise Unfit("its pickle refers to something that is no storage")
    if isinstance(dtype, Opaque):
        raise Unfit(f"it holds something other than plain tensors: {_numbers(dtype)}")
    dtype = STORAGES[_as(_Global, dtype).name]
    start, length = _counts((0, count) if view is None else tuple(view[1:3]))
    return _Storage(key, dtype, start * dtype.itemsize, length * dtype.itemsize)


def _numbers(storage: Opaque) -> str:
    told = {"torch.Complex": "complex numbers", "torch.Q": "quantised integers"}
    found = [text for begin, text in told.items() if storage.kind.startswith(begin)]
    return f"{found[0] if found else 'unknown numbers'} ({storage.kind})"


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Tensor:
    # Then requires_grad, hooks, and flags for conjugated and negated numbers.
    if len(more) > 2 and more[2]:
        raise Unfit("it holds a tensor that is stored negated")
    dtype = _as(_Storage, storage).dtype
    (offset,), size, stride = _counts((offset,)), _counts(size), _counts(stride)
    if len(size) != len(stride) or len(size) > 64:
        raise Unfit(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    return _Tensor(storage, dtype, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any
) -> _Tensor:
    tensor = _tensor(storage, offset, size, stride, grad, hooks)
    return dataclasses.replace(tensor, dtype=DTYPES[_as(_Global, dtype).name])


CALLS = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *factory: {},
    "torch.Size": lambda size: _as(tuple, size),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, grad, hooks: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *state: tensor,
}


def _arrays(
    tensors: dict[str, _Tensor], held: Held, is_swapped: bool, limit_bytes: int
) -> dict[str, np.ndarray]:
    """Returns the described tensors as arrays that are copies of the file's bytes."""
    copies: dict[_Tensor, np.ndarray] = {}
    for name, tensor in tensors.items():
        if tensor not in copies:
            view = _view(name[:100], tensor, held)
            limit_bytes -= view.nbytes
            if limit_bytes < 0:
                raise Unfit("its tensors claim far more bytes than it has")
            bits = np.array(view.view(f"u{view.itemsize}"), order="C")
            bits = bits.byteswap() if is_swapped else bits
            # Torch reads every byte but 0 as True, numpy only 1.
            bits = np.minimum(bits, 1, out=bits) if view.dtype == np.bool_ else bits
            copies[tensor] = bits.view(view.dtype)
    return {name: copies[tensor] for name, tensor in tensors.items()}


def _view(name: str, tensor: _Tensor, held: Held) -> np.ndarray:
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    if 0 in tensor.size:
        return np.empty(tensor.size, tensor.dtype)
    if storage.key not in held:
        raise Unfit(f"the bytes of tensor {name!r} are missing")
    content = held[storage.key][storage.start_bytes :][: storage.length_bytes]
    if len(content) != storage.length_bytes:
        raise Unfit(f"the bytes of tensor {name!r} are fewer than it says")
    reach = sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride))
    if (tensor.offset + reach + 1) * itemsize > storage.length_bytes:
        raise Unfit(f"tensor {name!r} of shape {tensor.size} leaves its storage")
    # Strides of axes with one element have no effect, and may be too large for numpy.
    strides = [s * itemsize if n > 1 else 0 for n, s in zip(tensor.size, tensor.stride)]
    start = tensor.offset * itemsize
    return np.ndarray(tensor.size, tensor.dtype, content, start, strides)
