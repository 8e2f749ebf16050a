"""Training what rounding leaves free: scales and minima of groups, norms' weights and biases; the codes stay.

The quantized model learns the source's own predictions: KL divergence from them, on the windows that it was calibrated
with, one a step, by Adam through all layers (as EfficientQAT's second phase: Chen et al. 2024, arXiv:2407.11062, which
trains scales, and for the text itself). Inputs are rounded as the kernels do, and gradients pass that as if it were not
there. All that is trained takes no more bits than before.

Memory: a byte a weight for the codes, 16 for each trained number, and one window's activations in all layers; no matrix
is kept as floats.
"""

# PyTorch's functional interface is typed as Any in part.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pronghorn.errors import ParameterError
from pronghorn.models import Model
from pronghorn.ops import Attention, Rope
from pronghorn.weights.packing import Codes, Floats, has_minimum, limits
from pronghorn.weights.types import Module, Target

try:
    import torch
    from torch import Tensor
    from torch.nn import functional
except ImportError as error:
    raise ParameterError("tuning needs PyTorch: pip install 'pronghorn[gpu]'") from error

RATE = 1e-3
"""Of Adam, at the beginning (it falls to 0 as a cosine), in parts of what each number began as, where codes have
4 bits; of 8, there is less to mend, and it is less by as much as the codes are finer."""
SPREAD = 4  # codes' distance from the middle, roughly: it makes a step of a minimum as large as one of a scale


class Trained:
    """A matrix of codes: w = scale * (q - middle) + centre.

    The middle is that of the codes, where there is a minimum, for from there scale and centre have little to do with
    each other; else 0, as is the centre.
    """

    def __init__(self, codes: Codes, target: Target) -> None:
        self.target, (self.n_out, self.n_in) = target, codes.q.shape
        low, high = limits(target)
        self.group = target.group or self.n_in
        q = np.pad(codes.q, ((0, 0), (0, -self.n_in % self.group)))
        self.q = torch.from_numpy(q.reshape(self.n_out, -1, self.group))  # [n_out, groups, group]
        self.middle = (low + high) / 2 if has_minimum(target) else 0.0
        self.unit = self.unit_of(target)
        self.start = torch.from_numpy(codes.scale.copy())
        self.centre = torch.from_numpy(codes.minimum + np.float32(self.middle) * codes.scale)
        self.change = torch.zeros_like(self.start).requires_grad_()
        self.shift = torch.zeros_like(self.start).requires_grad_(has_minimum(target))
        self.free = [part for part in (self.change, self.shift) if part.requires_grad]

    @staticmethod
    def unit_of(target: Target) -> float:
        """1 for codes of 4 bits, less for finer ones."""
        low, high = limits(target)
        return 16 / (high - low + 1)

    def parts(self) -> tuple[Tensor, Tensor]:
        """The scales and the minima now, [n_out, groups]."""
        scale = self.start * (1 + self.unit * self.change)
        centre = self.centre + self.shift * SPREAD * self.start
        return scale, centre - self.middle * scale

    def rows(self, ids: Tensor) -> Tensor:
        """Of an embedding, [tokens, embd]."""
        scale, minimum = self.parts()
        return values(self.q[ids], scale[ids], minimum[ids], self.n_in)

    def codes(self) -> Codes:
        """With what was learned, as it is stored."""
        with torch.no_grad():
            parts = [part.numpy() for part in self.parts()]
        if self.target.group:
            parts = [np.clip(part, -65504, 65504).astype(np.float16).astype(np.float32) for part in parts]
        q = self.q.reshape(self.n_out, -1)[:, : self.n_in].numpy()
        return Codes(np.ascontiguousarray(q), *parts)


class Vector:
    """A norm's weight, or a bias: it moves in parts of its root mean square, times `unit`."""

    def __init__(self, start: Floats, unit: float) -> None:
        self.start = torch.from_numpy(start.copy())
        self.unit = unit * float(np.sqrt((start**2).mean()))
        self.change = torch.zeros_like(self.start).requires_grad_()
        self.free = [self.change]

    def value(self) -> Tensor:
        """As it is now."""
        return self.start + self.unit * self.change


class Product(torch.autograd.Function):  # type: ignore[misc]
    """x @ w.T of codes, which are widened for each use and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, minimum: Tensor, q: Tensor) -> Tensor:
        """X [tokens, n_in], scale and minimum [n_out, groups], q [n_out, groups, group] -> [tokens, n_out]."""
        ctx.save_for_backward(x, scale, minimum, q)
        return x @ values(q, scale, minimum, x.shape[1]).T

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """Of x, scale and minimum."""
        x, scale, minimum, q = ctx.saved_tensors
        of_w = slopes[0].T @ x
        of_w = functional.pad(of_w, (0, q.shape[1] * q.shape[2] - of_w.shape[1])).reshape(q.shape)
        of_scale, of_minimum = (of_w * q).sum(2), of_w.sum(2)
        del of_w
        return slopes[0] @ values(q, scale, minimum, x.shape[1]), of_scale, of_minimum, None


class TuningOps:
    """The operations in float32 on one window, for gradients; nothing is read from a cache. Weights are as above."""

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids, self.at = token_ids, torch.arange(len(token_ids))
        self.last: tuple[Any, dict[int, Tensor]] = (None, {})

    def embed(self, table: Any) -> Tensor:
        return table.rows(self.token_ids) if isinstance(table, Trained) else table[self.token_ids]

    def positions(self, x: Tensor, table: Any) -> Tensor:
        return x + table[self.at]

    def layer_norm(self, x: Tensor, norm: Module, eps: float) -> Tensor:
        bias = norm.get("bias")
        return functional.layer_norm(x, x.shape[1:], norm.weight.value(), None if bias is None else bias.value(), eps)

    def rms_norm(self, x: Tensor, norm: Module, eps: float) -> Tensor:
        weight = norm.weight.value()
        runs = x.reshape(len(x), -1, len(weight))
        return (runs * torch.rsqrt((runs**2).mean(2, keepdim=True) + eps) * weight).reshape(x.shape)

    def linear(
        self, x: Tensor, module: Module, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        w, bias = module.weight, module.get("bias")
        y: Any = Product.apply(self.rounded(x, w.target.group), *w.parts(), w.q) if isinstance(w, Trained) else x @ w.T
        if bias is not None:
            y = y + bias.value()
        if activation is not None:
            y = activate(y, activation)
        return y if residual is None else y + residual

    def split(self, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(x.split(list(widths), dim=1))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> Tensor:
        q, k, v = (part.reshape(len(part), -1, spec.head_dim) for part in (q, k, v))
        if spec.rope is not None:
            q, k = rotate(q, self.at, spec.rope), rotate(k, self.at, spec.rope)
        ahead = self.at[:, None] - self.at  # how far each query is behind each key
        seen = (ahead >= 0) & (ahead < (spec.window or len(self.at)))
        k, v = (part.repeat_interleave(spec.n_heads // spec.n_kv_heads, 1) for part in (k, v))
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # [heads, window, dim]
        y = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=spec.scale)
        return y[0].transpose(0, 1).reshape(len(self.at), -1)

    def gate(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return activate(gate, activation) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def logits(self, x: Tensor, module: Module) -> Tensor:
        return self.linear(x, Module.of({"weight": module.weight}))

    def rounded(self, x: Tensor, group: int) -> Tensor:
        """As `to_int8` of ops.reference; its gradient is that of x. Once for several layers that read the same."""
        if self.last[0] is not x:
            self.last = (x, {})
        if group not in self.last[1]:
            with torch.no_grad():
                n, size = x.shape[1], group or x.shape[1]
                runs = functional.pad(x, (0, -n % size)).reshape(len(x), -1, size)
                largest = runs.abs().amax(2, keepdim=True)
                q = torch.round(runs * torch.where(largest > 0, 127 / largest, 0))
                error = (q * (largest / 127)).reshape(len(x), -1)[:, :n] - x
            self.last[1][group] = x + error
        return self.last[1][group]


def values(q: Tensor, scale: Tensor, minimum: Tensor, n_in: int) -> Tensor:
    """Codes [rows, groups, group] as numbers [rows, n_in]."""
    return torch.addcmul(minimum[..., None], q.to(scale.dtype), scale[..., None]).reshape(len(q), -1)[:, :n_in]


def activate(x: Tensor, name: str) -> Tensor:
    """One of ops.ACTIVATIONS."""
    if name in ("gelu", "gelu_new"):
        return functional.gelu(x, approximate="none" if name == "gelu" else "tanh")
    return {"silu": functional.silu, "relu": functional.relu}[name](x)


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Turns the pairs of each head of `x [tokens, heads, head_dim]`."""
    n = len(rope.frequencies)
    angles = positions[:, None, None] * torch.tensor(rope.frequencies, dtype=torch.float64)  # [tokens, 1, n]
    cos, sin = ((rope.magnitude * part).to(x.dtype) for part in (torch.cos(angles), torch.sin(angles)))
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rope.interleaved else (slice(0, n), slice(n, 2 * n))
    y = x.clone()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


class Student:
    """A quantized model that can be trained: `load` gives what is not in `codes`, a matrix as [n_out, n_in]."""

    def __init__(
        self, model: Model, codes: Mapping[str, Codes], formats: Mapping[str, Target], load: Callable[[str], Floats]
    ) -> None:
        self.model, self.leaves = model, dict[str, Any]()
        unit = max((Trained.unit_of(target) for target in formats.values()), default=1.0)
        for name, parameter in model.parameters().items():
            if name in codes:
                self.leaves[name] = Trained(codes[name], formats[name])
            elif parameter.kind == "vector":
                self.leaves[name] = Vector(load(name), unit)
            else:
                self.leaves[name] = torch.from_numpy(load(name).copy())
        self.named = Module.of(self.leaves)

    def logits(self, token_ids: NDArray[np.int64]) -> Tensor:
        """Of one window, [tokens, vocabulary]."""
        return self.model.forward(TuningOps(torch.from_numpy(token_ids)), self.named)

    def free(self) -> list[Tensor]:
        """What is trained."""
        return [part for leaf in self.leaves.values() if isinstance(leaf, (Trained, Vector)) for part in leaf.free]

    def learn(self, tokens: NDArray[np.int64], hidden: Floats, head: Floats, passes: int) -> None:
        """From the source's last hidden states [windows * window, embd], and its head [vocabulary, embd]."""
        from tqdm import tqdm

        n, window = tokens.shape
        wanted, table = torch.from_numpy(hidden).reshape(n, window, -1), torch.from_numpy(head.copy())
        optimizer, steps = torch.optim.Adam(self.free(), lr=RATE, betas=(0.9, 0.99)), passes * n
        with tqdm(total=steps, desc="tuning", unit="window", disable=None) as bar:
            for step, i in enumerate(order(n, passes)):
                optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
                target = functional.log_softmax(wanted[i] @ table.T, 1)
                found = functional.log_softmax(self.logits(tokens[i]), 1)
                kl = functional.kl_div(found, target, reduction="sum", log_target=True) / window
                optimizer.zero_grad()
                kl.backward()
                optimizer.step()
                bar.set_postfix(kl=f"{float(kl.detach()):.4f}")
                bar.update(1)

    def codes(self) -> dict[str, Codes]:
        """The matrices, with what was learned."""
        return {name: leaf.codes() for name, leaf in self.leaves.items() if isinstance(leaf, Trained)}

    def vectors(self) -> dict[str, Floats]:
        """Norms' weights and biases, with what was learned."""
        found = {name: leaf.value() for name, leaf in self.leaves.items() if isinstance(leaf, Vector)}
        return {name: value.detach().numpy() for name, value in found.items()}


def order(n: int, passes: int) -> Iterator[int]:
    """The windows of each pass, shuffled, the same each time."""
    rng = np.random.default_rng(0)
    for _ in range(passes):
        yield from rng.permutation(n).tolist()


if TYPE_CHECKING:
    from pronghorn.ops import Ops

    _: type[Ops[Tensor]] = TuningOps
