"""A model recorded for PyTorch, and fused: norms go into the products that read them, products of one input become one,
and so do a gate and what it closes; bias, activation and residual go into the product that ends in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pronghorn.ops import Attention
from pronghorn.weights.types import Module

if TYPE_CHECKING:
    from pronghorn.ops import Ops
    from pronghorn.ops.gpu import Step
    from pronghorn.ops.gpu_weights import Packed, Weights


class Columns(NamedTuple):
    """What recorded operations take and give: columns of a step's value."""

    number: int
    begin: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.begin


class Normed(NamedTuple):
    """A norm that is left to who reads it."""

    x: Columns
    kind: str  # rms | layer
    norm: Module
    eps: float


X = Columns | Normed


class Linear:
    """A product with all that is fused into it: activation(norm(x) @ weight.T + bias) + residual, or of a gate."""

    def __init__(self, x: X, module: Module, activation: str | None = None, residual: Columns | None = None) -> None:
        self.x, self.modules, self.activation, self.residual = x, [module], activation, residual
        self.gate = False  # whether the first half of the outputs, activated, multiplies the second
        self.head = False  # whether only the rows of logits are computed
        self.weight: Packed | torch.Tensor
        self.bias: torch.Tensor | None = None

    def joined_by(self, x: X, module: Module) -> bool:
        """Whether another product of x can be made together with this one."""
        first = self.modules[0]
        plain = self.activation is None and self.residual is None and not self.head
        alike = first.weight.form == module.weight.form and (first.get("bias") is None) == (module.get("bias") is None)
        return plain and alike and x == self.x

    def load(self, weights: Weights) -> None:
        """Puts the weights on the device, side by side."""
        self.weight = weights.matrix(*(module.weight for module in self.modules))
        if self.modules[0].get("bias") is not None:
            self.bias = torch.cat([weights.table(module.bias) for module in self.modules])
        self.name = self.modules[0].weight.name
        self.modules.clear()  # what was there already can go

    def __call__(self, step: Step) -> torch.Tensor:
        return step.linear(self)


class Embed:
    """Rows of a table for the tokens, and of learned positions, if there are."""

    def __init__(self, table: Any) -> None:
        self.table, self.places = table, None

    def __call__(self, step: Step) -> torch.Tensor:
        return step.embed(self.table, self.places)


class Recorder:
    """Records a model (see ops.Ops) -> `steps`: each is called with a Step, and gives its next value."""

    def __init__(self) -> None:
        self.steps: list[Callable[[Step], torch.Tensor]] = []
        self.widths: list[int] = []
        self.last: dict[int, int] = {}  # the step that is the last to read a value

    def record(self, step: Callable[[Step], torch.Tensor], width: int, *reads: X | None) -> Columns:
        number = len(self.steps)
        for x in reads:
            if x is not None:
                self.last[x.x.number if isinstance(x, Normed) else x.number] = number
        self.steps.append(step)
        self.widths.append(width)
        return Columns(number, 0, width)

    def value(self, x: X) -> Columns:
        """Has a norm computed that nobody fuses."""
        return x if isinstance(x, Columns) else self.record(lambda step: step.get(x), x.x.width, x)

    def embed(self, table: Any) -> Columns:
        return self.record(Embed(table), table.weight.n_in)

    def positions(self, x: X, table: Any) -> Columns:
        value, last = self.value(x), self.steps[-1]
        if isinstance(last, Embed) and last.places is None and value.number == len(self.steps) - 1:
            last.places = table
            return value
        return self.record(lambda step: step.get(value) + step.vector(table)[step.at.long()], value.width, value)

    def layer_norm(self, x: X, norm: Module, eps: float) -> X:
        return Normed(self.value(x), "layer", norm, eps)

    def rms_norm(self, x: X, norm: Module, eps: float) -> X:
        normed = Normed(self.value(x), "rms", norm, eps)
        return normed if norm.weight.weight.shape[0] == normed.x.width else self.value(normed)

    def linear(self, x: X, module: Module, activation: str | None = None, residual: X | None = None) -> Columns:
        last, n_out = self.steps[-1], module.weight.weight.n_out
        if isinstance(last, Linear) and activation is None and residual is None and last.joined_by(x, module):
            last.modules.append(module)
            self.widths[-1] += n_out
            return Columns(len(self.steps) - 1, self.widths[-1] - n_out, self.widths[-1])
        added = None if residual is None else self.value(residual)
        return self.record(Linear(x, module, activation, added), n_out, x, added)

    def split(self, x: X, widths: Sequence[int]) -> tuple[Columns, ...]:
        value = self.value(x)
        ends = [value.begin + sum(widths[: i + 1]) for i in range(len(widths))]
        return tuple(Columns(value.number, end - width, end) for end, width in zip(ends, widths, strict=True))

    def attention(self, q: X, k: X, v: X, spec: Attention) -> Columns:
        x = self.value(q), self.value(k), self.value(v)
        return self.record(lambda step: step.attention(*x, spec), spec.n_heads * spec.head_dim, *x)

    def gate(self, gate: X, up: X, activation: str) -> Columns:
        gate, up = self.value(gate), self.value(up)
        number, width, last = len(self.steps) - 1, gate.width, self.steps[-1]
        halves = Columns(number, 0, width), Columns(number, width, 2 * width)
        if isinstance(last, Linear) and (gate, up) == halves and self.widths[-1] == 2 * width:
            last.gate, last.activation, self.widths[-1] = True, activation, width
            return gate
        return self.record(lambda step: step.gate(gate, up, activation), width, gate, up)

    def add(self, x: X, y: X) -> Columns:
        x, y = self.value(x), self.value(y)
        return self.record(lambda step: step.get(x) + step.get(y), x.width, x, y)

    def logits(self, x: X, module: Module) -> Columns:
        head = Linear(x, module)
        head.head = True
        return self.record(head, module.weight.weight.n_out, x)


if TYPE_CHECKING:
    _: type[Ops[X]] = Recorder
