"""PyTorch's files (`.bin`, `.pt`, `.pth`) without PyTorch: tensors are mapped, and nothing is ever executed.

What torch.save writes is a pickle beside raw storages: in a zip archive (since PyTorch 1.6; docs: notes/serialization),
or one after the other in one stream (before). A pickle is a program, so none is ever run here: an interpreter of a few
dozen opcodes builds numbers, texts, lists and dictionaries, knows a handful of names, and imports and calls nothing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, NoReturn

from pronghorn.weights.files import fail, shown
from pronghorn.weights.types import DTYPES, Made, Tensor

_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": "f32", "Half": "f16", "BFloat16": "bf16", "Double": "f64", "Long": "i64", "Int": "i32",
        "Short": "i16", "Char": "i8", "Byte": "u8", "Bool": "bool",
    }.items()
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LONGEST_PICKLE = 64 << 20
"""Bytes. A model of a thousand tensors takes a quarter of a megabyte."""


class Name(str):
    """A global that a pickle refers to, "module name": never imported, only compared."""


class Storage(NamedTuple):
    """What tensors are views of: `size` elements in a file of the archive, or in the stream, by its key."""

    dtype: str
    key: str
    size: int


class View(NamedTuple):
    """A tensor as a pickle describes it; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: Path, view: memoryview) -> dict[str, Tensor]:
    """The tensors of one mapped file by name; CheckpointError for what is damaged, or more than tensors.

    A file holds one dictionary of tensors, which may stand within another under `model` or `state_dict`. A tensor
    whose elements do not lie in the file in its own order comes as `Made`.
    """
    state, storage_of = (_read_zip if bytes(view[:4]) == b"PK\3\4" else _read_stream)(path, view)
    if not isinstance(state, dict):
        fail(path, "holds no dictionary of tensors")
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            fail(path, "holds a tensor whose name is not text")
        if not isinstance(value, View):
            fail(path, f"{shown(name)}: is not a tensor but of another kind ({type(value).__name__})")
        tensors[name] = _tensor(path, name, value, storage_of(value.storage))
    if not tensors:
        fail(path, "holds no tensors")
    return tensors


def _tensor(path: Path, name: str, view: View, storage: memoryview) -> Tensor:
    dtype, size = view.storage.dtype, DTYPES[view.storage.dtype]
    count, last, dense = 1, view.offset, True
    for n, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        dense &= stride == count or n <= 1
        count *= n
        last += (n - 1) * stride
    begin = view.offset * size
    if count == 0:
        return Tensor(name, dtype, view.shape, storage[:0])
    # No more elements than there are in the file: what repeats itself could be made as large as it claims to be.
    if last >= view.storage.size or count > view.storage.size:
        fail(path, f"tensor {shown(name)}: lies outside of its storage of {view.storage.size} elements")
    if dense:
        return Tensor(name, dtype, view.shape, storage[begin : begin + count * size])

    def make() -> memoryview:
        import numpy as np

        strides = tuple(stride * size for stride in view.strides)
        elements: Any = np.ndarray(view.shape, f"V{size}", storage, begin, strides)
        return np.ascontiguousarray(elements).view(np.uint8).reshape(-1).data

    return Made.of(name, dtype, view.shape, make)


# The two containers -------------------------------------------------------------------------------------------

Storages = Callable[[Storage], memoryview]


def _read_zip(path: Path, view: memoryview) -> tuple[Any, Storages]:
    """An archive: NAME/data.pkl, and NAME/data/KEY for each storage, not compressed."""
    import zipfile

    try:
        with path.open("rb") as file:
            entries = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError, OSError) as error:
        fail(path, f"is a damaged zip archive: {shown(str(error) or type(error).__name__)}")
    found = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") <= 1]
    if len(found) != 1:
        fail(path, "is a zip archive, but not one of PyTorch's: it holds no data.pkl")
    prefix = found[0].removesuffix("data.pkl")

    def member(name: str) -> memoryview:
        info = entries.get(prefix + name)
        if info is None:
            fail(path, f"the archive lacks {shown(prefix + name)}")
        at = info.header_offset
        head = bytes(view[at : at + 30])
        if info.compress_type or info.flag_bits & 1:
            fail(path, f"the archive's {shown(name)} is compressed or encrypted, which PyTorch's never are")
        if at < 0 or len(head) < 30 or head[:4] != b"PK\3\4":
            fail(path, f"the archive's {shown(name)} is not where its directory says")
        begin = at + 30 + sum(struct.unpack_from("<HH", head, 26))
        data = view[begin : begin + info.file_size]
        if len(data) < info.file_size:
            fail(path, f"the archive's {shown(name)} goes past the end of the file")
        return data

    if prefix + "byteorder" in entries and bytes(member("byteorder")) != b"little":
        fail(path, "was written on a big-endian machine, which is not supported")

    def storage_of(storage: Storage) -> memoryview:
        data = member(f"data/{storage.key}")
        if len(data) < storage.size * DTYPES[storage.dtype]:
            fail(path, f"storage {shown(storage.key)}: {storage.size} {storage.dtype} in {len(data)} bytes")
        return data

    return unpickle(path, member("data.pkl"))[0], storage_of


def _read_stream(path: Path, view: memoryview) -> tuple[Any, Storages]:
    """PyTorch before 1.6: five pickles (magic, version, system, the object, keys), then for each key its storage."""
    magic, at = unpickle(path, view)
    if magic != _LEGACY_MAGIC:
        fail(path, "is a pickle, but not one of PyTorch's")
    version, at = unpickle(path, view, at)
    system, at = unpickle(path, view, at)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        fail(path, "is a PyTorch file of a version or a byte order that is not supported")
    dtypes: dict[str, str] = {}
    state, at = unpickle(path, view, at, dtypes)
    keys, at = unpickle(path, view, at)
    if not isinstance(keys, list):
        fail(path, "lacks the list of its storages")
    places: dict[str, memoryview] = {}
    for key in keys:
        if not isinstance(key, str) or key not in dtypes or key in places or at + 8 > len(view):
            fail(path, "the list of its storages is damaged")
        (size,) = struct.unpack_from("<Q", view, at)
        data = view[at + 8 : at + 8 + size * DTYPES[dtypes[key]]]
        at += 8 + size * DTYPES[dtypes[key]]
        if at > len(view):
            fail(path, f"is cut short: storage {shown(key)} goes past its end")
        places[key] = data

    def storage_of(storage: Storage) -> memoryview:
        data = places.get(storage.key)
        if data is None or len(data) < storage.size * DTYPES[storage.dtype]:
            fail(path, f"storage {shown(storage.key)}: is not there, or too short")
        return data

    return state, storage_of


# The pickle ---------------------------------------------------------------------------------------------------


class _Mark:
    pass


_MARK = _Mark()


class _Unpickler:
    """Protocols 2 to 5 (Python's pickletools describes the opcodes), as far as torch.save writes them."""

    def __init__(self, path: Path, data: memoryview, at: int) -> None:
        self.path, self.data, self.at = path, data, at
        self.end = min(len(data), at + LONGEST_PICKLE)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.dtypes: dict[str, str] = {}

    def wrong(self, fault: str) -> NoReturn:
        fail(self.path, f"its pickle {fault}")

    def take(self, size: int) -> memoryview:
        begin, self.at = self.at, self.at + size
        if self.at > self.end:
            self.wrong("is cut short, or too long")
        return self.data[begin : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, size: int, encoding: str = "utf-8") -> str:
        return str(self.take(size), encoding)

    def line(self) -> str:
        for size in range(1, 200):
            if self.at + size <= self.end and self.data[self.at + size - 1] == 10:
                return self.text(size)[:-1]
        self.wrong("is damaged")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError
        return value

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError
        return self.stack[-1]

    def popped(self) -> list[Any]:
        """What stands above the last mark, which goes as well."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def run(self) -> Any:
        push = self.stack.append
        while True:
            op = bytes(self.take(1))
            if op in _CONSTANTS:
                push(_CONSTANTS[op]())
            elif op in _NUMBERS:
                push(self.number(_NUMBERS[op]))
            elif op in _TEXTS:
                push(self.text(self.number(_TEXTS[op])))
            elif op in b"TU":  # texts of Python 2
                push(self.text(self.number("<i" if op == b"T" else "<B"), "latin-1"))
            elif op in (b"\x8a", b"\x8b"):
                push(int.from_bytes(self.take(self.number("<B" if op == b"\x8a" else "<I")), "little", signed=True))
            elif op in (b"q", b"r"):
                self.memo[self.number("<B" if op == b"q" else "<I")] = self.stack[-1]
            elif op == b"\x94":
                self.memo[len(self.memo)] = self.stack[-1]
            elif op in (b"h", b"j"):
                push(self.memo[self.number("<B" if op == b"h" else "<I")])
            elif op == b"t":
                push(tuple(self.popped()))
            elif op in (b"\x85", b"\x86", b"\x87"):
                count = op[0] - 0x84
                push(tuple([self.pop() for _ in range(count)][::-1]))
            elif op == b"a":
                value = self.pop()
                self.top(list).append(value)
            elif op == b"e":
                values = self.popped()
                self.top(list).extend(values)
            elif op == b"s":
                value, key = self.pop(), self.pop()
                self.top(dict).update(_pairs([(key, value)]))
            elif op == b"u":
                values = self.popped()
                self.top(dict).update(_pairs(zip(values[::2], values[1::2], strict=True)))
            elif op == b"c":
                push(self.known(self.line(), self.line()))
            elif op == b"\x93":
                name, module = self.pop(), self.pop()
                push(self.known(module, name))
            elif op == b"Q":
                push(self.storage(self.pop()))
            elif op in (b"R", b"\x81"):
                arguments, name = self.pop(), self.pop()
                push(self.reduced(name, arguments))
            elif op == b"b":  # attributes of a dictionary: state_dict's versions of its modules
                self.pop()
                self.top(dict)
            elif op == b"0":
                self.pop()
            elif op == b"\x80":
                self.take(1)
            elif op == b"\x95":
                self.take(8)
            elif op == b".":
                return self.pop()
            else:
                self.wrong(f"has the opcode {shown(repr(op)[1:])}, which no file of tensors needs")

    def known(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError
        full = f"{module} {name}"
        if full not in _BUILDERS and full not in _STORAGES:
            what = shown(f"{module}.{name}")
            self.wrong(f"asks for {what}, which is no tensor: a pickle can run any code, and this one is refused")
        return Name(full)

    def storage(self, identity: Any) -> Storage:
        """("storage", kind, key, device, size), and before PyTorch 1.6 the view that it is, which is None."""
        kind, dtype, key, _, size, *rest = identity
        if kind != "storage" or not isinstance(dtype, Name) or dtype not in _STORAGES or rest not in ([], [None]):
            raise ValueError
        if not isinstance(key, str) or not whole(size):
            raise ValueError
        storage = Storage(_STORAGES[dtype], key, size)
        if self.dtypes.setdefault(key, storage.dtype) != storage.dtype:
            self.wrong(f"reads storage {shown(key)} as two types")
        return storage

    def reduced(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or name not in _BUILDERS or not isinstance(arguments, tuple):
            raise ValueError
        return _BUILDERS[name](*arguments)


def whole(value: Any) -> bool:
    """Whether this is a count of elements."""
    return type(value) is int and 0 <= value < 1 << 48


def _pairs(pairs: Iterable[Any]) -> dict[Any, Any]:
    """A dictionary whose keys are plain: to hash tuples within tuples, deep enough, would end the process."""
    named = {}
    for key, value in pairs:
        if not isinstance(key, (str, int, float, NoneType)):
            raise ValueError
        named[key] = value
    return named


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> View:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError
    if not all(map(whole, (offset, *shape, *strides))) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError
    if math.prod(shape) >= 1 << 48:
        raise ValueError
    return View(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> View:
    if not isinstance(data, View):
        raise ValueError
    return data


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda pairs=(): _pairs(pairs),
    "torch Size": lambda sizes=(): tuple(sizes),
    "torch._utils _rebuild_tensor": _view,
    "torch._utils _rebuild_tensor_v2": _view,
    "torch._utils _rebuild_parameter": _parameter,
}
_CONSTANTS: dict[bytes, Callable[[], Any]] = {
    b"N": lambda: None, b"\x88": lambda: True, b"\x89": lambda: False, b"(": lambda: _MARK,
    b")": tuple, b"]": list, b"}": dict, b"\x8f": list,
}  # fmt: skip
_NUMBERS = {b"J": "<i", b"K": "<B", b"M": "<H", b"G": ">d"}
_TEXTS = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q"}


def unpickle(path: Path, data: memoryview, at: int = 0, dtypes: dict[str, str] | None = None) -> tuple[Any, int]:
    """The value of the pickle at `at`, and the position after it; `dtypes` gets the types of the storages by key."""
    reader = _Unpickler(path, data, at)
    if dtypes is not None:
        reader.dtypes = dtypes
    try:
        return reader.run(), reader.at
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, RecursionError, OverflowError):
        reader.wrong("is damaged")
