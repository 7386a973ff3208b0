"""Reads what `torch.save` wrote, without torch and without running anything.

Such a file is a pickle that describes tensors, and their bytes beside it. Python's own
unpickler calls what a pickle names. The machine here knows only the instructions that
build data: a global is nothing but its name, and those in `CALLS` stand for functions
of this module that describe a tensor. Bytes are looked at after the pickle has ended.
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

from finetune_jax.errors import UserError
from finetune_jax.pretrained.mapped import Bytes, stream

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
ADVICE = (
    "Is the file whole? If so, save only the model's state_dict() with torch.save, "
    "or as safetensors."
)
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# Put before every name by DataParallel and by torch.compile.
PREFIXES = ("module.", "_orig_mod.")
# Far above any list of tensors, and so few that what they build fits into memory.
MAX_INSTRUCTIONS = 2**22
# An expanded tensor is larger than its storage, and costs a file nothing.
MAX_GROWTH, MAX_GROWTH_BYTES = 4, 2**26

# numpy knows these of ml_dtypes by name once that is imported, but types do not.
DTYPES = {
    f"torch.{name}": np.dtype(getattr(ml_dtypes, name, name))
    for name in "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 bool int64 "
    "int32 int16 int8 uint64 uint32 uint16 uint8".split()
}
STORAGES = {
    f"torch.{kind}Storage": DTYPES[f"torch.{name}"]
    for kind, name in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8")),
        *(("BFloat16", "bfloat16"), ("Byte", "uint8"), ("Bool", "bool")),
        # Counted in bytes; the tensor says what they mean.
        *(("Untyped", "uint8"), ("storage.Untyped", "uint8")),
    )
}

# The instructions that are understood, by what is done with them.
IGNORED = {"PROTO", "FRAME"}
LITERALS = set(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
FRESH = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict} | {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
# How many values from the top of the stack; None: all since the last mark.
TAKEN = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BUILD": 1} | {
    **{"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None},
    **{"STACK_GLOBAL": 2, "BINPERSID": 1, "REDUCE": 2},
}

# The bytes of storages, by key, where they lie in the file.
Held = dict[str, memoryview]


class _Unfit(Exception):
    """What is wrong with a file, without the file's name and without advice."""


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


def read_torch_file(data: Bytes, where: str) -> dict[str, np.ndarray]:
    """Returns the tensors of the state dict in a file of `torch.save`, by name.

    Both formats are read, that of torch 1.6 and the older one. Of a checkpoint the
    model's state dict is taken; what is not a tensor in it is left out, and a prefix
    that wrappers put before all names. Names of one tensor share one array.

    Args:
        data: The whole file.
        where: What errors begin with, such as the config key and the path.

    Raises:
        UserError: The file is damaged, is not of `torch.save`, or holds something other
            than tensors, several state dicts, or more than its size accounts for.
    """
    try:
        read = _read_zip if data[:2] == b"PK" else _read_legacy
        top, held, is_swapped = read(data)
        limit_bytes = MAX_GROWTH * len(data) + MAX_GROWTH_BYTES
        return _arrays(_state_dict(top), held, is_swapped, limit_bytes)
    except _Unfit as error:
        raise UserError(f"{where}: {error}. {ADVICE}") from None
    except Exception as error:  # Whatever the damage leads to, memory included.
        raise UserError(
            f"{where}: cannot be read as a file of torch.save ({len(data)} bytes): "
            f"{type(error).__name__}: {str(error)[:200]}. {ADVICE}"
        ) from error


def _read_zip(data: Bytes) -> tuple[Any, Held, bool]:
    """Returns the pickled object, the storages' bytes, and whether they are swapped."""
    with zipfile.ZipFile(stream(data)) as archive:
        infos = archive.infolist()
    entries = {info.filename: info for info in infos}
    pickles = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1 or len(entries) < len(infos):
        raise _Unfit("it is a zip archive, but not one that torch.save wrote")
    folder = pickles[0].removesuffix("data.pkl")
    if any(n.startswith((f"{folder}code/", f"{folder}constants.pkl")) for n in entries):
        raise _Unfit("it is a TorchScript archive, which holds a program; none is run")
    order = b"little"
    if f"{folder}byteorder" in entries:
        order = bytes(_entry(data, entries[f"{folder}byteorder"]))
    if order not in (b"little", b"big"):
        raise _Unfit(f"its byteorder is {order[:20]!r}, neither little nor big")
    machine = _Machine()
    top = machine.run(io.BytesIO(_entry(data, entries[pickles[0]])))
    places = {key: f"{folder}data/{key}" for key in machine.storages}
    held = {k: _entry(data, entries[p]) for k, p in places.items() if p in entries}
    return top, held, order == b"big"


def _entry(data: Bytes, info: zipfile.ZipInfo) -> memoryview:
    """Returns the bytes of an entry where they lie, so that no entry can grow."""
    name = info.filename[:100]
    is_stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    if not is_stored or info.compress_size != info.file_size:
        raise _Unfit(f"its entry {name!r} is compressed, which torch.save never does")
    header = struct.unpack_from("<4s22xHH", data, info.header_offset)
    start = info.header_offset + 30 + header[1] + header[2]
    content = memoryview(data)[start : start + info.file_size]
    if header[0] != b"PK\x03\x04" or len(content) != info.file_size:
        raise _Unfit(f"its entry {name!r} lies outside the file")
    if zlib.crc32(content) != info.CRC:
        raise _Unfit(f"the checksum of its entry {name!r} is wrong")
    return content


def _read_legacy(data: Bytes) -> tuple[Any, Held, bool]:
    """Returns the pickled object, the storages' bytes, and False: none is swapped."""
    file = stream(data)
    if _Machine().run(file) != MAGIC or _Machine().run(file) != PROTOCOL:
        raise _Unfit("it is a pickle, but not one that torch.save wrote")
    # About the machine that wrote it; numbers are little-endian whatever it says.
    _Machine().run(file)
    machine = _Machine()
    top = machine.run(file)
    keys = _as(list, _Machine().run(file))
    held: Held = {}
    position = file.tell()
    for key in keys:
        if not isinstance(key, str) or key not in machine.storages:
            raise _Unfit("it lists a storage that no tensor has")
        (count,) = struct.unpack_from("<q", data, position)
        start, itemsize = position + 8, machine.storages[key].dtype.itemsize
        position = start + count * itemsize
        if not start <= position <= len(data):
            raise _Unfit(f"it ends before its storage {key[:100]!r} does")
        held[key] = memoryview(data)[start:position]
    return top, held, False


class _Machine:
    """Runs one pickle, and can only build data.

    Attributes:
        storages: By key, as the pickle describes them first.
    """

    def __init__(self):
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left = MAX_INSTRUCTIONS

    def run(self, file: IO[bytes]) -> Any:
        """Returns the pickled object; the file then stands behind it."""
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
            elif name in ("GLOBAL", "INST"):
                module, _, member = argument.partition(" ")
                self._stack.append(_global(module, member, name))
            elif name not in IGNORED:
                raise _Unfit(f"its pickle has {name}, which describes no tensor")
        raise _Unfit("its pickle has no end")

    def _spend(self, instructions: int):
        self._left -= instructions
        if self._left < 0:
            raise _Unfit(f"its pickle has more than {MAX_INSTRUCTIONS} instructions")

    def _take(self, count: int | None) -> list[Any]:
        if count is None:
            items, self._stack = self._stack, self._below.pop()
            return items
        return [self._stack.pop() for _ in range(count)][::-1]

    def _apply(self, name: str, items: list[Any]):
        if name.startswith("TUPLE"):
            self._stack.append(tuple(items))
        elif name.startswith("APPEND"):
            _as(list, self._stack[-1]).extend(items)
        elif name.startswith("SETITEM"):
            _as(dict, self._stack[-1]).update(_dict(zip(items[::2], items[1::2])))
        elif name == "STACK_GLOBAL":
            self._stack.append(_global(items[0], items[1], name))
        elif name == "BINPERSID":
            storage = _storage(*_as(tuple, items[0]))
            self.storages.setdefault(storage.key, storage)
            self._stack.append(storage)
        elif name == "REDUCE":
            called, arguments = _as(_Global, items[0]), _as(tuple, items[1])
            # A call takes few bytes, however long the list that it goes through.
            lists = [a for a in arguments if isinstance(a, list | tuple | dict)]
            self._spend(sum(map(len, lists)))
            self._stack.append(CALLS[called.name](*arguments))
        else:
            # BUILD sets attributes, such as a state dict's `_metadata`. None is set:
            # they would let a file change objects of this program.
            assert name == "BUILD"


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        found, wanted = type(value).__name__, kind.__name__
        raise _Unfit(f"its pickle has a {found} for a {wanted}")
    return value


def _dict(pairs: Any = ()) -> dict[str, Any]:
    # Names are strings; and to hash a deep tuple overflows the stack of the process.
    return {key: value for key, value in pairs if isinstance(key, str)}


def _global(module: str, name: str, instruction: str) -> _Global:
    full = f"{_as(str, module)}.{_as(str, name)}"
    is_known = full in CALLS or full in STORAGES or full in DTYPES
    if not is_known or instruction == "INST":
        raise _Unfit(
            f"its pickle asks for {full[:100]!r}, so it holds something other than "
            "plain tensors; code in a file is never run"
        )
    return _Global(full)


def _counts(numbers: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 2**63 for n in _as(tuple, numbers)):
        raise _Unfit("a size, stride or offset is not a number from 0 to 2**63 - 1")
    return numbers


def _storage(kind: str, dtype: Any, key: Any, place: Any, count: int, view: Any = None):
    del place  # The device on which it was.
    if kind != "storage" or not isinstance(key, str):
        raise _Unfit("its pickle refers to something that is no storage")
    dtype = STORAGES[_as(_Global, dtype).name]
    start, length = _counts((0, count) if view is None else tuple(view[1:3]))
    return _Storage(key, dtype, start * dtype.itemsize, length * dtype.itemsize)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> _Tensor:
    # Then: requires_grad, hooks, and bits that say to conjugate or negate the numbers.
    if len(more) > 2 and more[2]:
        raise _Unfit("it holds a tensor that is stored negated")
    dtype = _as(_Storage, storage).dtype
    (offset,), size, stride = _counts((offset,)), _counts(size), _counts(stride)
    if len(size) != len(stride) or len(size) > 64:
        raise _Unfit(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    return _Tensor(storage, dtype, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any
) -> _Tensor:
    tensor = _tensor(storage, offset, size, stride, grad, hooks)
    return dataclasses.replace(tensor, dtype=DTYPES[_as(_Global, dtype).name])


CALLS = {
    "collections.OrderedDict": _dict,
    "torch.Size": lambda size: _as(tuple, size),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda tensor, grad, hooks: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *state: tensor,
}


def _tensors(values: dict[str, Any]) -> dict[str, _Tensor]:
    return {n: value for n, value in values.items() if isinstance(value, _Tensor)}


def _state_dict(top: Any) -> dict[str, _Tensor]:
    """Returns the tensors of the one state dict, named without wrappers' prefixes."""
    if not isinstance(top, dict):
        kind = type(top).__name__.lstrip("_").lower()
        raise _Unfit(f"it holds one {kind} and no dict of tensors")
    nested = [n for n, v in top.items() if isinstance(v, dict) and _tensors(v)]
    found = [name for name in WRAPPERS if name in nested] or nested
    tensors = _tensors(top)
    if len(found) == 1 and (found[0] in WRAPPERS or not tensors):
        tensors, found = _tensors(top[found[0]]), []
    if found or not tensors:
        keys = ", ".join(repr(name[:100]) for name in sorted(top)[:20])
        problem = "several dicts of tensors" if found else "no dict of tensors"
        raise _Unfit(f"it holds {problem}; its keys are [{keys}]")
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if all(n.startswith(prefix) and n != prefix for n in tensors):
                tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
    return tensors


def _arrays(
    tensors: dict[str, _Tensor], held: Held, is_swapped: bool, limit_bytes: int
) -> dict[str, np.ndarray]:
    """Returns the described tensors as arrays that do not hold on to the file."""
    copies: dict[_Tensor, np.ndarray] = {}
    for name, tensor in tensors.items():
        if tensor not in copies:
            view = _view(name[:100], tensor, held)
            limit_bytes -= view.nbytes
            if limit_bytes < 0:
                raise _Unfit("its tensors claim far more bytes than it has")
            bits = np.array(view.view(f"u{view.itemsize}"), order="C")
            bits = bits.byteswap() if is_swapped else bits
            # A byte other than 0 and 1 is no bool to numpy, but to torch it is.
            bits = np.minimum(bits, 1, out=bits) if view.dtype == np.bool_ else bits
            copies[tensor] = bits.view(view.dtype)
    return {name: copies[tensor] for name, tensor in tensors.items()}


def _view(name: str, tensor: _Tensor, held: Held) -> np.ndarray:
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    if 0 in tensor.size:
        return np.empty(tensor.size, tensor.dtype)
    if storage.key not in held:
        raise _Unfit(f"the bytes of tensor {name!r} are missing")
    content = held[storage.key][storage.start_bytes :][: storage.length_bytes]
    if len(content) != storage.length_bytes:
        raise _Unfit(f"the bytes of tensor {name!r} are fewer than it says")
    reach = sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride))
    if (tensor.offset + reach + 1) * itemsize > storage.length_bytes:
        raise _Unfit(f"tensor {name!r} of shape {tensor.size} leaves its storage")
    # Strides of a single element mean nothing, and may be too large for numpy.
    strides = [s * itemsize if n > 1 else 0 for n, s in zip(tensor.size, tensor.stride)]
    start = tensor.offset * itemsize
    return np.ndarray(tensor.size, tensor.dtype, content, start, strides)
