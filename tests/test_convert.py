"""Converting: from every source, into safetensors and GGUF, with nothing changed that is not said."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import sources
import variants
from pronghorn import LLM, SamplingParams, _native
from pronghorn.cli import main
from pronghorn.convert import convert, row_order
from pronghorn.errors import CheckpointError, ParameterError, PronghornError
from pronghorn.models import model_for
from pronghorn.quantize import quantize
from pronghorn.text import open_tokenizer
from pronghorn.text.export import SAMPLES
from pronghorn.weights import TokenizerSource, open_checkpoint, writing
from test_sources import FIXTURE, TOKENS, array, parts
from tiny import save_tiny

# What GGUF has no place for, and the word that says so.
REFUSED = {
    "gpt2-untied-gelu": "activation is gelu, ",
    "gpt2-inner-narrow-relu": "activation is relu, ",
    "gpt2-unscaled": r"scale is 1\.0, ",
    "gpt2-by-layer": "scale is ",
    "llama-mqa-gelu": "activation is gelu_new, ",
    "llama-yarn-mscale": "the scaling of its rotation",
    "qwen2-sliding": "window is 9, ",
    "qwen3-sliding-bias": "sliding_window",
}
ODD_SCALING = "llama3"  # its parameters are not those of a released model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("variants")
    return lambda name: folder / name if (folder / name).exists() else variants.save(name, folder)


def logits(path: Path, ids: list[int]) -> np.ndarray:
    with LLM(path, device="reference") as llm:
        return llm.logits(ids)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_to_gguf_and_back(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The same logits from GGUF as from the source, and transformers' from what GGUF becomes again."""
    source, ids, there = saved(name), variants.prompt(name), tmp_path / "there.gguf"
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=rf"{name}: .*{REFUSED[name]}"):
            convert(source, there)
        assert list(tmp_path.iterdir()) == []
        return
    convert(source, there)
    expected = logits(source, ids)
    assert np.abs(logits(there, ids) - expected).max() < 1e-6  # frequencies and eps are f32 in GGUF
    if name == ODD_SCALING:
        with pytest.raises(CheckpointError, match=r"its rope_freqs are not those of Llama 3\.1"):
            convert(there, tmp_path / "back")
        return
    convert(there, tmp_path / "back")
    assert np.abs(variants.logits(tmp_path / "back", ids) - expected).max() < 3e-5
    before, after = open_checkpoint(source).tensors, open_checkpoint(tmp_path / "back").tensors
    assert {key for key in before if "lm_head" not in key} == {key for key in after if "lm_head" not in key}
    for key, tensor in after.items():
        assert np.array_equal(array(tensor), array(before[key])), key


def test_the_scaling_of_llama_3_1_comes_back(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    source = save_worded(tmp_path / "tiny", rope_scaling=scaling, rope_theta=500000.0, max_position_embeddings=131072)
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"] == scaling


@pytest.mark.parametrize(("ranks", "rows"), [(1, False), (2, False), (2, True)])
def test_meta(saved: Callable[[str], Path], tmp_path: Path, ranks: int, rows: bool) -> None:
    arrays, config = parts(saved("llama-gqa"))
    arrays = {key: value[:100] if len(value) == 101 else value for key, value in arrays.items()}
    source = sources.save_meta(tmp_path / "meta", arrays, config, ranks=ranks, rows=rows)
    convert(source, tmp_path / "hf")
    tensors = open_checkpoint(tmp_path / "hf").tensors
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(array(tensor), arrays[name]), name
    convert(source, tmp_path / "m.gguf")
    ids = [1, 5, 99, 3]
    assert np.array_equal(logits(tmp_path / "m.gguf", ids), logits(tmp_path / "hf", ids))
    assert np.abs(variants.logits(tmp_path / "hf", ids) - logits(tmp_path / "hf", ids)).max() < 3e-5


def test_turned_views(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A PyTorch file of views that cannot be mapped is converted, and not run."""
    import torch

    arrays, _ = parts(saved("llama"))
    source = tmp_path / "source"
    source.mkdir()
    state = {
        name: torch.from_numpy(a.T.copy()).t() if a.ndim == 2 else torch.from_numpy(a) for name, a in arrays.items()
    }
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be mapped as they lie"):
        LLM(source)
    convert(source, tmp_path / "hf")
    for name, tensor in open_checkpoint(tmp_path / "hf").tensors.items():
        assert np.array_equal(array(tensor), arrays[name]), name
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config | {"torch_dtype": "float32"}


def test_tensorflow(tmp_path: Path) -> None:
    expected = json.loads((FIXTURE / "logits.json").read_text())
    convert(FIXTURE, tmp_path / "hf")
    convert(FIXTURE, tmp_path / "m.gguf")
    table = np.array(expected["logits"])
    assert np.abs(variants.logits(tmp_path / "hf", expected["tokens"]) - table).max() < 1e-5
    assert np.abs(logits(tmp_path / "m.gguf", expected["tokens"]) - table).max() < 1e-5
    assert not list((tmp_path / "hf").glob("tokenizer*"))


def test_llama2c(saved: Callable[[str], Path], tmp_path: Path) -> None:
    arrays, config = parts(saved("llama-gqa"))
    (tmp_path / "m.bin").write_bytes(sources.llama2c(arrays, config))
    convert(tmp_path / "m.bin", tmp_path / "hf")
    for name, tensor in open_checkpoint(tmp_path / "hf").tensors.items():
        assert np.array_equal(array(tensor), arrays[name]), name


def test_fastgpt(saved: Callable[[str], Path], tmp_path: Path) -> None:
    arrays, config = parts(saved("gpt2"))
    source = sources.save_fastgpt(tmp_path / "model.gguf", arrays, config, [*TOKENS, "[last]"], ["a b", "ab c"])
    convert(source, tmp_path / "hf")
    convert(source, tmp_path / "other.gguf")
    for name, tensor in open_checkpoint(tmp_path / "hf").tensors.items():
        assert np.array_equal(array(tensor), arrays[name]), name
    for path in (tmp_path / "hf", tmp_path / "other.gguf"):
        with LLM(path) as llm:
            assert llm.tokenizer.encode("abcab!a") == [95, 94, 1, 65]
            assert llm.tokenizer.eos_ids == (0,)


# Types --------------------------------------------------------------------------------------------------------


def save_worded(folder: Path, **config: Any) -> Path:
    """The tiny model, with a tokenizer that GGUF has words for: GPT-2's cuts, and two merges."""
    save_tiny(folder, vocab_size=260, **config)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["use_regex"] = True
    spec["model"]["vocab"] |= {"<s>": 256, "</s>": 257, "he": 258, "th": 259}
    spec["model"]["merges"] = [["h", "e"], ["t", "h"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks, but for the MLP's last."""
    return save_worded(tmp_path_factory.mktemp("wide") / "model", hidden_size=64, intermediate_size=80)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_types(wide: Path, tmp_path: Path, kind: str) -> None:
    """Each type as the gguf package makes and reads it; what is no matrix stays f32."""
    path = tmp_path / "m.gguf"
    remarks = convert(wide, path, kind)
    assert [line for line in remarks if "matrices" in line] == (
        [f"2 matrices stay in f16: their rows are no multiple of 32, as {kind} asks for"] if kind[0] == "q" else []
    )
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    source = {name: array(tensor) for name, tensor in open_checkpoint(wide).tensors.items()}
    pairs = {"blk.1.attn_q.weight": ("model.layers.1.self_attn.q_proj.weight", 4), "token_embd.weight": ("", 0)}
    pairs |= {"blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", 0), "output_norm.weight": ("", 0)}
    for name, (full, heads) in pairs.items():
        full = full or {"token_embd.weight": "model.embed_tokens.weight"}.get(name, "model.norm.weight")
        values = sources.in_pairs(source[full], heads) if heads else source[full]
        expected = "f32" if values.ndim == 1 else "f16" if kind[0] == "q" and "down" in name else kind
        assert read[name].tensor_type.name.lower() == expected
        made = gguf.quants.quantize(values, read[name].tensor_type)
        assert read[name].data.tobytes() == made.tobytes(), name
    ids = [1, 200, 3, 44]
    off = np.abs(logits(path, ids) - logits(wide, ids)).max()
    assert off < 1e-6 if kind == "f32" else off > 1e-6


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_folder_of_another_type(wide: Path, tmp_path: Path, kind: str) -> None:
    import torch

    convert(wide, tmp_path / "hf", kind)
    before, after = open_checkpoint(wide).tensors, open_checkpoint(tmp_path / "hf").tensors
    to = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    for name, tensor in after.items():
        expected = torch.from_numpy(array(before[name]).copy()).to(to)
        assert tensor.dtype == kind
        assert bytes(tensor.data) == expected.view(torch.uint8).numpy().tobytes(), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(to).removeprefix("torch.")


def test_blocks_are_taken_over_bit_for_bit(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "a.gguf", "q4_1")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    convert(tmp_path / "a.gguf", tmp_path / "hf")  # where they are f32, exactly
    with LLM(tmp_path / "a.gguf", dtype="f32", device="reference") as llm:
        assert np.abs(llm.logits([1, 2, 3]) - logits(tmp_path / "hf", [1, 2, 3])).max() < 1e-6


def test_quantize_is_ggml_s() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2000, 64)).astype(np.float32)
    x[:500] *= np.exp(8 * rng.standard_normal((500, 1))).astype(np.float32).clip(1e-9, 1e4)
    x[500], x[501], x[502, :40] = 0, -0.0, 5
    x[503:600] = np.round(x[503:600] * 4) / 4  # ties
    for kind in writing.QUANTIZED:
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()])
        assert np.array_equal(writing.quantize(x, kind).reshape(expected.shape), expected), kind
    for value, message in ((np.nan, "not finite"), (np.inf, "not finite"), (1e9, "too large")):
        x[0, 0] = value
        for kind in writing.QUANTIZED:
            with pytest.raises(ValueError, match=message):
                writing.quantize(x, kind)


def test_values_too_large(wide: Path, tmp_path: Path) -> None:
    folder = save_worded(tmp_path / "large")
    tensor = open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    at = data.index(bytes(tensor.data[:64]))
    data[at : at + 4] = np.float32(1e8).tobytes()
    (folder / "model.safetensors").write_bytes(data)
    for kind, message in (("f16", "too large for f16: use bf16 or f32"), ("q8_0", "too large|too large for f16")):
        with pytest.raises(CheckpointError, match=rf"tensor model\.layers\.0\.mlp\.up_proj\.weight.*{message}"):
            convert(folder, tmp_path / "m.gguf", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_row_order() -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((24, 3))
    paired = q[row_order(24, 6, interleaved=True)]
    assert np.array_equal(paired, sources.in_pairs(q, 4))
    assert np.array_equal(paired[row_order(24, 6, interleaved=False)], q)


# Tokenizers ---------------------------------------------------------------------------------------------------


def test_tokenizers_go_along(tmp_path: Path) -> None:
    """A byte-level tokenizer with its template: the same ids in the folder, in GGUF, and back; transformers agrees."""
    source = save_worded(tmp_path / "tiny")
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "hf")
    convert(source, tmp_path / "copy")
    opened = {name: open_checkpoint(tmp_path / name).tokenizer for name in ("tiny", "m.gguf", "hf", "copy")}
    tokenizers = {name: open_tokenizer(source) for name, source in opened.items()}
    with variants.quiet() as transformers:
        official = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in SAMPLES:
        assert {tuple(tokenizer.encode(text)) for tokenizer in tokenizers.values()} == {tuple(official.encode(text))}
    for tokenizer in tokenizers.values():
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (256, (257,))
        assert tokenizer.chat_template == tokenizers["tiny"].chat_template != ""
    assert gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.pre")


def test_a_pre_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="GGUF has no words for a tokenizer that is cut by"):
        convert(source, tmp_path / "m.gguf")


def test_sentencepiece_goes_along(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "models" / "stories260K"
    for names in (("tokenizer.json",), ("tokenizer.model",)):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer_config.json", *names):
            (folder / name).write_bytes((source / name).read_bytes())
        remarks = convert(folder, path := tmp_path / f"{names[0]}.gguf")
        assert [line for line in remarks if "several in a row" in line] == remarks
        ours, theirs = (open_tokenizer(open_checkpoint(p).tokenizer) for p in (path, source / "stories260K.gguf"))
        for text in SAMPLES:
            assert ours.encode(text) == theirs.encode(text)
        golden = (source / "golden.txt").read_text().strip()
        with LLM(path) as llm:
            out = llm.generate("", SamplingParams(max_tokens=60))
            assert golden.startswith(out.text.strip()[:100])


def test_openai_tokenizer(test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """encoder.json and vocab.bpe become files that transformers knows, and GGUF's lists."""
    source = tmp_path / "source"
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 8, "n_embd": 8, "n_head": 1, "n_layer": 1}
    rng = np.random.default_rng(0)
    shapes = {name: p.shape for name, p in model_for(config).parameters().items()}
    arrays = {f"transformer.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    monkeypatch.setattr(sources, "crc32c", _native.crc32c)  # the tests' own takes seconds for a megabyte
    sources.save_openai(source, arrays, config)
    for name in ("encoder.json", "vocab.bpe"):
        (source / name).write_bytes((test_data / "models" / "gpt2-tokenizer" / name).read_bytes())
    convert(source, tmp_path / "hf")
    convert(source, tmp_path / "m.gguf")
    with variants.quiet() as transformers:
        official = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "hf")
    prompt = SAMPLES[0]
    assert open_tokenizer(TokenizerSource(folder=tmp_path / "hf")).encode(prompt) == official.encode(prompt)
    assert open_tokenizer(open_checkpoint(tmp_path / "m.gguf").tokenizer).encode(prompt)[:3] == [36235, 39141, 18765]


def test_the_default_model(default_model: Path, tmp_path: Path) -> None:
    """Every tensor of a real file is taken over, and its tokenizer."""
    convert(default_model, tmp_path / "m.gguf")
    before, after = (open_checkpoint(path) for path in (default_model, tmp_path / "m.gguf"))
    assert {name: (t.dtype, bytes(t.data)) for name, t in before.tensors.items()} == {
        name: (t.dtype, bytes(t.data)) for name, t in after.tensors.items()
    }
    assert before.tokenizer.gguf is not None
    assert after.tokenizer.gguf is not None
    for key in before.tokenizer.gguf:
        if key.startswith("tokenizer."):
            assert before.tokenizer.gguf[key] == after.tokenizer.gguf[key]


# The command --------------------------------------------------------------------------------------------------


def test_the_command(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    assert main(["convert", str(wide), str(path), "--type", "q8_0"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}\n"
    assert err == "pronghorn: 2 matrices stay in f16: their rows are no multiple of 32, as q8_0 asks for\n"
    before = path.read_bytes()
    assert main(["convert", str(wide), str(path)]) == 2
    assert "exists already: choose another name, or --force" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main(["convert", str(wide), str(path), "--force"]) == 0
    assert path.read_bytes() != before
    assert main(["generate", "-m", str(path), "a", "-n", "2", "-q"]) == 0


def test_mistakes(wide: Path, tmp_path: Path) -> None:
    for destination, kind, error, message in (
        ("m.gguf", "q5_0", ParameterError, "expected one of auto, f32"),
        ("folder", "q8_0", ParameterError, "q8_0 is a type of GGUF files"),
    ):
        with pytest.raises(error, match=message):
            convert(wide, tmp_path / destination, kind)
    for force, destination in ((True, wide), (True, wide / "model.safetensors")):
        with pytest.raises(PronghornError, match=r"the source itself|is no folder"):
            convert(wide, destination, force=force)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ParameterError, match="is a folder"):
        convert(wide, tmp_path / "folder.gguf", force=True)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert(tmp_path / "none", tmp_path / "x")
    assert open_checkpoint(wide).tensors


def test_the_source_is_not_replaced(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a folder that it lies in: however both are spelled, and where links lead to it."""
    models, files = tmp_path / "models", tmp_path / "files"
    shutil.copytree(wide, models / "m")
    shutil.copytree(wide, models / "linked")
    files.mkdir()
    for name in ("model.safetensors", "config.json"):  # as the Hub's cache has them
        (models / "linked" / name).rename(files / name)
        (models / "linked" / name).symlink_to(files / name)
    (tmp_path / "link").symlink_to(models / "m")
    (models / "other").symlink_to(files)
    monkeypatch.chdir(tmp_path)
    for source, destination in (
        ("models/m", f"{tmp_path}/models/m"), (f"{tmp_path}/models/m", "models"), ("models/m", "models"),
        ("models/m", "./models/../models/m"), ("models/../models/m", tmp_path), ("link", "models"),
        ("link", "models/m"), ("models/m", "link"), ("models/linked", f"{tmp_path}/models/linked"),
        ("models/linked", "files"), ("models/other", models), ("models/m/model.safetensors", "models"),
    ):  # fmt: skip
        for write in (convert, quantize):
            with pytest.raises(ParameterError, match="is the source itself"):
                write(source, destination, force=True)
    assert open_checkpoint(models / "m").tensors
    monkeypatch.chdir(models / "linked")
    convert("../m", "../new")
    convert("../m", "../new", force=True)
    assert open_checkpoint(models / "new").tensors


def test_force_replaces_a_folder(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").write_text("")
    convert(wide, tmp_path / "hf", force=True)
    assert not (tmp_path / "hf" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_force_replaces_a_link_and_not_what_it_leads_to(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("")
    (tmp_path / "hf").symlink_to(tmp_path / "kept")
    convert(wide, tmp_path / "hf", force=True)
    assert open_checkpoint(tmp_path / "hf").tensors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "kept"]
    assert (tmp_path / "kept" / "old").exists()


def test_what_cannot_be_replaced_stays(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").write_text("")

    def rename(path: Path, target: Path, original: Callable[[Path, Path], Path] = Path.rename) -> Path:
        if path.name.startswith(".converting-") and not path.name.endswith("-old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="hf: Input/output error"):
        convert(wide, tmp_path / "hf", force=True)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["hf", "hf/old"]


@pytest.mark.parametrize("destination", ["m.gguf", "hf"])
@pytest.mark.parametrize("function", ["fsync", "write"])
def test_a_full_disk_leaves_nothing(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str, function: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if function == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(writing, "write_all", full)
    with pytest.raises(CheckpointError, match=rf"{destination}.*: No space left on device$"):
        convert(wide, tmp_path / destination)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_bytes_of", interrupt)
    for destination in ("m.gguf", "hf"):
        with pytest.raises(KeyboardInterrupt):
            convert(wide, tmp_path / destination)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded_by_a_tensor(tmp_path: Path) -> None:
    """What a conversion takes grows with the largest tensor, and not with the number of layers."""
    import tracemalloc

    source = save_worded(tmp_path / "tiny", hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    for destination, kind in (("m.gguf", "q8_0"), ("half.gguf", "f16"), ("hf", "bf16")):
        tracemalloc.start()
        convert(source, tmp_path / destination, kind)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12_000_000 < (source / "model.safetensors").stat().st_size / 3
