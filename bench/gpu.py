"""Everything that is claimed of GPUs, measured in one call:

    python bench/gpu.py --json gpu.json                      # within 8 minutes
    python bench/gpu.py --sections checks,decode --models llama-2-7b
    python bench/gpu.py --tune                               # tables for ops/gpu_kernels.py: LAYOUTS
    python bench/gpu.py --device cpu --tiny                  # does all of it work?

Models have random weights, made on the device. Tokens are counted and timed by the engine's steps, so scheduling and
sampling are in; GB/s are the weights that a token reads, and the share is that of what a large copy reaches in this run
(bytes read and written). The peers run in the same process: `method`, plain PyTorch as gpt-fast describes its way (one
static model under torch.compile reduce-overhead, int8 by channel widened in the product, int4 by PyTorch's own kernel),
and transformers' generate with a static cache. A section begins only if its usual time is left, or says that not.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from pronghorn import SamplingParams
from pronghorn.engine.engine import Engine
from pronghorn.engine.scheduler import Request
from pronghorn.engine.speculate import ModelDraft
from pronghorn.models import Model, model_for
from pronghorn.ops import PAGE, Attention, Rope
from pronghorn.ops import gpu as house
from pronghorn.ops import gpu_weights
from pronghorn.weights.types import Module
from shapes import SHAPES, llama

TINY = llama(64, 96, 2, 4, 2, 272, head_dim=32)
MODELS = ("llama-2-7b", "llama-3.1-8b", "llama-3.2-1b", "gpt2", "gpt2-xl")
QUANTIZED = {"bf16": 0, "int8": 0, "int4": 32}  # groups
CONTEXT = 1024


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


# --- weights -------------------------------------------------------------------------------------------------------


def random_packed(n_out: int, n_in: int, format: str, group: int, device: str, scale: float = 0.02) -> gpu_weights.Packed:
    """A matrix with entries of about `scale`; int4 has minima, int8 by channel (group 0) or by groups has none."""
    if format in ("f32", "f16", "bf16"):
        return gpu_weights.packed(torch.randn(n_out, n_in, device=device).mul_(scale).to(gpu_weights.DTYPES[format]), format)
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
    return TINY if name == "tiny" else SHAPES[name]


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
        self, name: str, format: str, device: str, batch: int = 1, weights: Module | None = None, context: int = CONTEXT
    ) -> None:
        self.device, self.model = device, model_for(config_of(name))
        self.model.config.context = min(context, self.model.config.context)
        self.weights = weights or random_weights(self.model, format, QUANTIZED[format], device)
        n_pages = batch * -(-self.model.config.context // PAGE)
        self.runner = house.TorchRunner(self.model, self.weights, n_pages=n_pages, kv_dtype="bf16", device=device)
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


def check_matvec(device: str, sizes: list[tuple[int, int]], rows_of: tuple[int, ...] = (1, 2, 4, 8)) -> Iterator[Any]:
    """Each format's product with what is fused into it against float64 -> (what, worst error, bound, bits differ).

    The error is against the sum of the terms' magnitudes; a row's bits must not depend on the other rows.
    """
    from pronghorn.ops import gpu_kernels as kernels

    formats = [("f32", 0), ("f16", 0), ("bf16", 0), ("int8", 0), ("int8", 64), ("int4", 32), ("int4", 128)]
    norms, fused = itertools.cycle(("", "rms", "layer")), itertools.cycle((None, "silu", "gelu_new", "gelu", "relu"))
    for (format, group), (n_out, n_in), gate in itertools.product(formats, sizes, (False, True)):
        norm, activation = next(norms), next(fused)
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


def check_matmul(device: str, sizes: list[tuple[int, int]], rows_of: tuple[int, ...]) -> Iterator[Any]:
    """Products of many rows; weights and inputs are rounded to bf16 on the way -> the same."""
    from pronghorn.ops import gpu_kernels as kernels

    for (format, group), (n_out, n_in), rows in itertools.product(
        (("int8", 0), ("int8", 64), ("int4", 32), ("int4", 128)), sizes, rows_of
    ):
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
        angles = at.double()[:, None] * torch.tensor(rope.frequencies, device=device, dtype=torch.float64)
        qkv = torch.randn(len(at), (heads + 2 * kv_heads) * dim, device=device)
        q = kernels.store(qkv, at, table, spec, (angles.cos().float(), angles.sin().float()), pages, scales)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        got = kernels.attend(q[ends], at[ends], tables, spec, pages, scales).double()
        for i, length in enumerate(lengths):
            slots = (tables[i].long()[:, None] * PAGE + torch.arange(PAGE, device=device)).view(-1)[:length]
            k, v = (pages[part, 1, slots].double() for part in (0, 1))
            if scales is not None:
                k, v = k * scales[0, 1, slots], v * scales[1, 1, slots]
            k, v = (part[-(window or length) :].repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
            scores = torch.einsum("hd,shd->hs", q[ends[i]].double().view(heads, dim), k) * spec.scale
            want = torch.einsum("hs,shd->hd", scores.softmax(dim=1), v).view(-1)
            worst = float((got[i] - want).abs().max() / v.abs().max())
            yield f"attention {kv} {heads}/{kv_heads}x{dim} of {length}{' window' if window else ''}", worst, 2e-5, 0
        # What is stored is what was given: the rotation is tested where models are.
        given = qkv[:, -kv_heads * dim :].view(-1, kv_heads, dim)[: lengths[0]].double()
        slots = tables[0].long()[torch.arange(lengths[0], device=device) // PAGE] * PAGE
        slots += torch.arange(lengths[0], device=device) % PAGE
        kept = pages[1, 1, slots].double() * (1 if scales is None else scales[1, 1, slots])
        yield f"values kept in {kv}", float((kept - given).abs().max() / given.abs().max()), 2.0**-7, 0


def checks(device: str, tiny: bool) -> list[dict[str, Any]]:
    """All kernels, on fresh numbers; memory is poisoned before it is written. AssertionError where one is wrong."""
    if house.kernels_for(torch.device(device)) is None:
        return [{"skipped": "no Triton kernels here (Triton is missing, or TRITON_INTERPRET=1 is not set)"}]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    sizes = [(9, 384)] if tiny else [(4096, 4096), (768, 3072), (4095, 11008), (50257, 768)]
    rows_of = (1, 3) if tiny else (1, 2, 4, 8)
    attention = check_attention(device, (40, 1, 33) if tiny else (700, 1, 33, 1024), (16,) if tiny else (64, 128))
    rows = []
    try:
        many = check_matmul(device, sizes, (9,) if tiny else (9, 32, 100, 512))
        for what, worst, bound, differ in itertools.chain(check_matvec(device, sizes, rows_of), many, attention):
            rows.append({"what": what, "error": worst, "bound": bound, "bits_differ": differ})
            assert worst <= bound, rows[-1]
    finally:
        torch.use_deterministic_algorithms(False)
    return rows


# --- peers ---------------------------------------------------------------------------------------------------------


class MethodLinear(nn.Module):
    """A product as gpt-fast does it: dense; int8 by channel, widened in the product; int4 by PyTorch's own kernel."""

    def __init__(self, n_in: int, n_out: int, format: str, device: str) -> None:
        super().__init__()
        self.format, self.n_out = format, n_out
        weight = torch.randn(n_out, n_in, device=device, dtype=torch.bfloat16) * 0.02
        if format == "int8":
            weight = torch.randint(-127, 128, (n_out, n_in), device=device, dtype=torch.int8)
            self.register_buffer("scales", torch.full((n_out,), 0.02 / 74, device=device, dtype=torch.bfloat16))
        elif format == "int4":
            codes = torch.randint(0, 256, (n_out, n_in // 2), device=device, dtype=torch.uint8)
            weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
            pair = torch.full((n_in // 32, n_out, 2), 0.004, device=device, dtype=torch.bfloat16)
            self.register_buffer("pair", pair)
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.format == "int8":
            return functional.linear(x, self.weight.to(x.dtype)) * self.scales
        if self.format == "int4":
            y = torch.ops.aten._weight_int4pack_mm(x.reshape(-1, x.shape[-1]), self.weight, 32, self.pair)
            return y.view(*x.shape[:-1], self.n_out)
        return functional.linear(x, self.weight)


class Method(nn.Module):
    """A Llama in plain PyTorch with static keys and values: what gpt-fast compiles."""

    def __init__(self, config: Any, format: str, device: str, length: int) -> None:
        super().__init__()
        self.config = config
        dim, q, kv = config.embd, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.sizes = (q, kv, kv)
        self.embedding = nn.Embedding(config.vocab_size, dim, device=device, dtype=torch.bfloat16)
        make = [(dim, q + 2 * kv), (q, dim), (dim, 2 * config.inner), (config.inner, dim)]
        self.layers = nn.ModuleList(
            nn.ModuleList(MethodLinear(*size, format, device) for size in make) for _ in range(config.n_layers)
        )
        self.head = MethodLinear(dim, config.vocab_size, format, device)
        self.norm = nn.Parameter(torch.ones(dim, device=device, dtype=torch.bfloat16), requires_grad=False)
        shape = (config.n_layers, 2, 1, config.n_kv_heads, length, config.head_dim)
        self.register_buffer("kept", torch.zeros(shape, device=device, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tril(torch.ones(length, length, dtype=torch.bool, device=device)))
        angles = torch.outer(torch.arange(length), torch.tensor(config.attention[0].rope.frequencies))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles).to(device))

    def rotated(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[at][None, :, None]).flatten(3).to(x.dtype)

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cfg = self.config
        x = self.embedding(ids)  # [1, tokens, dim]
        for number, (qkv, out, open_, close) in enumerate(self.layers):
            y = functional.rms_norm(x, x.shape[-1:], self.norm, cfg.eps)
            q, k, v = (part.view(1, len(at), -1, cfg.head_dim) for part in qkv(y).split(self.sizes, dim=-1))
            q, k = self.rotated(q, at), self.rotated(k, at)
            for part, value in enumerate((k, v)):
                self.kept[number, part, :, :, at] = value.transpose(1, 2)
            y = functional.scaled_dot_product_attention(
                q.transpose(1, 2), *self.kept[number], attn_mask=self.mask[at][None, None],
                enable_gqa=cfg.n_heads != cfg.n_kv_heads,
            )  # fmt: skip
            x = x + out(y.transpose(1, 2).flatten(2))
            gate, up = open_(functional.rms_norm(x, x.shape[-1:], self.norm, cfg.eps)).chunk(2, dim=-1)
            x = x + close(functional.silu(gate) * up)
        return self.head(functional.rms_norm(x, x.shape[-1:], self.norm, cfg.eps)[:, -1:])


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
        if "gb_s" in row:
            row["share"] = row["gb_s"] / self.copy
        self.rows.append({"section": section, **row})
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{section:12} " + "  ".join(shown), flush=True)

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
        need = sum(torch.Size(p.shape).numel() for p in sizes) * bits / 8 * 1.1 + 4e9
        if need <= torch.cuda.mem_get_info()[0]:
            return True
        self.add(section, model=name, dtype=format, skipped=f"{need / 1e9:.0f} GB are not free")
        return False


def copy_section(r: Report) -> None:
    """What a large copy reaches, and a large sum."""
    n = 1 << (20 if r.tiny else 32)
    source = torch.ones(n // 4, device=r.device)
    target = torch.empty_like(source)
    r.copy = 2 * n / seconds(lambda: target.copy_(source), r.device) / 1e9
    r.add("copy", gb_s_copied=r.copy, gb_s_summed=n / seconds(source.sum, r.device) / 1e9)


def checks_section(r: Report) -> None:
    """The kernels against float64."""
    rows = checks(r.device, r.tiny)
    if "skipped" in rows[0]:
        return r.add("checks", **rows[0])
    worst = max(rows, key=lambda row: row["error"] / row["bound"])
    bits = [row["what"] for row in rows if row["bits_differ"]]
    found = {"worst": worst["what"], "error": worst["error"], "rows_change_bits": ", ".join(bits) or "none"}
    return r.add("checks", passed=len(rows), **found)


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
            read = bytes_read(b.model, b.weights)
            row = {"model": name, "dtype": format, "tok_s": speed, "gb_s": speed * read / 1e9}
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
        b = Bench(name, "bf16", r.device, weights=random_weights(model_for(config_of(name)), "bf16", 0, r.device, live))
        b.decode(1, n_new=8)
        plain, want = b.decode(1, n_new=r.n_new)
        draft = model_for(small)
        draft.config.context = b.model.config.context
        own = house.TorchRunner(draft, b.weights, n_pages=b.runner.n_pages, kv_dtype="bf16", device=r.device)
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
        r.add("large", model=name, dtype="int4", tok_s=speed, gb_s=speed * bytes_read(b.model, b.weights) / 1e9)


def peers_section(r: Report) -> None:
    """The same models by the peers' ways."""
    for name, format in itertools.product(r.models, QUANTIZED):
        if config_of(name)["model_type"] == "gpt2" or (r.tiny and format == "int4"):
            continue
        if r.has("peers", 60, f"method {name} {format}") and r.fits("peers", name, format):
            attempt(r, "method", name, format, lambda n=name, f=format: method_decode(n, f, r.device, r.n_new))
            torch.compiler.reset()
    for name in r.models:
        if r.has("peers", 60, f"transformers {name} bf16") and r.fits("peers", name, "bf16"):
            attempt(r, "transformers", name, "bf16", lambda n=name: transformers_decode(n, r.device, r.n_new))


def attempt(r: Report, peer: str, name: str, format: str, function: Callable[[], float]) -> None:
    """A peer's figure, or why there is none: other people's code may not run everywhere."""
    try:
        r.add("peers", peer=peer, model=name, dtype=format, tok_s=function())
    except (ImportError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        r.add("peers", peer=peer, model=name, dtype=format, failed=str(error).splitlines()[0][:200])


def tune(r: Report) -> None:
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

            run()
            call: Callable[[], Any] = run
            if r.device.startswith("cuda"):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                call = graph.replay
            found.append((sum(w.nbytes for w in matrices) / seconds(call, r.device) / 1e9, layout))
        for speed, layout in sorted(found, reverse=True)[:3]:
            r.add("tune", dtype=format, layout=layout, gb_s=speed)


SECTIONS: dict[str, Callable[[Report], None]] = {
    "checks": checks_section,
    "decode": decode_section,
    "batch": batch_section,
    "speculation": speculation_section,
    "large": large_section,
    "peers": peers_section,
}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is asked for -> the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that a test can wait for")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    r = Report(args)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    on_cuda = args.device.startswith("cuda")
    r.add("device", name=torch.cuda.get_device_name() if on_cuda else args.device, **versions)
    copy_section(r)
    for section in [tune] if args.tune else [SECTIONS[name] for name in args.sections]:
        section(r)
        if args.json:
            args.json.write_text(json.dumps(r.rows, indent=1))
    return r.rows


if __name__ == "__main__":
    main()
