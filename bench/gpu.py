"""Everything that is claimed of GPUs, measured in one call:

    python bench/gpu.py --json gpu.json                      # within 8 minutes
    python bench/gpu.py --sections checks,decode --models llama-2-7b
    python bench/gpu.py --sections tune                      # tables for ops/gpu_kernels.py: LAYOUTS
    python bench/gpu.py --device cpu --tiny                  # does all of it work?

Models have random weights, made on the device. Tokens are counted and timed by the engine's steps, so scheduling and
sampling are in; GB/s are the weights that a token reads, and the share is that of what a large copy reaches in this run
(bytes read and written). The peers run in the same process: `method`, plain PyTorch as gpt-fast describes its way (one
static model under torch.compile reduce-overhead, int8 by channel widened in the product, int4 by PyTorch's own kernel),
and transformers' generate with a static cache. Each section is a process of its own on CUDA, with a share of the time
that is left; one that fails or takes too long says so in one row, and the others go on. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
if importlib.util.find_spec("pronghorn._native") is None:  # it could not be built here: only the engine needs it

    class StandIn(types.ModuleType):
        """Any name can be imported from it, and none be called."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return self.missing

        def missing(self, *arguments: Any, **more: Any) -> None:
            raise ImportError("pronghorn._native is not built: docs/gpu.md says how")

    sys.modules["pronghorn._native"] = StandIn("pronghorn._native")
from pronghorn import SamplingParams
from pronghorn.engine.scheduler import Request
from pronghorn.engine.speculate import ModelDraft
from pronghorn.models import Model, model_for
from pronghorn.ops import PAGE, Attention, Rope, gpu_weights
from pronghorn.ops import gpu as house
from pronghorn.weights.types import Module
from shapes import SHAPES, gpt2, llama

TINY = {"tiny": llama(64, 96, 2, 4, 2, 272, head_dim=32), "tiny-gpt2": gpt2(2, 64, 2)}
MODELS = ("llama-2-7b", "llama-3.1-8b", "llama-3.2-1b", "gpt2", "gpt2-xl")
QUANTIZED = {"bf16": 0, "int8": 0, "int4": 32}  # groups
CONTEXT = 1024
GRACE = 15  # seconds that a section may take beyond its share


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str, repeat: int = 10) -> float:
    """The median time of a call, each waited for."""
    times = []
    for _ in range(repeat + 2):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[repeat // 2]


def replayed(function: Callable[[], Any], device: str) -> float:
    """The median time of what a function launches, without the time to launch it: as a graph, on CUDA."""
    function()
    if device.startswith("cuda"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = graph.replay
    return seconds(function, device)


# --- weights -------------------------------------------------------------------------------------------------------


def random_packed(
    n_out: int, n_in: int, format: str, group: int, device: str, scale: float = 0.02
) -> gpu_weights.Packed:
    """A matrix with entries of about `scale`; int4 has minima, int8 by channel (group 0) or by groups has none."""
    if format in ("f32", "f16", "bf16"):
        return gpu_weights.packed(
            torch.randn(n_out, n_in, device=device).mul_(scale).to(gpu_weights.DTYPES[format]), format
        )
    fields = gpu_weights.FIELDS[format]
    words = torch.randint(-(2**31), 2**31, (n_out, n_in // fields), dtype=torch.int32, device=device)
    n_groups = -(-n_in // group) if group else 1
    spread = torch.rand(n_out, n_groups, device=device) + 0.5
    if format == "int8":
        scales = spread * (scale / 74)
        return gpu_weights.Packed(words, scales.half() if group else scales, "int8", n_in, group, 128)
    pairs = torch.stack((spread * (scale / 4.6), spread * (-7.5 * scale / 4.6)), dim=2).half()
    return gpu_weights.Packed(words, pairs.view(n_out, -1).view(torch.int32), "int4", n_in, group)


def random_weights(model: Model, format: str, group: int, device: str, live_layers: int | None = None) -> Module:
    """All of a model's; where `live_layers` is given, the layers beyond add nothing (and are computed all the same)."""
    found: dict[str, Any] = {}
    for name, parameter in model.parameters().items():
        shape = tuple(reversed(parameter.shape)) if parameter.transposed else parameter.shape
        if parameter.kind == "matrix":
            found[name] = random_packed(*shape, format, group, device)
            layer = next((int(part) for part in name.split(".") if part.isdecimal()), -1)
            closes = name.split(".")[-2] in ("o_proj", "down_proj", "c_proj")
            if live_layers is not None and layer >= live_layers and closes:
                nothing = found[name].words if found[name].scales is None else found[name].scales
                nothing.zero_()
        else:
            around = 1.0 if parameter.kind == "vector" and name.endswith("weight") else 0.0
            found[name] = torch.randn(shape, device=device) * 0.02 + around
    return Module.of(found)


def config_of(name: str) -> dict[str, Any]:
    """A shape of bench/shapes.py."""
    return TINY.get(name) or SHAPES[name]


def bytes_read(model: Model, weights: Module) -> int:
    """Of weights, by a token that is decoded."""
    total = 0
    for name in model.parameters():
        value = weights
        for part in name.split("."):
            value = value.get(part)
        looked_up = name == model.EMBEDDING and not model.config.tied
        if not (looked_up or name == "wpe.weight"):
            total += value.nbytes
    return total


# --- the engine ----------------------------------------------------------------------------------------------------


class Bench:
    """A model on the device, under its engine."""

    def __init__(
        self,
        name: str,
        format: str,
        device: str,
        batch: int = 1,
        weights: Module | None = None,
        context: int = CONTEXT,
        ahead: bool = True,
    ) -> None:
        self.device, self.model = device, model_for(config_of(name))
        self.model.config.context = min(context, self.model.config.context)
        n_pages = batch * -(-self.model.config.context // PAGE)
        from pronghorn.engine.engine import Engine  # which needs the native module

        weights = weights or random_weights(self.model, format, QUANTIZED[format], device)
        self.read = bytes_read(self.model, weights)
        more = {"kv_dtype": "bf16", "device": device, "ahead": ahead}
        self.runner = house.TorchRunner(self.model, weights, n_pages=n_pages, **more)
        self.engine = Engine(
            self.runner, n_pages=n_pages, context=self.model.config.context, vocabulary=self.model.config.vocab_size,
            max_sequences=max(batch, 1), prefix_cache=False,
        )  # fmt: skip

    def requests(self, batch: int, n_prompt: int, n_new: int, temperature: float = 0.0) -> list[Request]:
        """Some, with prompts of their own."""
        params = SamplingParams(max_tokens=n_new, ignore_eos=True, temperature=temperature, seed=1)
        vocabulary = self.model.config.vocab_size
        return [Request([(7 * i + 13 * j + 5) % vocabulary for i in range(n_prompt)], params) for j in range(batch)]

    def decode(self, batch: int, n_prompt: int = 16, n_new: int = 128) -> tuple[float, list[list[int]]]:
        """Tokens a second of all, once the prompts are done -> and the tokens."""
        requests = self.requests(batch, n_prompt, n_new)
        for request in requests:
            self.engine.add(request)
        while any(len(request.token_ids) < n_prompt + 4 for request in requests):
            self.engine.step()
        synchronize(self.device)
        before, started = sum(len(request.token_ids) for request in requests), time.perf_counter()
        while not all(request.finish_reason for request in requests):
            self.engine.step()
        synchronize(self.device)
        took, errors = time.perf_counter() - started, [request.error for request in requests if request.error]
        if errors:
            raise errors[0]
        tokens = sum(len(request.token_ids) for request in requests) - before
        return tokens / took, [list(request.token_ids) for request in requests]

    def first_token(self, n_prompt: int) -> float:
        """Seconds from a prompt to its first token."""
        times = []
        for _ in range(4):
            (request,) = self.requests(1, n_prompt, 1)
            started = time.perf_counter()
            self.engine.add(request)
            while not request.finish_reason:
                self.engine.step()
            times.append(time.perf_counter() - started)
        return sorted(times[1:])[1]


# --- checks --------------------------------------------------------------------------------------------------------


def check_matvec(
    device: str, form: tuple[str, int], sizes: list[tuple[int, int]], rows_of: tuple[int, ...], fused: Iterator[Any]
) -> Iterator[Any]:
    """A format's products with what is fused into it against float64 -> (what, worst error, bound, bits differ).

    The error is against the sum of the terms' magnitudes; a row's bits must not depend on the other rows.
    """
    from pronghorn.ops import gpu_kernels as kernels

    format, group = form
    for (n_out, n_in), (gate, norm, activation) in zip(sizes, fused, strict=False):
        activation = activation or "silu" if gate else activation
        w = random_packed(n_out * (1 + gate), n_in, format, group, device, 1.0)
        x, residual = torch.randn(max(rows_of), n_in, device=device), torch.randn(max(rows_of), n_out, device=device)
        bias, weight, shift = (torch.randn(n, device=device) for n in (n_out * (1 + gate), n_in, n_in))
        parts = (norm, 0.1, weight, shift if norm == "layer" else None) if norm else None
        exact, y = w.unpack().double(), x.double()
        if norm == "rms":
            y = y / (y.square().mean(1, keepdim=True) + 0.1).sqrt() * weight
        if norm == "layer":
            y = functional.layer_norm(y, (n_in,), weight.double(), shift.double(), 0.1)
        size = (y.abs() @ exact.abs().T).amax() + 4
        y = y @ exact.T + bias
        if gate:
            y = house.activate(y[:, :n_out], activation or "") * y[:, n_out:]
            size = size * size
        elif activation:
            y = house.activate(y, activation)
        y = y + residual
        got = {n: kernels.matvec(x[:n], w, parts, bias, activation, gate, residual[:n]) for n in rows_of}
        worst = max(float(((out - y[:n]).abs() / size).max()) for n, out in got.items())
        differ = sum(int((out[:1] != got[rows_of[0]][:1]).sum()) for out in got.values())
        what = f"{format}-{group} {n_out}x{n_in} {norm or '-'} {activation or '-'}{' gate' * gate}"
        yield what, worst, 2e-6, differ


def check_matmul(
    device: str, form: tuple[str, int], sizes: list[tuple[int, int]], rows_of: tuple[int, ...]
) -> Iterator[Any]:
    """Products of many rows; weights and inputs are rounded to bf16 on the way -> the same."""
    from pronghorn.ops import gpu_kernels as kernels

    format, group = form
    for (n_out, n_in), rows in itertools.product(sizes, rows_of):
        w, x = random_packed(n_out, n_in, format, group, device, 1.0), torch.randn(rows, n_in, device=device)
        got = kernels.matmul(gpu_weights.reordered(x, gpu_weights.FIELDS[format]), w).double()
        exact = w.unpack().double()
        want, size = x.double() @ exact.T, x.double().abs() @ exact.abs().T
        what = f"{format}-{group} {n_out}x{n_in} of {rows} rows"
        yield what, float(((got - want).abs() / size).max()), 2.0**-7, 0


def check_attention(device: str, lengths: tuple[int, ...], dims: tuple[int, ...]) -> Iterator[Any]:
    """Sequences' keys and values stored, and their last tokens' attention, against float64 -> the same."""
    from pronghorn.ops import gpu_kernels as kernels

    kinds = itertools.product(((4, 2), (3, 3)), ((None, "bf16"), (20, "int8")))
    for dim, ((heads, kv_heads), (window, kv)) in itertools.product(dims, kinds):
        rope = Rope(tuple(0.7 ** (i + 0.3) for i in range(dim // 2)), interleaved=window is None)
        spec = Attention(1, heads, kv_heads, dim, dim**-0.5, rope, window)
        width = -(-max(lengths) // PAGE)
        tables = torch.randperm(len(lengths) * width, device=device).view(len(lengths), width).int()
        shape = (2, 2, len(lengths) * width * PAGE, kv_heads, dim)
        pages = torch.full(shape, 99, dtype=gpu_weights.DTYPES[kv], device=device)
        scales = torch.full((*shape[:-1], 1), torch.nan, device=device) if kv == "int8" else None
        at = torch.cat([torch.arange(n, device=device) for n in lengths]).int()
        table = tables.repeat_interleave(torch.tensor(lengths, device=device), dim=0)
        frequencies = torch.tensor(rope.frequencies, device=device, dtype=torch.float64)
        turns = house.turns_at(rope, frequencies, torch.arange(max(lengths), device=device))
        qkv = torch.randn(len(at), (heads + 2 * kv_heads) * dim, device=device)
        q = kernels.store(qkv, at, table, spec, turns, pages, scales)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        got = kernels.attend(q[ends], at[ends], tables, spec, pages, scales)
        # One row that stores its own keys and values gets the same bits, and leaves the same.
        differ, want = 0, [None if kept is None else kept.clone() for kept in (pages, scales)]
        for i, end in enumerate(ends.tolist()):
            slot = int(tables[i, at[end] // PAGE]) * PAGE + int(at[end]) % PAGE
            for kept in (pages, scales):
                if kept is not None:
                    kept[:, 1, slot] = 77
            row = qkv[end : end + 1], at[end : end + 1], tables[i : i + 1]
            differ += int((kernels.attend(*row, spec, pages, scales, turns, fresh=True) != got[i]).sum())
        left = [(a, b) for a, b in zip(want, (pages, scales), strict=True) if a is not None]
        differ += sum(int((a.nan_to_num() != b.nan_to_num()).sum()) for a, b in left)
        got = got.double()
        for i, length in enumerate(lengths):
            slots = (tables[i].long()[:, None] * PAGE + torch.arange(PAGE, device=device)).view(-1)[:length]
            k, v = (pages[part, 1, slots].double() for part in (0, 1))
            if scales is not None:
                k, v = k * scales[0, 1, slots], v * scales[1, 1, slots]
            k, v = (part[-(window or length) :].repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
            scores = torch.einsum("hd,shd->hs", q[ends[i]].double().view(heads, dim), k) * spec.scale
            want = torch.einsum("hs,shd->hd", scores.softmax(dim=1), v).view(-1)
            worst = float((got[i] - want).abs().max() / v.abs().max())
            yield (
                f"attention {kv} {heads}/{kv_heads}x{dim} of {length}{' window' if window else ''}",
                worst,
                2e-5,
                differ,
            )
        # What is stored is what was given: the rotation is tested where models are.
        given = qkv[:, -kv_heads * dim :].view(-1, kv_heads, dim)[: lengths[0]].double()
        slots = tables[0].long()[torch.arange(lengths[0], device=device) // PAGE] * PAGE
        slots += torch.arange(lengths[0], device=device) % PAGE
        kept = pages[1, 1, slots].double() * (1 if scales is None else scales[1, 1, slots])
        yield f"values kept in {kv}", float((kept - given).abs().max() / given.abs().max()), 2.0**-7, 0


DENSE = [("f32", 0), ("f16", 0), ("bf16", 0)]
PACKED = [("int8", 0), ("int8", 64), ("int4", 32), ("int4", 128), ("int4", 256)]


def checks(device: str, tiny: bool, end: float = math.inf) -> list[dict[str, Any]]:
    """All kernels, on fresh numbers; memory is poisoned before it is written -> what was checked, right or not."""
    if house.kernels_for(torch.device(device)) is None:
        return [{"skipped": "no Triton kernels here (Triton is missing, or TRITON_INTERPRET=1 is not set)"}]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    sizes = [(9, 256), (7, 128)] if tiny else [(4096, 4096), (4095, 11008), (50257, 768)]
    few, many = ((1, 3), (9,)) if tiny else ((1, 2, 4, 8), (9, 32, 100, 512))
    lengths, dims = ((40, 1, 33), (16,)) if tiny else ((700, 1, 33, 1024), (64, 128))
    kinds = (False, True), ("", "rms", "layer"), (None, "silu", "gelu_new", "gelu", "relu")
    fused = zip(*map(itertools.cycle, kinds), strict=False)
    jobs = [(f"products of few rows, {form}", check_matvec(device, form, sizes, few, fused)) for form in DENSE + PACKED]
    jobs += [(f"products of many rows, {form}", check_matmul(device, form, sizes, many)) for form in PACKED]
    jobs += [(f"attention, heads of {dim}", check_attention(device, lengths, (dim,))) for dim in dims]
    rows: list[dict[str, Any]] = []
    for name, found in jobs:
        try:
            for what, worst, bound, differ in found:
                rows.append({"what": what, "error": worst, "bound": bound, "bits_differ": differ})
                if time.perf_counter() > end:
                    raise TimeoutError("the rest was not reached in time")
        except Exception as error:
            rows.append({"what": f"{name}: {first_line(error)}", "error": float("nan"), "bound": 0.0, "bits_differ": 0})
    torch.use_deterministic_algorithms(False)
    return rows


# --- peers ---------------------------------------------------------------------------------------------------------


class MethodLinear(nn.Module):
    """A product as gpt-fast does it: dense; int8 by channel, widened in the product; int4 by PyTorch's own kernel."""

    def __init__(self, n_in: int, n_out: int, format: str, device: str, bias: bool = False) -> None:
        super().__init__()
        self.format, self.n_out = format, n_out
        weight = torch.randn(n_out, n_in, device=device, dtype=torch.bfloat16) * 0.02
        if format == "int8":
            weight = torch.randint(-127, 128, (n_out, n_in), device=device, dtype=torch.int8)
            self.register_buffer("scales", torch.full((n_out,), 0.02 / 74, device=device, dtype=torch.bfloat16))
        elif format == "int4":
            codes = torch.randint(0, 256, (n_out, n_in // 2), device=device, dtype=torch.uint8)
            weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8 if n_in % 128 == 0 else 2)
            pair = torch.full((n_in // 32, n_out, 2), 0.004, device=device, dtype=torch.bfloat16)
            self.register_buffer("pair", pair)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(n_out, device=device, dtype=torch.bfloat16) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.format == "bf16":
            return functional.linear(x, self.weight, self.bias)
        if self.format == "int8":
            y = functional.linear(x, self.weight.to(x.dtype)) * self.scales
        else:
            y = torch.ops.aten._weight_int4pack_mm(x.reshape(-1, x.shape[-1]), self.weight, 32, self.pair)
            y = y.view(*x.shape[:-1], self.n_out)
        return y if self.bias is None else y + self.bias


class Method(nn.Module):
    """A Llama or a GPT-2 in plain PyTorch with static keys and values: what gpt-fast compiles."""

    def __init__(self, config: Any, format: str, device: str, length: int) -> None:
        super().__init__()
        self.config, self.rope = config, config.attention[0].rope  # GPT-2 has none, but biases, and no gates
        dim, q, kv = config.embd, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        vocabulary, biased = -(-config.vocab_size // 64) * 64, self.rope is None
        self.sizes = (q, kv, kv)
        self.embedding = nn.Embedding(vocabulary, dim, device=device, dtype=torch.bfloat16)
        make = [(dim, q + 2 * kv), (q, dim), (dim, config.inner * (1 if biased else 2)), (config.inner, dim)]
        self.layers = nn.ModuleList(
            nn.ModuleList(MethodLinear(*size, format, device, biased) for size in make) for _ in range(config.n_layers)
        )
        self.head = MethodLinear(dim, vocabulary, format, device)
        self.register_buffer("weight", torch.ones(dim, device=device, dtype=torch.bfloat16))
        self.register_buffer("shift", torch.zeros(dim, device=device, dtype=torch.bfloat16))
        shape = (config.n_layers, 2, 1, config.n_kv_heads, length, config.head_dim)
        self.register_buffer("kept", torch.zeros(shape, device=device, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tril(torch.ones(length, length, dtype=torch.bool, device=device)))
        if self.rope is None:
            self.register_buffer("places", torch.randn(length, dim, device=device, dtype=torch.bfloat16))
        else:
            angles = torch.outer(torch.arange(length), torch.tensor(self.rope.frequencies))
            self.register_buffer("turns", torch.stack((angles.cos(), angles.sin()), dim=-1).to(device))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        if self.rope is None:
            return functional.layer_norm(x, x.shape[-1:], self.weight, self.shift, self.config.eps)
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.config.eps)

    def rotated(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        pairs, (c, s) = x.float().reshape(*x.shape[:-1], -1, 2), self.turns[at][None, :, None].unbind(dim=-1)
        a, b = pairs.unbind(dim=-1)
        return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(3).to(x.dtype)

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cfg = self.config
        x = self.embedding(ids)  # [1, tokens, dim]
        x = x + self.places[at] if self.rope is None else x
        for number, (qkv, out, open_, close) in enumerate(self.layers):
            q, k, v = (p.view(1, len(at), -1, cfg.head_dim) for p in qkv(self.norm(x)).split(self.sizes, dim=-1))
            if self.rope is not None:
                q, k = self.rotated(q, at), self.rotated(k, at)
            for part, value in enumerate((k, v)):
                self.kept[number, part, :, :, at] = value.transpose(1, 2)
            y = functional.scaled_dot_product_attention(
                q.transpose(1, 2), *self.kept[number], attn_mask=self.mask[at][None, None],
                enable_gqa=cfg.n_heads != cfg.n_kv_heads,
            )  # fmt: skip
            x = x + out(y.transpose(1, 2).flatten(2))
            y = open_(self.norm(x))
            if self.rope is None:
                y = functional.gelu(y, approximate="tanh")
            else:
                gate, up = y.chunk(2, dim=-1)
                y = functional.silu(gate) * up
            x = x + close(y)
        return self.head(self.norm(x)[:, -1:])


@torch.inference_mode()
def method_decode(name: str, format: str, device: str, n_new: int) -> float:
    """Tokens a second of gpt-fast's method at batch 1, greedy."""
    model = Method(model_for(config_of(name)).config, format, device, 256)

    def step(ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return model(ids, at)[:, -1].argmax(dim=-1, keepdim=True)

    on_cuda = device.startswith("cuda")
    run = torch.compile(step, mode="reduce-overhead", fullgraph=True) if on_cuda else step
    ids, at = torch.tensor([[5]], device=device), torch.tensor([0], device=device)
    for _ in range(4):
        ids = run(ids, at).clone()
        at += 1
    synchronize(device)
    started = time.perf_counter()
    for _ in range(n_new):
        ids = run(ids, at).clone()
        at += 1
        ids.tolist()  # as a caller who streams
    return n_new / (time.perf_counter() - started)


@torch.inference_mode()
def transformers_decode(name: str, device: str, n_new: int) -> float:
    """Tokens a second of transformers' generate with a static cache, bf16, greedy."""
    import transformers

    config = dict(config_of(name))
    kind = transformers.GPT2LMHeadModel if config["model_type"] == "gpt2" else transformers.LlamaForCausalLM
    with torch.device(device):
        model = kind(kind.config_class(**config)).to(torch.bfloat16).eval()
    ids = torch.full((1, 16), 5, device=device)
    options = {"cache_implementation": "static", "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    took = []
    for n in (n_new, n_new, 1):  # the first compiles
        synchronize(device)
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **options)
        synchronize(device)
        took.append(time.perf_counter() - started)
    return (n_new - 1) / max(took[1] - took[2], 1e-9)


# --- sections ------------------------------------------------------------------------------------------------------


class Report:
    """What has been found, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.tiny = args, args.device, args.tiny
        self.end = time.perf_counter() + args.minutes * 60
        self.rows: list[dict[str, Any]] = []
        self.copy = 0.0  # GB/s
        self.models = ["tiny"] if args.tiny else args.models
        self.n_new = 8 if args.tiny else 128

    def add(self, section: str, **row: Any) -> None:
        if "gb_s" in row and self.copy:
            row["share"] = row["gb_s"] / self.copy
        self.rows.append({"section": section, **row})
        self.write()
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{section:12} " + "  ".join(shown), flush=True)

    def write(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.rows, indent=1))

    def has(self, section: str, seconds: float, what: str) -> bool:
        """Whether so many seconds are left; if not, it is said."""
        self.clear()
        if self.tiny or self.end - time.perf_counter() >= seconds:
            return True
        self.add(section, what=what, skipped=f"under {seconds:.0f} s are left")
        return False

    def clear(self) -> None:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def fits(self, section: str, name: str, format: str) -> bool:
        """Whether the memory holds the model; if not, it is said."""
        if not self.device.startswith("cuda"):
            return True
        sizes = model_for(config_of(name)).parameters().values()
        bits = {"bf16": 16, "int8": 8, "int4": 5}[format]
        need = sum(torch.Size(p.shape).numel() for p in sizes) * bits / 8 * 1.7 + 4e9  # what is joined is there twice
        if need <= torch.cuda.mem_get_info()[0]:
            return True
        self.add(section, model=name, dtype=format, skipped=f"{need / 1e9:.0f} GB are not free")
        return False


def copy_section(r: Report) -> None:
    """The device; what a large copy reaches there, and a large sum."""
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if importlib.util.find_spec("triton"):
        versions["triton"] = importlib.metadata.version("triton")
    r.add("device", name=torch.cuda.get_device_name() if r.device.startswith("cuda") else r.device, **versions)
    n = 1 << (20 if r.tiny else 32)
    source = torch.ones(n // 4, device=r.device)
    target = torch.empty_like(source)
    r.copy = 2 * n / seconds(lambda: target.copy_(source), r.device) / 1e9
    r.add("copy", gb_s_copied=r.copy, gb_s_summed=n / seconds(source.sum, r.device) / 1e9)


def checks_section(r: Report) -> None:
    """The kernels against float64."""
    rows = checks(r.device, r.tiny, r.end)
    if "skipped" in rows[0]:
        return r.add("checks", **rows[0])
    wrong = [row for row in rows if not row["error"] <= row["bound"]]
    for row in wrong:
        r.add("checks", failed=row["what"], error=row["error"], bound=row["bound"])
    right = [row for row in rows if row["error"] <= row["bound"]]
    worst = max(right, key=lambda row: row["error"] / row["bound"], default={"what": "none", "error": 0.0})
    bits = [row["what"] for row in rows if row["bits_differ"]]
    found = {"worst": worst["what"], "error": worst["error"], "rows_change_bits": ", ".join(bits) or "none"}
    return r.add("checks", passed=len(right), wrong=len(wrong), **found)


def decode_section(r: Report) -> None:
    """Batch 1, and for the first model its prompts and its batches."""
    for name in r.models:
        for format in QUANTIZED:
            what = f"{name} {format}"
            if not r.has("decode", 15, what) or not r.fits("decode", name, format):
                continue
            started = time.perf_counter()
            b = Bench(name, format, r.device)
            synchronize(r.device)
            made = time.perf_counter() - started
            first = b.first_token(16)
            b.decode(1, n_new=8)
            speed = b.decode(1, n_new=r.n_new)[0]
            row = {"model": name, "dtype": format, "tok_s": speed, "gb_s": speed * b.read / 1e9}
            bucket = b.runner.buckets.get(1)
            if bucket and bucket.graph:
                row["graph_tok_s"] = 1 / seconds(bucket.graph.replay, r.device, 20)
            r.add("decode", **row, ttft_16_s=first, made_s=made)
            for n_prompt in (512,) if not r.tiny else (20,):
                r.add("prompt", model=name, dtype=format, tokens=n_prompt, tok_s=n_prompt / b.first_token(n_prompt))
            del b


def batch_section(r: Report) -> None:
    """Many streams."""
    for name, format, batch in itertools.product(r.models[:1], QUANTIZED, (2, 3) if r.tiny else (8, 32, 128)):
        if r.has("batch", 20, f"{name} {format} {batch}") and r.fits("batch", name, format):
            b = Bench(name, format, r.device, batch, context=256)
            b.decode(batch, n_new=8)
            r.add("batch", model=name, dtype=format, streams=batch, tok_s=b.decode(batch, n_new=r.n_new)[0])


def speculation_section(r: Report) -> None:
    """A draft that is always right: the model's layers beyond the draft's add nothing. The tokens must be the same."""
    for name in r.models[:1]:
        if not r.has("speculation", 30, name) or not r.fits("speculation", name, "bf16"):
            continue
        small = dict(config_of(name))
        layers = "n_layer" if small["model_type"] == "gpt2" else "num_hidden_layers"
        small[layers] = live = max(small[layers] // 16, 1)
        weights = random_weights(model_for(config_of(name)), "bf16", 0, r.device, live)
        b = Bench(name, "bf16", r.device, weights=weights)
        b.decode(1, n_new=8)
        plain, want = b.decode(1, n_new=r.n_new)
        draft = model_for(small)
        draft.config.context = b.model.config.context
        own = house.TorchRunner(draft, weights, n_pages=b.runner.n_pages, kv_dtype="bf16", device=r.device)
        sizes = {"context": draft.config.context, "max_tokens": 512}
        b.engine.speculate(ModelDraft(own, b.engine.pool, shared=False, **sizes, cost=live / config_of(name)[layers]))
        b.decode(1, n_new=r.n_new)
        speed, got = b.decode(1, n_new=r.n_new)
        stats = b.engine.stats()
        accepted = stats.accepted_tokens / max(stats.drafted_tokens, 1)
        r.add("speculation", model=name, tok_s=speed, plain_tok_s=plain, accepted=accepted, same_tokens=got == want)


def large_section(r: Report) -> None:
    """Llama-2-70B in 4 bits, where the memory allows it."""
    name = "tiny" if r.tiny else "llama-2-70b"
    if r.has("large", 40, name) and r.fits("large", name, "int4"):
        b = Bench(name, "int4", r.device)
        b.decode(1, n_new=8)
        speed = b.decode(1, n_new=r.n_new // 4 + 4)[0]
        r.add("large", model=name, dtype="int4", tok_s=speed, gb_s=speed * b.read / 1e9)


def peers_section(r: Report) -> None:
    """The same models by the peers' ways."""
    names = list(TINY) if r.tiny else r.models
    for name, format in itertools.product(names, QUANTIZED):
        if r.tiny and format == "int4":
            continue
        if r.has("peers", 60, f"method {name} {format}") and r.fits("peers", name, format):
            attempt(r, "method", name, format, lambda n=name, f=format: method_decode(n, f, r.device, r.n_new))
            torch.compiler.reset()
    for name in names:
        if r.has("peers", 60, f"transformers {name} bf16") and r.fits("peers", name, "bf16"):
            attempt(r, "transformers", name, "bf16", lambda n=name: transformers_decode(n, r.device, r.n_new))


def attempt(r: Report, peer: str, name: str, format: str, function: Callable[[], float]) -> None:
    """A peer's figure, or why there is none: other people's code may not run everywhere."""
    try:
        r.add("peers", peer=peer, model=name, dtype=format, tok_s=function())
    except Exception as error:
        r.add("peers", peer=peer, model=name, dtype=format, failed=first_line(error))


def first_line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


@torch.inference_mode()
def fp8_section(r: Report) -> None:
    """What weights in fp8 (e4m3, a scale an output) would give: PyTorch's product, beside ours in int8, and bf16's.

    Inputs are fp8 too, with a scale a row; a single row fills up 16. Matrices are several, more than a cache holds.
    """
    if not r.device.startswith("cuda") or torch.cuda.get_device_capability() < (8, 9):
        return r.add("fp8", skipped="no fp8 products on this device")
    kernels = house.kernels_for(torch.device(r.device))
    n_out, n_in, count = 11008, 4096, 8
    dense = [torch.randn(n_out, n_in, device=r.device, dtype=torch.bfloat16) * 0.02 for _ in range(count)]
    packed = [random_packed(n_out, n_in, "int8", 0, r.device) for _ in range(count)]
    scales = [w.float().abs().amax(dim=1)[None] / 448 for w in dense]  # [1, n_out]
    fp8 = [(w.float() / s.T).to(torch.float8_e4m3fn).T for w, s in zip(dense, scales, strict=True)]  # [n_in, n_out]
    for rows in (1, 16, 512, 2048):
        x = torch.randn(rows, n_in, device=r.device)
        wide = functional.pad(x, (0, 0, 0, max(16 - rows, 0)))
        scale = (wide.abs().amax(dim=1, keepdim=True) / 448).clamp(min=1e-12)

        def by_fp8(wide: Any = wide, scale: Any = scale) -> None:
            small = (wide / scale).to(torch.float8_e4m3fn)
            for w, s in zip(fp8, scales, strict=True):
                torch._scaled_mm(small, w, scale_a=scale, scale_b=s, out_dtype=torch.bfloat16)

        def by_int8(x: Any = x, few: bool = rows <= kernels.MOST_ROWS) -> None:
            for w in packed:
                kernels.matvec(x, w) if few else house.multiply(x, w, kernels)

        def by_bf16(x: Any = x) -> None:
            x = x.bfloat16()
            for w in dense:
                torch.mm(x, w.T)

        for dtype, function in (("fp8", by_fp8), ("int8", by_int8), ("bf16", by_bf16)):
            each = replayed(function, r.device) / count
            size = n_out * n_in * (2 if dtype == "bf16" else 1)
            tera = 2 * rows * n_out * n_in / each / 1e12
            r.add("fp8", dtype=dtype, rows=rows, microseconds=each * 1e6, gb_s=size / each / 1e9, tflop_s=tera)


def tune_section(r: Report) -> None:
    """Tries layouts for the products of a 7B, and prints the best of each format."""
    from pronghorn.ops import gpu_kernels as kernels

    sizes = [(9, 128)] if r.tiny else [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    for format, group in QUANTIZED.items():
        matrices = [random_packed(*size, format, group, r.device) for size in sizes for _ in range(1 if r.tiny else 4)]
        inputs = [torch.randn(1, w.n_in, device=r.device) for w in matrices]
        found = []
        layouts = [(2, 128, 1)] if r.tiny else itertools.product((1, 2, 4, 8), (128, 256, 512, 1024), (1, 2, 4, 8))
        for layout in layouts:
            if layout[1] < 64 * layout[2] and not r.tiny:
                continue
            kernels.LAYOUTS[format] = layout

            def run(matrices: Any = matrices, inputs: Any = inputs) -> None:
                for w, x in zip(matrices, inputs, strict=True):
                    kernels.matvec(x, w)

            if not r.tiny and time.perf_counter() > r.end - 10:
                r.add("tune", dtype=format, skipped="the time is over")
                break
            try:
                found.append((sum(w.nbytes for w in matrices) / replayed(run, r.device) / 1e9, layout))
            except Exception as error:  # such as more registers or shared memory than there are
                r.add("tune", dtype=format, layout=layout, failed=first_line(error))
        for speed, layout in sorted(found, reverse=True)[:3]:
            r.add("tune", dtype=format, layout=layout, gb_s=speed)


# Each with its share of the time: of what those before have left.
SECTIONS: dict[str, tuple[float, Callable[[Report], None]]] = {
    "copy": (1, copy_section),
    "checks": (12, checks_section),
    "decode": (14, decode_section),
    "peers": (14, peers_section),
    "batch": (6, batch_section),
    "speculation": (3, speculation_section),
    "fp8": (2, fp8_section),
    "large": (3, large_section),
    "tune": (12, tune_section),
}


def guarded(r: Report, name: str) -> None:
    """Runs a section; what it fails of is a row."""
    try:
        SECTIONS[name][1](r)
    except Exception as error:
        r.add(name, failed=first_line(error))


def inside(r: Report, name: str, results: Any) -> None:
    """A section in its process: its rows go to the parent."""
    add = r.add

    def sent(section: str, **row: Any) -> None:
        add(section, **row)
        results.send(r.rows[-1])

    r.add, r.args.json = sent, None  # type: ignore[method-assign]
    guarded(r, name)


def apart(r: Report, name: str, seconds: float) -> None:
    """Runs a section in a process of its own, as an error on the device is for good, and ends it if it hangs."""
    context = multiprocessing.get_context("fork")  # the device has not been touched here: nothing is imported twice
    here, there = context.Pipe(duplex=False)
    end, r.end = r.end, time.perf_counter() + seconds
    child = context.Process(target=inside, args=(r, name, there))
    child.start()
    there.close()
    try:
        while here.poll(max(r.end + GRACE - time.perf_counter(), 0)):
            r.rows.append(here.recv())
            r.write()
        child.kill()
        r.add(name, failed=f"it did not end within {seconds:.0f} s")
    except EOFError:  # it is done, or dead
        child.join()
        if child.exitcode:
            r.add(name, failed=f"its process ended with {child.exitcode}")
    r.end = end
    r.copy = next((row["gb_s_copied"] for row in r.rows if "gb_s_copied" in row), 0.0)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is asked for -> the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a test can wait for")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--sections", type=lambda text: text.split(","), default=[n for n in SECTIONS if n != "tune"])
    parser.add_argument("--apart", action="store_true", help="sections in processes of their own, as on CUDA")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if unknown := set(args.sections) - set(SECTIONS) | set(args.models) - set(SHAPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    r = Report(args)
    names = ["copy", *(name for name in args.sections if name != "copy")]  # shares are of what it finds
    for i, name in enumerate(names):
        if args.apart or args.device.startswith("cuda"):
            left = max(r.end - time.perf_counter(), 1)
            apart(r, name, left * SECTIONS[name][0] / sum(SECTIONS[other][0] for other in names[i:]))
        else:
            guarded(r, name)
    return r.rows


if __name__ == "__main__":
    main()
