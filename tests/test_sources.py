"""Models in older formats: each reader against a writer of its format, tensor for tensor, and against transformers."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import sources
import variants
from pronghorn import LLM, _native
from pronghorn.errors import CheckpointError
from pronghorn.weights import open_checkpoint, open_source
from pronghorn.weights.tensorflow import snappy
from pronghorn.weights.torch import read_torch
from pronghorn.weights.types import Made, Tensor

FIXTURE = Path(__file__).parent / "fixtures" / "tensorflow_gpt2"
TOKENS = ["<|endoftext|>", *(chr(i) for i in range(33, 126)), "ab", "abc"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of transformers, of some variants."""
    folder = tmp_path_factory.mktemp("variants")
    return {name: variants.save(name, folder) for name in ("gpt2", "llama", "llama-gqa", "llama-tied")}


def parts(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A checkpoint's arrays, and its config with what transformers leaves out."""
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def array(tensor: Tensor) -> np.ndarray:
    kind = {
        "f32": "<f4",
        "f64": "<f8",
        "f16": "<f2",
        "bf16": "<u2",
        "i64": "<i8",
        "bool": "?",
        "u8": "u1",
        "i32": "<i4",
    }
    return np.frombuffer(tensor.data, kind[tensor.dtype]).reshape(tensor.shape)


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()


def same_logits(path: Path, original: Path, name: str) -> None:
    """The reference house computes from `path` what transformers computes from the original."""
    ids = variants.prompt(name, 20)
    with LLM(path, device="reference") as llm:
        assert np.abs(llm.logits(ids) - variants.logits(original, ids)).max() < 3e-5


# TensorFlow ---------------------------------------------------------------------------------------------------


def test_crc32c() -> None:
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    data = np.random.default_rng(0).bytes(100)
    for begin in (0, 1, 5):
        for end in range(begin, 100):
            assert _native.crc32c(memoryview(data)[begin:end]) == sources.crc32c(data[begin:end])


def test_a_checkpoint_that_tensorflow_wrote() -> None:
    checkpoint = open_checkpoint(FIXTURE)
    assert checkpoint.format == "tensorflow"
    assert checkpoint.tensors["h.0.attn.c_attn.weight"].shape == (8, 24)
    expected = json.loads((FIXTURE / "logits.json").read_text())
    for device in ("cpu", "reference"):
        with LLM(FIXTURE, device=device) as llm:
            assert np.abs(llm.logits(expected["tokens"]) - np.array(expected["logits"])).max() < 1e-5


@pytest.mark.parametrize(("shards", "compress"), [(1, False), (3, False), (1, True)])
def test_openai_folders(folders: dict[str, Path], tmp_path: Path, shards: int, compress: bool) -> None:
    arrays, config = parts(folders["gpt2"])
    path = sources.save_openai(tmp_path / "openai", arrays, config, shards=shards, compress=compress)
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.files) == shards
    assert set(checkpoint.tensors) == {name.removeprefix("transformer.") for name in arrays}
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(array(tensor), arrays[f"transformer.{name}"]), name
    same_logits(path, folders["gpt2"], "gpt2")


def test_snappy() -> None:
    rng = np.random.default_rng(1)
    for size in (0, 1, 59, 60, 61, 70, 300, 3000):
        for alphabet in (1, 2, 200):
            data = rng.integers(0, alphabet, size, np.uint8).tobytes()
            assert snappy(memoryview(sources.snappy(data))) == data


def test_damaged_bundles(folders: dict[str, Path], tmp_path: Path) -> None:
    arrays, config = parts(folders["gpt2"])
    path = sources.save_openai(tmp_path / "openai", arrays, config)
    data, index = path / "model.ckpt.data-00000-of-00001", path / "model.ckpt.index"
    whole, table = data.read_bytes(), index.read_bytes()
    data.write_bytes(whole[:-1])
    refused(path, r"data-00000-of-00001: tensor model/\S+: its data, \d+ to \d+, ends after the file")
    data.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    refused(path, r"tensor model/\S+: is damaged: its checksum differs")
    data.write_bytes(whole)
    for at in range(0, len(table) - 48, 7):
        index.write_bytes(table[:at] + bytes([table[at] ^ 16]) + table[at + 1 :])
        refused(path, r"model\.ckpt\.index: .* damaged|is said to be|is not part of GPT-2")
    index.write_bytes(table[:-1])
    refused(path, "last eight bytes")
    index.write_bytes(table)
    (path / "hparams.json").write_text(json.dumps({"n_vocab": 97}))
    refused(path, r"hparams\.json: n_ctx is missing")
    (path / "hparams.json").write_text(json.dumps({"n_vocab": 97, "res_dropout": 0.1}))
    refused(path, r"res_dropout is 0\.1, which is not implemented")
    (path / "checkpoint").write_text("model_checkpoint_path: 3")
    (path / "hparams.json").write_text(json.dumps(json.loads((FIXTURE / "hparams.json").read_text())))
    refused(path, "names no model_checkpoint_path")


# PyTorch ------------------------------------------------------------------------------------------------------


def tensors_to_save() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return {
        "plain": base.clone(),
        "view": base[2:4],
        "also a view": base.view(48)[5:9],
        "turned": base.t(),
        "strided": base[::2, 1::3],
        "one column": base[:, 3],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "bfloat turned": base.bfloat16().t(),
        "double": base.double(),
        "long": torch.arange(5),
        "bool": base > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base.clone()),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pytorch_files(tmp_path: Path, legacy: bool, protocol: int) -> None:
    saved = OrderedDict(tensors_to_save())
    saved._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as a state_dict has it
    path = tmp_path / "model.bin"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    tensors = read_torch(path, memoryview(path.read_bytes()))
    assert list(tensors) == list(saved)
    for name, tensor in tensors.items():
        expected = saved[name].detach()
        assert tensor.shape == tuple(expected.shape)
        raw = expected.contiguous().view(torch.uint8) if expected.ndim else expected.reshape(1).view(torch.uint8)
        assert bytes(tensor.data) == raw.numpy().tobytes(), name
    made = {name for name, tensor in tensors.items() if isinstance(tensor, Made)}
    assert made == {"turned", "strided", "one column", "bfloat turned"}


def test_a_dictionary_within(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for wrapped in ({"model": tensors_to_save()}, {"state_dict": tensors_to_save(), "epoch": 3, "rates": (0.1, [2])}):
        torch.save(wrapped, path)
        assert "plain" in read_torch(path, memoryview(path.read_bytes()))


@pytest.mark.parametrize("legacy", [False, True])
def test_hugging_face_bin(folders: dict[str, Path], tmp_path: Path, legacy: bool) -> None:
    for name in ("gpt2", "llama-tied"):
        arrays, _ = parts(folders[name])
        state = {key: torch.from_numpy(value) for key, value in arrays.items()}
        if name == "gpt2":
            state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 80, 80, dtype=torch.uint8)  # as old files have it
            state["lm_head.weight"] = state["transformer.wte.weight"]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        for path in (folder, folder / "pytorch_model.bin"):
            assert open_checkpoint(path).format == "torch"
            same_logits(path, folders[name], name)


def test_sharded_bin(folders: dict[str, Path], tmp_path: Path) -> None:
    arrays, _ = parts(folders["llama"])
    names = list(arrays)
    files = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in files.items():
        torch.save({name: torch.from_numpy(arrays[name]) for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    assert len(open_checkpoint(tmp_path).files) == 2
    same_logits(tmp_path, folders["llama"], "llama")
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "pytorch_model-00001-of-00002.bin"}}))
    refused(tmp_path, "tensor more: is not in pytorch_model-00001-of-00002.bin")
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "../x.bin"}}))
    refused(tmp_path, "not a file name in this folder")


@pytest.mark.parametrize("rows", [False, True])
def test_meta_folders(folders: dict[str, Path], tmp_path: Path, rows: bool) -> None:
    for name in ("llama", "llama-gqa"):
        arrays, config = parts(folders[name])
        arrays = {key: value[:100] if len(value) == 101 else value for key, value in arrays.items()}
        whole = sources.save_meta(tmp_path / f"{name}-whole", arrays, config)
        cut = sources.save_meta(tmp_path / f"{name}-cut", arrays, config, ranks=2, rows=rows)
        checkpoint, joined = open_checkpoint(whole), open_source(cut)
        assert checkpoint.config == joined.config
        assert checkpoint.config["rope_interleaved"]
        for key, tensor in checkpoint.tensors.items():
            assert bytes(joined.tensors[key].data) == bytes(tensor.data), key
        refused(cut, "cannot be mapped as they lie: `pronghorn convert` puts them in order")
        (cut / "consolidated.00.pth").unlink()
        refused(cut, "are not all there")


def test_meta_logits(folders: dict[str, Path], tmp_path: Path) -> None:
    arrays, config = parts(folders["llama-gqa"])
    path = sources.save_meta(tmp_path / "meta", arrays, config)
    same_logits(path, folders["llama-gqa"], "llama-gqa")
    same_logits(path / "consolidated.00.pth", folders["llama-gqa"], "llama-gqa")


@pytest.mark.parametrize(
    ("more", "context", "factor"),
    [
        ({}, 4096, None),
        ({"rope_theta": 500000.0}, 8192, None),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 8.0),
        ({"rope_theta": 1000000.0}, 16384, None),
        ({"max_seq_len": 77}, 77, None),
    ],
)
def test_what_params_json_does_not_say(
    folders: dict[str, Path], tmp_path: Path, more: dict[str, Any], context: int, factor: float | None
) -> None:
    path = sources.save_meta(tmp_path / "meta", *parts(folders["llama"]))
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | more))
    config = open_checkpoint(path).config
    assert config["max_position_embeddings"] == context
    assert config.get("rope_scaling", {}).get("factor") == factor
    for wrong in ({"moe": {}}, {"rope_theta": [1]}, {"quantization_args": 1}):
        (path / "params.json").write_text(json.dumps(params | wrong))
        refused(path, r"params\.json: ")


# Pickles that are more than tensors ---------------------------------------------------------------------------


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def run(*_: object) -> None:
    raise AssertionError("a pickle was executed")


def hostile(path: Path, data: bytes, archive: bool) -> None:
    if not archive:
        path.write_bytes(data)
        return
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")


def legacy(*values: Any, protocol: int = 2) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return b"".join(pickle.dumps(value, protocol) for value in (0x1950A86A20F9469CFC6C, 1001, system, *values))


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(run, ()), r"\S*test_sources\.run"),
        ({"a": Evil(run, ())}, r"\S*test_sources\.run"),
        ({"a": Evil(exec, ("raise SystemExit",))}, r"\S*builtin\S*\.exec"),
        ({"a": Evil(getattr, ("text", "upper"))}, r"\S*builtin\S*\.getattr"),
        ({"a": np.float32(1)}, r"numpy\S*"),
        ({"a": Path("x")}, r"pathlib\S*"),
    ],
)
def test_a_pickle_never_runs(tmp_path: Path, archive: bool, value: Any, name: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    for protocol in (2, 4):
        data = pickle.dumps(value, protocol)
        hostile(path, data if archive else legacy(value, [], protocol=protocol), archive)
        refused(tmp_path, rf"asks for {name}, which is no tensor: a pickle can run any code, and this one is refused$")


DEEP = b"\x80\x02}" + b")" + b"\x85" * 200_000


def tensor_pickle(size: int = 4, offset: int = 0, shape: Any = (4,), strides: Any = (1,)) -> bytes:
    """{"a": a view of storage "0" of `size` elements}."""

    def tuple_of(values: Any) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in values) + b"t"

    number = b"\x8a\x08"
    out = b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n("
    out += b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + number
    out += struct.pack("<q", size) + b"tQ" + number + struct.pack("<q", offset)
    return out + tuple_of(shape) + tuple_of(strides) + b"\x89}tRs."


def write_archive(path: Path, pickled: bytes, data: bytes, **more: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/data/0", data)
        for name, content in more.items():
            file.writestr(f"x/{name}", content)


def test_a_handmade_archive_is_right(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    write_archive(path, tensor_pickle(), struct.pack("<4f", 1, 2, 3, 4), byteorder=b"little")
    assert array(read_torch(path, memoryview(path.read_bytes()))["a"]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor_pickle(size=5), "storage 0: 5 f32 in 16 bytes"),
        (tensor_pickle(size=1 << 47, shape=(1 << 47,)), "in 16 bytes"),
        (tensor_pickle(offset=1), "tensor a: lies outside of its storage of 4 elements"),
        (tensor_pickle(shape=(2, 3), strides=(3, 1)), "lies outside"),
        (tensor_pickle(shape=(1 << 30, 4), strides=(0, 1)), "lies outside"),  # 16 GiB out of nothing
        (tensor_pickle(shape=(1 << 40, 1 << 40), strides=(0, 0)), "is damaged"),
        (tensor_pickle(shape=(-4,)), "is damaged"),
        (tensor_pickle(shape=(2, 2), strides=(1,)), "is damaged"),
        (tensor_pickle()[:-1], "is cut short"),
        (tensor_pickle()[:-2] + b".", "holds no dictionary of tensors"),
        (b"\x80\x02}.", "holds no tensors"),
        (b"\x80\x02K\x01.", "holds no dictionary of tensors"),
        (b"\x80\x02}X\x01\0\0\0aK\x01s.", "a: is not a tensor but of another kind"),
        (b"\x80\x02}K\x01K\x01s.", "whose name is not text"),
        (b"\x80\x02X\xff\xff\xff\xffa", "is cut short"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa", "is cut short"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "holds no dictionary"),  # a memo of four billion places is not made
        (b"\x80\x02j\xff\xff\xff\xff.", "is damaged"),
        (b"\x80\x02(.", "is damaged"),
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", r"asks for os\.system"),
        (b"\x80\x02ios\nsystem\n", "has the opcode 'i'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"asks for os\.system"),
        (DEEP + b"Ns.", "is damaged"),  # hashing it would overflow the stack
        (DEEP + DEEP[3:] + b"\x93.", "is damaged"),
    ],
)
def test_damaged_pickles(tmp_path: Path, pickled: bytes, message: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_archive(path, pickled, struct.pack("<4f", 1, 2, 3, 4))
    refused(tmp_path, rf"pytorch_model\.bin: .*({message})")


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    data = struct.pack("<4f", 1, 2, 3, 4)
    write_archive(path, tensor_pickle(), data, byteorder=b"big")
    refused(tmp_path, "big-endian")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", tensor_pickle())
        file.writestr("x/data/0", data)
    refused(tmp_path, r"data\.pkl is compressed or encrypted")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", tensor_pickle())
    refused(tmp_path, "lacks x/data/0")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/readme", "")
    refused(tmp_path, "not one of PyTorch's")
    write_archive(path, tensor_pickle(), data)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "is a damaged zip archive")
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    refused(tmp_path, "is a pickle, but not one of PyTorch's")


# llama2.c -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied"])
def test_llama2c(folders: dict[str, Path], tmp_path: Path, version: int, name: str) -> None:
    arrays, config = parts(folders[name])
    path = tmp_path / "model.bin"
    path.write_bytes(sources.llama2c(arrays, config, version))
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "llama2.c"
    assert checkpoint.config["tie_word_embeddings"] == (name == "llama-tied")
    same_logits(path, folders[name], name)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    refused(path, r"bytes long; its header asks for")
    path.write_bytes(whole[:200])
    refused(path, "is 200 bytes long|is cut short")
    path.write_bytes(b"24ka" + struct.pack("<i", 2) + whole[8:])
    refused(path, r"version 2 \(int8\), which is not supported" if version else r"version 2|makes no sense")


# fastGPT ------------------------------------------------------------------------------------------------------


def test_fastgpt(folders: dict[str, Path], tmp_path: Path) -> None:
    arrays, config = parts(folders["gpt2"])
    path = sources.save_fastgpt(tmp_path / "model.gguf", arrays, config, [*TOKENS, "[last]"], ["a b", "ab c"])
    checkpoint = open_checkpoint(path)
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(array(tensor), arrays[f"transformer.{name}"]), name
    same_logits(path, folders["gpt2"], "gpt2")
    with LLM(path) as llm:
        assert llm.tokenizer.encode("abcab!a") == [95, 94, 1, 65]
        assert llm.tokenizer.eos_ids == (0,)
    whole = bytearray(path.read_bytes())
    mark = re.search(struct.pack("<i", 0xFA51697), whole)
    assert mark
    whole[mark.end()] = 9
    path.write_bytes(whole)
    refused(path, "is a fastGPT file of version 9; 1 and 2 are supported")
