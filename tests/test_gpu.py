"""The GPU's house without a GPU: its kernels in Triton's interpreter and compiled for a GPU that is not there, ranks by
gloo, and bench/gpu.py on tiny sizes.

What is named `interpreted_...` runs in a process of its own, as Triton must know at its import that it interprets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronghorn import LLM, SamplingParams, parallel
from pronghorn._native import Pool, pack, packed_size
from pronghorn.cli import main
from pronghorn.errors import CheckpointError, ConfigError, ParameterError
from pronghorn.models import model_for
from pronghorn.weights import quantize
from pronghorn.weights.packing import unpack
from pronghorn.weights.types import FORMATS, Int8, Parameter, Tensor, Unquantized
from tiny import save_tiny

pytest.importorskip("torch")
FILE = Path(__file__)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def bench() -> Any:
    """bench/gpu.py, imported."""
    path = FILE.parents[1] / "bench/gpu.py"
    if not path.exists():
        pytest.skip("runs without the repository's bench/")
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Triton --------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", ["kernels", "engine", "sampler"])
def test_interpreted(name: str, tmp_path: Path) -> None:
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    code = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import test_gpu; test_gpu.interpreted_{name}()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted_kernels() -> None:
    """Each against float64, in memory that is NaN before."""
    fewer_programs()
    rows = bench().checks("cpu", tiny=True)
    assert len(rows) > 30, rows
    assert not [row for row in rows if not row["error"] <= row["bound"]]
    assert not [row for row in rows if row["bits_differ"]]  # by the other rows


def interpreted_engine() -> None:
    """The engine's tokens are the native house's: greedy and sampled, with every filter, and with drafts."""
    fewer_programs()
    from pronghorn.ops.gpu import TorchRunner

    path = save_tiny(Path("tiny"), num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    some = {"max_tokens": 2, "ignore_eos": True}
    jobs = [
        SamplingParams(max_tokens=3, ignore_eos=True),
        SamplingParams(temperature=0.8, top_k=9, seed=2**64 - 3, **some),
        SamplingParams(temperature=1.3, top_p=0.6, min_p=0.02, seed=3, **some),
        SamplingParams(temperature=1.0, seed=9, repetition_penalty=1.4, **some),
        SamplingParams(temperature=1.0, seed=4, logprobs=2, prompt_logprobs=0, **some),
        SamplingParams(temperature=1.0, seed=4, best_of=2, **some),
    ]
    if importlib.util.find_spec("llguidance"):
        jobs.append(SamplingParams(max_tokens=2, temperature=1.0, seed=1, regex="[a-f]+x"))
    prompts: list[Any] = [[1, 2, 3] * 6, "a", "b", "c", "d", "e", "f"][: len(jobs)]
    with LLM(path) as native, LLM(path, device="torch:cpu", kv_dtype="f32") as ours:
        for want, got in zip(native.generate(prompts, jobs), ours.generate(prompts, jobs), strict=True):
            assert want.token_ids == got.token_ids
            chances = [[p.logprob for p in out.logprobs or ()] for out in (want, got)]
            np.testing.assert_allclose(*chances, atol=1e-4)
        runner: Any = ours._engine and ours._engine.runner
        assert isinstance(runner, TorchRunner)
        assert runner.buckets

    # A stream alone: most of its steps have begun before they are asked for, across pages too.
    long = SamplingParams(max_tokens=20, temperature=0.7, seed=5, ignore_eos=True)
    with LLM(path) as native, LLM(path, device="torch:cpu", kv_dtype="f32") as ours:
        runner = ours._engine and ours._engine.runner
        assert native.generate([[3] * 20], long)[0].token_ids == ours.generate([[3] * 20], long)[0].token_ids
        assert runner.ahead.patience == 2  # no guess was wrong, but for the last one
        assert runner.ahead.begun is not None

    # The native house rounds inputs to 8 bits; PyTorch's own operations do not.
    os.environ["TRITON_INTERPRET"] = "0"
    with LLM(path, "int4", "torch:cpu", kv_dtype="int8") as plain:
        want = plain.logits(list(range(20)))
    os.environ["TRITON_INTERPRET"] = "1"
    with LLM(path, "int4", "torch:cpu", kv_dtype="int8") as ours:
        got = ours.logits(list(range(20)))
    assert np.abs(got - want).max() < 1e-4 * want.std()

    params = SamplingParams(temperature=0.9, seed=2, max_tokens=5, ignore_eos=True)
    with LLM(path, device="torch:cpu") as plain, LLM(path, device="torch:cpu", draft="self-int8") as drafted:
        assert drafted._engine
        assert drafted._engine.speculator
        drafted._engine.speculator.lengths = 2
        assert plain.generate("a", params).token_ids == drafted.generate("a", params).token_ids
        assert drafted.stats().accepted_tokens > 0


def interpreted_sampler() -> None:
    """The native house's tokens, or its reasons for none: NaN, infinity, masks that leave nothing, or hide a NaN."""
    import torch

    from pronghorn._native import choose_rows
    from pronghorn.engine.sampling import sampler
    from pronghorn.ops import Choice, gpu_kernels, gpu_sampling

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, 2050)).astype(np.float32)
    logits[1, 2049], logits[2, 1030], logits[3, :] = np.nan, np.inf, -np.inf
    logits[4, 7] = np.nan
    logits[6, 5:] = -np.inf
    mask = np.zeros(65, np.uint32)
    mask[1] = 6  # tokens 33 and 34
    masks = {4: mask, 5: np.zeros(65, np.uint32), 6: mask, 7: mask}
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=3),
    ):
        choices = [
            Choice(sampler(params, 5, ()), row, array("i", range(3)), 3, masks.get(row), None)
            for row in range(len(logits))
        ]
        want = choose_rows(logits, logits.shape[1], choices)
        got = gpu_sampling.choose(torch.from_numpy(logits), choices, gpu_kernels)
        assert got == want, (got, want)
        assert [isinstance(chosen, str) for chosen in got] == [False, True, True, True, True, True, True, False, False]
        assert len({chosen for chosen in got if isinstance(chosen, str)}) == 2


def fewer_programs() -> None:
    """Wider blocks: the interpreter takes its time for each program, and none for its width."""
    import warnings

    from pronghorn.ops import gpu_kernels

    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", "overflow encountered in exp")  # of an activation, which is 0 then
    gpu_kernels.LAYOUTS = dict.fromkeys(gpu_kernels.LAYOUTS, (64, 128, 4))
    gpu_kernels.SPLITS = 2


class Compiled:
    """Takes the place of a kernel: compiles what is launched for compute capability 9.0, once, and runs nothing."""

    def __init__(self, kernel: Any, done: dict[str, Any]) -> None:
        self.kernel, self.done = kernel, done

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.compile

    def compile(self, *arguments: Any, **constants: Any) -> None:
        import torch
        import triton

        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
        names |= {torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
        options = {name: constants.pop(name) for name in {"num_warps", "enable_fp_fusion"} & set(constants)}
        constants["OVERLAP"] = True
        signature: dict[str, str] = {}
        aligned = {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=False)):
            special = not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{names[value.dtype]}"
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if value is None or (special and type(value) is int and value == 1):
                constants[parameter.name] = value
            elif isinstance(value, torch.Tensor) or (special and type(value) is int and value % 16 == 0):
                aligned[(i,)] = [["tt.divisibility", 16]]
        if self.kernel.__name__ == "matmul_kernel":
            signature["x"] = "*bf16"  # as on CUDA
        signature |= dict.fromkeys(constants, "constexpr")
        signature = {name: signature[name] for name in self.kernel.arg_names}
        key = f"{self.kernel.__name__} {signature} {constants} {sorted(aligned)} {options}"
        if key not in self.done:
            source = triton.compiler.ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
            target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
            self.done[key] = triton.compile(source, target=target, options=options | {"launch_pdl": True})
            assert self.done[key].metadata.shared <= 227 << 10, key
            if self.kernel.__name__ == "matvec_kernel" and constants["ROWS"] == 1:
                n_loads = constants["BLOCK_N"] * (1 + constants["GATE"])
                assert self.done[key].asm["ptx"].count("ld.global.v4.b32") >= n_loads, key
                assert ".local" not in self.done[key].asm["ptx"], key


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the kernels that a test launches are compiled to; its keys begin with their names."""
    from pronghorn.ops import gpu_kernels as kernels

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled with TRITON_INTERPRET=1")
    done: dict[str, Any] = {}
    for kernel in ("matvec", "matmul", "embed", "store", "attend", "race", "finish"):
        monkeypatch.setattr(kernels, f"{kernel}_kernel", Compiled(getattr(kernels, f"{kernel}_kernel"), done))
    return done


@needs_triton
@pytest.mark.parametrize(
    ("name", "format", "group", "kv_dtype", "rows"),
    [
        ("llama-2-7b", "bf16", 0, "bf16", (1,)),
        ("llama-2-7b", "int8", 0, "bf16", (1, 128)),
        ("llama-2-7b", "int4", 32, "bf16", (1,)),
        ("llama-3.1-8b", "int4", 32, "int8", (1,)),
        ("llama-3.1-8b", "int4", 256, "bf16", (1,)),
        ("llama-3.2-1b", "bf16", 0, "bf16", (1,)),
        ("gpt2", "bf16", 0, "bf16", (1,)),
        ("gpt2", "int8", 64, "f32", (1, 2, 128)),
        ("gpt2", "int4", 32, "f32", (4, 128)),
        ("gpt2-xl", "int4", 32, "bf16", (1,)),
        ("llama-2-70b", "int4", 64, "bf16", (1,)),
    ],
)
def test_steps_compile_for_a_gpu(
    name: str, format: str, group: int, kv_dtype: str, rows: tuple[int, ...], compiled: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Steps of full-size models, on tensors without memory: every kernel fits a program's 227 KiB of shared memory.

    Of one row, products load weights 16 bytes at once, and spill no registers.
    """
    import torch

    from pronghorn.models import model_for
    from pronghorn.ops import gpu
    from pronghorn.ops import gpu_kernels as kernels

    monkeypatch.setattr(gpu, "kernels_for", lambda device: kernels)
    config = bench().config_of(name)
    config = config | dict.fromkeys({"n_layer", "num_hidden_layers"} & set(config), 1)
    model = model_for(config)
    weights = bench().random_weights(model, format, group, "meta")
    runner = gpu.TorchRunner(model, weights, n_pages=64, kv_dtype=kv_dtype, device="meta")
    for n in rows:
        zeros = torch.zeros(n, dtype=torch.int32, device="meta")
        logits = gpu.Step(runner, zeros, zeros, zeros[:, None].expand(n, runner.width).contiguous()).run()
        assert logits.shape == (n, model.config.vocab_size)
    kinds = {key.split()[0] for key in compiled}
    assert kinds >= {"matvec_kernel", "embed_kernel", "attend_kernel"}
    assert ("matmul_kernel" in kinds) == (max(rows) > 8 and format != "bf16")


@needs_triton
def test_the_race_compiles_for_a_gpu(compiled: dict[str, Any]) -> None:
    import torch

    from pronghorn.ops import gpu_kernels

    gpu_kernels.race(torch.empty(3, 128256), [0.0] * 3, [1] * 3, [2] * 3)
    assert len(compiled) == 2


# --- memory --------------------------------------------------------------------------------------------------------


def test_the_devices_memory_holds_keys_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, not of this machine; what its weights will take is not free."""
    import torch

    from pronghorn.loading import memory_of, pages_for, total_bytes

    with LLM(save_tiny(tmp_path), device="torch:cpu") as llm:
        weights = llm._weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {"cuda:1": (2**30, 2**60)}[device])
    assert total_bytes(weights.values()) > 10_000
    memory = memory_of("cuda:1", weights)
    assert memory == (2**60, 2**30 - total_bytes(weights.values()))
    assert pages_for(2**20, 64, 16, 2**50, memory) == 2**25
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="device is 'cuda'"):
            LLM(tmp_path, device="cuda")


# --- quantizing ----------------------------------------------------------------------------------------------------


def edges(n_out: int, n_in: int) -> np.ndarray:
    """Weights of which the rows differ in kind: usual ones, one sign, zeros of both, constants, ties, tiny, large."""
    rng = np.random.default_rng(n_in)
    w = rng.standard_normal((n_out, n_in), np.float32) * np.float32(0.05)
    w[1], w[2] = abs(w[1]), -abs(w[2])
    w[3], w[4], w[5] = 0, -0.0, np.where(rng.random(n_in) < 0.5, np.float32(-0.0), np.float32(0))
    w[6], w[7] = 0.3, -0.7
    w[8] = rng.integers(-15, 16, n_in) / 2  # halves are rounded to even
    w[9], w[10] = w[9] * 1e-6, w[10] * 1e-38  # scales are subnormal in f16, or nothing
    w[11] = w[11] / abs(w[11]).max() * 60000
    w[12, ::3], w[13, 5:] = 0, -0.0
    w[14] = np.maximum(w[14], 0)
    return w


@pytest.mark.parametrize("form", list(FORMATS))
def test_a_device_quantizes_as_the_cpu_does(form: str) -> None:
    """Bit for bit: codes, scales and minima, in each dtype and order, with a short last group."""
    import torch

    from pronghorn.ops import gpu_weights

    target, device = FORMATS[form], torch.device("cpu")
    gpu_weights.CHUNK = 1000  # rows are taken in several parts
    for n_in, kind, turned in ((256, "f32", False), (300, "bf16", False), (20, "f16", True), (300, "f32", True)):
        values = edges(16, n_in)[: 16 if kind == "f32" else 15]
        tensor = torch.from_numpy(values.T.copy() if turned else values).to(gpu_weights.DTYPES[kind])
        data = memoryview(tensor.view(torch.uint8).numpy().reshape(-1))
        parameter = Parameter(tuple(tensor.shape), "matrix", turned)
        ours = quantize.unquantized({"w": parameter}, {"w": Tensor("w", kind, parameter.shape, data)}, "int4")["w"]
        size = packed_size(target.format, *values.shape, target.group, target.symmetric)
        room = memoryview(bytearray(size))
        pack(data, kind, *values.shape, turned, room, *target, Pool(1))
        want = gpu_weights.codes_of(quantize.weight(parameter, target, room), device)  # type: ignore[arg-type]
        got = gpu_weights.quantized(ours._replace(**target._asdict()), device)
        for one, other in zip(want, got, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.dtype == other.dtype
                assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
def test_what_cannot_be_quantized_is_refused_as_on_the_cpu(tmp_path: Path, dtype: str, value: float) -> None:
    from safetensors.numpy import load_file, save_file

    path = save_tiny(tmp_path)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, path / "model.safetensors")
    said = []
    for device in ("cpu", "torch:cpu"):
        with pytest.raises(CheckpointError, match=f"^tensor {name} .f32. holds values that are not finite") as caught:
            LLM(path, dtype, device)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_packed_file_is_loaded_as_it_is(tmp_path: Path) -> None:
    """What `pronghorn quantize` has packed is not quantized again."""
    import torch

    from pronghorn.ops import gpu_weights

    path, packed = save_tiny(tmp_path / "plain"), tmp_path / "packed"
    assert main(["quantize", str(path), str(packed), "--format", "int8-g32"]) == 0
    with LLM(packed, device="torch:cpu") as ours:
        found = [w for w in ours._weights.values() if isinstance(w, Int8)]
        assert len(found) == 15
        assert not [w for w in ours._weights.values() if isinstance(w, Unquantized)]
        for w in found:
            got = gpu_weights.Weights(torch.device("cpu"), None).load(w)
            np.testing.assert_array_equal(got.numpy(), unpack(w))


# --- bench/gpu.py --------------------------------------------------------------------------------------------------


def test_bench_runs_on_tiny_sizes(tmp_path: Path) -> None:
    module = bench()
    rows = module.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text()) == rows
    by_section = {row["section"]: row for row in rows}
    assert set(by_section) == {"device", "prompt", *module.SECTIONS} - {"tune"}
    assert by_section["speculation"]["same_tokens"] is True
    assert by_section["speculation"]["accepted"] == 1
    assert {row["model"] for row in rows if row.get("peer") == "method"} == {"tiny", "tiny-gpt2"}
    assert not [row for row in rows if "failed" in row]


FAILING = """import sys, time, os, test_gpu
bench = test_gpu.bench()
bench.SECTIONS |= {
    "raises": (1, lambda r: 1 / 0), "hangs": (1e-9, lambda r: time.sleep(999)), "dies": (1, lambda r: os.abort()),
    "works": (1, lambda r: r.add("works", gb_s=1.0)),
}
bench.GRACE = 0
bench.main(["--device", "cpu", "--tiny", "--apart", "--sections", "raises,hangs,dies,works", "--json", sys.argv[1]])
"""


def test_a_section_that_fails_does_not_take_the_others_along(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FILE.parent), *sys.path])}
    subprocess.run([sys.executable, "-c", FAILING, str(file)], check=True, capture_output=True, env=environment)
    by_section = {row["section"]: row for row in json.loads(file.read_text())}
    assert by_section["raises"]["failed"] == "ZeroDivisionError: division by zero"
    assert "did not end" in by_section["hangs"]["failed"]
    assert "ended with -6" in by_section["dies"]["failed"]
    assert by_section["works"]["share"] > 0


# --- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_tensors_make_up_the_whole(size: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 255, (8, 12, 4), np.uint8)
    tensor = Tensor("t", "f32", (8, 12), memoryview(values.reshape(-1)))

    def parts(of: Tensor, axis: int, times: int = 1) -> list[np.ndarray]:
        found = [parallel.part_of(of, axis, rank, size, times) for rank in range(size)]
        return [np.frombuffer(part.data, np.uint8).reshape(*part.shape, -1) for part in found]

    for axis in (0, 1):
        np.testing.assert_array_equal(np.concatenate(parts(tensor, axis), axis), values)
    if size == 2:
        three = [np.split(part, 3, axis=1) for part in parts(tensor, 1, times=3)]
        whole = np.concatenate([np.concatenate(pieces, axis=1) for pieces in zip(*three, strict=True)], axis=1)
        np.testing.assert_array_equal(whole, values)
    odd = Tensor("t", "f32", (7, 12), memoryview(values[:7].reshape(-1)))
    filled = np.concatenate(parts(odd, 0))
    np.testing.assert_array_equal(filled[:7], values[:7])
    assert not filled[7:].any()
    blocks = Tensor("t", "q4_0", (4, 64 * size), memoryview(rng.integers(0, 255, 4 * 2 * size * 18, np.uint8)))
    pieces = [parallel.part_of(blocks, 1, rank, size).data for rank in range(size)]
    joined = np.concatenate([np.frombuffer(piece, np.uint8).reshape(4, -1) for piece in pieces], axis=1)
    np.testing.assert_array_equal(joined.reshape(-1), np.frombuffer(blocks.data, np.uint8))
    with pytest.raises(ConfigError, match="cannot be divided"):
        parallel.part_of(blocks._replace(shape=(2 * size, 64)), 1, 0, 2 * size)


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    with pytest.raises(ConfigError, match="2 key-value heads cannot be divided"):
        LLM(path, device="torch:cpu", tensor_parallel=4)
    for more, message in (
        ({}, "device 'cpu' has no ranks"),
        ({"device": "torch:cpu", "tensor_parallel": 0}, "tensor_parallel is 0"),
    ):
        with pytest.raises(ParameterError, match=message):
            LLM(path, **{"tensor_parallel": 2, **more})  # type: ignore[arg-type]


def in_a_process(function: Callable[..., None], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Calls a function of this file in a fresh interpreter: a process has one group of ranks."""
    code = f"import sys; sys.path.insert(0, {str(FILE.parent)!r}); import test_gpu; test_gpu.{function.__name__}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{code}(*{arguments!r})"], capture_output=True, text=True, check=False
    )


def four_ranks(path: str) -> None:
    """Logits and tokens as one rank's."""
    ids = [(7 * i) % 258 for i in range(40)]
    params = [SamplingParams(max_tokens=8, temperature=t, seed=1, n=2) for t in (0.0, 1.0)]
    with LLM(path) as alone, LLM(path, device="torch:cpu", tensor_parallel=4) as ranks:
        want, got = alone.logits(ids), ranks.logits(ids)
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-4 * want.std()
        tokens = [[out.token_ids for out in llm.generate(["hello", "a"], params)] for llm in (alone, ranks)]
        assert tokens[0] == tokens[1]


def test_four_ranks_are_as_one(tmp_path: Path) -> None:
    save_tiny(tmp_path, num_attention_heads=8, num_key_value_heads=4, vocab_size=259, tie_word_embeddings=False)
    done = in_a_process(four_ranks, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def drafts_of_two_ranks(path: str, other: str) -> None:
    """Tokens as one rank's without drafts: of the model's own copy, on the same keys and values, and of another."""
    params = [SamplingParams(max_tokens=12, temperature=t, seed=3, ignore_eos=True) for t in (0.0, 0.9)]
    with LLM(path, device="torch:cpu") as alone:
        want = [out.token_ids for out in alone.generate(["hello", "a"], params)]
    for draft in ("self-int8", other):
        with LLM(path, device="torch:cpu", draft=draft, tensor_parallel=2) as ranks:
            assert ranks._engine
            assert ranks._engine.speculator
            ranks._engine.speculator.lengths = 3
            assert [out.token_ids for out in ranks.generate(["hello", "a"], params)] == want
            assert ranks.stats().accepted_tokens > 0


def test_ranks_have_drafts(tmp_path: Path) -> None:
    path, other = (save_tiny(tmp_path / name) for name in ("model", "draft"))
    done = in_a_process(drafts_of_two_ranks, str(path), str(other))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_draft_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    odd = save_tiny(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    with pytest.raises(ConfigError, match="3 heads cannot be divided"):
        LLM(save_tiny(tmp_path / "model"), device="torch:cpu", draft=odd, tensor_parallel=2)


def two_ranks(gpt2: str) -> None:
    """The same of GPT-2, whose q, k and v are one matrix, in the file's order; then a rank is killed."""
    ids = list(range(30))
    with LLM(gpt2, device="torch:cpu") as alone:
        want = alone.logits(ids)
    ranks = LLM(gpt2, device="torch:cpu", tensor_parallel=2)
    got = ranks.logits(ids)
    assert np.abs(got - want).max() < 1e-4 * want.std()
    group: Any = ranks._group
    group.crew.processes[0].kill()
    ranks.generate(ids, SamplingParams(max_tokens=20, ignore_eos=True))
    print("went on")


def test_the_end_of_a_rank_is_the_end_of_all(tmp_path: Path) -> None:
    sizes = {"vocab_size": 67, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    save_random({"model_type": "gpt2", **sizes}, tmp_path)
    done = in_a_process(two_ranks, str(tmp_path))
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr == "pronghorn: rank 1 of 2 ended (SIGKILL): it said nothing\n"


def save_random(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of any configuration, with random weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    parameters = model_for(config).parameters()
    save_file(
        {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in parameters.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
