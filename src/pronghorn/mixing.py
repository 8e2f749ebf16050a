"""Which matrices get how many bits, within a budget: by what each unit of a model costs by itself, measured.

A unit is a block's attention, a block's MLP, or a matrix outside of blocks. It is rounded alone to each format of
LADDER (plainly, by its range), and the KL divergence from the unchanged model is measured on windows of text. Costs are
taken to add up. Then all begin at the fewest bits, and the upgrade that saves the most KL for its bits is taken again
and again: the solution of the Lagrangian, but for the last step (Shoham and Gersho 1988).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pronghorn._native import Pool
from pronghorn.machine import usable_processors
from pronghorn.models import Model
from pronghorn.ops import PAGE, Batch
from pronghorn.ops.cpu import CpuRunner
from pronghorn.weights import Checkpoint
from pronghorn.weights.quantize import Jobs, prepare, weight
from pronghorn.weights.types import FORMATS, Matrix, Module, Tensor, packed_bytes

LADDER = ("int4-g128-sym", "int4-g64", "int4-g32", "int8-g64")
ROWS = 64  # of logits that are compared at a time

Floats = NDArray[np.float32]


class Meter:
    """KL divergence from a model as it is, on windows [n, window] of tokens: the mean over all places, in nats."""

    def __init__(
        self, checkpoint: Checkpoint, model: Model, tensors: Mapping[str, Tensor], windows: NDArray[np.int64]
    ) -> None:
        self.model, self.tensors, self.windows, self.pool = model, tensors, windows, Pool(usable_processors())
        self.parameters = model.parameters()
        self.weights = prepare(checkpoint, self.parameters, tensors, "auto")
        self.reference = [log_softmax(logits) for logits in self.logits(model, self.weights)]

    def kl(self, model: Model, weights: Mapping[str, Matrix]) -> float:
        """Of other weights."""
        total = 0.0
        for log_p, logits in zip(self.reference, self.logits(model, weights), strict=True):
            for rows in (slice(start, start + ROWS) for start in range(0, len(logits), ROWS)):
                p = log_p[rows].astype(np.float64)
                total += float((np.exp(p) * (p - log_softmax(logits[rows]))).sum())
        return total / self.windows.size

    def changed(self, names: Sequence[str], format: str) -> float:
        """Of the same weights, but for those of these names."""
        target = FORMATS[format]
        sizes = {name: packed_bytes(self.parameters[name], target) for name in names}
        data = Jobs(self.parameters, self.tensors, dict.fromkeys(names, target), sizes, self.pool.size).in_memory()
        return self.kl(
            self.model, self.weights | {name: weight(self.parameters[name], target, data[name]) for name in names}
        )

    def logits(self, model: Model, weights: Mapping[str, Matrix]) -> list[Floats]:
        """Of each window, [window, vocabulary]."""
        length = self.windows.shape[1]
        pages = -(-length // PAGE)
        named = Module.of(dict(weights))
        runner = CpuRunner(model, named, n_pages=pages, max_tokens=length, pool=self.pool)
        found = []
        for token_ids in self.windows:
            batch = Batch(table_width=pages)
            batch.token_ids.extend(token_ids.tolist())
            for rows in (batch.positions, batch.logits_rows):
                rows.extend(range(length))
            batch.sequence.extend([0] * length)
            batch.page_table.extend(range(pages))
            found.append(np.frombuffer(runner.run(batch), np.float32).reshape(length, -1).copy())
        return found


def log_softmax(logits: Floats) -> Floats:
    """Row by row."""
    values: Floats = logits - logits.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def units_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The matrices of each unit: those whose names differ in the last place."""
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(name.rsplit(".", 2)[0], []).append(name)
    return units


def costs_of(meter: Meter, names: Sequence[str], bar: Any) -> dict[str, dict[str, float]]:
    """The KL of each unit in each format of LADDER."""
    costs: dict[str, dict[str, float]] = {}
    for unit, members in units_of(names).items():
        costs[unit] = {}
        for format in LADDER:
            costs[unit][format] = meter.changed(members, format)
            bar.update(1)
    return costs


def mix(
    costs: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, Mapping[str, int]],
    room: float = math.inf,
    most: float = 0.0,
) -> dict[str, str]:
    """Each unit's format: as little cost as `room` for the sizes allows, or as little size as costs <= `most` allow."""
    chosen = {unit: min(costs[unit], key=lambda format: sizes[unit][format]) for unit in costs}
    while sum(costs[unit][format] for unit, format in chosen.items()) > most:
        left = room - sum(sizes[unit][format] for unit, format in chosen.items())
        best, step = 0.0, None
        for unit, now in chosen.items():
            for format, cost in costs[unit].items():
                more = sizes[unit][format] - sizes[unit][now]
                if 0 < more <= left and (gain := (costs[unit][now] - cost) / more) > best:
                    best, step = gain, (unit, format)
        if step is None:
            break
        chosen[step[0]] = step[1]
    return chosen
