"""Scales of channels: what a layer's inputs are divided by, and its weights' columns multiplied by, before rounding.

Large channels take the few steps of 8 or 4 bits from the small ones of their group; scales even them out (SmoothQuant:
Xiao et al. 2022, arXiv:2211.10438; AWQ: Lin et al. 2023, arXiv:2306.00978). What makes the channels, a norm or the rows
of a linear layer, takes the division in, so that the result is an ordinary checkpoint. Scales are powers of two: the
scaled model computes the same numbers as the source, bit for bit, in any format of floats.
"""

# NumPy's stubs type most arithmetic as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pronghorn.models import Model
from pronghorn.ops import Attention
from pronghorn.weights.gptq import grouped, span
from pronghorn.weights.packing import Floats
from pronghorn.weights.types import FORMATS, Module, sides

POWERS = tuple(i / 8 for i in range(9))
"""Of a channel's root mean square, that are tried as its scale."""
SAMPLE = 512  # of the tokens, by which a power is chosen


class Channels(NamedTuple):
    """What makes an activation: the rows of a weight from `first` on; heads of them are repeated after each other."""

    weight: str
    bias: str | None
    first: int
    width: int
    head: int = 1
    repeats: int = 1

    def spread(self, scale: Floats) -> Floats:
        """Of each row -> of each channel."""
        return np.repeat(scale.reshape(-1, self.head), self.repeats, axis=0).reshape(-1)

    def gather(self, values: Floats) -> Floats:
        """Of each channel -> of each row, the root mean square of its copies."""
        copies = values.reshape(-1, self.repeats, self.head)
        return np.sqrt((copies**2).mean(1)).reshape(-1)


class Tracer:
    """The operations on `Channels | None`, which find what each linear layer reads. Weights are their names."""

    def __init__(self, model: Model) -> None:
        self.parameters = model.parameters()
        self.readers: dict[Channels, list[str]] = {}
        self.tables: set[str] = set()
        self.fixed: set[Channels | None] = {None}  # read by something that scales do not pass
        model.forward(self, Module.of({name: name for name in self.parameters}))

    def folds(self) -> dict[Channels, list[str]]:
        """The channels that may be scaled, with the matrices that read them."""
        return {made: names for made, names in self.readers.items() if made not in self.fixed}

    def fix(self, *read: Channels | None) -> None:
        self.fixed.update(read)

    def embed(self, table: Any) -> None:
        self.tables.add(table)

    def positions(self, x: Channels | None, table: Any) -> None:
        self.fix(x)

    def layer_norm(self, x: Channels | None, norm: Module, eps: float) -> Channels:
        self.fix(x)
        return Channels(norm.weight, norm.get("bias"), 0, self.parameters[norm.weight].shape[0])

    rms_norm = layer_norm

    def linear(
        self, x: Channels | None, module: Module, activation: str | None = None, residual: Channels | None = None
    ) -> Channels | None:
        self.fix(residual)
        self.logits(x, module)
        if activation not in (None, "relu") or residual is not None:
            return None
        return Channels(module.weight, module.get("bias"), 0, sides(self.parameters[module.weight])[0])

    def split(self, x: Channels | None, widths: Sequence[int]) -> tuple[Channels | None, ...]:
        starts = np.cumsum([0, *widths[:-1]]).tolist()
        return tuple(x and x._replace(first=x.first + at, width=n) for at, n in zip(starts, widths, strict=True))

    def attention(self, q: Channels | None, k: Channels | None, v: Channels | None, spec: Attention) -> Channels | None:
        self.fix(q, k)
        return v and v._replace(head=spec.head_dim, repeats=spec.n_heads // spec.n_kv_heads)

    def gate(self, gate: Channels | None, up: Channels | None, activation: str) -> Channels | None:
        self.fix(gate)
        return up

    def add(self, x: Channels | None, y: Channels | None) -> None:
        self.fix(x, y)

    def logits(self, x: Channels | None, module: Module) -> None:
        if x is not None:
            self.readers.setdefault(x, []).append(module.weight)
            # Rows of a table are the embeddings as well; a norm of each head makes fewer channels than are read.
            if module.weight in self.tables or x.width * x.repeats != sides(self.parameters[module.weight])[1]:
                self.fix(x)


class Scaling:
    """Scales of a model's channels, chosen one after another; `load` gives a source's matrix [n_out, n_in]."""

    def __init__(self, model: Model, formats: Mapping[str, str], load: Callable[[str], Floats]) -> None:
        self.formats, self.load, self.parameters = formats, load, model.parameters()
        self.folds = {name: (made, names) for made, names in Tracer(model).folds().items() for name in names}
        self.rows: dict[str, Floats] = {}  # by weight or bias: what its rows are multiplied by
        self.columns: dict[str, Floats] = {}  # by matrix: what its columns are multiplied by
        self.squares: dict[str, Floats] = {}  # by matrix: the mean square of each of its inputs, once they are scaled

    def see(self, name: str, x: Floats) -> None:
        """The inputs [tokens, n_in] of a matrix in the source."""
        squares = np.einsum("ti,ti->i", x, x) / np.float32(len(x))
        if name in self.folds and name not in self.columns:
            self.choose(*self.folds[name], x, squares)
        squares = squares / self.columns.get(name, np.float32(1)) ** 2
        self.squares[name] = squares + np.float32(0.01) * squares.mean()  # so that no weight is free

    def apply(self, name: str, w: Floats) -> Floats:
        """A weight, a vector or [n_out, n_in], with its scales."""
        if name in self.columns:
            w = w * self.columns[name]
        return (w.T * self.rows[name]).T if name in self.rows else w

    def choose(self, made: Channels, names: Sequence[str], x: Floats, squares: Floats) -> None:
        """The power of the root mean square with which rounding is expected to change these layers' outputs least.

        Rounding in steps of d adds errors of mean square d^2 / 12, and of independent signs: to each weight, times its
        input's square; and to each input, times the squares of its weights.
        """
        packed = [name for name in names if self.formats.get(name) in FORMATS]
        if not packed:
            return
        size = made.gather(np.sqrt(squares))
        size = np.log2(np.where(size > 0, size, 1))
        size -= size.mean()
        weights = {name: self.load(name) for name in packed}
        columns = {name: np.einsum("oi,oi->i", w, w) for name, w in weights.items()}
        x = x[:: -(-len(x) // SAMPLE)]

        def scale_of(power: float) -> Floats:
            return np.exp2(np.rint(np.float32(power) * size))

        def loss(power: float) -> float:
            scale, total = made.spread(scale_of(power)), 0.0
            for name, w in weights.items():
                target = FORMATS[self.formats[name]]
                group = target.group or w.shape[1]
                step = span(grouped(w * scale, group), target)[0]  # [n_out, groups]
                total += float((step**2).sum(0) @ grouped((squares / scale**2)[None], group)[0].sum(1))
                step = np.abs(grouped(x / scale, group)).max(2) / 127  # [tokens, groups]
                total += float((step**2).mean(0) @ grouped((columns[name] * scale**2)[None], group)[0].sum(1))
            return total

        self.fold(made, names, scale_of(min(POWERS, key=loss)))

    def fold(self, made: Channels, names: Sequence[str], scale: Floats) -> None:
        """Divides what makes channels by a scale for each of its rows, and multiplies the columns that read them."""
        for part in (made.weight, made.bias):
            if part is not None:
                parameter = self.parameters[part]
                n = parameter.shape[0 if parameter.kind == "matrix" and not parameter.transposed else -1]
                self.rows.setdefault(part, np.ones(n, np.float32))[made.first : made.first + made.width] /= scale
        for name in names:
            self.columns[name] = made.spread(scale)
