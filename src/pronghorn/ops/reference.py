"""The slow twin: every operation in NumPy and float64, as it stands in the papers.

What the formats round, it rounds as well (see `linear`), so that a fast path may differ from it only by the
order and the precision of its sums. With `round_inputs=False` nothing is rounded: the pure model.
"""

# NumPy's stubs type most arithmetic as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pronghorn import _native
from pronghorn.errors import ParameterError
from pronghorn.ops import KV_DTYPES, PAGE, Attention, Batch, Choice, Chosen, Rope
from pronghorn.weights.packing import unpack
from pronghorn.weights.types import Dense, Matrix, Module

Array = NDArray[np.float64]


class ReferenceRunner:
    """A model in float64. `pages` is the KV cache, keys and values of `[layer, page, slot, head, dim]`."""

    def __init__(
        self,
        model: Model,
        weights: Module,
        *,
        n_pages: int,
        kv_dtype: str = "f32",
        max_tokens: int = 512,
        round_inputs: bool = True,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise ParameterError(f"kv_dtype is {kv_dtype!r}: expected one of {', '.join(KV_DTYPES)}")
        self.model = model
        self.weights = weights
        self.kv_dtype = kv_dtype
        self.max_tokens = max_tokens
        self.round_inputs = round_inputs
        cfg = model.config
        # Not a number until it is written: who reads a slot that was never filled will notice.
        self.pages = np.full((2, cfg.n_layers, n_pages, PAGE, cfg.n_kv_heads, cfg.head_dim), np.nan)
        self._arrays: dict[int, Array] = {}

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        return self.logits(batch).astype(np.float32).data

    def logits(self, batch: Batch) -> Array:
        """What `run` gives, before it is rounded to float32."""
        if len(batch.token_ids) > self.max_tokens:
            raise ParameterError(f"{len(batch.token_ids)} tokens in a batch: at most {self.max_tokens}")
        return self.model.forward(ReferenceOps(self, batch), self.weights)

    def copy_page(self, source: int, target: int) -> None:
        """See ops.Runner."""
        self.pages[:, :, target] = self.pages[:, :, source]

    def choose(self, logits: memoryview, choices: Sequence[Choice]) -> list[Chosen]:
        """See ops.Runner."""
        return _native.choose_rows(logits, self.model.config.vocab_size, choices)

    def array(self, weight: Matrix) -> Array:
        """`to_array`, once for each weight."""
        if id(weight) not in self._arrays:
            self._arrays[id(weight)] = to_array(weight)
        return self._arrays[id(weight)]


class ReferenceOps:
    """The operations of one batch (see ops.Ops); activations are float64 arrays `[tokens, width]`."""

    def __init__(self, runner: ReferenceRunner, batch: Batch) -> None:
        self.runner = runner
        self.token_ids, self.at, self.sequence, self.logits_rows = (
            np.array(a, dtype=np.int64) for a in (batch.token_ids, batch.positions, batch.sequence, batch.logits_rows)
        )
        self.page_table = np.array(batch.page_table, dtype=np.int64).reshape(-1, max(batch.table_width, 1))

    def embed(self, table: Matrix) -> Array:
        return self.runner.array(table)[self.token_ids]

    def positions(self, x: Array, table: Matrix) -> Array:
        return x + self.runner.array(table)[self.at]

    def layer_norm(self, x: Array, norm: Module, eps: float) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * self.runner.array(norm.weight)
        return y if norm.get("bias") is None else y + self.runner.array(norm.bias)

    def rms_norm(self, x: Array, norm: Module, eps: float) -> Array:
        weight = self.runner.array(norm.weight)
        runs = x.reshape(len(x), -1, len(weight))
        return (runs / np.sqrt((runs**2).mean(axis=2, keepdims=True) + eps) * weight).reshape(x.shape)

    def linear(self, x: Array, module: Module, activation: str | None = None, residual: Array | None = None) -> Array:
        """With bf16 weights x is rounded to bf16; with int8 and int4 to 8 bits, by the weights' groups."""
        y = self.rounded(x, module.weight) @ self.runner.array(module.weight).T
        if module.get("bias") is not None:
            y = y + self.runner.array(module.bias)
        if activation is not None:
            y = activate(y, activation)
        return y if residual is None else y + residual

    def split(self, x: Array, widths: Sequence[int]) -> tuple[Array, ...]:
        return tuple(np.split(x, np.cumsum(widths)[:-1], axis=1))

    def attention(self, q: Array, k: Array, v: Array, spec: Attention) -> Array:
        heads = (len(q), -1, spec.head_dim)
        q, k, v = q.reshape(heads), k.reshape(heads), v.reshape(heads)
        if spec.rope is not None:
            q, k = rotate(q, self.at, spec.rope), rotate(k, self.at, spec.rope)

        keys, values = self.runner.pages[:, spec.layer]  # [page, slot, kv head, dim]
        pages, slots = self.page_table[self.sequence, self.at // PAGE], self.at % PAGE
        keys[pages, slots], values[pages, slots] = self.stored(k), self.stored(v)

        y = np.empty_like(q)
        for row, position in enumerate(self.at):
            first = 0 if spec.window is None else max(0, position + 1 - spec.window)
            seen = np.arange(first, position + 1)
            pages, slots = self.page_table[self.sequence[row], seen // PAGE], seen % PAGE
            for head in range(spec.n_heads):
                kv_head = head // (spec.n_heads // spec.n_kv_heads)
                scores = spec.scale * keys[pages, slots, kv_head] @ q[row, head]  # [seen]
                weights = np.exp(scores - scores.max())
                y[row, head] = weights / weights.sum() @ values[pages, slots, kv_head]
        return y.reshape(len(q), -1)

    def gate(self, gate: Array, up: Array, activation: str) -> Array:
        return activate(gate, activation) * up

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def logits(self, x: Array, module: Module) -> Array:
        return self.linear(x[self.logits_rows], module)

    def rounded(self, x: Array, weight: Matrix) -> Array:
        """What the kernels for this weight's format see of x."""
        if not self.runner.round_inputs:
            return x
        if isinstance(weight, Dense):
            return to_bf16(x) if weight.dtype == "bf16" else x
        return to_int8(x, weight.group)

    def stored(self, x: Array) -> Array:
        """What the KV cache gives back of x."""
        if not self.runner.round_inputs:
            return x
        if self.runner.kv_dtype == "int8":  # a scale for each token and head
            return to_int8(x.reshape(-1, x.shape[-1]), 0).reshape(x.shape)
        return to_bf16(x) if self.runner.kv_dtype == "bf16" else x.astype(np.float32).astype(np.float64)


def activate(x: Array, name: str) -> Array:
    """One of ops.ACTIVATIONS."""
    if name == "gelu":
        erfc = np.vectorize(math.erfc, otypes=[np.float64])
        return x / 2 * erfc(-x / math.sqrt(2))  # erfc(-z) = 1 + erf(z), exact in the tail as well
    if name == "gelu_new":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        with np.errstate(over="ignore"):
            return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    raise ValueError(f"unknown activation {name}")


def rotate(x: Array, positions: NDArray[np.int64], rope: Rope) -> Array:
    """Turns the pairs of each head of `x [tokens, heads, head_dim]`."""
    n = len(rope.frequencies)
    angles = positions[:, None, None] * np.array(rope.frequencies)  # [tokens, 1, n]
    cos, sin = rope.magnitude * np.cos(angles), rope.magnitude * np.sin(angles)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rope.interleaved else (slice(0, n), slice(n, 2 * n))
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def to_bf16(x: Array) -> Array:
    """Rounds through float32 to the nearest bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), x, rounded.astype(np.uint32).view(np.float32).astype(np.float64))


def to_int8(x: Array, group: int) -> Array:
    """Rounds each row of x, by groups (0: the whole row), to scale * q with whole q in -127..127."""
    n = x.shape[1]
    group = group or n
    padded = np.zeros((len(x), -(-n // group) * group), np.float32)
    padded[:, :n] = x
    groups = padded.reshape(len(x), -1, group)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    scale = largest / np.float32(127)
    with np.errstate(divide="ignore"):
        q = np.rint(groups * np.where(largest > 0, np.float32(127) / largest, np.float32(0)))
    return (q.astype(np.float64) * scale).reshape(len(x), -1)[:, :n]


def to_array(weight: Matrix) -> Array:
    """The weight's values: a vector as it is, a matrix as `[n_out, n_in]`."""
    if not isinstance(weight, Dense):
        return unpack(weight)
    if weight.dtype == "bf16":
        flat = (np.frombuffer(weight.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(weight.data, {"f32": np.float32, "f16": np.float16}[weight.dtype])
    values = flat.astype(np.float64).reshape(weight.shape)
    return values.T if weight.transposed else values


if TYPE_CHECKING:
    from pronghorn.models import Model
    from pronghorn.ops import Ops

    _: type[Ops[Array]] = ReferenceOps
