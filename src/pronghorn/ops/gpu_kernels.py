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

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pronghorn.ops import PAGE

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an old Triton
    gdc_launch_dependents = gdc_wait = None

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

MAGIC = {"int8": 0x4B000000, "int4": 0x3F800000}
"""2^23 and 1: the bits before those of a code that is read as a float."""

OVERLAP = True
"""Whether a kernel may begin while the one before it ends (programmatic dependent launch), where the device can."""

AHEAD = 2048
"""Words of each of its outputs that a program asks for while the kernel before it ends."""


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Lets the next kernel begin, and waits for what the one before has written; every kernel calls it or the like."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def ask_for(words, n, n_words, AHEAD: tl.constexpr, BLOCK_W: tl.constexpr):
    """Has the beginnings of rows brought into the cache, 32 bytes a thread and time."""
    lanes = tl.arange(0, BLOCK_W) * 8
    for start in range(0, tl.minimum(n_words, AHEAD), BLOCK_W * 8):
        word = tl.minimum(start + lanes, n_words - 1)  # an address that is not there must not be asked for
        at = (words + n[:, None].to(tl.int64) * n_words + word[None, :]).to(tl.int64)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def field(w, i: tl.constexpr, magic, FORMAT: tl.constexpr, ZERO: tl.constexpr):
    """Element i of each word as float32; of int4, 1 + code / `unit`, of which a group's sum is corrected at its end.

    A code is put below the leading bits of a float, `magic`, so that there is no conversion. These come as an argument,
    as `(w & mask) | magic` is one instruction only where one of both is in a register.
    """
    if FORMAT == "f32":
        return w.to(tl.float32, bitcast=True)
    elif FORMAT == "bf16":
        return (w << 16 if i == 0 else w & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif FORMAT == "f16":
        return (w >> (16 * i)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "int4":  # below the 23rd bit of 1.0, or 4 bits lower, which spares half of the shifts
        up: tl.constexpr = (19 if i % 2 == 0 else 15) - 4 * i
        moved = w << up if up > 0 else w >> -up
        return (moved & (0x00780000 if i % 2 == 0 else 0x00078000) | magic).to(tl.float32, bitcast=True)
    else:  # the bits below the 23rd of 2^23 are a whole number
        place: tl.constexpr = 8 * (i % 2)
        code = (w >> 16 if i >= 2 else w) & (255 << place)
        return (code | magic).to(tl.float32, bitcast=True) - (8388608.0 + ZERO * (1 << place))


@triton.jit
def unit(i: tl.constexpr, FORMAT: tl.constexpr):
    """What `field` has to be multiplied by; a power of two, so the input can be instead."""
    if FORMAT == "int4":
        return 16.0 if i % 2 == 0 else 256.0
    elif FORMAT == "int8":
        return 1.0 / (1 << (8 * (i % 2)))
    else:
        return 1.0


@triton.jit
def by_chunk(x, ROWS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Sums of four words, which one thread has."""
    return tl.sum(tl.reshape(x, [ROWS, BLOCK_W // 4, 4]), axis=2)


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
def products(acc, words, scales, n, start, xs, total, offset, magic, n_words, n_groups, group_bits,
             FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ZERO: tl.constexpr,
             ROWS: tl.constexpr, FIELDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Adds a block's products to each row's sums. `xs`: the inputs by row and field; `total`: their sums by chunk.

    `offset`: what the sums of int4 have too much, by chunk.
    """
    word = start + tl.arange(0, BLOCK_W)
    w = tl.load(words + n[:, None].to(tl.int64) * n_words + word[None, :], mask=(word < n_words)[None, :], other=0)
    w = w.to(tl.uint32, bitcast=True)
    parts = (tl.zeros([BLOCK_N, BLOCK_W], tl.float32),) * ROWS
    for i in tl.static_range(FIELDS):
        f = field(w, i, magic, FORMAT, ZERO)
        new = ()
        for m in tl.static_range(ROWS):
            new = new + (parts[m] + f * xs[m * FIELDS + i][None, :],)
        parts = new
    if GROUP > 0:
        # `group_bits` is not known beforehand, lest Triton load four to a thread and move them to where they belong.
        chunk = start // 4 + tl.arange(0, BLOCK_W // 4)
        at = n[:, None].to(tl.int64) * n_groups + (chunk >> group_bits)[None, :]
        s = tl.load(scales + at, mask=(chunk * 4 < n_words)[None, :], other=0)
        scale = half_of(s, 0) if MINIMA else s.to(tl.float32)
    new = ()
    for m in tl.static_range(ROWS):
        part = parts[m]
        if GROUP > 0:
            part = by_chunk(part, BLOCK_N, BLOCK_W)
            if FORMAT == "int4":
                part -= offset[m]
            part *= scale
            if MINIMA:
                part += half_of(s, 1) * total[m]
        new = new + (acc[m] + part,)
    return new


@triton.jit(do_not_specialize=["rows", "magic", "group_bits"])
def matvec_kernel(x, words, scales, norm_weight, norm_bias, bias, residual, out,
                  rows, n_out, n_in, n_words, n_groups, x_stride, residual_stride, magic, group_bits, eps,
                  NORM: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
                  FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ZERO: tl.constexpr,
                  FIELDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
                  BLOCK_X: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Out = activation(norm(x) @ w.T + bias) + residual, or activation(gate) * up of a matrix [gate; up]."""
    n_words = n_words // 4 * 4  # as it is, which tells Triton that each row may be loaded 16 bytes at once
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < n_out
    near = tl.minimum(n, n_out - 1)
    if OVERLAP:  # weights are nobody's output: they come while the kernel before ends
        gdc_launch_dependents()
        if AHEAD > 0:
            ask_for(words, near, n_words, AHEAD, BLOCK_W // 8)
            if GATE:
                ask_for(words, near + n_out, n_words, AHEAD, BLOCK_W // 8)
        gdc_wait()
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
    wide: tl.constexpr = BLOCK_W // 4 if GROUP > 0 else BLOCK_W
    magic = magic.to(tl.uint32)
    acc = (tl.zeros([BLOCK_N, wide], tl.float32),) * ROWS
    other = (tl.zeros([BLOCK_N, wide], tl.float32),) * ROWS
    for start in range(0, n_words, BLOCK_W):
        word = start + lanes
        known = word < n_words
        xs, total, offset, new_squares = (), (), (), ()
        for m in tl.static_range(ROWS):
            even, odd = tl.zeros([BLOCK_W], tl.float32), tl.zeros([BLOCK_W], tl.float32)
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
                if FORMAT == "int4":
                    if i % 2 == 0:
                        even += v
                    else:
                        odd += v
                xs = xs + (v * unit(i, FORMAT),)
            if FORMAT == "int4":
                even, odd = by_chunk(even, 1, BLOCK_W), by_chunk(odd, 1, BLOCK_W)
            total = total + (even + odd,)
            offset = offset + ((16.0 + ZERO) * even + (256.0 + ZERO) * odd,)
            new_squares = new_squares + (square,)
        squares = new_squares
        acc = products(acc, words, scales, near, start, xs, total, offset, magic, n_words, n_groups, group_bits,
                       FORMAT, GROUP, MINIMA, ZERO, ROWS, FIELDS, BLOCK_N, BLOCK_W)  # fmt: skip
        if GATE:
            other = products(other, words, scales, near + n_out, start, xs, total, offset, magic, n_words, n_groups,
                             group_bits, FORMAT, GROUP, MINIMA, ZERO, ROWS, FIELDS, BLOCK_N, BLOCK_W)  # fmt: skip
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
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    """Out = x @ w.T by tensor cores.

    `x` is bf16, or f32 for the interpreter, in the order of the codes' bytes: for int4 those of the low nibbles, then
    those of the high ones.
    """
    begin(OVERLAP)
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


@triton.jit
def embed_kernel(ids, positions, words, scales, places, out, n_in, n_words, n_groups,
                 FORMAT: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr, ZERO: tl.constexpr,
                 FIELDS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A row of the table for each token, and the row of its position, if these are learned."""
    begin(OVERLAP)
    row, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < n_in
    token = tl.load(ids + row).to(tl.int64)
    w = tl.load(words + token * n_words + k // (4 * FIELDS) * 4 + k % 4, mask=inside, other=0)
    w = w.to(tl.uint32, bitcast=True)
    i = (k // 4 % FIELDS).to(tl.uint32)
    if FORMAT == "f32":
        y = w.to(tl.float32, bitcast=True)
    elif FORMAT == "bf16":
        y = (w >> (16 * i) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "f16":
        y = (w >> (16 * i)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        code = w >> (8 * i) & 255 if FORMAT == "int8" else w >> (4 * i) & 15
        y = code.to(tl.float32) - ZERO
        s = tl.load(scales + token * n_groups + (k // GROUP if GROUP > 0 else 0 * k), mask=inside, other=0)
        y = y * half_of(s, 0) + half_of(s, 1) if MINIMA else y * s.to(tl.float32)
    if places is not None:
        y += tl.load(places + tl.load(positions + row).to(tl.int64) * n_in + k, mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64) * n_in + k, y, mask=inside)


@triton.jit
def turned(source, d, inside, cos, sin, position, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A head's values, turned as its position asks."""
    y = tl.load(source + d, mask=inside, other=0.0)
    if PAIRS > 0:
        if INTERLEAVED:
            mate, pair, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            mate, pair, sign = tl.where(d < PAIRS, d + PAIRS, d - PAIRS), d % PAIRS, tl.where(d < PAIRS, -1.0, 1.0)
        turns = d < 2 * PAIRS
        c = tl.load(cos + position * PAIRS + pair, mask=turns, other=1.0)
        s = tl.load(sin + position * PAIRS + pair, mask=turns, other=0.0)
        y = y * c + sign * tl.load(source + mate, mask=turns, other=0.0) * s
    return y


@triton.jit
def as_kept(y, INT8: tl.constexpr):
    """Keys or values as they are kept, and the scale of int8 ones."""
    largest = tl.max(tl.abs(y), axis=0)
    if INT8:
        y = y * tl.where(largest > 0, 127 / largest, 0.0)
        y = (y + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    return y, largest / 127


@triton.jit(do_not_specialize=["layer", "n_layers"])
def store_kernel(qkv, cos, sin, positions, table, q_out, pages, scales,
                 row_stride, table_width, layer, n_layers, n_slots, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
                 HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 PAGE: tl.constexpr, INT8: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Turns a head of q into `q_out`, or of k into its page; v goes into its page as it is."""
    begin(OVERLAP)
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    inside = d < DIM
    source = qkv + row.to(tl.int64) * row_stride + head * DIM
    position = tl.load(positions + row)
    if head < HEADS + KV_HEADS:
        y = turned(source, d, inside, cos, sin, position, PAIRS, INTERLEAVED)
    else:
        y = turned(source, d, inside, cos, sin, position, 0, INTERLEAVED)
    if head < HEADS:
        tl.store(q_out + (row * HEADS + head) * DIM + d, y, mask=inside)
    else:
        page = tl.load(table + row * table_width + position // PAGE)
        part = (head - HEADS) // KV_HEADS
        slot = (part * n_layers + layer).to(tl.int64) * n_slots + page * PAGE + position % PAGE
        kept = slot * KV_HEADS + (head - HEADS) % KV_HEADS
        y, scale = as_kept(y, INT8)
        if INT8:
            tl.store(scales + kept, scale)
        tl.store(pages + kept * DIM + d, y.to(pages.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "n_layers", "window"])
def attend_kernel(q, positions, table, pages, scales, best, weight, part, arrived, out, cos, sin,
                  table_width, layer, n_layers, n_slots, scale, window,
                  FRESH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  PAGE: tl.constexpr, SPLITS: tl.constexpr, INT8: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A head's attention to a part of its pages; the part that is done last merges them all, in ascending order.

    FRESH: `q` is a single row of q, k and v, which are turned and stored here too, with what store_kernel would make
    of them: its keys and values are taken from the registers as they would be read from the page.
    """
    begin(OVERLAP)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, s, each = tl.arange(0, BLOCK_D), tl.arange(0, PAGE), tl.arange(0, SPLITS)
    inside = d < DIM
    position = tl.load(positions + row)
    first = tl.maximum(position + 1 - window, 0) // PAGE
    count = tl.cdiv(position // PAGE + 1 - first, SPLITS)
    kv_head = head // (HEADS // KV_HEADS)
    if FRESH:
        query = turned(q + head * DIM, d, inside, cos, sin, position, PAIRS, INTERLEAVED) * scale
        k_new = turned(q + (HEADS + kv_head) * DIM, d, inside, cos, sin, position, PAIRS, INTERLEAVED)
        v_new = tl.load(q + (HEADS + KV_HEADS + kv_head) * DIM + d, mask=inside, other=0.0)
        k_new, k_scale = as_kept(k_new, INT8)
        v_new, v_scale = as_kept(v_new, INT8)
        k_new, v_new = k_new.to(pages.dtype.element_ty), v_new.to(pages.dtype.element_ty)
        if (split == 0) & (head % (HEADS // KV_HEADS) == 0):
            page = tl.load(table + row * table_width + position // PAGE)
            kept = (layer.to(tl.int64) * n_slots + page * PAGE + position % PAGE) * KV_HEADS + kv_head
            kept_value = kept + n_layers.to(tl.int64) * n_slots * KV_HEADS
            tl.store(pages + kept * DIM + d, k_new, mask=inside)
            tl.store(pages + kept_value * DIM + d, v_new, mask=inside)
            if INT8:
                tl.store(scales + kept, k_scale)
                tl.store(scales + kept_value, v_scale)
    else:
        query = tl.load(q + (row * HEADS + head) * DIM + d, mask=inside, other=0.0) * scale
    top = -float("inf")
    total = 0.0
    y = tl.zeros([BLOCK_D], tl.float32)
    for index in range(first + split * count, tl.minimum(first + (split + 1) * count, position // PAGE + 1)):
        at = index * PAGE + s
        seen = (at <= position) & (at > position - window)
        there = seen & (at < position) if FRESH else seen  # in memory
        page = tl.load(table + row * table_width + index)
        slot = (layer.to(tl.int64) * n_slots + page * PAGE + s) * KV_HEADS + kv_head
        values = slot + n_layers.to(tl.int64) * n_slots * KV_HEADS
        both = there[:, None] & inside[None, :]
        k = tl.load(pages + slot[:, None] * DIM + d[None, :], mask=both, other=0.0)
        v = tl.load(pages + values[:, None] * DIM + d[None, :], mask=both, other=0.0)
        if FRESH:
            k = tl.where((at == position)[:, None], k_new[None, :], k)
            v = tl.where((at == position)[:, None], v_new[None, :], v)
        k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.sum(query[None, :] * k, axis=1)
        if INT8:
            factor = tl.load(scales + slot, mask=there, other=0.0)
            scores *= tl.where(at == position, k_scale, factor) if FRESH else factor
        scores = tl.where(seen, scores, -float("inf"))
        new = tl.maximum(top, tl.max(scores, axis=0))
        shrink = tl.exp(top - new)
        p = tl.exp(scores - new)
        total = total * shrink + tl.sum(p, axis=0)
        if INT8:
            factor = tl.load(scales + values, mask=there, other=0.0)
            p *= tl.where(at == position, v_scale, factor) if FRESH else factor
        y = y * shrink + tl.sum(p[:, None] * v, axis=0)
        top = new
    ours = row * HEADS + head
    base = ours.to(tl.int64) * SPLITS
    tl.store(best + base + split, top)
    tl.store(weight + base + split, total)
    tl.store(part + (base + split) * DIM + d, y, mask=inside)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(arrived + ours, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrived + ours, 0)  # for the next launch
        tops = tl.load(best + base + each, cache_modifier=".cg")  # what others have written is not in this L1
        shares = tl.exp(tops - tl.max(tops, axis=0))
        total = tl.sum(shares * tl.load(weight + base + each, cache_modifier=".cg"), axis=0)
        parts = part + (base + each)[:, None] * DIM + d[None, :]
        y = tl.load(parts, mask=inside[None, :], other=0.0, cache_modifier=".cg")
        y = tl.sum(shares[:, None] * y, axis=0) / total
        tl.store(out + ours * DIM + d, y, mask=inside)


@triton.jit
def race_kernel(logits, inverse, seeds, positions, best, winner, size, BLOCK: tl.constexpr,
                OVERLAP: tl.constexpr):  # fmt: skip
    """The best of a block of tokens by logit / temperature + Gumbel noise, in float64 as native/sampling.cpp has it.

    `inverse` is 1 / temperature, or 0 for greedy. The winner is -1 where a logit is NaN or +inf.
    """
    begin(OVERLAP)
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
def finish_kernel(best, winner, out, n_blocks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """The winner of all blocks; of equals the lowest id; -1 where a logit is NaN or +inf, -2 where none is left."""
    begin(OVERLAP)
    row = tl.program_id(0)
    b = tl.arange(0, BLOCK)
    scores = tl.load(best + row * n_blocks + b, mask=b < n_blocks, other=-float("inf"))
    index = tl.argmax(scores, axis=0, tie_break_left=True)
    bad = tl.min(tl.load(winner + row * n_blocks + b, mask=b < n_blocks, other=0), axis=0) < 0
    none = tl.max(scores, axis=0) == -float("inf")
    token = tl.load(winner + row * n_blocks + index)
    tl.store(out + row, tl.where(bad, -1, tl.where(none, -2, token)))


COMPILING = False
"""Whether what is launched is only compiled: see compiling."""


@contextmanager
def compiling() -> Iterator[None]:
    """Compiles what is launched meanwhile, side by side, and runs nothing; its results are what memory holds."""
    global COMPILING
    COMPILING = True
    try:
        with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        COMPILING = False


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first argument."""
    overlap = arguments[0].is_cuda and overlaps(arguments[0].device)
    constants["OVERLAP"] = overlap
    if overlap:
        constants["launch_pdl"] = True
    if COMPILING:
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether the device, and Triton, know programmatic dependent launch. PRONGHORN_OVERLAP=0 says no."""
    able = gdc_wait is not None and torch.cuda.get_device_capability(device) >= (9, 0)
    return able and os.environ.get("PRONGHORN_OVERLAP") != "0"


def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may."""
    return OVERLAP and can_overlap(device)


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
    launch(
        matvec_kernel, (triton.cdiv(n_out, block_n), len(out) // together),
        x, w.words, w.scales, norm_weight, norm_bias, bias, residual, out,
        rows, n_out, w.n_in, n_words, 0 if w.scales is None else w.scales.shape[1],
        x.stride(0), 0 if residual is None else residual.stride(0), MAGIC.get(w.format, 0),
        (w.group * n_words // w.n_in // 4).bit_length() - 1 if w.group else 0, eps,
        NORM=kind, ACTIVATION=activation or "", GATE=gate, FORMAT=w.format, GROUP=w.group, MINIMA=w.minima, ZERO=w.zero,
        FIELDS=w.n_in // n_words, ROWS=together, BLOCK_N=block_n, BLOCK_W=block_w,
        BLOCK_X=triton.next_power_of_2(w.n_in) if kind == "layer" else 1, AHEAD=AHEAD, num_warps=warps,
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
    launch(
        matmul_kernel, (triton.cdiv(n_out, block_n), triton.cdiv(rows, block_m)),
        x, w.words.view(torch.uint8), w.scales, out, rows, n_out, n_in // each, w.scales.shape[1],
        FORMAT=w.format, GROUP=w.group, MINIMA=w.minima, ZERO=w.zero,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64 // each, num_warps=4 if block_m <= 64 else 8,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def embed(ids: Any, at: Any, w: Any, places: Any = None) -> torch.Tensor:
    """Rows of a matrix, and those of learned positions -> [tokens, n_in]."""
    out = torch.empty(len(ids), w.n_in, device=ids.device)
    n_words = w.words.shape[1]
    launch(
        embed_kernel, (len(ids), triton.cdiv(w.n_in, 1024)),
        ids, at, w.words, w.scales, places, out, w.n_in, n_words, 0 if w.scales is None else w.scales.shape[1],
        FORMAT=w.format, GROUP=w.group, MINIMA=w.minima, ZERO=w.zero, FIELDS=w.n_in // n_words, BLOCK=1024,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def store(qkv: Any, at: Any, table: Any, spec: Any, turns: Any, pages: Any, scales: Any) -> torch.Tensor:
    """Turns q and k of `[tokens, q and k and v]`, and puts k and v into their pages -> q.

    `turns`: cosines and sines by position, or None.
    """
    q = torch.empty(len(qkv), spec.n_heads * spec.head_dim, device=qkv.device)
    launch(
        store_kernel, (len(qkv), spec.n_heads + 2 * spec.n_kv_heads),
        qkv, *(turns or (None, None)), at, table, q, pages, scales, qkv.stride(0), table.stride(0), spec.layer,
        *pages.shape[1:3], num_warps=1, enable_fp_fusion=True, **shape_of(spec, turns, scales),
    )  # fmt: skip
    return q


@functools.cache
def arrivals(device: torch.device, n: int) -> torch.Tensor:
    """Zeros, which each launch leaves as it has found them. One stream at a time has them."""
    return torch.zeros(n, dtype=torch.int32, device=device)


def attend(
    q: Any, at: Any, table: Any, spec: Any, pages: Any, scales: Any, turns: Any = None, *, fresh: bool = False
) -> torch.Tensor:
    """Each row's attention to its sequence up to its own position -> [tokens, n_heads * head_dim].

    `fresh`: of a single row of q, k and v, which are turned and stored too: see `store`.
    """
    n = len(q) * spec.n_heads
    best, weight = torch.empty(2, n, SPLITS, device=q.device)
    part, out = (torch.empty(n, *sizes, spec.head_dim, device=q.device) for sizes in ((SPLITS,), ()))
    window = 2**31 - 1 if spec.window is None else spec.window
    launch(
        attend_kernel, (len(q), spec.n_heads, SPLITS),
        q, at, table, pages, scales, best, weight, part, arrivals(q.device, n), out, *(turns or (None, None)),
        table.stride(0), spec.layer, *pages.shape[1:3], spec.scale, window,
        FRESH=fresh, SPLITS=SPLITS, num_warps=4, enable_fp_fusion=True, **shape_of(spec, turns, scales),
    )  # fmt: skip
    return out.view(len(q), -1)


def shape_of(spec: Any, turns: Any, scales: Any) -> dict[str, Any]:
    """What the kernels of attention are compiled for."""
    heads, dim = {"HEADS": spec.n_heads, "KV_HEADS": spec.n_kv_heads}, spec.head_dim
    rope = {"PAIRS": turns[0].shape[1] if turns else 0, "INTERLEAVED": bool(spec.rope and spec.rope.interleaved)}
    return {
        **heads, **rope, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "PAGE": PAGE, "INT8": scales is not None,
    }  # fmt: skip


def race(logits: Any, inverses: list[float], seeds: list[int], positions: list[int]) -> torch.Tensor:
    """The arg max of each row's logits times `inverses` (0: of the logits) plus Gumbel noise (or see finish_kernel).

    int32, on the device, which is not waited for.
    """
    logits = logits.contiguous()  # ranks' columns may have been cut from wider rows
    rows, size = logits.shape
    block = 1024
    n_blocks = triton.cdiv(size, block)
    numbers = torch.from_numpy(np.array([seeds, positions, np.array(inverses).view(np.int64)]))
    if logits.is_cuda:
        numbers = numbers.pin_memory().to(logits.device, non_blocking=True)
    best = torch.empty(rows, n_blocks, dtype=torch.float64, device=logits.device)
    winner = torch.empty(rows, n_blocks, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    inverse = numbers[2].view(torch.float64)
    exactly = {"enable_fp_fusion": False}  # as native/sampling.cpp rounds
    launch(
        race_kernel, (rows, n_blocks),
        logits, inverse, numbers[0], numbers[1], best, winner, size, BLOCK=block, **exactly,
    )  # fmt: skip
    wide = triton.next_power_of_2(n_blocks)
    launch(finish_kernel, (rows,), best, winner, out, n_blocks, BLOCK=wide, **exactly)
    return out
