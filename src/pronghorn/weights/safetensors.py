"""The safetensors format (github.com/huggingface/safetensors, README: Format), single and sharded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pronghorn.weights.files import fail, map_file, nature, parse_json, read_json, shown
from pronghorn.weights.types import DTYPES, FORMATS, Tensor

HEADER_LIMIT = 100_000_000
"""Bytes of a header, as the format's own reader limits it."""

PACKED = "pronghorn.packed"
"""The key of `__metadata__` that names quantized matrices (see weights.writing.safetensors_file)."""

_DTYPES = {name.upper(): name for name in DTYPES}


def read_safetensors(path: Path, view: memoryview) -> dict[str, Tensor]:
    """The tensors of one mapped file, in the order of their data; CheckpointError if anything is wrong.

    As the format asks, tensors cover the data exactly: no holes, no overlap, nothing after the last. It does not
    ask for alignment (GPT-2's own file begins its f32 data at an odd offset): `data` may lie at any address.
    """
    length = int.from_bytes(view[:8], "little")
    brace = bytes(view[8:9]) == b"{"
    if length > min(HEADER_LIMIT, len(view) - 8) or not brace:
        if (known := nature(bytes(view[:32]))) and not brace:
            fail(path, f"is not a safetensors file but {known}")
        if len(view) < 8:
            fail(path, "is not a safetensors file: it is shorter than a header's length field")
        if length > HEADER_LIMIT:
            fail(
                path,
                f"a header of {length} bytes ({HEADER_LIMIT} is the limit): damaged, or not safetensors",
            )
        if length > len(view) - 8:
            fail(path, f"is cut short: a header of {length} bytes in a file of {len(view)}")
        fail(path, "is not a safetensors file: its header does not begin with {")
    header = parse_json(view[8 : 8 + length], path, "header: ")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(path, "header: __metadata__ is not a map of strings")

    data = view[8 + length :]
    placed = [_tensor(path, name, entry, data) for name, entry in header.items()]
    placed.sort(key=lambda item: item[:2])
    end = 0
    for begin, next_end, tensor in placed:
        if begin != end:
            fault = (
                "overlaps the tensor before it" if begin < end else f"leaves a hole of {begin - end} bytes before it"
            )
            fail(path, f"tensor {shown(tensor.name)}: {fault}")
        end = next_end
    if end != len(data):
        fail(path, f"holds {len(data)} bytes of data; its tensors cover {end}")
    tensors = {tensor.name: tensor for _, _, tensor in placed}
    if PACKED in metadata:
        places = {tensor.name: 8 + length + begin for begin, _, tensor in placed}
        tensors |= _packed(path, metadata[PACKED], tensors, places)
    return tensors


def _packed(path: Path, text: str, tensors: dict[str, Tensor], places: dict[str, int]) -> dict[str, Tensor]:
    """The matrices that are in one of weights.types.FORMATS, stored as bytes; how many is for the model to check."""
    found: dict[str, Tensor] = {}
    for name, entry in parse_json(memoryview(text.encode("utf-8", "replace")), path, f"header: {PACKED}: ").items():
        entry = entry if isinstance(entry, dict) else {}
        format, shape = entry.get("format"), entry.get("shape")
        if name not in tensors or tensors[name].dtype != "u8":
            fail(path, f"tensor {shown(name)}: {PACKED} names it, but it is not there as U8")
        if not isinstance(format, str) or format not in FORMATS:
            fail(path, f"tensor {shown(name)}: the format {shown(str(format))} is not supported")
        if not isinstance(shape, list) or len(shape) != 2 or not _counts(shape):
            fail(path, f"tensor {shown(name)}: {shown(str(shape))} is not the shape of a matrix")
        if places[name] % 64:
            fail(path, f"tensor {shown(name)}: its data does not begin at a multiple of 64 bytes")
        found[name] = Tensor(name, format, tuple(shape), tensors[name].data)
    return found


def _tensor(path: Path, name: str, entry: Any, data: memoryview) -> tuple[int, int, Tensor]:
    """One entry of the header -> (begin, end, tensor)."""

    def wrong(fault: str) -> NoReturn:
        fail(path, f"tensor {shown(name)}: {fault}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        wrong("its entry is not of the form {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        wrong(f"the dtype {shown(str(dtype))} is not supported")
    if not _counts(shape):
        wrong("its shape is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2:
        wrong("its data_offsets are not two positions")
    begin, end = offsets
    if not begin <= end <= len(data):
        wrong(f"its data, {begin} to {end}, lies outside of the file's {len(data)} bytes of data")
    size = DTYPES[_DTYPES[dtype]]
    for n in shape:
        size *= n
        if size >= 1 << 63:
            wrong("its size overflows")
    if size != end - begin:
        wrong(f"shape {shown(str(shape))} of {dtype} is {size} bytes; the file gives it {end - begin}")
    return begin, end, Tensor(name, _DTYPES[dtype], tuple(shape), data[begin:end])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def index_files(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """An index's `weight_map`: each tensor's file, by name, in the index's own folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(path, "weight_map is not a map of tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or os.sep in shard or "\0" in shard:
            fail(path, f"tensor {shown(name)}: the shard {shown(str(shard))} is not a file name in this folder")
        if shard == path.name:
            fail(path, f"tensor {shown(name)}: its shard is this index itself")
    return weight_map


def read_index(
    path: Path, read: Callable[[Path, memoryview], dict[str, Tensor]], *, strict: bool
) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    """The shards that a `model.safetensors.index.json`, or PyTorch's, names, and their tensors, as `read` gives them.

    Each tensor of the index must be in the shard that it says. `strict`: it is in no other, and a shard has no more.
    """
    weight_map = index_files(path, read_json(path, HEADER_LIMIT))
    files = tuple(path.parent / shard for shard in sorted(set(weight_map.values())))
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read(file, map_file(file)).items():
            if strict and name in tensors:
                fail(file, f"tensor {shown(name)}: is in another shard too")
            if weight_map.get(name) == file.name:
                tensors[name] = tensor
            elif strict:
                fail(file, f"tensor {shown(name)}: {path.name} does not say that it is in this shard")
    for name, shard in weight_map.items():
        if name not in tensors:
            fail(path, f"tensor {shown(name)}: is not in {shown(shard)}, where the index says that it is")
    return files, tensors
