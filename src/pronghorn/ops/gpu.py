"""The operations in PyTorch, on any of its devices; activations are float32.

As in the native house, the model function is called once and recorded, here to be fused: norms go into the products
that read them, products of one input become one, and so do a gate and what it closes. A step of few rows runs by Triton
kernels where there are any (ops/gpu_kernels.py), and on CUDA as a graph, captured once for each bucket of rows; longer
ones, prompts above all, by PyTorch's own products, for which x is rounded to bf16 with bf16 weights (as on the CPU);
Int8 and Int4 are widened to f32 (or, by a kernel, to bf16).
"""

# PyTorch's functional interface is typed as Any in part.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pronghorn import _native
from pronghorn.errors import ParameterError, PronghornError
from pronghorn.ops import KV_DTYPES, PAGE, Attention, Batch, Choice, Chosen, Rope
from pronghorn.weights.types import Dense, Int4, Int8, Matrix, Module

try:
    import torch
    from torch.nn import functional
except ImportError as error:
    raise PronghornError("PyTorch is not installed: pip install 'pronghorn[gpu]'") from error

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of the steps that are captured as graphs."""

FEW = 16
"""Rows up to which all logits are computed for the graph's sake, where fewer are wanted."""

NOT_FINITE = "the model's logits are not finite"

FIELDS = {"f32": 1, "f16": 2, "bf16": 2, "int8": 4, "int4": 8}
"""Elements in a word of 32 bits."""


class Packed(NamedTuple):
    """A matrix `[n_out, n_in]` as the kernels read it (see ops/gpu_kernels.py): w = scale * (code - zero) + minimum.

    `scales [n_out, n_groups]`: f16, or f32 where `group` is 0 (one an output); with minima, int32 words of two f16.
    """

    words: torch.Tensor  # int32 [n_out, n_in / FIELDS]
    scales: torch.Tensor | None
    format: str
    n_in: int
    group: int = 0
    zero: int = 0

    @property
    def n_out(self) -> int:
        return len(self.words)

    @property
    def minima(self) -> bool:
        return self.scales is not None and self.scales.dtype == torch.int32

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def in_order(self) -> torch.Tensor:
        """A dense matrix in its own type, its inputs in the words' order: see `reordered`."""
        return self.words.view(DTYPES[self.format])

    def unpack(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix, or some of its rows, in float32."""
        words = self.words if rows is None else self.words[rows]
        if self.format == "int4":
            pairs = words.view(torch.uint8)
            flat = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(len(words), -1)
        else:
            flat = words.view(torch.uint8 if self.format == "int8" else DTYPES[self.format])
        codes = flat.view(len(words), -1, 4, FIELDS[self.format]).transpose(2, 3).reshape(len(words), -1).float()
        if self.scales is None:
            return codes
        scales = self.scales if rows is None else self.scales[rows]
        if not self.minima:
            return (codes - self.zero) * spread(scales.float(), self)
        both = scales.view(torch.float16).float()
        return codes * spread(both[:, 0::2], self) + spread(both[:, 1::2], self)


def spread(numbers: torch.Tensor, packed: Packed) -> torch.Tensor:
    """One number a group, for every input."""
    return numbers.repeat_interleave(packed.group or packed.n_in, dim=1)[:, : packed.n_in]


def reordered(x: torch.Tensor, fields: int) -> torch.Tensor:
    """The columns in the words' order."""
    return x.view(len(x), -1, fields, 4).transpose(2, 3).reshape(len(x), -1)


def packed(values: torch.Tensor, format: str, **more: Any) -> Packed:
    """Values or codes `[n_out, n_in]` in words."""
    n_in = values.shape[1]
    values = reordered(values, FIELDS[format]).contiguous()
    if format == "int4":
        values = values[:, 0::2] | values[:, 1::2] << 4
    return Packed(values.view(torch.int32), more.pop("scales", None), format, n_in, **more)


def codes_of(weight: Int8 | Int4, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The codes `[n_out, n_in]` (uint8), and scales and minima `[n_out, n_groups]`, of a packed weight."""
    group = weight.group or weight.n_in
    n_groups, n_panels = -(-weight.n_in // group), -(-weight.n_out // 16)
    kind = torch.float16 if weight.group else torch.float32
    part = -(-n_groups * 16 * kind.itemsize // 64) * 64
    wide = isinstance(weight, Int8)
    head = part if isinstance(weight, Int8) or weight.symmetric else 2 * part
    sizes = [min(group, weight.n_in - g * group) for g in range(n_groups)]
    body = -(-weight.n_in // 4) * 64 if wide else sum(-(-size // 8) for size in sizes) * 64
    flat = to_device(weight.data[: n_panels * (head + body)], torch.uint8, device)
    panels = flat.view(n_panels, head + body)

    def numbers(start: int) -> torch.Tensor:
        found = panels[:, start : start + part].contiguous().view(kind)[:, : n_groups * 16]
        return found.view(n_panels, n_groups, 16).transpose(1, 2).reshape(-1, n_groups)[: weight.n_out].contiguous()

    codes = panels[:, head:].reshape(n_panels, -1, 16, 4)
    if not wide:
        codes = torch.cat((codes & 15, codes >> 4), dim=3)
    codes = codes.transpose(1, 2).reshape(n_panels * 16, -1)[: weight.n_out]
    if not wide and group % 8:  # each group is padded to 8
        starts, places = [0], torch.arange(codes.shape[1], device=device)
        for size in sizes:
            starts.append(starts[-1] + -(-size // 8) * 8)
        codes = torch.cat([codes[:, places[a : a + n]] for a, n in zip(starts, sizes, strict=False)], dim=1)
    minima = numbers(part) if head > part else None
    return codes[:, : weight.n_in].contiguous(), numbers(0), minima


def to_device(data: memoryview, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Bytes of a mapping as a flat tensor on the device, by way of pinned chunks where it has memory of its own."""
    source, flat = np.frombuffer(data, np.uint8), torch.empty(data.nbytes, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        flat.numpy()[:] = source
        return flat.view(dtype)
    step = 1 << 26
    chunks = [torch.empty(min(step, len(source)), dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in "ab"]
    for index, start in enumerate(range(0, len(source), step)):
        chunk = chunks[index % 2][: len(source) - start]
        if index > 1 and device.type == "cuda":
            torch.cuda.synchronize()  # the copy from this chunk is done
        chunk.numpy()[:] = source[start : start + step]
        flat[start : start + step].copy_(chunk, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return flat.view(dtype)


class Leaf(NamedTuple):
    """A weight under its name, not yet on the device."""

    name: str
    weight: Any  # Matrix; or a Packed or a tensor that is there already

    @property
    def form(self) -> tuple[object, ...]:
        """What two matrices share that can be one."""
        w = self.weight
        if isinstance(w, Dense):
            return w.dtype, w.n_in
        return type(w), w.n_in, w.group, getattr(w, "symmetric", None), getattr(w, "format", None)


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

    def load(self, runner: TorchRunner) -> None:
        """Puts the weights on the device, side by side."""
        self.weight = runner.matrix(*(module.weight for module in self.modules))
        if self.modules[0].get("bias") is not None:
            self.bias = torch.cat([runner.table(module.bias) for module in self.modules])

    def __call__(self, step: Step) -> torch.Tensor:
        return step.linear(self)


class Recorder:
    """Records a model (see ops.Ops) -> `steps`: each is called with a Step, and gives its next value."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
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
        return self.record(lambda step: step.embed(table), table.weight.n_in)

    def positions(self, x: X, table: Any) -> Columns:
        value = self.value(x)
        return self.record(lambda step: step.get(value) + self.runner.table(table)[step.at.long()], value.width, value)

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
        return self.record(lambda step: activate(step.get(gate), activation) * step.get(up), width, gate, up)

    def add(self, x: X, y: X) -> Columns:
        x, y = self.value(x), self.value(y)
        return self.record(lambda step: step.get(x) + step.get(y), x.width, x, y)

    def logits(self, x: X, module: Module) -> Columns:
        head = Linear(x, module)
        head.head = True
        return self.record(head, module.weight.weight.n_out, x)


class TorchRunner:
    """A model on a PyTorch device.

    `pages`: keys and values `[2, layer, page * PAGE + slot, kv head, dim]`; `scales`: of int8 ones, dim is 1. The page
    after the last is where rows that fill up a bucket write. `cache` is another runner's, for a draft that reads and
    writes the same. `group`: the ranks among which the weights, of which this one has its part, are divided. With
    `waits`, `run` returns when it is done, for those who learn how long it takes.
    """

    def __init__(
        self,
        model: Model,
        weights: Module,
        *,
        n_pages: int,
        kv_dtype: str = "f32",
        max_tokens: int = 512,
        device: str = "cpu",
        cache: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        group: Group | None = None,
        waits: bool = False,
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise ParameterError(f"kv_dtype is {kv_dtype!r}: expected one of {', '.join(KV_DTYPES)}")
        try:
            self.device = torch.device(group.device if group else device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # how PyTorch says that it has no such device
            raise ParameterError(f"device {device}: {str(error).splitlines()[0]}") from None
        self.model, self.max_tokens, self.group, self.waits = model, max_tokens, group, waits
        self.kernels = kernels_for(self.device)
        cfg = model.config
        shape = (2, cfg.n_layers, (n_pages + 1) * PAGE, cfg.n_kv_heads, cfg.head_dim)
        if cache is None:
            scales = torch.zeros((*shape[:-1], 1), device=self.device) if kv_dtype == "int8" else None
            cache = torch.zeros(shape, dtype=DTYPES[kv_dtype], device=self.device), scales
        self.cache = cache
        self.pages, self.scales = cache
        self.n_pages, self.width = n_pages, min(n_pages, -(-cfg.context // PAGE))
        self.buckets: dict[int, Bucket] = {}
        self.ropes: dict[Rope, torch.Tensor] = {}
        self.loaded: dict[tuple[str, ...], Any] = {}

        def leaf(name: str) -> Leaf:
            return Leaf(name, reduce(Module.get, name.split("."), weights))

        self.enter()
        self.record = Recorder(self)
        with torch.inference_mode():
            model.forward(self.record, Module.of({name: leaf(name) for name in model.parameters()}))
            for step in self.record.steps:
                if isinstance(step, Linear):
                    step.load(self)
        last = self.record.last
        self.ends = [[value for value in last if last[value] == n] for n in range(len(self.record.steps))]
        self.logits = torch.empty(0, cfg.vocab_size, device=self.device)  # of the last batch

    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        with self.group.step() if self.group else nullcontext():
            return self.compute(batch)

    @torch.inference_mode()
    def compute(self, batch: Batch) -> memoryview:
        """One step, of all ranks."""
        self.enter()
        n = len(batch.token_ids)
        if n > self.max_tokens:
            raise ParameterError(f"{n} tokens in a batch: at most {self.max_tokens}")
        arrays = batch.token_ids, batch.positions, batch.sequence, batch.logits_rows, batch.page_table
        if self.group:
            self.group.send(batch.table_width, *arrays)
        token_ids, positions, sequence, rows, table = (np.array(a, np.int32) for a in arrays)
        by_row = table.reshape(-1, max(batch.table_width, 1))[sequence, : self.width]
        if self.kernels and n <= (BUCKETS[-1] if len(rows) == n else FEW):
            size = next(size for size in BUCKETS if size >= n)
            if size not in self.buckets:
                self.buckets[size] = Bucket(self, size)
            self.logits = self.buckets[size].run(token_ids, positions, by_row)[:n]
            if len(rows) < n:
                self.logits = self.logits[torch.from_numpy(rows).to(self.device).long()]
        else:
            ids, at, wanted, pages = (torch.from_numpy(a).to(self.device) for a in (token_ids, positions, rows, by_row))
            self.logits = Step(self, ids, at, pages, wanted.long(), sequence).run()
        if batch.logits_here or not self.kernels:
            return self.fetched()
        if self.waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return memoryview(b"")

    def enter(self) -> None:
        """Makes the device that of this thread, which Triton and streams go by."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def fetched(self) -> memoryview:
        """The logits, in the host's memory."""
        return self.logits.cpu().contiguous().numpy().data

    @torch.inference_mode()
    def choose(self, logits: memoryview, choices: Sequence[Choice]) -> list[Chosen]:
        """See ops.Runner: on the device, but for what needs a history, or the likeliest tokens."""
        there = [i for i, c in enumerate(choices) if self.kernels and not c.n_top and c.sampler.plain]
        here = sorted(set(range(len(choices))) - set(there))
        found = dict(zip(there, self.drawn([choices[i] for i in there]) if there else (), strict=True))
        if here:
            rows = logits if len(logits) else self.fetched()
            chosen = _native.choose_rows(rows, self.model.config.vocab_size, [choices[i] for i in here])
            found |= zip(here, chosen, strict=True)
        return [found[i] for i in range(len(choices))]

    def drawn(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Chooses on the device."""
        self.enter()
        rows, logits = [c.row for c in choices], self.logits
        if rows != list(range(len(logits))):
            logits = logits[torch.tensor(rows, device=self.device)]
        left = logits
        samplers = [c.sampler for c in choices]
        limited = [(i, s) for i, s in enumerate(samplers) if s.temperature and (s.top_k or s.top_p < 1 or s.min_p)]
        masked = [(i, bytes(c.allowed)) for i, c in enumerate(choices) if c.allowed is not None]
        if masked or limited:
            left = logits.clone()
        for i, mask in masked:
            left[i].masked_fill_(~allowed(mask, left[i]), -torch.inf)
        for i, sampler in limited:
            left[i].masked_fill_(~likely(left[i], sampler), -torch.inf)
        ids = self.kernels.race(
            left,
            [1 / s.temperature if s.temperature else 0.0 for s in samplers],
            [s.seed - (s.seed >> 63 << 64) for s in samplers],
            [len(c.history) for c in choices],
        )
        chances = list[float]()
        if any(c.n_top is not None for c in choices):
            chosen = torch.tensor(ids, device=self.device).clamp(min=0)[:, None]
            chances = (logits.double().gather(1, chosen)[:, 0] - logits.double().logsumexp(1)).tolist()
        return [
            NOT_FINITE if token < 0 else (token, [] if c.n_top is None else [(token, chances[i])])
            for i, (c, token) in enumerate(zip(choices, ids, strict=True))
        ]

    def copy_page(self, source: int, target: int) -> None:
        """See ops.Runner."""
        self.enter()
        if self.group:
            self.group.send(-1, array("i", [source, target]))
        for kept in self.cache:
            if kept is not None:
                pages = kept.view(*kept.shape[:2], -1, PAGE, *kept.shape[3:])
                pages[:, :, target] = pages[:, :, source]

    def frequencies(self, rope: Rope, device: torch.device) -> torch.Tensor:
        """Of a rotary embedding, in float64."""
        if rope not in self.ropes:
            self.ropes[rope] = torch.tensor(rope.frequencies, dtype=torch.float64, device=device)
        return self.ropes[rope]

    def table(self, leaf: Leaf) -> torch.Tensor:
        """A vector or learned positions, in float32."""
        if (leaf.name,) not in self.loaded:
            w = leaf.weight
            values = to_device(w.data, DTYPES[w.dtype], self.device) if isinstance(w, Dense) else w
            self.loaded[(leaf.name,)] = values.view(w.shape).float()
        return self.loaded[(leaf.name,)]

    def matrix(self, *leaves: Leaf) -> Packed | torch.Tensor:
        """Matrices one above the other: as the kernels take them, or, for what they do not, as `[n_out, n_in]`."""
        key = tuple(leaf.name for leaf in leaves)
        if key not in self.loaded:
            parts = [self.load(leaf.weight) for leaf in leaves]
            first = parts[0]
            if len(parts) > 1 and isinstance(first, Packed):
                scales = None if first.scales is None else torch.cat([part.scales for part in parts])
                first = first._replace(words=torch.cat([part.words for part in parts]), scales=scales)
            elif len(parts) > 1:
                first = torch.cat(parts)
            self.loaded[key] = first
        return self.loaded[key]

    def load(self, w: Matrix | Packed) -> Any:
        """One matrix on the device."""
        if isinstance(w, Packed):
            return w
        form = w.dtype if isinstance(w, Dense) else "int8" if isinstance(w, Int8) else "int4"
        chunk = 4 * FIELDS[form]
        if isinstance(w, Dense):
            values = to_device(w.data, DTYPES[form], self.device).view(w.shape)
            values = values.T if w.transposed else values
            return packed(values, form) if self.kernels and w.n_in % chunk == 0 else values.contiguous()
        codes, scales, minima = codes_of(w, self.device)
        zero = 128 if form == "int8" else 8 if minima is None else 0
        if self.kernels and w.n_in % chunk == 0 and w.group % chunk == 0:
            if minima is not None:
                scales = torch.stack((scales, minima), dim=2).view(len(codes), -1).view(torch.int32)
            return packed(codes, form, scales=scales, group=w.group, zero=zero)
        group = w.group or w.n_in
        values = (codes.float() - zero) * scales.float().repeat_interleave(group, dim=1)[:, : w.n_in]
        return values if minima is None else values + minima.float().repeat_interleave(group, dim=1)[:, : w.n_in]


class Bucket:
    """A decoding step of so many rows: on CUDA a graph, with its place for the inputs."""

    def __init__(self, runner: TorchRunner, size: int) -> None:
        self.runner, self.size = runner, size
        on_cuda = runner.device.type == "cuda"
        self.host = torch.zeros(size * (2 + runner.width), dtype=torch.int32, pin_memory=on_cuda)
        self.inputs = torch.zeros_like(self.host, device=runner.device)
        ids, at, table = self.inputs[:size], self.inputs[size : 2 * size], self.inputs[2 * size :].view(size, -1)
        table.fill_(runner.n_pages)  # while it is tried out, all write into the page that no one reads
        self.step = Step(runner, ids, at, table)
        self.graph: Any = None
        if on_cuda:
            stream = torch.cuda.Stream(runner.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step.run()  # compiles, and has the libraries make their beginnings outside of the graph
            torch.cuda.current_stream().wait_stream(stream)
            pool = next((bucket.graph.pool() for bucket in runner.buckets.values()), None)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.logits = self.step.run()

    def run(self, token_ids: Any, positions: Any, table: Any) -> torch.Tensor:
        """The logits of all rows, those that fill up too."""
        n, size = len(token_ids), self.size
        host = self.host.numpy()
        host[:n], host[size : size + n] = token_ids, positions
        host[n:size] = host[size + n : 2 * size] = 0
        by_row = host[2 * size :].reshape(size, -1)
        by_row[:n, : table.shape[1]], by_row[n:] = table, self.runner.n_pages
        self.inputs.copy_(self.host, non_blocking=True)
        if self.graph is None:
            return self.step.run()
        self.graph.replay()
        return self.logits


class Step:
    """One pass over the record: `[tokens]` ids, positions and page tables, int32, on the device.

    `rows` are those whose logits are wanted, None for all; `sequence` says which rows belong together, where more than
    MOST_ROWS of one sequence may be there: these are attended to as a matrix, all others one by one.
    """

    def __init__(
        self,
        runner: TorchRunner,
        token_ids: torch.Tensor,
        at: torch.Tensor,
        table: torch.Tensor,
        rows: torch.Tensor | None = None,
        sequence: Any = None,
    ) -> None:
        self.runner, self.token_ids, self.at, self.table, self.rows = runner, token_ids, at, table, rows
        self.kernels = runner.kernels
        self.values: list[torch.Tensor | None] = []
        self.turns: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self.singles: torch.Tensor | None = None  # rows that are attended to one by one; None: all
        # Of the other sequences: their rows, the positions that they may see, and where these are kept.
        self.sequences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if sequence is not None:
            singles: list[int] = []
            positions = at.tolist()
            for index in sorted(set(sequence.tolist())):
                found = np.flatnonzero(sequence == index).tolist()
                if self.kernels and len(found) <= self.kernels.MOST_ROWS:
                    singles += found
                    continue
                seen = torch.arange(max(positions[row] for row in found) + 1, device=at.device)
                slots = table[found[0]].long()[seen // PAGE] * PAGE + seen % PAGE
                self.sequences.append((torch.tensor(found, device=at.device), seen, slots))
            self.singles = torch.tensor(singles, dtype=torch.int64, device=at.device)

    def run(self) -> torch.Tensor:
        """All of the record -> the logits."""
        self.values, self.turns = [], {}
        for number, step in enumerate(self.runner.record.steps):
            self.values.append(step(self))
            for old in self.runner.ends[number]:
                self.values[old] = None  # its memory is free
        logits = self.values.pop()
        assert logits is not None
        return logits

    def get(self, x: X) -> torch.Tensor:
        """What has been recorded as x: [tokens, width]."""
        if isinstance(x, Normed):
            return self.normed(self.get(x.x), x)
        value = self.values[x.number]
        assert value is not None
        return value if value.shape[1] == x.width else value[:, x.begin : x.end]

    def normed(self, y: torch.Tensor, x: Normed) -> torch.Tensor:
        """The norm of y."""
        weight, bias = self.runner.table(x.norm.weight), x.norm.get("bias")
        if x.kind == "layer":
            shift = None if bias is None else self.runner.table(bias)
            return functional.layer_norm(y, y.shape[1:], weight, shift, x.eps)
        runs = y.reshape(len(y), -1, len(weight))
        return functional.rms_norm(runs, runs.shape[2:], weight, x.eps).reshape(y.shape)

    def embed(self, leaf: Leaf) -> torch.Tensor:
        """Rows of a table; of one that is divided, each rank gives those that it has."""
        table, ids, group = self.runner.matrix(leaf), self.token_ids.long(), self.runner.group
        if group is None:
            return rows_of(table, ids)
        n_here = leaf.weight.n_out
        ids = ids - group.rank * n_here
        here = (ids >= 0) & (ids < n_here)
        return group.sum(rows_of(table, ids.clamp(0, n_here - 1)) * here[:, None])

    def linear(self, op: Linear) -> torch.Tensor:
        """See Linear. Where the inputs are divided among ranks, bias and residual come after the sum of all."""
        w, group = op.weight, self.runner.group
        x, norm = (self.get(op.x.x), op.x) if isinstance(op.x, Normed) else (self.get(op.x), None)
        if op.head and self.rows is not None:
            x = x[self.rows]
        bias, residual = op.bias, None if op.residual is None else self.get(op.residual)
        divided = group is not None and group.divides_inputs(op.modules[0].weight.name)
        now = (None, None) if divided else (bias, residual)
        if self.kernels and isinstance(w, Packed) and 0 < len(x) <= self.kernels.MOST_ROWS:
            parts = None
            if norm is not None:
                shift = norm.norm.get("bias")
                shift = None if shift is None else self.runner.table(shift)
                parts = norm.kind, norm.eps, self.runner.table(norm.norm.weight), shift
            y = self.kernels.matvec(x, w, parts, now[0], op.activation, op.gate, now[1])
        else:
            y = multiply(x if norm is None else self.normed(x, norm), w, self.kernels)
            y = y if now[0] is None else y + now[0]
            if op.gate:
                gate, up = y.chunk(2, dim=1)
                y = activate(gate, op.activation or "") * up
            elif op.activation is not None:
                y = activate(y, op.activation)
            y = y if now[1] is None else y + now[1]
        if group is None:
            return y
        if op.head:
            return group.gather(y)[:, : self.runner.model.config.vocab_size]
        if divided:
            y = group.sum(y)
            y = y if bias is None else y + bias
            y = y if residual is None else y + residual
        return y

    def attention(self, q: Columns, k: Columns, v: Columns, spec: Attention) -> torch.Tensor:
        """See ops.Ops."""
        cache, shape = (self.runner.pages, self.runner.scales), (len(self.at), -1, spec.head_dim)
        if not self.kernels:
            heads = [self.get(x).reshape(shape) for x in (q, k, v)]
            if spec.rope is not None:
                heads[:2] = [self.rotate(x, spec.rope) for x in heads[:2]]
            pages = self.table.long().gather(1, (self.at.long() // PAGE)[:, None])[:, 0]
            for part in (0, 1):
                self.keep(part, spec.layer, pages * PAGE + self.at % PAGE, heads[part + 1])
            return self.attend(heads[0], spec, torch.empty_like(heads[0])).view(len(self.at), -1)
        if q.number == k.number == v.number and (q.end, k.end) == (k.begin, v.begin):
            together = self.get(Columns(q.number, q.begin, v.end))
        else:
            together = torch.cat([self.get(x) for x in (q, k, v)], dim=1)
        turns = None if spec.rope is None else self.turns_of(spec.rope)
        turned = self.kernels.store(together, self.at, self.table, spec, turns, *cache)
        if self.singles is None:
            return self.kernels.attend(turned, self.at, self.table, spec, *cache)
        y = torch.empty_like(turned)
        if len(self.singles):
            few = (x[self.singles] for x in (turned, self.at, self.table))
            y[self.singles] = self.kernels.attend(*few, spec, *cache)
        return self.attend(turned.view(shape), spec, y.view(shape)).view(len(y), -1)

    def attend(self, q: torch.Tensor, spec: Attention, y: torch.Tensor) -> torch.Tensor:
        """Fills in y, [tokens, heads, head_dim], for the sequences that are attended to as a matrix."""
        for rows, seen, slots in self.sequences:
            at = self.at[rows, None]  # [rows, 1]
            visible = seen <= at if spec.window is None else (seen <= at) & (seen > at - spec.window)
            k, v = (self.kept(part, spec.layer, slots).transpose(0, 1)[None] for part in (0, 1))
            heads = q[rows].transpose(0, 1)[None]  # [1, heads, rows, head_dim]
            if heads.is_cuda and self.runner.pages.dtype == torch.bfloat16:
                heads, k, v = heads.bfloat16(), k.bfloat16(), v.bfloat16()
            grouped = spec.n_heads != spec.n_kv_heads
            attended = functional.scaled_dot_product_attention(
                heads, k, v, attn_mask=visible, scale=spec.scale, enable_gqa=grouped
            )
            y[rows] = attended[0].transpose(0, 1).float()
        return y

    def keep(self, part: int, layer: int, slots: torch.Tensor, x: torch.Tensor) -> None:
        """Writes keys (part 0) or values (1), `[tokens, kv heads, dim]`, where the batch's tokens have their place."""
        pages, scales = self.runner.pages[part, layer], self.runner.scales
        if scales is not None:
            largest = x.abs().amax(dim=2, keepdim=True)
            scales[part, layer][slots] = largest / 127
            x = torch.where(largest > 0, x * (127 / largest), 0).round()
        pages[slots] = x.to(pages.dtype)

    def kept(self, part: int, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """What these slots hold, as float32."""
        x, scales = self.runner.pages[part, layer][slots].float(), self.runner.scales
        return x if scales is None else x * scales[part, layer][slots]

    def turns_of(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[tokens, pairs]`, by way of float64, which not every device has."""
        if rope not in self.turns:
            at = self.at if self.at.is_cuda else self.at.cpu()
            angles = at.double()[:, None] * self.runner.frequencies(rope, at.device)
            cos, sin = ((rope.magnitude * part).float().to(self.at.device) for part in (angles.cos(), angles.sin()))
            self.turns[rope] = cos, sin
        return self.turns[rope]

    def rotate(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Turns the pairs of each head of `x [tokens, heads, head_dim]`."""
        cos, sin = (part[:, None] for part in self.turns_of(rope))  # [tokens, 1, pairs]
        n = len(rope.frequencies)
        first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rope.interleaved else (slice(0, n), slice(n, 2 * n))
        y = x.clone()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y


def kernels_for(device: torch.device) -> Any:
    """The Triton kernels, where they run on this device; None where PyTorch's own operations have to do."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from pronghorn.ops import gpu_kernels
    except ImportError:
        return None
    return gpu_kernels


def rows_of(table: Packed | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix, in float32."""
    return table.unpack(ids) if isinstance(table, Packed) else table[ids].float()


def multiply(x: torch.Tensor, w: Packed | torch.Tensor, kernels: Any) -> torch.Tensor:
    """Gives x @ w.T in float32: with bf16 matrices, and quantized ones where there are kernels, of bf16 inputs."""
    if isinstance(w, Packed):
        if w.scales is not None and kernels and len(x):
            return kernels.matmul(reordered(x, FIELDS[w.format]), w)
        x, w = (x, w.unpack()) if w.scales is not None else (reordered(x, FIELDS[w.format]), w.in_order)
    if w.dtype != torch.bfloat16:
        return functional.linear(x, w.float())
    if x.is_cuda:
        return torch.mm(x.bfloat16(), w.T, out_dtype=torch.float32)
    return functional.linear(x.bfloat16().float(), w.float())


def allowed(mask: bytes, logits: torch.Tensor) -> torch.Tensor:
    """A mask of engine.grammar as booleans, one a token; tokens past its end are not allowed."""
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(bool))[: len(logits)]
    return functional.pad(bits, (0, len(logits) - len(bits))).to(logits.device)


def likely(logits: torch.Tensor, sampler: _native.Sampler) -> torch.Tensor:
    """Which tokens of a row top_k, top_p and min_p leave, as native/sampling.cpp has it."""
    found, ids = torch.sort(logits, descending=True, stable=True)
    shares = ((found.double() - found[0].double()) / sampler.temperature).exp()
    keep = torch.ones_like(ids, dtype=torch.bool)
    if sampler.top_k:
        shares[sampler.top_k :] = 0
        keep[sampler.top_k :] = False
    if sampler.top_p < 1:
        keep &= shares.cumsum(0) - shares < sampler.top_p * shares.sum()
    if sampler.min_p:
        least = (found[0].double() + sampler.temperature * math.log(sampler.min_p)).float()
        keep &= found >= torch.minimum(found[0], least)
    return torch.empty_like(keep).scatter_(0, ids, keep)


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """One of ops.ACTIVATIONS."""
    if name == "gelu":
        return functional.gelu(x)
    if name == "gelu_new":
        return functional.gelu(x, approximate="tanh")
    if name == "silu":
        return functional.silu(x)
    if name == "relu":
        return functional.relu(x)
    raise ValueError(f"unknown activation {name}")


if TYPE_CHECKING:
    from pronghorn.models import Model
    from pronghorn.ops import Ops
    from pronghorn.parallel import Group

    _: type[Ops[X]] = Recorder
