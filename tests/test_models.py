"""Models against transformers, on tiny random checkpoints of every variant; and configs that must be refused.

Each house of operations computes every variant: as a whole prompt, in chunks, and token by token. The reference
agrees with transformers to float64's rounding when both compute in it, so the others are held against it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import variants

from pronghorn.errors import CheckpointError, ConfigError, ParameterError, PronghornError
from pronghorn.models import Model, model_for
from pronghorn.models.positions import rope_of
from pronghorn.models.config import Fields
from pronghorn.ops import PAGE, Batch
from pronghorn.ops.reference import ReferenceRunner
from pronghorn.weights import open_checkpoint
from pronghorn.weights.types import Dense, Module, Tensor

HOUSES = ["reference", "torch", "cpu"]
CHUNKS = {"whole": 1000, "chunks": 13, "tokens": 1}


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
    """The tensors as they are, by parameter name."""
    parameters = model.parameters()
    return Module.of(
        {
            name: Dense(tensor.data, tensor.dtype, tensor.shape, parameters[name].transposed)
            for name, tensor in model.resolve(tensors).items()
        }
    )


def batch_of(token_ids: Iterable[int], start: int, pages: list[int]) -> Batch:
    """One sequence's tokens from position `start` on, all logits wanted."""
    ids = array("i", token_ids)
    n = len(ids)
    return Batch(
        token_ids=ids,
        positions=array("i", range(start, start + n)),
        sequence=array("i", [0] * n),
        page_table=array("i", pages),
        table_width=len(pages),
        logits_rows=array("i", range(n)),
    )


def logits_of(run: Callable[[Batch], Any], token_ids: list[int], chunk: int = 1000) -> np.ndarray:
    """The logits of a whole prompt, run chunk by chunk; its pages lie in no order."""
    pages = [3, 1, 0, 2]
    parts = []
    for start in range(0, len(token_ids), chunk):
        ids = token_ids[start : start + chunk]
        parts.append(np.array(run(batch_of(ids, start, pages)), dtype=np.float64).reshape(len(ids), -1))
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("variants")
    return cache(lambda name: variants.save(name, folder))


@pytest.fixture(scope="module")
def exact(saved: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    """What transformers computes in float64 for a variant's prompt."""
    return cache(lambda name: variants.logits(saved(name), variants.prompt(name), exact=True))


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_reference_is_transformers(
    name: str, saved: Callable[[str], Path], exact: Callable[[str], np.ndarray]
) -> None:
    checkpoint = open_checkpoint(saved(name))
    model = model_for(checkpoint.config)
    weights = weights_of(model, checkpoint.tensors)
    want = exact(name)
    for chunk in CHUNKS.values():
        runner = ReferenceRunner(model, weights, n_pages=4, round_inputs=False)
        got = logits_of(runner.logits, variants.prompt(name), chunk)
        assert np.abs(got - want).max() < 1e-12 * want.std()


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", variants.VARIANTS)
@pytest.mark.parametrize("house", HOUSES)
def test_houses_agree(
    house: str, name: str, chunk: int, saved: Callable[[str], Path], exact: Callable[[str], np.ndarray]
) -> None:
    checkpoint = open_checkpoint(saved(name))
    model = model_for(checkpoint.config)
    runner = runner_class(house)(model, weights_of(model, checkpoint.tensors), n_pages=4)
    want = exact(name)
    got = logits_of(runner.run, variants.prompt(name), chunk)
    assert np.abs(got - want).max() < 1e-5 * want.std()
