"""One answer: the same tokens' logits, bit for bit, whatever the batch, the chunks, the pages and the threads."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import houses
from pronghorn.models import model_for
from pronghorn.ops import PAGE
from pronghorn.ops.cpu import CpuRunner
from pronghorn.weights import open_checkpoint, quantize
from pronghorn.weights.types import Module, Target
from variants import save

N_PAGES = 96


def runner_of(folder: Path, dtype: str, kv_dtype: str, threads: int) -> CpuRunner:
    checkpoint = open_checkpoint(folder)
    model = model_for(checkpoint.config)
    weights = quantize.prepare(checkpoint, model.parameters(), model.resolve(checkpoint.tensors), dtype)
    return CpuRunner(model, Module.of(weights), n_pages=N_PAGES, kv_dtype=kv_dtype, max_tokens=320, threads=threads)


def alone(runner: CpuRunner, ids: list[int]) -> np.ndarray:
    """A sequence by itself, all at once."""
    return houses.logits_of(runner.run, houses.batch_of((ids, 0, range(-(-len(ids) // PAGE)))))


def in_company(runner: CpuRunner, sequences: list[list[int]], chooser: random.Random) -> list[np.ndarray]:
    """All sequences through shared batches, in chunks and on pages of the chooser's fancy."""
    free = chooser.sample(range(N_PAGES), N_PAGES)
    pages = [[free.pop() for _ in range(-(-len(ids) // PAGE))] for ids in sequences]
    done = [0] * len(sequences)
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    while any(done[i] < len(ids) for i, ids in enumerate(sequences)):
        parts, budget = [], 128
        for i in chooser.sample(range(len(sequences)), len(sequences)):
            left = len(sequences[i]) - done[i]
            n = min(left, budget, chooser.choice([1, 1, 2, 3, 5, 17, 33, 100]))
            if n and chooser.random() < 0.8:
                parts.append((i, sequences[i][done[i] : done[i] + n], done[i]))
                budget -= n
        if not parts:
            continue
        batch = houses.batch_of(*((ids, start, pages[i]) for i, ids, start in parts))
        logits = houses.logits_of(runner.run, batch)
        for i, ids, _ in parts:
            rows[i].append(logits[: len(ids)])
            logits = logits[len(ids) :]
            done[i] += len(ids)
    return [np.concatenate(r) for r in rows]


def check(folder: Path, dtype: str, kv_dtype: str, rounds: int, longest: int = 90) -> None:
    chooser = random.Random(f"{folder.name} {dtype} {kv_dtype}")
    runners = {threads: runner_of(folder, dtype, kv_dtype, threads) for threads in (1, 2, 3, 4)}
    config = runners[1].model.config
    longest = min(config.context, longest)
    sequences = [
        [
            chooser.randrange(config.vocab_size)
            for _ in range(chooser.choice([1, 2, 31, 32, 33, 64, longest]) % longest + 1)
        ]
        for _ in range(7)
    ]
    expected = [alone(runners[1], ids) for ids in sequences]
    assert all(np.isfinite(logits).all() for logits in expected)
    for _ in range(rounds):
        for threads, runner in runners.items():
            for i, logits in enumerate(in_company(runner, sequences, chooser)):
                differing = int((logits != expected[i]).sum())
                assert differing == 0, (
                    f"sequence {i} of {len(sequences[i])} tokens, {threads} threads: {differing} differ"
                )


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-odd", "smollm", "mistral-window", "qwen3-sliding-bias"])
def test_any_company_gives_the_same_logits(name: str, dtype: str, kv_dtype: str, tmp_path: Path) -> None:
    check(save(name, tmp_path), dtype, kv_dtype, rounds=1)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("f32", "f32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16")])
def test_on_a_trained_model(dtype: str, kv_dtype: str, test_data: Path) -> None:
    """Contexts of several blocks of attention, which threads share."""
    check(test_data / "models/stories260K", dtype, kv_dtype, rounds=2, longest=310)


def test_every_int8_granularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (Target("int8"), Target("int8", 32), Target("int8", 128)):
        monkeypatch.setitem(quantize.QUANTIZED, "int8", target)
        check(save("smollm", tmp_path), "int8", "f32", rounds=1)
