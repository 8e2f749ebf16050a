"""Weights as the kernels read them: mapped as they are where possible, else converted once and kept in the cache.

What is converted goes into one safetensors file of bytes (`U8`) in the cache folder. Its name depends on the source
(path, size, time of change), the target and FORMAT; its header has a checksum of all data, which is verified at every
load. A stale or damaged file is rebuilt. It is written beside its place, synced, and renamed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronghorn.errors import CheckpointError
from pronghorn.weights.types import (
    DENSE,
    DTYPES,
    FORMATS,
    Dense,
    Int4,
    Int8,
    Made,
    Matrix,
    Parameter,
    Target,
    Tensor,
    Unquantized,
    packed_bytes,
    sides,
)

if TYPE_CHECKING:
    from pronghorn._native import Pool
    from pronghorn.weights import Checkpoint

FORMAT = 1
"""Of the packed data: a file of another number is rebuilt."""

ALIGNMENT = 64
SMALL = 1 << 20
"""Bytes up to which a conversion is repeated at each load rather than kept."""


# What a block format of GGUF becomes when no dtype is asked for: the same numbers, or the nearest that we have.
BLOCKS = {
    "q4_0": Target("int4", 32, symmetric=True),
    "q4_1": Target("int4", 32),
    "q4_k": Target("int4", 32),
    "q5_0": Target("int8", 32),
    "q5_1": Target("int8", 32),
    "q5_k": Target("int8", 32),
    "q6_k": Target("int8", 32),
    "q8_0": Target("int8", 32),
}
EXACT = ("q4_0", "q4_1", "q8_0")
"""The block formats whose codes and scales are taken over bit for bit."""

QUANTIZED = {"int8": Target("int8", 64), "int4": Target("int4", 32)}
"""What `--dtype int8` and `int4` make of other weights."""

DRAFTS = {"self-int8": (Target("int8", 64), Target("int8", 64)), "self-int4": (Target("int4", 32), Target("int4", 64))}
"""What a draft's copy makes of a weight; the second of one that has 4 bits in the file, so as not to be the same."""

DRAFT_HEAD = Target("int8", 64)
"""Of a draft's head, where 4 bits cost more right drafts than all other weights together."""


def target_of(parameter: Parameter, tensor: Tensor, dtype: str, head: bool = False) -> Target:
    """The form that `dtype` ("auto": the file's own; or a draft's name) gives to one weight."""
    if parameter.kind == "vector":
        return Target("f32")
    own = tensor.dtype if tensor.dtype in DENSE else "f32"
    if parameter.kind == "table":
        return Target(dtype if dtype in DTYPES else own)
    block = BLOCKS.get(tensor.dtype) or FORMATS.get(tensor.dtype)
    if dtype in DRAFTS:
        return DRAFT_HEAD if head else DRAFTS[dtype][block is not None and block.format == "int4"]
    if dtype == "auto":
        return block or Target(own)
    if block and (tensor.dtype in EXACT or tensor.dtype in FORMATS) and block.format == dtype:
        return block
    return QUANTIZED.get(dtype) or Target(dtype)


def how(parameter: Parameter, tensor: Tensor, target: Target) -> str:
    """What becomes of a weight: "mapped" as it is, "packed" with its own numbers, or "converted" to others."""
    if target == FORMATS.get(tensor.dtype, Target(tensor.dtype)):
        return "mapped"
    exact = tensor.dtype in EXACT and target == BLOCKS[tensor.dtype]
    wider = target.format == "f32" and tensor.dtype in ("f16", "bf16")
    return "packed" if exact or wider else "converted"


def describe(
    parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor], dtype: str = "auto"
) -> dict[str, tuple[str, str, str, int]]:
    """What `prepare` would do: by weight (dtype of the file, target, "mapped" | "packed" | "converted", its bytes)."""
    plan: dict[str, tuple[str, str, str, int]] = {}
    for name, parameter in parameters.items():
        target = target_of(parameter, tensors[name], dtype)
        size = packed_bytes(parameter, target)
        plan[name] = (tensors[name].dtype, str(target), how(parameter, tensors[name], target), size)
    return plan


def prepare(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, Tensor],
    dtype: str,
    threads: int | None = None,
    heads: Collection[str] = (),
    keep: bool = True,
) -> dict[str, Matrix]:
    """The weights by parameter name, ready to run: the file's own bytes, or converted ones from the cache.

    Without `keep` these are made anew, in memory: of tensors that are parts of the file's.

    `dtype` is "auto", f32, f16, bf16, int8 or int4, or one of DRAFTS, whose `heads` names the matrices that give the
    logits. Raises CheckpointError for a weight that cannot be converted.
    """
    plan = {name: target_of(p, tensors[name], dtype, name in heads) for name, p in parameters.items()}
    data = {name: tensors[name].data for name in plan if how(parameters[name], tensors[name], plan[name]) == "mapped"}
    todo = {name: packed_bytes(parameters[name], plan[name]) for name in plan if name not in data}
    if todo:
        from pronghorn.machine import usable_processors

        few = sum(todo.values()) <= SMALL  # such as norms: to start threads would take longer than they do
        small = {n: packed_bytes(parameters[n], plan[n]) for n in data if parameters[n].kind != "matrix"}
        if keep and not few and 8 * sum(small.values()) < sum(todo.values()):
            # So that a token meets one file: of each place that is read in another, the system may map 2 MB.
            todo |= small
            data = {name: view for name, view in data.items() if name not in small}
        jobs = Jobs(parameters, tensors, plan, todo, 1 if few else threads or usable_processors())
        data |= jobs.in_memory() if few or not keep else jobs.cached(checkpoint, dtype)
    return {name: weight(parameters[name], plan[name], data[name]) for name in plan}


def unquantized(
    parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor], dtype: str, heads: Collection[str] = ()
) -> dict[str, Unquantized]:
    """What a device may quantize itself, of what `prepare` would: matrices of floats that lie in a file."""
    found: dict[str, Unquantized] = {}
    for name, parameter in parameters.items():
        tensor, target = tensors[name], target_of(parameter, tensors[name], dtype, name in heads)
        if target.format in QUANTIZED and tensor.dtype in DENSE and not isinstance(tensor, Made):
            source = Dense(tensor.data, tensor.dtype, parameter.shape, parameter.transposed)
            found[name] = Unquantized(source, tensor.name, *target, packed_bytes(parameter, target))
    return found


def weight(parameter: Parameter, target: Target, data: memoryview) -> Matrix:
    """The value type of a weight."""
    if target.format == "int8":
        return Int8(data, *sides(parameter), target.group)
    if target.format == "int4":
        return Int4(data, *sides(parameter), target.group, target.symmetric)
    return Dense(data, target.format, parameter.shape, parameter.transposed)


def plain(parameter: Parameter, tensor: Tensor) -> Tensor:
    """A packed tensor in f32, in the parameter's own order; any other as it is."""
    if tensor.dtype not in FORMATS:
        return tensor
    import numpy as np

    from pronghorn.weights.packing import unpack

    packed = weight(parameter, FORMATS[tensor.dtype], tensor.data)
    assert not isinstance(packed, Dense)
    values = unpack(packed).T if parameter.transposed else unpack(packed)
    flat = np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1)
    return Tensor(tensor.name, "f32", tensor.shape, flat.data)


class Jobs:
    """The conversions of a model: `sizes` names them, with the bytes of each result."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        tensors: Mapping[str, Tensor],
        plan: Mapping[str, Target],
        sizes: Mapping[str, int],
        threads: int,
    ) -> None:
        self.parameters, self.tensors, self.plan, self.sizes = parameters, tensors, plan, sizes
        self.threads = threads
        self.pool: Pool | None = None

    def convert(self, name: str, destination: memoryview) -> None:
        """Writes one weight, on all threads."""
        from pronghorn._native import Pool, pack

        self.pool = self.pool or Pool(self.threads)
        parameter, target = self.parameters[name], self.plan[name]
        tensor = plain(parameter, self.tensors[name])
        n_out, n_in = sides(parameter)
        turned = parameter.transposed and target.format not in DTYPES  # a dense target keeps the file's order
        try:
            pack(tensor.data, tensor.dtype, n_out, n_in, turned, destination, *target, self.pool)
        except ValueError as error:
            raise CheckpointError(f"tensor {tensor.name} ({tensor.dtype}) {error}") from None

    def in_memory(self) -> dict[str, memoryview]:
        """All of them, in memory of this process."""
        import mmap

        from pronghorn.weights.files import progress

        results = {name: memoryview(mmap.mmap(-1, size)) for name, size in self.sizes.items()}
        names = self.sizes if sum(self.sizes.values()) <= SMALL else progress(self.sizes.items(), "packing")
        for name in names:
            self.convert(name, results[name])
        return results

    def cached(self, checkpoint: Checkpoint, dtype: str) -> dict[str, memoryview]:
        """All of them, mapped from the cache; made and written there if they are not, or no longer, good."""
        from pronghorn._native import checksum
        from pronghorn.weights.ahead import place_of
        from pronghorn.weights.hub import cache_folder

        place, key = place_of(checkpoint.files[0]), f"{checksum(self.identity(checkpoint)):016x}"
        folder = cache_folder() / "packed"
        path = folder / f"{place}-{dtype}-{key}.safetensors"
        if os.path.exists(path):  # noqa: PTH110 (Path's raises for a folder that may not be read)
            try:
                return self.mapped(path)
            except CheckpointError as error:
                notice(f"{error}: packing the weights again")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.write(path)
        except OSError as error:
            notice(f"{folder}: {error.strerror}: the packed weights are kept in memory only")
            return self.in_memory()
        # What the same source became earlier, and what a process that was killed has left.
        with suppress(OSError):  # another process may be about to rename what it has written, or do the same
            abandoned = [file for file in folder.glob(".writing-*") if time.time() - file.stat().st_mtime > 3600]
            for old in [*folder.glob(f"{place}-{dtype}-*.safetensors"), *abandoned]:
                if old != path:
                    old.unlink(missing_ok=True)
        return self.mapped(path)

    def identity(self, checkpoint: Checkpoint) -> bytes:
        """What the result depends on."""
        files = []
        for file in checkpoint.files:
            status = file.stat()
            files.append([os.path.realpath(file), status.st_size, status.st_mtime_ns])
        return repr((FORMAT, files, [(name, *self.plan[name]) for name in self.sizes])).encode()

    def mapped(self, path: Path) -> dict[str, memoryview]:
        """The weights of a cache file. CheckpointError if it is not what was written."""
        from pronghorn.weights.ahead import reading
        from pronghorn.weights.files import fail, parse_json
        from pronghorn.weights.safetensors import read_safetensors

        ahead = reading(path, self.threads - 1)
        view = ahead.view
        found = read_safetensors(path, view)
        length = int.from_bytes(view[:8], "little")
        metadata = parse_json(view[8 : 8 + length], path).get("__metadata__", {})
        if metadata.get("checksum") != f"{ahead.reader.finish():016x}":
            fail(path, "is damaged (its checksum differs)")
        if any(name not in found or found[name].data.nbytes < size for name, size in self.sizes.items()):
            fail(path, "lacks a weight")
        return {name: found[name].data[:size] for name, size in self.sizes.items()}

    def write(self, path: Path) -> None:
        """Converts all into a file of this name. OSError if the folder or the disk does not take it."""
        import json
        import mmap

        from pronghorn._native import ReadAhead
        from pronghorn.weights.files import in_large_pages, progress, replacing

        header: dict[str, Any] = {"__metadata__": {"pronghorn": str(FORMAT), "checksum": "0" * 16}}
        end = 0
        for name, size in self.sizes.items():
            begin, end = end, end + -(-size // ALIGNMENT) * ALIGNMENT
            header[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        text = json.dumps(header)
        text += " " * (-(8 + len(text)) % ALIGNMENT)
        start = 8 + len(text)
        with replacing(path, start + end) as file:
            view = memoryview(in_large_pages(mmap.mmap(file.fileno(), start + end)))
            for name in progress(self.sizes.items(), "packing"):
                begin = start + header[name]["data_offsets"][0]
                self.convert(name, view[begin : begin + self.sizes[name]])
            text = text.replace("0" * 16, f"{ReadAhead(view[start:], True, self.threads - 1).finish():016x}", 1)
            view[:start] = len(text).to_bytes(8, "little") + text.encode()


def notice(text: str) -> None:
    """One line for the user, where nothing else will say it."""
    import logging

    logging.getLogger("pronghorn").warning("pronghorn: %s", text)
