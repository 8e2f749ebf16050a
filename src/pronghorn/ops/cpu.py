"""The native house: a model function is called once and recorded; the runner executes the record for any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pronghorn import _native
from pronghorn._native import View
from pronghorn.errors import ConfigError, ParameterError
from pronghorn.machine import usable_processors
from pronghorn.ops import KV_DTYPES, Attention, Batch, Choice, Chosen
from pronghorn.weights.types import Dense, Int4, Int8, Matrix, Module

if TYPE_CHECKING:
    from pronghorn.models import Model


class CpuRunner:
    """A model as a native program, with its KV cache and its threads (None: as many as this process may use).

    `pool` and `cache` are another runner's, for a draft: its threads, and keys and values that both read and write.
    """

    def __init__(
        self,
        model: Model,
        weights: Module,
        *,
        n_pages: int,
        kv_dtype: str = "f32",
        max_tokens: int = 512,
        threads: int | None = None,
        pool: _native.Pool | None = None,
        cache: _native.KvCache | None = None,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise ParameterError(f"kv_dtype is {kv_dtype!r}: expected one of {', '.join(KV_DTYPES)}")
        cfg = model.config
        try:
            recorder = CpuOps(max_tokens, cfg.vocab_size)
            model.forward(recorder, weights)
            recorder.program.finish()
        except ValueError as error:  # a size that the kernels do not take
            raise ConfigError(f"this model does not run on the CPU: {error}") from None
        self.model = model
        self.program = recorder.program
        self.pool = pool or _native.Pool(threads or usable_processors())
        self.cache = cache or _native.KvCache(cfg.n_layers, n_pages, cfg.n_kv_heads, cfg.head_dim, kv_dtype)

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner. The interpreter lock is free meanwhile."""
        return self.program.run(
            batch.token_ids,
            batch.positions,
            batch.sequence,
            batch.page_table,
            batch.table_width,
            batch.logits_rows,
            self.cache,
            self.pool,
        )

    def copy_page(self, source: int, target: int) -> None:
        """See ops.Runner."""
        self.cache.copy_page(source, target)

    def choose(self, logits: memoryview, choices: Sequence[Choice]) -> list[Chosen]:
        """See ops.Runner. The rows are shared out over the threads."""
        return _native.choose_rows(logits, self.model.config.vocab_size, choices, self.pool)


class CpuOps:
    """Records operations (see ops.Ops): an activation is a View of one of the program's buffers."""

    def __init__(self, max_tokens: int, vocab_size: int) -> None:
        self.program = _native.Program(max_tokens, vocab_size)
        self._numbers: dict[int, int] = {}  # of the weights that the program has, by identity

    def embed(self, table: Matrix) -> View:
        return self.program.embed(self._matrix(table))

    def positions(self, x: View, table: Matrix) -> View:
        return self.program.positions(x, self._matrix(table))

    def layer_norm(self, x: View, norm: Module, eps: float) -> View:
        return self.program.layer_norm(x, self._vector(norm.weight), self._vector(norm.get("bias")), eps)

    def rms_norm(self, x: View, norm: Module, eps: float) -> View:
        return self.program.rms_norm(x, self._vector(norm.weight), eps)

    def linear(self, x: View, module: Module, activation: str | None = None, residual: View | None = None) -> View:
        bias = self._vector(module.get("bias"))
        return self.program.linear(x, self._matrix(module.weight), bias, activation or "", residual)

    def split(self, x: View, widths: Sequence[int]) -> tuple[View, ...]:
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        return tuple(x.columns(end - width, end) for end, width in zip(ends, widths, strict=True))

    def attention(self, q: View, k: View, v: View, spec: Attention) -> View:
        rope = -1
        if spec.rope is not None:
            rope = self.program.rope(spec.rope.frequencies, spec.rope.interleaved, spec.rope.magnitude)
        sizes = (spec.layer, spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.scale, spec.window or 0, rope)
        return self.program.attention(q, k, v, *sizes)

    def gate(self, gate: View, up: View, activation: str) -> View:
        return self.program.gate(gate, up, activation)

    def add(self, x: View, y: View) -> View:
        return self.program.add(x, y)

    def logits(self, x: View, module: Module) -> View:
        self.program.logits(x, self._matrix(module.weight), self._vector(module.get("bias")))
        return x

    def _matrix(self, w: Matrix) -> int:
        if id(w) not in self._numbers:
            match w:
                case Dense():
                    order = "in_out" if w.transposed else "out_in"
                    number = self.program.matrix(w.data, w.dtype, order, w.n_out, w.n_in)
                case Int8():
                    number = self.program.matrix(w.data, "int8", "packed", w.n_out, w.n_in, w.group)
                case Int4():
                    number = self.program.matrix(w.data, "int4", "packed", w.n_out, w.n_in, w.group, w.symmetric)
            self._numbers[id(w)] = number
        return self._numbers[id(w)]

    def _vector(self, w: Dense | None) -> int:
        if w is None:
            return -1
        if id(w) not in self._numbers:
            self._numbers[id(w)] = self.program.vector(w.data, w.shape[0])
        return self._numbers[id(w)]
