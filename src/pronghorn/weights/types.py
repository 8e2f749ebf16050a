"""The values that weights are: raw tensors of a file, what a model needs, and the matrices that operations read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

DTYPES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1}
"""Plain element types and their sizes in bytes. GGUF's block formats (`q4_0`, ...) are named beside these."""

DENSE = ("f32", "f16", "bf16")
"""Those that weights run in as they are."""


class Tensor(NamedTuple):
    """A named array as it stands in a mapped file. Nothing is read until it is used.

    `dtype` is a key of `DTYPES`, or a block format of GGUF (`weights.gguf.BLOCKS`) in lower case.
    `shape` is row-major; for GGUF, whose files name the fastest dimension first, it is already reversed.
    `data` is the flat bytes, a slice of the file's mapping (which it keeps alive).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Made(Tensor):
    """A tensor that is not in any file in one piece: `data` is made anew each time that it is read, and not kept.

    Such tensors can be converted, and no engine runs on them.
    """

    make: Callable[[], memoryview]

    @classmethod
    def of(cls, name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], memoryview]) -> Made:
        """A tensor whose data is what `make` gives."""
        tensor = cls(name, dtype, shape, memoryview(b""))
        tensor.make = make
        return tensor

    @property
    def data(self) -> memoryview:
        return self.make()


class Dense(NamedTuple):
    """A vector or matrix of floats, in the file's own order.

    `dtype` is f32, f16 or bf16. A matrix is `[n_out, n_in]`, or `[n_in, n_out]` where `transposed` (GPT-2's
    files); an embedding table is `[vocabulary, embd]`, the same as the head that it may be tied to.
    """

    data: memoryview
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def n_out(self) -> int:
        return self.shape[1 if self.transposed else 0]

    @property
    def n_in(self) -> int:
        return self.shape[0 if self.transposed else 1]


class Int8(NamedTuple):
    """A matrix `[n_out, n_in]` of 8-bit weights: w = scale * (stored - 128).

    Panels of 16 outputs; each panel has its scales, then its inputs in quads `[ceil(n_in/4)][16][4]` of uint8.
    `group` 0: one f32 scale an output (64 bytes a panel). Otherwise one f16 scale for `group` inputs (the last
    group may be short), `[n_groups][16]`, padded to 64 bytes. Padding inputs are stored as 128, which is zero.
    """

    data: memoryview
    n_out: int
    n_in: int
    group: int


class Int4(NamedTuple):
    """A matrix `[n_out, n_in]` of 4-bit weights: w = scale * q + minimum, q in 0..15.

    Panels of 16 outputs: f16 scales `[n_groups][16]`, then (unless `symmetric`, where minimum = -8 * scale)
    f16 minima likewise, each padded to 64 bytes; then for each group `[ceil(group/8)][16][4]` bytes: the low
    nibbles are the inputs 8j..8j+3, the high nibbles 8j+4..8j+7. The last group may be short; it is padded to 8.
    """

    data: memoryview
    n_out: int
    n_in: int
    group: int
    symmetric: bool


Matrix = Dense | Int8 | Int4


class Unquantized(NamedTuple):
    """A matrix that is to be Int8 or Int4, with these `group` and `symmetric`, and is quantized where it will run.

    `name` is the file's own, `nbytes` what the packed matrix takes.
    """

    source: Dense
    name: str
    format: str  # int8 | int4
    group: int
    symmetric: bool
    nbytes: int

    @property
    def n_out(self) -> int:
        return self.source.n_out

    @property
    def n_in(self) -> int:
        return self.source.n_in


class Module:
    """A node of a model's weights: `w.layers[0].self_attn.q_proj.weight` is the checkpoint's own name.

    Children are attributes; numbered children are reached by index.
    """

    def __init__(self) -> None:
        self._children: dict[str, Any] = {}

    @classmethod
    def of(cls, named: dict[str, Any]) -> Module:
        """The tree of a flat dictionary of dotted names."""
        root = cls()
        for name, value in named.items():
            node = root
            *path, leaf = name.split(".")
            for part in path:
                node = node._children.setdefault(part, cls())
            node._children[leaf] = value
        return root

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_children"][name]
        except KeyError:
            raise AttributeError(f"no weight named {name}") from None

    def __getitem__(self, index: int) -> Any:
        return self._children[str(index)]

    def __iter__(self) -> Iterator[Any]:
        return (self._children[str(i)] for i in range(len(self._children)))

    def get(self, name: str) -> Any:
        """The child of this name, or None: for what is optional, such as a bias."""
        return self._children.get(name)


class Parameter(NamedTuple):
    """A weight that a model needs.

    `kind` is "matrix" (linear layers and embeddings: what may be quantized), "table" (learned positions) or
    "vector" (norms and biases). A matrix is `[n_out, n_in]`, or `[n_in, n_out]` where `transposed`.
    """

    shape: tuple[int, ...]
    kind: str
    transposed: bool = False


def sides(parameter: Parameter) -> tuple[int, int]:
    """(n_out, n_in); a vector is one row."""
    if len(parameter.shape) == 1:
        return 1, parameter.shape[0]
    n_out, n_in = reversed(parameter.shape) if parameter.transposed else parameter.shape
    return n_out, n_in


class Target(NamedTuple):
    """The form that a weight takes. `group` and `symmetric` are for int8 and int4: see Int8 and Int4."""

    format: str  # f32 | f16 | bf16 | int8 | int4
    group: int = 0
    symmetric: bool = False

    def __str__(self) -> str:
        group = f" in groups of {self.group}" if self.group else ""
        return self.format + group + (", symmetric" if self.symmetric else "")


GROUPS = (32, 64, 128, 256)  # inputs

FORMATS = {
    "int8": Target("int8"),
    **{f"int8-g{group}": Target("int8", group) for group in GROUPS},
    **{f"int4-g{group}": Target("int4", group) for group in GROUPS},
    **{f"int4-g{group}-sym": Target("int4", group, symmetric=True) for group in GROUPS},
}
"""Dtypes of what `pronghorn quantize` has packed (see weights.writing.safetensors_file), mapped and run as it is."""


def packed_bytes(parameter: Parameter, target: Target) -> int:
    """The size of a converted weight."""
    from pronghorn._native import packed_size

    n_out, n_in = sides(parameter)
    if target.format in DTYPES:
        return n_out * n_in * DTYPES[target.format]
    return packed_size(target.format, n_out, n_in, target.group, target.symmetric)
