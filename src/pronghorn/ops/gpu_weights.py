"""Weights on a PyTorch device: the CPU's value types (weights.types), in words as the kernels read them.

What is to be quantized there gets the codes and scales that native/pack.cpp gives it, bit for bit.
"""

# PyTorch's functional interface is typed as Any in part.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pronghorn.errors import CheckpointError
from pronghorn.weights.types import Dense, Int4, Int8, Matrix, Unquantized

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
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


Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes `[n_out, n_in]` as they are stored (uint8), scales and minima `[n_out, n_groups]`."""


def codes_of(weight: Int8 | Int4, device: torch.device) -> Quantized:
    """What a packed matrix holds."""
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


CHUNK = 1 << 24
"""Weights that are quantized at a time: what is in between takes ten times their bytes."""


def quantized(w: Unquantized, device: torch.device) -> Quantized:
    """The codes, scales and minima of a matrix. CheckpointError where native/pack.cpp gives none."""
    source, finite = w.source, torch.ones((), dtype=torch.bool, device=device)
    values = to_device(source.data, DTYPES[source.dtype], device).view(source.shape)
    values = values.T if source.transposed else values
    parts = list[Quantized]()
    for rows in values.split(max(CHUNK // w.n_in, 1)):
        group, whole = w.group or w.n_in, w.n_in // (w.group or w.n_in)
        rows = normal(rows.float().contiguous())
        finite &= rows.isfinite().all()
        found = [by_groups(rows[:, : whole * group].view(len(rows), whole, group), w)] if whole else []
        if rest := w.n_in - whole * group:  # the last group may be short
            found.append(by_groups(rows[:, -rest:].view(len(rows), 1, rest), w))
        codes, scales, minima = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
        finite &= scales.isfinite().all() & minima.isfinite().all() if w.group else finite
        parts.append((codes, scales, minima))
    if not finite:
        raise CheckpointError(
            f"tensor {w.name} ({source.dtype}) holds values that are not finite, or too large for f16 scales: "
            "it cannot be quantized"
        )
    codes, scales, minima = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scales, minima if w.format == "int4" and not w.symmetric else None


def by_groups(x: torch.Tensor, w: Unquantized) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups `[rows, n_groups, group]` -> codes side by side, scales and minima: `pack_panel` of native/pack.cpp."""
    # Of equal ones the first, as there: it may be -0. Divisors are tensors: on CUDA numbers are multiplied inverted.
    low, high = (x.gather(2, at(x, dim=2, keepdim=True)) for at in (torch.argmin, torch.argmax))
    zero = torch.zeros_like(low)
    if w.format == "int8":
        scale, minimum, first, last = torch.where(-low < high, high, -low) / torch.full_like(low, 127), zero, -127, 127
    elif w.symmetric:
        scale, minimum, first, last = torch.where(-low > high, low, high) / torch.full_like(low, -8), zero, -8, 7
    else:
        minimum, first, last = torch.where(low > 0, zero, low), 0, 15
        scale = (torch.where(high < 0, zero, high) - minimum) / torch.full_like(low, 15)
    scale, minimum = (part.half().float() if w.group else normal(part) for part in (scale, minimum))
    codes = torch.where(scale != 0, ((x - minimum) / scale).round(), zero).clamp(first, last)
    kind = torch.float16 if w.group else torch.float32
    stored = (codes + (128 if w.format == "int8" else -first)).to(torch.uint8)
    return stored.flatten(1), scale[:, :, 0].to(kind), minimum[:, :, 0].to(kind)


def normal(x: torch.Tensor) -> torch.Tensor:
    """Subnormal numbers become zeros of their sign, as on the native house's threads."""
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, x * 0, x)


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
        kind = w.format if isinstance(w, (Packed, Unquantized)) else type(w)
        return kind, w.n_in, w.group, getattr(w, "symmetric", None)


class Weights:
    """A model's, put on the device as they are asked for. `kernels`: those that read `Packed`, or None."""

    def __init__(self, device: torch.device, kernels: Any) -> None:
        self.device, self.kernels = device, kernels
        self.loaded: dict[tuple[str, ...], Any] = {}

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

    def load(self, w: Matrix | Unquantized | Packed) -> Any:
        """One matrix on the device."""
        if isinstance(w, Packed):
            return w
        named = w.dtype if isinstance(w, Dense) else w.format if isinstance(w, Unquantized) else None
        form = named or ("int8" if isinstance(w, Int8) else "int4")
        chunk = 4 * FIELDS[form]
        if isinstance(w, Dense):
            values = to_device(w.data, DTYPES[form], self.device).view(w.shape)
            values = values.T if w.transposed else values
            return packed(values, form) if self.kernels and w.n_in % chunk == 0 else values.contiguous()
        codes, scales, minima = quantized(w, self.device) if isinstance(w, Unquantized) else codes_of(w, self.device)
        zero = 128 if form == "int8" else 8 if minima is None else 0
        chunks = w.group // chunk
        if self.kernels and w.n_in % chunk == 0 and w.group % chunk == 0 and chunks & (chunks - 1) == 0:
            if minima is not None:
                scales = torch.stack((scales, minima), dim=2).view(len(codes), -1).view(torch.int32)
            return packed(codes, form, scales=scales, group=w.group, zero=zero)
        group = w.group or w.n_in
        values = (codes.float() - zero) * scales.float().repeat_interleave(group, dim=1)[:, : w.n_in]
        return values if minima is None else values + minima.float().repeat_interleave(group, dim=1)[:, : w.n_in]


def rows_of(table: Packed | torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix, in float32."""
    return table.unpack(ids) if isinstance(table, Packed) else table[ids].float()
