"""What is measured is what is said to be measured. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import builtins
import gc
import importlib.util
import json
import mmap
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronghorn import LLM, SamplingParams, bench
from pronghorn.cli import main
from pronghorn.loading import open_model
from pronghorn.models import model_for
from tiny import save_tiny

SCRIPTS = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer, which measuring does without."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=700)
    (folder / "tokenizer.json").unlink()
    return folder


def subject(model: Path, dtype: str) -> bench.Subject:
    checkpoint = open_model(model)
    return bench.Subject(checkpoint, model_for(checkpoint.config), dtype, threads=2)


def test_table_and_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-m", str(model), "--dtype", "f32,int4", "--threads", "2", "--rounds", "1", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["machine"]["threads"] == 2
    rows = found["results"]
    assert [(row["dtype"], row["kind"], row.get("streams", row.get("tokens"))) for row in rows] == [
        (dtype, kind, size)
        for dtype in ("f32", "int4")
        for kind, size in (("decode", 1), ("decode", 8), ("decode", 32), ("prompt", 512), ("prompt", 19))
    ]
    assert len(lines) == 2 + len(rows)
    for row, line in zip(rows, lines[2:], strict=True):
        assert line.startswith(row["dtype"])
        for name in ("tok_s", "gb_s", "ceiling_gb_s", "share"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
def test_bytes_and_keys_are_those_of_the_engine(model: Path, dtype: str) -> None:
    measured = subject(model, dtype)
    with LLM(model, dtype=dtype) as llm:
        assert measured.kv_dtype == llm.kv_dtype
        prompt = list(measured.request(bench.PROMPT, 100).token_ids)
        timings = llm.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True)).timings
    samples = list(measured.decode(1, 100))
    assert [sample.steps for sample in samples] == [10] * 10
    # Each step reads the keys and values of all tokens so far: 20 in the first, 119 in the last.
    expected = [measured.weight_bytes + measured.token_bytes * (24.5 + 10 * i) for i in range(10)]
    assert [sample.bytes for sample in samples] == expected
    mean = sum(sample.bytes for sample in samples) / 10
    assert mean == pytest.approx(timings.bytes_per_token, abs=measured.token_bytes)


def test_a_sample_is_what_it_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = subject(model, "f32")
    steps = []
    real = measured.engine.step
    monkeypatch.setattr(measured.engine, "step", lambda: steps.append(len(real())))
    samples = list(measured.decode(8, 20))
    assert steps[-20:] == [8] * 20
    assert [(sample.rows, sample.steps) for sample in samples] == [(8, 10), (8, 10)]
    assert not measured.engine.scheduler.running
    steps.clear()
    prompt = measured.prompt(512)
    assert (prompt.rows, steps) == (512, [1])
    assert not measured.engine.scheduler.running
    row = bench.summary(measured, "decode", 8, [bench.Sample(8, 10, 1e6, 0.5, 1e8), bench.Sample(8, 10, 3e6, 1, 1e8)])
    assert row["tok_s"] == {"median": 120, "min": 80, "max": 160}
    assert row["share"] == {"median": 0.25, "min": 0.2, "max": 0.3}


def test_operations(model: Path) -> None:
    """Two for each weight of a matrix and token; the head's only for the rows whose logits are wanted."""
    measured = subject(model, "f32")
    layers = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    head = 258 * 32
    assert bench.operations_of(measured, 19, 1) == 2 * (19 * layers + head)
    assert bench.operations_of(measured, 8, 8) == 2 * 8 * (layers + head)


def test_short_context(tmp_path: Path) -> None:
    found = bench.bench(save_tiny(tmp_path / "short", max_position_embeddings=12), ["f32"], rounds=1)
    sizes = [(row["kind"], row.get("tokens")) for row in found["results"]]
    assert ("prompt", 11) in sizes


def test_one_dtype_at_a_time_is_in_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[bench.Subject] = weakref.WeakSet()

    class Counted(bench.Subject):
        def __init__(self, *args: Any) -> None:
            gc.collect()
            assert not alive
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(bench, "Subject", Counted)
    monkeypatch.setattr(bench, "measure", lambda subject, rounds: [{}])
    assert len(bench.bench(model, ["f32", "int8", "int4"], threads=1)["results"]) == 3


def test_regions_are_the_mapping_itself() -> None:
    memory = mmap.mmap(-1, 8 << 20)
    whole = memoryview(memory)
    found = bench.regions([whole[: 2 << 20], whole[(2 << 20) + 64 : 4 << 20], whole[6 << 20 :]])
    places = [(bench.address(region) - bench.address(whole), region.nbytes) for region in found]
    assert places == [(0, 4 << 20), (6 << 20, 2 << 20)]


def test_regions_of_many_small_pieces_are_written_memory() -> None:
    pieces = [memoryview(mmap.mmap(-1, 100_000)) for _ in range(30)]
    (region,) = bench.regions(pieces)
    assert region.nbytes == 3_000_000
    assert np.frombuffer(region, np.uint8).all()


def test_default_dtypes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_model(model)
    described = model_for(checkpoint.config)
    assert bench.default_dtypes(checkpoint, described) == ["f32", "bf16", "int8", "int4"]
    monkeypatch.setattr(bench, "free_memory", lambda: 60_000)
    assert bench.default_dtypes(checkpoint, described) == ["bf16", "int8", "int4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "f32,f7"], "dtype is 'f7'"),
        (["--threads", "0"], "threads is 0"),
        (["--rounds", "0"], "rounds is 0"),
        (["--plot", "/nowhere/at/all.png"], "--plot"),
    ],
)
def test_mistakes(model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "-m", str(model), *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_plot(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roof.svg"
    assert main(["bench", "-m", str(model), "--dtype", "f32", "--rounds", "1", "--plot", str(path)]) == 0
    assert "<svg" in path.read_text(encoding="utf-8")
    assert main(["bench", "-m", str(model), "--plot", str(tmp_path / "roof.nonsense")]) == 2


def test_plot_without_matplotlib(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["bench", "-m", str(model), "--plot", "roof.png"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "pronghorn[bench]" in err


def script(name: str, *options: str) -> dict[str, Any]:
    """What a script of bench/ prints last."""
    if not SCRIPTS.is_dir():
        pytest.skip("runs without the repository's bench/")
    done = subprocess.run([sys.executable, SCRIPTS / name, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_peers(model: Path) -> None:
    found = script("peers.py", "-m", str(model), "--dtype", "int8", "--only", "pronghorn,llama-bench", "--rounds", "1")
    ours, theirs = found["results"]
    assert (ours["engine"], ours["dtype"], theirs["engine"]) == ("pronghorn", "int8", "llama-bench")
    assert all(ours[name]["median"] > 0 for name in ("ttft_s", "decode_tok_s", "prompt_tok_s", "streams_tok_s"))
    assert "--llama-bin" in theirs["missing"]


def module(name: str) -> Any:
    """A script of bench/, imported."""
    if not SCRIPTS.is_dir():
        pytest.skip("runs without the repository's bench/")
    spec = importlib.util.spec_from_file_location(f"bench_{name}", SCRIPTS / f"{name}.py")
    assert spec
    assert spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_peers_measure_from_when_all_have_their_first() -> None:
    peers = module("peers")
    steps = [[], [(0, 7)], [(0, 8), (1, 5)], [(0, 9), (1, 6)], [(1, 6)]]
    trace = peers.traced(lambda prompts, n_new: iter(steps))([[1], [2]], 3)
    assert trace.made == [3, 5, 6]
    assert trace.tokens == [[7, 8, 9], [5, 6, 6]]
    assert peers.Trace([1.0, 2.0, 4.0], trace.made, []).rate(2) == 1.0


def test_converted_models_are_the_same(tmp_path: Path) -> None:
    shapes, convert = module("shapes"), module("convert")
    shapes.SHAPES["gpt2-tiny"] = shapes.gpt2(2, 64, 4) | {"vocab_size": 96, "eos_token_id": 95, "bos_token_id": 95}
    folder = shapes.write("gpt2-tiny", tmp_path / "model")
    ids = [(7 * i) % 96 for i in range(30)]
    with LLM(folder) as llm:
        expected = llm.logits(ids)
    for dtype, tolerance in (("f32", 1e-6), ("bf16", 0.02), ("q8_0", 0.02), ("q4_1", 0.2)):
        convert.gguf(folder, dtype, tmp_path / f"{dtype}.gguf")
        with LLM(tmp_path / f"{dtype}.gguf") as llm:
            assert np.abs(llm.logits(ids) - expected).max() < tolerance * np.abs(expected).max(), dtype


FASTGPT = """#!/bin/sh
echo "Loading the model...
    done. Time:   0.121s, Model file version: 1
n_tokens_to_generate =  20
Running model...
    done. Time:   0.500s (1.23x)"
"""


def test_fastgpt_is_understood(model: Path, tmp_path: Path) -> None:
    program = tmp_path / "gpt2"
    program.write_text(FASTGPT)
    program.chmod(0o755)
    options = ["--dtype", "f32", "--only", "fastgpt", "--fastgpt", str(program), "--rounds", "1"]
    (row,) = script("peers.py", "-m", str(model), *options)["results"]
    assert row["decode_tok_s"]["median"] == 40


LOOPS = """
   0: xor    %eax,%eax
   4: vmovups (%rdi),%zmm0
   8: vpdpbusd (%rsi),%zmm1,%zmm2
   c: jb     8 <f+0x8>
  10: vpdpbusd (%rsi),%zmm1,%zmm2
  14: jne    18 <f+0x18>
  18: vmovaps %zmm2,0x40(%rsp)
  1c: jne    4 <f+0x4>
  20: jmp    30 <g>
"""


def test_guard_finds_innermost_loops() -> None:
    guard = module("guard")
    (loop,) = guard.loops(LOOPS.strip("\n").splitlines())
    assert [line.split(":")[0].strip() for line in loop] == ["8", "c"]


def test_guard_compares() -> None:
    compare = module("guard").compare
    table = {"a": 1000, "b": 1000, "c": 1000, "none": 0, "gone": 5}
    worse, better = compare(table, {"a": 1019, "b": 1021, "c": 900, "none": 1, "new": 3})
    assert [line.split(":")[0] for line in worse] == ["b", "none", "new", "gone"]
    assert better == ["c: 1000 -> 900 (-10.0 %)"]
    assert "+2.1 %" in worse[0]


def test_startup(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    found = script("startup.py", "-m", str(folder), "--dtype", "f32", "--rounds", "1", "--prompt", "hello",
                   "--beside", "echo {prompt} {n}")  # fmt: skip
    (result,) = found["results"].values()
    assert set(result["whole"]) == set(result["beside"]) == {"1", "20"}
    assert result["memory_bytes"]["weights"] > 0
    parts = {name: value["median"] for name, value in result["parts_of_20_tokens"].items()}
    for name in ("interpreter", "imports_of_cli", "imports_of_rest", "reading_begins", "reading_wait", "files",
                 "weights", "tokenizer", "program", "prompt", "tokens", "close", "exit"):  # fmt: skip
        assert parts[name] > 0
