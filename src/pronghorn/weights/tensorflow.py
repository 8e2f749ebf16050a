"""TensorFlow's checkpoints ("tensor bundles", V2), without TensorFlow: OpenAI's original GPT-2 files.

A bundle is an index (a sorted table in LevelDB's format, tensorflow/core/lib/io/table_format.txt, of protocol buffers,
tensorflow/core/protobuf/tensor_bundle.proto), and data files with the raw tensors. Every block of the index and every
tensor carries a masked CRC-32C; all are verified when the checkpoint is opened.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pronghorn.weights import wire
from pronghorn.weights.files import fail, map_file, read_json, shown
from pronghorn.weights.types import DTYPES, Tensor

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two block handles, padding, magic
LARGEST_BLOCK = 16 << 20
"""Bytes of a decompressed block; TensorFlow writes them with 256 KiB."""

_DTYPES = {1: "f32", 2: "f64", 3: "i32", 4: "u8", 5: "i16", 6: "i8", 9: "i64", 10: "bool", 14: "bf16", 19: "f16"}
"""tensorflow/core/framework/types.proto."""


class _Damaged(ValueError):
    """What the parts of a table say when they are not one."""


class Entry(NamedTuple):
    """BundleEntryProto: where a tensor is."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


def read_bundle(prefix: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The files of the checkpoint `PREFIX.index`, and its tensors by TensorFlow's names, mapped.

    CheckpointError for what is damaged, checksums included.
    """
    index = prefix.with_name(prefix.name + ".index")
    try:
        entries = dict(_table(map_file(index)))
        header = _fields(entries.pop(b"", b""))
        n_shards = header.get(1, 0)
        found = {str(name, "utf-8"): _entry(value) for name, value in entries.items()}
    except (ValueError, struct.error, TypeError) as error:
        fail(index, f"is not a TensorFlow checkpoint's index, or is damaged ({str(error) or 'it is cut short'})")
    if header.get(2, 0) != 0:
        fail(index, "was written on a big-endian machine, which is not supported")
    if type(n_shards) is not int or not 1 <= n_shards <= 10_000:
        fail(index, f"says that there are {shown(str(n_shards))} data files")
    files = tuple(prefix.with_name(f"{prefix.name}.data-{i:05}-of-{n_shards:05}") for i in range(n_shards))
    views = [map_file(file) for file in files]
    return files, {name: _tensor(files, views, name, entry) for name, entry in found.items()}


def _tensor(files: tuple[Path, ...], views: list[memoryview], name: str, entry: Entry) -> Tensor:
    from pronghorn._native import crc32c

    if not 0 <= entry.shard < len(files):
        fail(files[0], f"tensor {shown(name)}: is said to be in data file {entry.shard} of {len(files)}")
    file, view = files[entry.shard], views[entry.shard]

    def wrong(fault: str) -> NoReturn:
        fail(file, f"tensor {shown(name)}: {fault}")

    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        wrong(f"TensorFlow's type {entry.dtype} is not supported")
    size = DTYPES[dtype]
    for n in entry.shape:
        size *= n
    if size != entry.size:
        wrong(f"shape {shown(str(list(entry.shape)))} of {dtype} is {size} bytes; the index gives it {entry.size}")
    data = view[entry.offset : entry.offset + size]
    if len(data) != size:
        wrong(f"its data, {entry.offset} to {entry.offset + size}, ends after the file")
    if masked(crc32c(data)) != entry.crc:
        wrong("is damaged: its checksum differs")
    return Tensor(name, dtype, entry.shape, data)


def masked(crc: int) -> int:
    """A checksum as it is stored: one of data that hold checksums would be a weak one (LevelDB's util/crc32c.h)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# The table ----------------------------------------------------------------------------------------------------


def _table(view: memoryview) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table."""
    if len(view) < FOOTER or struct.unpack_from("<Q", view, len(view) - 8)[0] != MAGIC:
        raise _Damaged("its last eight bytes are not a table's")
    footer = view[len(view) - FOOTER :]
    *metaindex, at = _handle(footer, 0)
    *index, _ = _handle(footer, at)
    seen = len(list(_block(view, *metaindex)))  # it holds nothing
    for _, handle in _block(view, *index):
        *block, _ = _handle(memoryview(handle), 0)
        seen += block[1]
        if seen > len(view):  # no block twice
            raise _Damaged("its blocks overlap")
        yield from _block(view, *block)


def _handle(data: memoryview, at: int) -> tuple[int, int, int]:
    """A BlockHandle (offset and size), and the position after it."""
    offset, at = wire.varint(data, at)
    return offset, *wire.varint(data, at)


def _block(view: memoryview, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The entries of one block: each key shares a beginning with the one before it."""
    from pronghorn._native import crc32c

    stored = view[offset : offset + size + 5]
    if len(stored) != size + 5:
        raise _Damaged("a block goes past its end")
    kind, crc = struct.unpack_from("<BI", stored, size)
    if masked(crc32c(stored[: size + 1])) != crc:
        raise _Damaged("a block's checksum differs")
    if kind > 1:
        raise _Damaged(f"a block is compressed in the unknown way {kind}")
    data = memoryview(snappy(stored[:size])) if kind else stored[:size]
    if len(data) < 4:
        raise _Damaged
    end = len(data) - 4 * (1 + struct.unpack_from("<I", data, len(data) - 4)[0])  # where the restarts begin
    key, at = b"", 0
    while at < end:
        shared, at = wire.varint(data, at)
        unshared, at = wire.varint(data, at)
        length, at = wire.varint(data, at)
        if shared > len(key) or at + unshared + length > end:
            raise _Damaged
        key = key[:shared] + bytes(data[at : at + unshared])
        at += unshared
        yield key, bytes(data[at : at + length])
        at += length
    if at != end:
        raise _Damaged


def snappy(data: memoryview) -> bytes:
    """Decompresses one block (github.com/google/snappy, format_description.txt)."""
    length, at = wire.varint(data, 0)
    if length > LARGEST_BLOCK:
        raise _Damaged(f"a block of {length} bytes")
    out = bytearray()
    while at < len(data) and len(out) <= length:
        tag = data[at]
        at += 1
        if tag & 3 == 0:  # a literal
            size = tag >> 2
            if size >= 60:
                n = size - 59
                size = int.from_bytes(data[at : at + n], "little")
                at += n
            size += 1
            if at + size > len(data):
                raise _Damaged
            out += data[at : at + size]
            at += size
            continue
        n = (0, 1, 2, 4)[tag & 3]
        offset = int.from_bytes(data[at : at + n], "little")
        at += n
        size = (tag >> 2) + 1
        if tag & 3 == 1:
            size, offset = (tag >> 2 & 7) + 4, offset | tag >> 5 << 8
        if not 0 < offset <= len(out):
            raise _Damaged
        piece = out[-offset:]  # a copy may reach into itself: then it repeats
        out += (piece * (size // offset + 1))[:size]
    if len(out) != length or at != len(data):
        raise _Damaged("a compressed block is damaged")
    return bytes(out)


# Protocol buffers ---------------------------------------------------------------------------------------------


def _entry(data: bytes) -> Entry:
    fields = _fields(data)
    if 7 in fields:
        raise _Damaged("a tensor in slices, which is not supported")
    sizes: list[int] = []
    shape = memoryview(fields.get(2, b""))
    for number, dim in _wire(shape):
        if number == 3 and dim:
            raise _Damaged("a tensor of unknown shape")
        if number == 2:
            size = _fields(dim).get(1, 0)
            if type(size) is not int or not 0 <= size < 1 << 48 or len(sizes) >= 8:
                raise _Damaged("a tensor of an impossible shape")
            sizes.append(size)
    values = [fields.get(number, 0) for number in (1, 3, 4, 5, 6)]
    if not all(type(value) is int for value in values):
        raise _Damaged
    return Entry(values[0], tuple(sizes), *values[1:])


def _fields(data: bytes | memoryview) -> dict[int, Any]:
    return dict(_wire(memoryview(data)))


def _wire(data: memoryview) -> Iterator[tuple[int, Any]]:
    return wire.fields(data, lambda part: int.from_bytes(part, "little"))


# OpenAI's GPT-2 -----------------------------------------------------------------------------------------------

_NAMES = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln_f/g": "ln_f.weight",
    "ln_f/b": "ln_f.bias",
    **{f"h*/{norm}/{a}": f"h.*.{norm}.{b}" for norm in ("ln_1", "ln_2") for a, b in (("g", "weight"), ("b", "bias"))},
    **{
        f"h*/{linear}/{a}": f"h.*.{linear.replace('/', '.')}.{b}"
        for linear in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
        for a, b in (("w", "weight"), ("b", "bias"))
    },
}


def read_gpt2(folder: Path) -> tuple[tuple[Path, ...], dict[str, Any], dict[str, Tensor]]:
    """OpenAI's folder (`checkpoint`, `hparams.json`, `model.ckpt.*`) -> (files, config, tensors).

    github.com/openai/gpt-2: src/model.py. Its convolutions of width 1 are [1, n_in, n_out].
    """
    params = read_json(folder / "hparams.json", 1_000_000)
    keys = {
        "n_vocab": "vocab_size",
        "n_ctx": "n_positions",
        "n_embd": "n_embd",
        "n_head": "n_head",
        "n_layer": "n_layer",
    }
    for key in sorted(params.keys() - keys):
        fail(folder / "hparams.json", f"{shown(key)} is {shown(str(params[key]))}, which is not implemented")
    config: dict[str, Any] = {"model_type": "gpt2"}
    for key, name in keys.items():
        if key not in params:
            fail(folder / "hparams.json", f"{key} is missing")
        config[name] = params[key]
    config |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}

    prefix = folder / _prefix(folder)
    files, raw = read_bundle(prefix)
    tensors: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        stem = name.removeprefix("model/")
        layer = re.match(r"h(\d{1,4})/", stem)
        general = f"h*/{stem[layer.end() :]}" if layer else stem
        if general not in _NAMES:
            fail(files[0], f"tensor {shown(name)}: is not part of GPT-2")
        full = _NAMES[general].replace("*", layer[1] if layer else "")
        shape = tensor.shape[1:] if len(tensor.shape) == 3 and tensor.shape[0] == 1 else tensor.shape
        tensors[full] = Tensor(full, tensor.dtype, shape, tensor.data)
    return files, config, tensors


def _prefix(folder: Path) -> str:
    """The name of the latest checkpoint, as the file `checkpoint` says, wherever that was; else model.ckpt."""
    path = folder / "checkpoint"
    if not path.exists():
        return "model.ckpt"
    found = re.search(
        rb'^model_checkpoint_path: "(?:[^"\\]*/)?([^"\\/\0]{1,200})"', bytes(map_file(path)[:10_000]), re.MULTILINE
    )
    if not found:
        fail(path, "names no model_checkpoint_path")
    try:
        return str(found[1], "utf-8")
    except UnicodeDecodeError:
        fail(path, "is not UTF-8")
