"""The operations in PyTorch, on any of its devices; activations are float32.

As in the native house, the model function is called once and recorded (gpu_record.py); its weights are put on the
device (gpu_weights.py). A step of few rows runs by Triton kernels where there are any (gpu_kernels.py), and on CUDA as
a graph, captured once for each bucket of rows; longer ones, prompts above all, by PyTorch's own products, for which x
is rounded to bf16 with bf16 weights (as on the CPU); Int8 and Int4 are widened to f32 (or, by a kernel, to bf16).
"""

# PyTorch's functional interface is typed as Any in part.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from pronghorn.errors import ParameterError, PronghornError
from pronghorn.ops import KV_DTYPES, PAGE, Attention, Batch, Choice, Chosen, Rope
from pronghorn.weights.types import Module

try:
    import torch
    from torch.nn import functional
except ImportError as error:
    raise PronghornError("PyTorch is not installed: pip install 'pronghorn[gpu]'") from error

from pronghorn.ops import gpu_sampling
from pronghorn.ops.gpu_record import Columns, Linear, Normed, Recorder, X
from pronghorn.ops.gpu_weights import DTYPES, FIELDS, Leaf, Packed, Weights, reordered, rows_of

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of the steps that are captured as graphs."""

FEW = 16
"""Rows up to which all logits are computed for the graph's sake, where fewer are wanted."""


class TorchRunner:
    """A model on a PyTorch device.

    `pages`: keys and values `[2, layer, page * PAGE + slot, kv head, dim]`; `scales`: of int8 ones, dim is 1. The page
    after the last is where rows that fill up a bucket write. `cache` is another runner's, for a draft that reads and
    writes the same. `group`: the ranks among which the weights, of which this one has its part, are divided. With
    `waits`, `run` returns when it is done, for those who learn how long it takes. With `ahead`, `choose` may begin the
    next step by itself: see Ahead.
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
        ahead: bool = False,
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
            try:
                scales = torch.zeros((*shape[:-1], 1), device=self.device) if kv_dtype == "int8" else None
                cache = torch.zeros(shape, dtype=DTYPES[kv_dtype], device=self.device), scales
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from None
        self.cache = cache
        self.pages, self.scales = cache
        self.n_pages, self.width = n_pages, min(n_pages, -(-cfg.context // PAGE))
        self.buckets: dict[int, Bucket] = {}
        self.ropes: dict[Rope, torch.Tensor] = {}
        self.turns: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ahead = Ahead() if ahead and self.kernels and not group else None
        self.bucket: Bucket | None = None  # of the last step, if each of its rows was a sequence that decodes
        self.weights = Weights(self.device, self.kernels)

        def leaf(name: str) -> Leaf:
            return Leaf(name, reduce(Module.get, name.split("."), weights))

        if group:
            group.runners.append(self)
        self.enter()
        self.record = Recorder()
        with torch.inference_mode():
            model.forward(self.record, Module.of({name: leaf(name) for name in model.parameters()}))
            for step in self.record.steps:
                if isinstance(step, Linear):
                    step.load(self.weights)
        last = self.record.last
        self.ends = [[value for value in last if last[value] == n] for n in range(len(self.record.steps))]
        self.logits = torch.empty(0, cfg.vocab_size, device=self.device)  # of the last batch
        if self.kernels and self.device.type == "cuda":
            self.compile()

    @torch.inference_mode()
    def compile(self) -> None:
        """Has the kernels of all steps of few rows before the first request: what is not in Triton's cache is compiled.

        All at once, as one after the other takes seconds. The graph of one row is made, too.
        """
        with self.kernels.compiling():
            for n in (n for n in BUCKETS if n <= self.kernels.MOST_ROWS):
                zeros = torch.zeros(n, dtype=torch.int32, device=self.device)
                logits = Step(self, zeros, zeros, zeros[:, None].expand(n, self.width).contiguous()).run()
            self.kernels.race(logits, [0.0] * n, [0] * n, [0] * n)
        self.buckets[1] = Bucket(self, 1)

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
            self.group.send(self.group.runners.index(self), batch.table_width, *arrays)
        token_ids, positions, sequence, rows, table = (np.array(a, np.int32) for a in arrays)
        by_row = table.reshape(-1, max(batch.table_width, 1))[sequence, : self.width]
        decodes = self.ahead and n == len(rows) == len(set(batch.sequence)) and n <= BUCKETS[-1]
        begun = self.ahead and self.ahead.has_begun(*(token_ids, positions, by_row) if decodes else ())
        if not begun:
            self.bucket = None
        if begun and self.bucket:
            self.logits = self.bucket.logits[:n]
        elif self.kernels and n <= (BUCKETS[-1] if len(rows) == n else FEW):
            size = next(size for size in BUCKETS if size >= n)
            if size not in self.buckets:
                self.buckets[size] = Bucket(self, size)
            self.logits = self.buckets[size].run(token_ids, positions, by_row)[:n]
            self.bucket = self.buckets[size] if decodes else None
            if len(rows) < n:
                self.logits = self.logits[torch.from_numpy(rows).to(self.device).long()]
        else:
            ids, at, wanted, pages = (torch.from_numpy(a).to(self.device) for a in (token_ids, positions, rows, by_row))
            self.logits = Step(self, ids, at, pages, wanted.long(), (sequence, positions)).run()
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
        self.enter()
        there = [i for i, c in enumerate(choices) if self.kernels and not c.n_top and c.sampler.plain]
        here = sorted(set(range(len(choices))) - set(there))
        found: dict[int, Chosen] = {}
        if there:
            rows, wanted, meanwhile = self.logits, [choices[i].row for i in there], None
            if wanted != list(range(len(rows))):
                rows = rows[torch.tensor(wanted, device=self.device)]
            elif self.bucket and self.ahead and self.ahead.may_begin() and not here:
                meanwhile = self.bucket.go_on
            chosen = gpu_sampling.choose(rows, [choices[i] for i in there], self.kernels, meanwhile)
            if meanwhile and self.ahead:
                self.ahead.begun = [-1 if isinstance(c, str) else c[0] for c in chosen]
            found = dict(zip(there, chosen, strict=True))
        if here:
            from pronghorn import _native

            given = logits if len(logits) else self.fetched()
            chosen = _native.choose_rows(given, self.model.config.vocab_size, [choices[i] for i in here])
            found |= zip(here, chosen, strict=True)
        return [found[i] for i in range(len(choices))]

    def copy_page(self, source: int, target: int) -> None:
        """See ops.Runner."""
        self.enter()
        if self.group:
            self.group.send(self.group.runners.index(self), -1, array("i", [source, target]))
        for kept in self.cache:
            if kept is not None:
                pages = kept.view(*kept.shape[:2], -1, PAGE, *kept.shape[3:])
                pages[:, :, target] = pages[:, :, source]

    def frequencies(self, rope: Rope, device: torch.device) -> torch.Tensor:
        """Of a rotary embedding, in float64."""
        if rope not in self.ropes:
            self.ropes[rope] = torch.tensor(rope.frequencies, dtype=torch.float64, device=device)
        return self.ropes[rope]

    def turns_of(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions, `[positions, pairs]`, for the kernels."""
        if rope not in self.turns:
            at = torch.arange(self.width * PAGE, device=self.device)
            self.turns[rope] = turns_at(rope, self.frequencies(rope, self.device), at)
        return self.turns[rope]


class Ahead:
    """The next decoding step, begun before it is asked for: the tokens just chosen, each sequence one further.

    So the device computes while the host tells what has come and asks for more. Nothing else has to know of it: `run`
    finds its step done, or the guess was wrong and it computes its own. A wrong guess has written one token's keys and
    values beyond the end of sequences, in pages that these held alone, and before whatever is written there later.
    It costs a step, so guesses are made when steps have followed each other for a while, and fewer after wrong ones.
    """

    def __init__(self) -> None:
        self.begun: list[int] | None = None  # the tokens of the step
        self.last: tuple[Any, Any] | None = None  # positions and page tables of the step before
        self.calm, self.patience = 0, 2  # steps that have followed each other, and that have to

    def has_begun(self, token_ids: Any = None, positions: Any = None, table: Any = None) -> bool:
        """Notes the step that is asked for (nothing: one of another kind); whether it is the one that has begun."""
        follows, right = False, False
        if positions is not None and self.last is not None:
            width = int(positions.max()) // PAGE + 1
            follows = np.array_equal(positions, self.last[0] + 1)
            right = follows and np.array_equal(table[:, :width], self.last[1][:, :width])
            right = right and token_ids.tolist() == self.begun
        if self.begun is not None:
            self.patience = max(self.patience - 1, 2) if right else min(2 * self.patience, 64)
        self.calm = self.calm + 1 if follows else 0
        self.last, self.begun = None if positions is None else (positions, table), None
        return right

    def may_begin(self) -> bool:
        """Whether a guess is worth it, and no sequence would need another page."""
        return self.calm >= self.patience and self.last is not None and bool(((self.last[0] + 1) % PAGE).all())


class Bucket:
    """A decoding step of so many rows: on CUDA a graph, with its place for the inputs.

    Its `logits` are those of all rows, those that fill up too.
    """

    def __init__(self, runner: TorchRunner, size: int) -> None:
        self.runner, self.size = runner, size
        on_cuda = runner.device.type == "cuda"
        self.inputs = torch.zeros(size * (2 + runner.width), dtype=torch.int32, device=runner.device)
        self.logits: torch.Tensor
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
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.logits = self.step.run()

    def run(self, token_ids: Any, positions: Any, table: Any) -> torch.Tensor:
        """A step of these rows -> `logits`."""
        n, size, on_cuda = len(token_ids), self.size, self.graph is not None
        # Pinned anew each time: the last one may not have been copied yet. PyTorch knows, and takes them in turns.
        given = torch.empty(self.inputs.shape, dtype=torch.int32, pin_memory=on_cuda)
        host = given.numpy()
        host[:n], host[size : size + n] = token_ids, positions
        host[n:size] = host[size + n : 2 * size] = 0
        by_row = host[2 * size :].reshape(size, -1)
        by_row[:n, : table.shape[1]], by_row[n:] = table, self.runner.n_pages
        by_row[:n, table.shape[1] :] = self.runner.n_pages
        self.inputs.copy_(given, non_blocking=True)
        return self.replay()

    def go_on(self, token_ids: torch.Tensor) -> None:
        """The step that follows the last one, with these tokens (those below 0 are none, and will not be asked for)."""
        n = len(token_ids)
        torch.clamp(token_ids, min=0, out=self.inputs[:n])
        self.inputs[self.size : self.size + n] += 1
        self.replay()

    def replay(self) -> torch.Tensor:
        """What the inputs ask for."""
        if self.graph is None:
            self.logits = self.step.run()
        else:
            self.graph.replay()
        return self.logits


class Step:
    """One pass over the record: `[tokens]` ids, positions and page tables, int32, on the device.

    `rows` are those whose logits are wanted, None for all; `spread`, the sequence and the position of each row on the
    host, says which belong together, where more than MOST_ROWS of one may be there: these are attended to as a matrix,
    all others one by one.
    """

    def __init__(
        self,
        runner: TorchRunner,
        token_ids: torch.Tensor,
        at: torch.Tensor,
        table: torch.Tensor,
        rows: torch.Tensor | None = None,
        spread: tuple[Any, Any] | None = None,
    ) -> None:
        self.runner, self.token_ids, self.at, self.table, self.rows = runner, token_ids, at, table, rows
        self.kernels = runner.kernels
        self.values: list[torch.Tensor | None] = []
        self.turns: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}
        self.singles: torch.Tensor | None = None  # rows that are attended to one by one; None: all
        # Of the other sequences: their rows, the positions that they may see, and where these are kept.
        self.sequences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if spread is not None:
            singles: list[int] = []
            sequence, positions = spread
            for index in sorted(set(sequence.tolist())):
                found = np.flatnonzero(sequence == index).tolist()
                if self.kernels and len(found) <= self.kernels.MOST_ROWS:
                    singles += found
                    continue
                seen = torch.arange(int(positions[found].max()) + 1, device=at.device)
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

    def vector(self, leaf: Leaf) -> torch.Tensor:
        """A vector or learned positions, in float32."""
        return self.runner.weights.table(leaf)

    def get(self, x: X) -> torch.Tensor:
        """What has been recorded as x: [tokens, width]."""
        if isinstance(x, Normed):
            return self.normed(self.get(x.x), x)
        value = self.values[x.number]
        assert value is not None
        return value if value.shape[1] == x.width else value[:, x.begin : x.end]

    def normed(self, y: torch.Tensor, x: Normed) -> torch.Tensor:
        """The norm of y."""
        weight, bias = self.vector(x.norm.weight), x.norm.get("bias")
        if x.kind == "layer":
            shift = None if bias is None else self.vector(bias)
            return functional.layer_norm(y, y.shape[1:], weight, shift, x.eps)
        runs = y.reshape(len(y), -1, len(weight))
        return functional.rms_norm(runs, runs.shape[2:], weight, x.eps).reshape(y.shape)

    def embed(self, leaf: Leaf, places: Leaf | None) -> torch.Tensor:
        """Rows of a table, and those of learned positions; of a divided table, each rank gives the rows that it has."""
        table, ids, group = self.runner.weights.matrix(leaf), self.token_ids.long(), self.runner.group
        learned = None if places is None else self.vector(places)
        if self.kernels and group is None and isinstance(table, Packed):
            return self.kernels.embed(self.token_ids, self.at, table, learned)
        if group is None:
            y = rows_of(table, ids)
        else:
            n_here = leaf.weight.n_out
            ids = ids - group.rank * n_here
            here = (ids >= 0) & (ids < n_here)
            y = group.sum(rows_of(table, ids.clamp(0, n_here - 1)) * here[:, None])
        return y if learned is None else y + learned[self.at.long()]

    def linear(self, op: Linear) -> torch.Tensor:
        """See Linear. Where the inputs are divided among ranks, bias and residual come after the sum of all."""
        w, group = op.weight, self.runner.group
        x, norm = (self.get(op.x.x), op.x) if isinstance(op.x, Normed) else (self.get(op.x), None)
        if op.head and self.rows is not None:
            if not len(self.rows):  # a chunk of a prompt, not its last
                return x.new_empty(0, self.runner.model.config.vocab_size)
            x = x[self.rows]
        bias, residual = op.bias, None if op.residual is None else self.get(op.residual)
        divided = group is not None and group.divides_inputs(op.name)
        now = (None, None) if divided else (bias, residual)
        if self.kernels and isinstance(w, Packed) and 0 < len(x) <= self.kernels.MOST_ROWS:
            parts = None
            if norm is not None:
                shift = norm.norm.get("bias")
                shift = None if shift is None else self.vector(shift)
                parts = norm.kind, norm.eps, self.vector(norm.norm.weight), shift
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

    def gate(self, gate: Columns, up: Columns, activation: str) -> torch.Tensor:
        """See ops.Ops."""
        return activate(self.get(gate), activation) * self.get(up)

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
        turns = None if spec.rope is None else self.runner.turns_of(spec.rope)
        if self.singles is None and len(self.at) == 1:  # no other row's keys have to be there before
            return self.kernels.attend(together, self.at, self.table, spec, *cache, turns, fresh=True)
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
            visible = None  # the fastest way is for a prompt's first chunk
            if spec.window is not None or len(rows) != len(seen):
                visible = seen <= at if spec.window is None else (seen <= at) & (seen > at - spec.window)
            k, v = (self.kept(part, spec.layer, slots).transpose(0, 1)[None] for part in (0, 1))
            heads = q[rows].transpose(0, 1)[None]  # [1, heads, rows, head_dim]
            if heads.is_cuda and self.runner.pages.dtype == torch.bfloat16:
                heads, k, v = heads.bfloat16(), k.bfloat16(), v.bfloat16()
            # Not all of PyTorch's ways know grouped heads together with masks.
            k, v = (x.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=1) for x in (k, v))
            attended = functional.scaled_dot_product_attention(
                heads, k, v, attn_mask=visible, is_causal=visible is None, scale=spec.scale
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
            cos, sin = turns_at(rope, self.runner.frequencies(rope, at.device), at)
            self.turns[rope] = cos.to(self.at.device), sin.to(self.at.device)
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


def turns_at(rope: Rope, frequencies: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions, `[positions, pairs]`, in float32 by way of float64."""
    angles = at.double()[:, None] * frequencies
    return (rope.magnitude * angles.cos()).float(), (rope.magnitude * angles.sin()).float()


def kernels_for(device: torch.device) -> Any:
    """The Triton kernels, where they run on this device; None where PyTorch's own operations have to do."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from pronghorn.ops import gpu_kernels
    except ImportError:
        return None
    return gpu_kernels


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
    from pronghorn.parallel import Group
