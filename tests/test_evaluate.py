"""`pronghorn eval`: its figures are those of a plain computation, and of transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from pronghorn import LLM, ParameterError, PromptError
from pronghorn.cli import main
from pronghorn.evaluate import evaluate, log_softmax, windows_of
from tiny import STORY, save_tiny
from variants import logits as logits_of_transformers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=100)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    chance = random.Random(3)
    return [chance.randrange(256) for _ in range(150)]


def test_windows() -> None:
    assert windows_of(range(7), 3) == [range(3), range(3, 6)]  # the rest has nothing to score
    assert windows_of(range(8), 3) == [range(3), range(3, 6), range(6, 8)]
    assert windows_of(range(8), 3, 1) == [range(3)]
    assert windows_of(range(1), 3) == []


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8", "int4"])
def test_figures_are_those_of_a_plain_computation(model: Path, ids: list[int], dtype: str) -> None:
    found = evaluate(model, ids, [dtype], window=60)
    reference, result = found["results"]
    losses: dict[str, list[float]] = {"f32": [], dtype: []}
    kl, top1, top5 = [], [], []
    with LLM(model, dtype="f32") as exact, LLM(model, dtype=dtype) as llm:
        assert result["kv_dtype"] == llm.kv_dtype
        for window in (ids[:60], ids[60:120], ids[120:]):
            pair = []
            for name, one in (("f32", exact), (dtype, llm)):
                values = one.logits(window).astype(np.float64)
                p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
                pair.append(p)
                losses[name] += [-np.log(p[i, window[i + 1]]) for i in range(len(window) - 1)]
            for p, q in zip(pair[0][:-1], pair[1][:-1], strict=True):
                kl.append(np.sum(p * np.log(p / q)))
                top1.append(p.argmax() == q.argmax())
                top5.append(len({*np.argsort(p)[-5:]} & {*np.argsort(q)[-5:]}) / 5)
    assert found["windows"] == 3
    assert result["scored_tokens"] == 59 + 59 + 29
    assert reference["perplexity"] == pytest.approx(np.exp(np.mean(losses["f32"])), rel=1e-12)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses[dtype])), rel=1e-12)
    assert result["kl"] == pytest.approx(np.mean(kl), rel=1e-9, abs=1e-15)
    assert result["top1"] == pytest.approx(np.mean(top1))
    assert result["top5"] == pytest.approx(np.mean(top5))
    assert (reference["kl"], reference["top1"], reference["top5"]) == (0, 1, 1)
    assert (result["kl"] > 1e-9) == (dtype != "auto")


def test_perplexity_is_that_of_transformers(model: Path, ids: list[int]) -> None:
    windows = (ids[:60], ids[60:120], ids[120:])
    losses: list[float] = []
    for window in windows:
        values = log_softmax(logits_of_transformers(model, window))
        losses += [-values[i, window[i + 1]] for i in range(len(window) - 1)]
    found = evaluate(model, ids, ["f32"], window=60)["results"][0]["perplexity"]
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(STORY * 4, encoding="utf-8")
    command = ["eval", str(text), "-m", str(model), "--dtype", "f32,int8", "--window", "64", "--limit", "2", "--json"]
    assert main(command) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    with LLM(model) as llm:
        ids = llm.tokenizer.encode(STORY * 4, add_special=False)
    expected = evaluate(model, ids, ["f32", "int8"], window=64, limit=2)
    assert found == {"file": str(text), **expected}
    assert [line.split()[0] for line in lines[2:]] == ["f32", "f32", "int8"]


def test_memory_does_not_grow_with_the_text(model: Path, ids: list[int]) -> None:
    """All that is kept of a window is in the sums: no array outlives its window."""
    import tracemalloc

    peaks = []
    for windows in (2, 20):
        tracemalloc.start()
        evaluate(model, (ids * 20)[: 60 * windows], ["int8"], window=60)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_mistakes(model: Path, ids: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PromptError, match="at least two"):
        evaluate(model, ids[:1])
    with pytest.raises(ParameterError, match="window is 1: expected at least 2"):
        evaluate(model, ids, window=1)
    with pytest.raises(ParameterError, match="limit is 0"):
        evaluate(model, ids, limit=0)
    with pytest.raises(ParameterError, match="window is 101: the model's context holds 100"):
        evaluate(model, ids, window=101)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for name, message in (("missing.txt", "No such file"), ("latin1.txt", "utf-8")):
        assert main(["eval", str(tmp_path / name), "-m", str(model)]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "latin1.txt"), "-m", str(model), "--dtype", "int5"]) == 2
    assert "dtype is 'int5'" in capsys.readouterr().err
