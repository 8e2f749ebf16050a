"""Triton kernels, above all for steps of few rows, where the weights' bytes are what costs.

Matrices are stored in words of 32 bits, four of which a thread loads at once: element i of word j in such a chunk of 16
bytes is input 4i + j, so that the inputs are read four at a time too, and nothing crosses a thread. A program computes
BLOCK_N outputs; its threads lie along the inputs, in an order that the sizes alone decide. No sum depends on the other
rows, nor on how many there are. With TRITON_INTERPRET=1 all of it runs without a GPU.
"""

# Triton's language is Python's in form alone: tuples grow, and there are no types.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pronghorn.ops import PAGE

MOST_ROWS = 8
"""Of a step that runs by `matvec`: beyond, tensor cores are faster."""

SPLITS = 8
"""Parts into which a sequence's pages are divided, to be attended to side by side."""

LAYOUTS: dict[str, tuple[int, int, int]] = {
    # format: outputs of a program, words of a step, warps. bench/gpu.py --sections tune tries others.
    "f32": (4, 512, 4),
    "f16": (4, 512, 4),
    "bf16": (4, 512, 4),
    "int8": (4, 512, 4),
    "int4": (4, 256, 2),
}


@triton.jit
def field(w, i: tl.constexpr, FORMAT: tl.constexpr, ZERO: tl.constexpr):
    """Element i of each word as float32: codes come out less ZERO, times what `unit` says."""
    if FORMAT == "f32":
        return w.to(tl.float32, bitcast=True)
    elif FORMAT == "bf16":
        return (w << 16 if i == 0 else w & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif FORMAT == "f16":
        return (w >> (16 * i)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # Bits below the 23rd of 2^23 are a whole number: no conversion, and a shift only for the upper half.
        bits: tl.constexpr = 4 if FORMAT == "int4" else 8
        half: tl.constexpr = 16 // bits
        place: tl.constexpr = bits * (i % half)
        code = (w >> 16 if i >= half else w) & (((1 << bits) - 1) << place)
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO * (1 << place))


@triton.jit
def unit(i: tl.constexpr, FORMAT: tl.constexpr):
    """What a code has to be multiplied by; a power of two, so the input can be instead."""
    if FORMAT == "int4":
        return 1.0 / (1 << (4 * (i % 4)))
    elif FORMAT == "int8":
        return 1.0 / (1 << (8 * (i % 2)))
    else:
        return 1.0


@triton.jit
def half_of(pair, i: tl.constexpr):
    """The lower or upper f16 of a word, as float32."""
    return (pair >> (16 * i)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """One of ops.ACTIVATIONS, or none."""
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_new":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-z))  # x/2 (1 + tanh(z/2))
    elif NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def products(acc, words, scales, n, word, inside, xs, total, n_words, n_groups,
             FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ZERO: tl.constexpr,
             ROWS: tl.constexpr, FIELDS: tl.constexpr):  # fmt: skip
    """Adds a block's products to each row's sums; `xs` are the inputs by row and field, `total` their sums."""
    w = tl.load(words + n[:, None].to(tl.int64) * n_words + word[None, :], mask=inside, other=0)
    w = w.to(tl.uint32, bitcast=True)
    parts = (tl.zeros_like(acc[0]),) * ROWS
    for i in tl.static_range(FIELDS):
        f = field(w, i, FORMAT, ZERO)
        new = ()
        for m in tl.static_range(ROWS):
            new = new + (parts[m] + f * xs[m * FIELDS + i][None, :],)
        parts = new
    if GROUP > 0:
        at = n[:, None].to(tl.int64) * n_groups + (word * FIELDS // GROUP)[None, :]
        s = tl.load(scales + at, mask=inside, other=0)
        scale = half_of(s, 0) if MINIMA else s.to(tl.float32)
    new = ()
    for m in tl.static_range(ROWS):
        part = parts[m] * scale if GROUP > 0 else parts[m]
        if MINIMA:
            part += half_of(s, 1) * total[m][None, :]
        new = new + (acc[m] + part,)
    return new


@triton.jit(do_not_specialize=["rows"])
def matvec_kernel(x, words, scales, norm_weight, norm_bias, bias, residual, out,
                  rows, n_out, n_in, n_words, n_groups, x_stride, residual_stride, eps,
                  NORM: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
                  FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ZERO: tl.constexpr,
                  FIELDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
                  BLOCK_X: tl.constexpr):  # fmt: skip
    """Out = activation(norm(x) @ w.T + bias) + residual, or activation(gate) * up of a matrix [gate; up]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < n_out
    first = tl.program_id(1) * ROWS  # of the rows, of which the last may stand for some beyond
    lanes = tl.arange(0, BLOCK_W)
    means, roots, squares = (), (), ()
    for m in tl.static_range(ROWS):
        if NORM == "layer":
            column = tl.arange(0, BLOCK_X)
            row = tl.load(x + tl.minimum(first + m, rows - 1) * x_stride + column, mask=column < n_in, other=0.0)
            mean = tl.sum(row, axis=0) / n_in
            centred = tl.where(column < n_in, row - mean, 0.0)
            means = means + (mean,)
            roots = roots + (tl.rsqrt(tl.sum(centred * centred, axis=0) / n_in + eps),)
        squares = squares + (tl.zeros([BLOCK_W], tl.float32),)
    acc = (tl.zeros([BLOCK_N, BLOCK_W], tl.float32),) * ROWS
    other = (tl.zeros([BLOCK_N, BLOCK_W], tl.float32),) * ROWS
    for start in range(0, n_words, BLOCK_W):
        word = start + lanes
        known = word < n_words
        xs, total, new_squares = (), (), ()
        for m in tl.static_range(ROWS):
            whole = tl.zeros([BLOCK_W], tl.float32)
            square = squares[m]
            for i in tl.static_range(FIELDS):
                k = word // 4 * (4 * FIELDS) + 4 * i + word % 4
                v = tl.load(x + tl.minimum(first + m, rows - 1) * x_stride + k, mask=known, other=0.0)
                if NORM == "rms":
                    square += v * v
                if NORM == "layer":
                    v = (v - means[m]) * roots[m]
                if NORM != "":
                    v = v * tl.load(norm_weight + k, mask=known, other=0.0)
                if NORM == "layer" and norm_bias is not None:
                    v = v + tl.load(norm_bias + k, mask=known, other=0.0)
                if MINIMA:
                    whole += v
                xs = xs + (v * unit(i, FORMAT),)
            total = total + (whole,)
            new_squares = new_squares + (square,)
        squares = new_squares
        inside = there[:, None] & known[None, :]
        acc = products(acc, words, scales, n, word, inside, xs, total, n_words, n_groups,
                       FORMAT, GROUP, MINIMA, ZERO, ROWS, FIELDS)  # fmt: skip
        if GATE:
            other = products(other, words, scales, n + n_out, word, inside, xs, total, n_words, n_groups,
                             FORMAT, GROUP, MINIMA, ZERO, ROWS, FIELDS)  # fmt: skip
    for m in tl.static_range(ROWS):
        y, up = tl.sum(acc[m], axis=1), tl.sum(other[m], axis=1)
        if FORMAT == "int8" and GROUP == 0:
            y *= tl.load(scales + n, mask=there, other=0.0)
            if GATE:
                up *= tl.load(scales + n_out + n, mask=there, other=0.0)
        if NORM == "rms":
            root = tl.rsqrt(tl.sum(squares[m], axis=0) / n_in + eps)
            y, up = y * root, up * root
        if bias is not None:
            y += tl.load(bias + n, mask=there, other=0.0)
            if GATE:
                up += tl.load(bias + n_out + n, mask=there, other=0.0)
        y = activated(y, ACTIVATION)
        if GATE:
            y = y * up
        if residual is not None:
            y += tl.load(residual + tl.minimum(first + m, rows - 1) * residual_stride + n, mask=there, other=0.0)
        tl.store(out + (first + m) * n_out + n, y, mask=there)


@triton.jit
def widened(code, scales, at, inside, MINIMA: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr):
    """Codes as weights; without groups their scale is left to the end."""
    w = code.to(tl.float32) - ZERO
    if GROUP > 0:
        s = tl.load(scales + at, mask=inside, other=0)
        w = w * half_of(s, 0) + half_of(s, 1) if MINIMA else w * s.to(tl.float32)
    return w


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(x, codes, scales, out, rows, n_out, n_bytes, n_groups,
                  FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ZERO: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Out = x @ w.T by tensor cores.

    `x` is bf16, or f32 for the interpreter, in the order of the codes' bytes: for int4 those of the low nibbles, then
    those of the high ones.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    each: tl.constexpr = 2 if FORMAT == "int4" else 1
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n_bytes, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        known = k < n_bytes
        inside = (n < n_out)[:, None] & known[None, :]
        here = (m < rows)[:, None] & known[None, :]
        byte = tl.load(codes + n[:, None].to(tl.int64) * n_bytes + k[None, :], mask=inside, other=0)
        at = n[:, None].to(tl.int64) * n_groups + (k * each // GROUP if GROUP > 0 else k)[None, :]
        part = x + m[:, None].to(tl.int64) * (each * n_bytes) + k[None, :]
        low = widened(byte & 15 if each == 2 else byte, scales, at, inside, MINIMA, GROUP, ZERO)
        acc = tl.dot(tl.load(part, mask=here, other=0.0), tl.trans(low.to(x.dtype.element_ty)), acc)
        if each == 2:
            high = widened(byte >> 4, scales, at, inside, MINIMA, GROUP, ZERO)
            high = high.to(x.dtype.element_ty)
            acc = tl.dot(tl.load(part + n_bytes, mask=here, other=0.0), tl.trans(high), acc)
    if GROUP == 0:
        acc *= tl.load(scales + n, mask=n < n_out, other=0.0)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * n_out + n[None, :], acc, mask=(m < rows)[:, None] & (n < n_out)[None, :])


@triton.jit(do_not_specialize=["layer", "n_layers"])
def store_kernel(qkv, cos, sin, positions, table, q_out, pages, scales,
                 row_stride, table_width, layer, n_layers, n_slots, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
                 HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 PAGE: tl.constexpr, INT8: tl.constexpr):  # fmt: skip
    """Turns a head of q into `q_out`, or of k into its page; v goes into its page as it is."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < DIM
    source = qkv + row.to(tl.int64) * row_stride + head * DIM
    y = tl.load(source + d, mask=inside, other=0.0)
    if PAIRS > 0:
        if INTERLEAVED:
            mate, pair, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            mate, pair, sign = tl.where(d < PAIRS, d + PAIRS, d - PAIRS), d % PAIRS, tl.where(d < PAIRS, -1.0, 1.0)
        turns = d < tl.where(head < HEADS + KV_HEADS, 2 * PAIRS, 0)
        c = tl.load(cos + row * PAIRS + pair, mask=turns, other=1.0)
        s = tl.load(sin + row * PAIRS + pair, mask=turns, other=0.0)
        y = y * c + sign * tl.load(source + mate, mask=turns, other=0.0) * s
    if head < HEADS:
        tl.store(q_out + (row * HEADS + head) * DIM + d, y, mask=inside)
    else:
        position = tl.load(positions + row)
        page = tl.load(table + row * table_width + position // PAGE)
        part = (head - HEADS) // KV_HEADS
        slot = (part * n_layers + layer).to(tl.int64) * n_slots + page * PAGE + position % PAGE
        kept = slot * KV_HEADS + (head - HEADS) % KV_HEADS
        if INT8:
            largest = tl.max(tl.abs(y), axis=0)
            tl.store(scales + kept, largest / 127)
            y = y * tl.where(largest > 0, 127 / largest, 0.0)
            y = (y + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
        tl.store(pages + kept * DIM + d, y.to(pages.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "n_layers", "window"])
def attend_kernel(q, positions, table, pages, scales, best, weight, part, table_width, layer, n_layers, n_slots,
                  scale, window, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  PAGE: tl.constexpr, SPLITS: tl.constexpr, INT8: tl.constexpr):  # fmt: skip
    """A head's attention to a part of its pages -> (maximum, sum, output) of the part."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
    inside = d < DIM
    position = tl.load(positions + row)
    first = tl.maximum(position + 1 - window, 0) // PAGE
    count = tl.cdiv(position // PAGE + 1 - first, SPLITS)
    query = tl.load(q + (row * HEADS + head) * DIM + d, mask=inside, other=0.0) * scale
    kv_head = head // (HEADS // KV_HEADS)
    top = -float("inf")
    total = 0.0
    y = tl.zeros([BLOCK_D], tl.float32)
    for index in range(first + split * count, tl.minimum(first + (split + 1) * count, position // PAGE + 1)):
        at = index * PAGE + s
        seen = (at <= position) & (at > position - window)
        page = tl.load(table + row * table_width + index)
        slot = (layer.to(tl.int64) * n_slots + page * PAGE + s) * KV_HEADS + kv_head
        values = slot + n_layers.to(tl.int64) * n_slots * KV_HEADS
        both = seen[:, None] & inside[None, :]
        k = tl.load(pages + slot[:, None] * DIM + d[None, :], mask=both, other=0.0).to(tl.float32)
        v = tl.load(pages + values[:, None] * DIM + d[None, :], mask=both, other=0.0).to(tl.float32)
        scores = tl.sum(query[None, :] * k, axis=1)
        if INT8:
            scores *= tl.load(scales + slot, mask=seen, other=0.0)
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, axis=0))
        shrink = tl.exp(top - new)
        p = tl.exp(scores - new)
        total = total * shrink + tl.sum(p, axis=0)
        if INT8:
            p *= tl.load(scales + values, mask=seen, other=0.0)
        y = y * shrink + tl.sum(p[:, None] * v, axis=0)
        top = new
    at = (row * HEADS + head) * SPLITS + split
    tl.store(best + at, top)
    tl.store(weight + at, total)
    tl.store(part + at * DIM + d, y, mask=inside)


@triton.jit
def merge_kernel(best, weight, part, out, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of a head, in ascending order, into one."""
    at = tl.program_id(0).to(tl.int64) * SPLITS
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    tops = tl.load(best + at + s)
    shares = tl.exp(tops - tl.max(tops, axis=0))
    total = tl.sum(shares * tl.load(weight + at + s), axis=0)
    y = tl.load(part + (at + s)[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    y = tl.sum(shares[:, None] * y, axis=0) / total
    tl.store(out + tl.program_id(0).to(tl.int64) * DIM + d, y, mask=d < DIM)


@triton.jit
def race_kernel(logits, inverse, seeds, positions, best, winner, size, BLOCK: tl.constexpr):
    """The best of a block of tokens by logit / temperature + Gumbel noise, in float64 as native/sampling.cpp has it.

    `inverse` is 1 / temperature, or 0 for greedy. The winner is -1 where a logit is NaN or +inf.
    """
    row, block, n_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    inside = ids < size
    z = tl.load(logits + row.to(tl.int64) * size + ids, mask=inside, other=-float("inf"))
    bad = tl.sum(tl.where(z < float("inf"), 0, 1), axis=0)
    scale = tl.load(inverse + row)
    score = z.to(tl.float64)
    if scale > 0:
        zero = tl.zeros_like(ids)
        words = tl.philox(tl.load(seeds + row), ids // 4, zero + tl.load(positions + row).to(tl.int32), zero, zero)
        low = tl.where(ids % 2 == 0, words[0], words[1])
        word = tl.where(ids % 4 < 2, low, tl.where(ids % 2 == 0, words[2], words[3]))
        u = (word.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * 2.3283064365386963e-10
        score = score * scale - tl.log(-tl.log(u))
    score = tl.where(inside, score, -float("inf"))
    tl.store(best + row * n_blocks + block, tl.max(score, axis=0))
    index = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(winner + row * n_blocks + block, tl.where(bad > 0, -1, block * BLOCK + index))


@triton.jit
def finish_kernel(best, winner, out, n_blocks, BLOCK: tl.constexpr):
    """The winner of all blocks; of equals the lowest id; -1 where a logit is NaN or +inf, -2 where none is left."""
    row = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    scores = tl.load(best + row * n_blocks + b, mask=b < n_blocks, other=-float("inf"))
    index = tl.argmax(scores, axis=0, tie_break_left=True)
    bad = tl.min(tl.load(winner + row * n_blocks + b, mask=b < n_blocks, other=0), axis=0) < 0
    none = tl.max(scores, axis=0) == -float("inf")
    token = tl.load(winner + row * n_blocks + index)
    tl.store(out + row, tl.where(bad, -1, tl.where(none, -2, token)))


def matvec(
    x: Any, w: Any, norm: Any = None, bias: Any = None, activation: str | None = None, gate: bool = False,
    residual: Any = None,
) -> torch.Tensor:  # fmt: skip
    """A product of at most MOST_ROWS rows: see ops.gpu.Linear. `norm`: (kind, eps, weight, bias or None)."""
    kind, eps, norm_weight, norm_bias = norm or ("", 0.0, None, None)
    rows, (n_out, n_words) = len(x), w.words.shape
    n_out //= 2 if gate else 1
    block_n, block_w, warps = LAYOUTS[w.format]
    while block_w >= 2 * n_words and warps > 1:  # short rows: fewer lanes, not idle ones
        block_w, warps = block_w // 2, warps // 2
    together = min(triton.next_power_of_2(rows), 4)
    block_n = min(block_n, max(2 * block_n // (together * (1 + gate)), 1))  # what the registers hold
    out = torch.empty(-(-rows // together) * together, n_out, device=x.device)
    matvec_kernel[triton.cdiv(n_out, block_n), len(out) // together](
        x, w.words, w.scales, norm_weight, norm_bias, bias, residual, out,
        rows, n_out, w.n_in, n_words, 0 if w.scales is None else w.scales.shape[1],
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        NORM=kind, ACTIVATION=activation or "", GATE=gate, FORMAT=w.format, GROUP=w.group, MINIMA=w.minima, ZERO=w.zero,
        FIELDS=w.n_in // n_words, ROWS=together, BLOCK_N=block_n, BLOCK_W=block_w,
        BLOCK_X=triton.next_power_of_2(w.n_in) if kind == "layer" else 1, num_warps=warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out[:rows]


def matmul(x: Any, w: Any) -> torch.Tensor:
    """Gives x @ w.T of any number of rows and a quantized matrix; `x` in the words' order (ops.gpu.reordered)."""
    (rows, n_in), n_out = x.shape, len(w.words)
    each = 2 if w.format == "int4" else 1
    x = x.view(rows, -1, each).transpose(1, 2).to(torch.bfloat16 if x.is_cuda else torch.float32).contiguous()
    out = torch.empty(rows, n_out, device=x.device)
    block_m, block_n = min(max(triton.next_power_of_2(rows), 16), 128), 32 if rows <= 64 else 128
    matmul_kernel[triton.cdiv(n_out, block_n), triton.cdiv(rows, block_m)](
        x, w.words.view(torch.uint8), w.scales, out, rows, n_out, n_in // each, w.scales.shape[1],
        FORMAT=w.format, GROUP=w.group, MINIMA=w.minima, ZERO=w.zero,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64 // each, num_warps=4 if block_m <= 64 else 8,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def store(qkv: Any, at: Any, table: Any, spec: Any, turns: Any, pages: Any, scales: Any) -> torch.Tensor:
    """Turns q and k of `[tokens, q and k and v]`, and puts k and v into their pages -> q."""
    q = torch.empty(len(qkv), spec.n_heads * spec.head_dim, device=qkv.device)
    cos, sin = turns or (None, None)
    store_kernel[len(qkv), spec.n_heads + 2 * spec.n_kv_heads](
        qkv, cos, sin, at, table, q, pages, scales, qkv.stride(0), table.stride(0), spec.layer, *pages.shape[1:3],
        PAIRS=0 if cos is None else cos.shape[1], INTERLEAVED=spec.rope is not None and spec.rope.interleaved,
        num_warps=1, enable_fp_fusion=True, **shape_of(spec, scales),
    )  # fmt: skip
    return q


def attend(q: Any, at: Any, table: Any, spec: Any, pages: Any, scales: Any) -> torch.Tensor:
    """Each row's attention to its sequence up to its own position -> [tokens, n_heads * head_dim]."""
    n = len(q) * spec.n_heads
    best, weight = torch.empty(2, n, SPLITS, device=q.device)
    part = torch.empty(n, SPLITS, spec.head_dim, device=q.device)
    window = 2**31 - 1 if spec.window is None else spec.window
    shape = shape_of(spec, scales)
    attend_kernel[len(q), spec.n_heads, SPLITS](
        q, at, table, pages, scales, best, weight, part, table.stride(0), spec.layer, *pages.shape[1:3],
        spec.scale, window, SPLITS=SPLITS, num_warps=4, enable_fp_fusion=True, **shape,
    )  # fmt: skip
    out = torch.empty_like(q)
    sizes = {name: shape[name] for name in ("DIM", "BLOCK_D")}
    merge_kernel[(n,)](best, weight, part, out, SPLITS=SPLITS, num_warps=1, enable_fp_fusion=True, **sizes)
    return out


def shape_of(spec: Any, scales: Any) -> dict[str, int]:
    """What the kernels of attention are compiled for."""
    heads, dim = {"HEADS": spec.n_heads, "KV_HEADS": spec.n_kv_heads}, spec.head_dim
    return {**heads, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "PAGE": PAGE, "INT8": scales is not None}


def race(logits: Any, inverses: list[float], seeds: list[int], positions: list[int]) -> list[int]:
    """The arg max of each row's logits times `inverses` (0: of the logits) plus Gumbel noise (or see finish_kernel)."""
    logits = logits.contiguous()  # ranks' columns may have been cut from wider rows
    rows, size = logits.shape
    block = 1024
    n_blocks = triton.cdiv(size, block)
    numbers = np.array([seeds, positions, np.array(inverses).view(np.int64)])
    given = torch.from_numpy(numbers).to(logits.device)
    best = torch.empty(rows, n_blocks, dtype=torch.float64, device=logits.device)
    winner = torch.empty(rows, n_blocks, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    inverse = given[2].view(torch.float64)
    exactly = {"enable_fp_fusion": False}  # as native/sampling.cpp rounds
    race_kernel[rows, n_blocks](logits, inverse, given[0], given[1], best, winner, size, BLOCK=block, **exactly)
    finish_kernel[(rows,)](best, winner, out, n_blocks, BLOCK=triton.next_power_of_2(n_blocks), **exactly)
    found: list[int] = out.tolist()
    return found
