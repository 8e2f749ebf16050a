"""The three houses of operations under one roof: how tests run a model, or one operation, in each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pronghorn.models import Config, Model
from pronghorn.ops import Attention, Batch
from pronghorn.ops.reference import ReferenceRunner
from pronghorn.weights.types import Dense, Int4, Int8, Matrix, Module, Parameter, Tensor

HOUSES = ("reference", "torch", "cpu")


def runner_class(house: str) -> Any:
    """The house's Runner."""
    if house == "reference":
        return ReferenceRunner
    if house == "torch":
        pytest.importorskip("torch")
        from pronghorn.ops.gpu import TorchRunner

        return TorchRunner
    if importlib.util.find_spec("pronghorn.ops.cpu") is None:
        pytest.skip("ops/cpu.py is not there yet")
    from pronghorn.ops.cpu import CpuRunner

    return CpuRunner


def weights_of(model: Model, tensors: dict[str, Tensor]) -> Module:
    """A checkpoint's tensors as they are, by parameter name."""
    parameters = model.parameters()
    return Module.of(
        {
            name: Dense(tensor.data, tensor.dtype, tensor.shape, parameters[name].transposed)
            for name, tensor in model.resolve(tensors).items()
        }
    )


def batch_of(*sequences: tuple[Sequence[int], int, Sequence[int]], rows: Sequence[int] | None = None) -> Batch:
    """Sequences of (token ids, position of the first, pages); `rows`: whose logits are wanted (None: all)."""
    width = max(len(pages) for _, _, pages in sequences)
    batch = Batch(table_width=width)
    for index, (token_ids, start, pages) in enumerate(sequences):
        batch.token_ids.extend(token_ids)
        batch.positions.extend(range(start, start + len(token_ids)))
        batch.sequence.extend([index] * len(token_ids))
        batch.page_table.extend([*pages, *[0] * (width - len(pages))])
    batch.logits_rows.extend(range(len(batch.token_ids)) if rows is None else rows)
    return batch


def logits_of(run: Callable[[Batch], Any], batch: Batch) -> np.ndarray:
    """What a runner (its `run`, or the reference's `logits`) computes, as float64 [rows, vocabulary]."""
    logits = np.array(run(batch), dtype=np.float64)
    return logits.reshape(len(batch.logits_rows), -1) if logits.size else logits


def dense(values: np.ndarray, dtype: str = "f32", transposed: bool = False) -> Dense:
    """An array as a weight; a matrix is given as [n_out, n_in]."""
    values = np.ascontiguousarray(values.T if transposed else values)
    if dtype == "bf16":
        raw = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        raw = values.astype({"f32": np.float32, "f16": np.float16}[dtype])
    return Dense(memoryview(raw.tobytes()), dtype, values.shape, transposed)


class Tiny(Model):
    """A model of one function: `forward(ops, weights) -> x`, whose columns come out as the logits.

    Token i's input is row i of an embedding; the head is an identity, so that it changes nothing. `attention`
    tells the size of the KV cache.
    """

    def __init__(
        self,
        forward: Callable[[Any, Module], Any],
        weights: Mapping[str, Matrix],
        n_tokens: int,
        width: int,
        attention: Attention | None = None,
    ) -> None:
        spec = attention or Attention(0, 1, 1, 2, 1.0)
        size = max(n_tokens, width)
        self.function = forward
        self.named = {**weights, "head.weight": dense(np.eye(size, width))}
        self.weights = Module.of(self.named)
        heads = (spec.n_heads, spec.n_kv_heads, spec.head_dim)
        super().__init__(Config("tiny", 1, *heads, width, size, 128, width, "relu", 1.0, False, (spec,)))

    def parameters(self) -> dict[str, Parameter]:
        """Shapes and kinds, read off the weights."""
        return {
            name: Parameter((w.n_out, w.n_in), "matrix")
            if isinstance(w, Int8 | Int4)
            else Parameter(w.shape, "matrix" if len(w.shape) == 2 else "vector", w.transposed)
            for name, w in self.named.items()
        }

    def forward(self, ops: Any, w: Module) -> Any:
        """The function, and the identity."""
        return ops.logits(self.function(ops, w), w.head)
