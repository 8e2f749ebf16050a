"""The canonical packing of int8 and int4 (see weights.types), in NumPy: codes to bytes, and bytes to numbers."""

# NumPy's stubs type most arithmetic as Any.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pronghorn._native import packed_size
from pronghorn.weights.types import Int4, Int8, Target

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

PANEL = 16  # outputs that are packed together


class Codes(NamedTuple):
    """A quantized matrix: w = scale * q + minimum, with a scale and a minimum for each row and group."""

    q: NDArray[np.int8]  # [n_out, n_in]: 0..15, -8..7 (symmetric) or -127..127
    scale: Floats  # [n_out, n_groups]; numbers of f16 where there are groups
    minimum: Floats  # [n_out, n_groups]; zero but for int4 with minimum

    def values(self, target: Target) -> Floats:
        """The weights [n_out, n_in]."""
        n_in = self.q.shape[1]
        scale, minimum = (np.repeat(part, target.group or n_in, axis=1)[:, :n_in] for part in self[1:])
        return self.q * scale + minimum


def has_minimum(target: Target) -> bool:
    """Whether groups have a minimum of their own."""
    return target.format == "int4" and not target.symmetric


def limits(target: Target) -> tuple[int, int]:
    """The lowest and the highest code."""
    return (-127, 127) if target.format == "int8" else (0, 15) if has_minimum(target) else (-8, 7)


def pack(codes: Codes, target: Target) -> memoryview:
    """The data of an Int8 or Int4."""
    n_out, n_in = codes.q.shape
    n_panels, n_groups = -(-n_out // PANEL), codes.scale.shape[1]
    out = np.zeros(packed_size(target.format, n_out, n_in, target.group, target.symmetric), np.uint8)
    int8, kind = target.format == "int8", np.float16 if target.group else np.float32
    part = -(-n_groups * PANEL * np.dtype(kind).itemsize // 64) * 64
    step, zero, fill = (4, 128, 128) if int8 else (8, 8 * target.symmetric, 0)
    sections: list[tuple[int, NDArray[np.uint8]]] = []
    for numbers in codes[1 : 2 + has_minimum(target)]:
        table = padded(numbers.astype(kind), 0).reshape(n_panels, PANEL, n_groups).transpose(0, 2, 1)
        sections.append((part, np.ascontiguousarray(table).view(np.uint8)))
    for first in range(0, n_in, n_in if int8 else target.group):
        stored = codes.q[:, first : first + (n_in if int8 else target.group)].astype(np.int16) + zero
        values = padded(stored.astype(np.uint8), fill, step).reshape(n_panels, PANEL, -1, step).transpose(0, 2, 1, 3)
        sections.append((0, values if int8 else values[..., :4] | values[..., 4:] << 4))
    flat = [(size or data[0].size, data.reshape(n_panels, -1)) for size, data in sections]
    panels = out[: n_panels * sum(size for size, _ in flat)].reshape(n_panels, -1)
    at = 0
    for size, data in flat:
        panels[:, at : at + data.shape[1]] = data
        at += size
    return out.data


def padded(table: NDArray[Any], fill: int, step: int = 1) -> NDArray[Any]:
    """With rows for whole panels, and a multiple of `step` columns."""
    return np.pad(table, ((0, -len(table) % PANEL), (0, -table.shape[1] % step)), constant_values=fill)


def unpack(weight: Int8 | Int4) -> Array:
    """The numbers [n_out, n_in]."""
    return from_int8(weight) if isinstance(weight, Int8) else from_int4(weight)


def from_int8(weight: Int8) -> Array:
    """See weights.types.Int8."""
    group, n_quads = weight.group or weight.n_in, -(-weight.n_in // 4)
    n_groups = -(-weight.n_in // group)
    kind = np.float16 if weight.group else np.float32
    head = -(-n_groups * PANEL * np.dtype(kind).itemsize // 64) * 64
    panels = panels_of(weight, head + n_quads * 4 * PANEL)
    scales = floats(panels[:, :head], kind, n_groups)  # [panels, n_groups, 16]
    values = panels[:, head:].reshape(-1, n_quads, PANEL, 4).transpose(0, 2, 1, 3)  # [panels, 16, quads, 4]
    stored = values.reshape(len(panels) * PANEL, -1)[: weight.n_out, : weight.n_in].astype(np.float64)
    return by_group(scales, group, weight) * (stored - 128)


def from_int4(weight: Int4) -> Array:
    """See weights.types.Int4."""
    n_groups = -(-weight.n_in // weight.group)
    sizes = [min(weight.group, weight.n_in - g * weight.group) for g in range(n_groups)]
    part = -(-n_groups * PANEL * 2 // 64) * 64
    head = part if weight.symmetric else 2 * part
    panels = panels_of(weight, head + sum(-(-size // 8) for size in sizes) * 4 * PANEL)
    scales = by_group(floats(panels[:, :part], np.float16, n_groups), weight.group, weight)
    quants, at = [], head
    for size in sizes:
        end = at + -(-size // 8) * 4 * PANEL
        octets = panels[:, at:end].reshape(len(panels), -1, PANEL, 4)  # [panels, octets, 16, 4]
        both = np.concatenate([octets & 15, octets >> 4], axis=3).transpose(0, 2, 1, 3)
        quants.append(both.reshape(len(panels) * PANEL, -1)[: weight.n_out, :size])
        at = end
    q = np.concatenate(quants, axis=1).astype(np.float64)
    if weight.symmetric:
        return scales * (q - 8)
    return scales * q + by_group(floats(panels[:, part:head], np.float16, n_groups), weight.group, weight)


def panels_of(weight: Int8 | Int4, size: int) -> NDArray[np.uint8]:
    """The packed bytes `[panels, size]`, without what stands behind them."""
    n_panels = -(-weight.n_out // PANEL)
    return np.frombuffer(weight.data, np.uint8, count=n_panels * size).reshape(n_panels, size)


def floats(head: NDArray[np.uint8], kind: Any, n_groups: int) -> Array:
    """Scales or minima `[panels, n_groups, 16]` of the panels' heads, padding dropped."""
    numbers = np.ascontiguousarray(head).view(kind)[:, : n_groups * PANEL]
    return numbers.astype(np.float64).reshape(len(head), n_groups, PANEL)


def by_group(numbers: Array, group: int, weight: Int8 | Int4) -> Array:
    """One number a group and output, `[panels, n_groups, 16]`, for every weight: `[n_out, n_in]`."""
    rows = numbers.transpose(0, 2, 1).reshape(-1, numbers.shape[1])  # [outputs, n_groups]
    return np.repeat(rows, group, axis=1)[: weight.n_out, : weight.n_in]
