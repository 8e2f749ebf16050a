"""Model files written whole or not at all, a tensor at a time: safetensors and GGUF."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pronghorn.weights.files import fail, replacing, write_all
from pronghorn.weights.gguf import BLOCKS, TENSOR_TYPES
from pronghorn.weights.safetensors import PACKED
from pronghorn.weights.types import DTYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GGUF_ALIGNMENT = 32


class Part(NamedTuple):
    """A tensor to be written: `make` gives its bytes, when its turn has come; `packed` of them, if it is packed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], memoryview]
    packed: int = 0

    @property
    def nbytes(self) -> int:
        if self.packed:
            return self.packed
        values, size = BLOCKS.get(self.dtype) or (1, DTYPES[self.dtype])
        for n in self.shape:
            size *= n
        return size // values


class Raw(NamedTuple):
    """A GGUF value as another file has it: its type, and its bytes."""

    data: memoryview


Progress = Callable[[Iterable[Part]], Iterable[Part]]


@contextmanager
def safetensors_file(path: Path, parts: Iterable[Part]) -> Iterator[Callable[[Part, memoryview], None]]:
    """One safetensors file of these tensors, whole or not at all -> what takes a tensor's data, in any order.

    Matrices in one of weights.types.FORMATS are stored as bytes, padded to a multiple of 64, before all others, and
    described in `__metadata__`: "pronghorn.packed" is JSON, {name: {"format": ..., "shape": [...]}}. The shape is that
    of the checkpoint's own matrix; packed panels are of outputs in any case. OSError if the disk does not take it.
    """
    import json

    described = {part.name: {"format": part.dtype, "shape": list(part.shape)} for part in parts if part.packed}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers does not load it
    if described:
        header["__metadata__"][PACKED] = json.dumps(described)
    end = 0
    for part in sorted(parts, key=lambda part: not part.packed):
        begin, end = end, end + (-(-part.nbytes // 64) * 64 if part.packed else part.nbytes)
        dtype, shape = ("U8", [end - begin]) if part.packed else (part.dtype.upper(), list(part.shape))
        header[part.name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with replacing(path, 8 + len(text) + end) as file:

        def put(part: Part, data: memoryview) -> None:
            file.seek(8 + len(text) + header[part.name]["data_offsets"][0])
            write_all(file, _bytes_of(path, part, data))

        write_all(file, struct.pack("<Q", len(text)) + text)
        yield put


def write_safetensors(path: Path, parts: list[Part], progress: Progress) -> None:
    """The same, of tensors that make their own data."""
    with safetensors_file(path, parts) as put:
        for part in progress(parts):
            put(part, part.make())


def write_gguf(path: Path, keys: Mapping[str, Any], parts: list[Part], progress: Progress) -> None:
    """One GGUF file, version 3, of these keys (str, bool, int, float, lists of them, or Raw) and tensors."""
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(parts), len(keys)))
    for key, value in keys.items():
        out += _string(key) + (value.data if isinstance(value, Raw) else _value(value))
    numbers = {name: number for number, name in TENSOR_TYPES.items()}
    end = 0
    for part in parts:
        begin, end = end, end + part.nbytes + -part.nbytes % GGUF_ALIGNMENT
        dims = struct.pack(f"<I{len(part.shape)}Q", len(part.shape), *reversed(part.shape))
        out += _string(part.name) + dims + struct.pack("<IQ", numbers[part.dtype], begin)
    out += bytes(-len(out) % GGUF_ALIGNMENT)
    with replacing(path, len(out) + end) as file:
        write_all(file, out)
        for part in progress(parts):
            write_all(file, _bytes_of(path, part, part.make()))
            write_all(file, bytes(-part.nbytes % GGUF_ALIGNMENT))


def _bytes_of(path: Path, part: Part, data: memoryview) -> memoryview:
    if data.nbytes != part.nbytes:
        fail(path, f"tensor {part.name}: {data.nbytes} bytes where its shape asks for {part.nbytes}")
    return data


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type and value, as the format has them: u32 (u64 where larger), i32 within lists, f32, bool, string."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    head = struct.pack("<I", 9)
    if value and isinstance(value[0], str):
        return head + struct.pack("<IQ", 8, len(value)) + b"".join(map(_string, value))
    if value and isinstance(value[0], float):
        return head + struct.pack("<IQ", 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
    return head + struct.pack("<IQ", 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


# GGUF's block formats -----------------------------------------------------------------------------------------

QUANTIZED = ("q8_0", "q4_0", "q4_1")
"""The block formats that are written; others are only taken over as they are."""


def quantize(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """Rows of values [rows, a multiple of 32] as blocks, as ggml's reference does (ggml-quants.c).

    ValueError for values that are not finite, or too large for f16 scales.
    """
    import numpy as np

    x = values.reshape(-1, 32)
    low: NDArray[np.float32] | None = None
    codes: NDArray[Any]
    if not np.isfinite(x).all():
        raise ValueError("holds values that are not finite")
    if dtype == "q8_0":
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        codes = _away(x * _inverse(scale)).astype(np.int8).view(np.uint8)
    elif dtype == "q4_0":
        furthest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
        scale = furthest / np.float32(-8)
        codes = _nibbles(x * _inverse(scale) + np.float32(8.5))
    else:
        low = x.min(axis=1, keepdims=True)
        scale = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
        codes = _nibbles((x - low) * _inverse(scale) + np.float32(0.5))
    with np.errstate(over="ignore"):
        scales = [part.astype(np.float16) for part in (scale, low) if part is not None]
    if not all(np.isfinite(part).all() for part in scales):
        raise ValueError("holds values too large for f16 scales")
    return np.concatenate([*(part.view(np.uint8) for part in scales), codes], axis=1)


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    with np.errstate(divide="ignore", over="ignore"):
        inverse: NDArray[np.float32] = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return inverse


def _away(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded, halves away from zero, as C's roundf."""
    import numpy as np

    rounded: NDArray[np.float32] = np.trunc(x + np.copysign(np.float32(0.5), x))
    whole = np.trunc(x)
    # x + 0.5 itself is rounded: the largest float below a half must not become one.
    return np.where(np.abs(x - whole) < np.float32(0.5), whole, rounded)


def _nibbles(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Two codes a byte: the first half of a block in the low nibbles."""
    import numpy as np

    codes: NDArray[np.uint8] = np.clip(x, 0, 15.9).astype(np.uint8)
    codes[:, :16] |= codes[:, 16:] << np.uint8(4)
    return codes[:, :16]
