"""Safetensors files and folders: against the safetensors package, and with every kind of damage."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pronghorn.errors import CheckpointError
from pronghorn.weights import open_checkpoint
from pronghorn.weights.types import DTYPES

HEADER_LIMIT = 100_000_000
TORCH = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build(header: Any, data: int | bytes = 0, length: int | None = None) -> bytes:
    """A file with this header (JSON, or text as it is), however wrong it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (
        struct.pack("<Q", len(text) if length is None else length)
        + text
        + (bytes(data) if isinstance(data, int) else data)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def refused(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# right files -----------------------------------------------------------------------------------------


def test_every_dtype_reads_as_it_was_written(folder: Path) -> None:
    assert TORCH.keys() == DTYPES.keys()
    torch.manual_seed(0)
    written = {name: torch.randint(0, 2, (3, 5)).to(kind) for name, kind in TORCH.items()}
    written |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0, 2), "last": torch.randn(7)}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})

    for path in (folder, folder / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == path
        assert checkpoint.files == (folder / "model.safetensors",)
        assert checkpoint.format == "safetensors"
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.tokenizer.folder == folder
        assert checkpoint.tokenizer.gguf is None
        assert checkpoint.tensors.keys() == written.keys()
        for name, tensor in checkpoint.tensors.items():
            assert tensor.name == name
            assert tensor.shape == tuple(written[name].shape)
            assert TORCH[tensor.dtype] == written[name].dtype
            assert bytes(tensor.data) == written[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert tensor.data.readonly


def test_data_may_begin_at_an_odd_address(folder: Path) -> None:
    """As in GPT-2's own file: the format aligns neither the header nor the tensors."""
    header = json.dumps({"a": entry([1], 0, 1, "U8"), "b": entry([2], 1, 9)})
    (folder / "model.safetensors").write_bytes(build(header.encode(), b"\7" + struct.pack("<2f", 1.5, -2)))
    assert open_checkpoint(folder).tensors["b"].data.cast("f").tolist() == [1.5, -2]


def test_header_padding_and_no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(build(b"{}      "))
    assert open_checkpoint(folder).tensors == {}


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """Hugging Face's cache holds links to blobs."""
    blob = tmp_path / "0123abcd"
    blob.write_bytes(build({"a": entry([1], 0, 4)}, 4))
    (folder / "model.safetensors").symlink_to(blob)
    assert list(open_checkpoint(folder).tensors) == ["a"]


# damaged files ---------------------------------------------------------------------------------------

A = entry([2], 0, 8)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "shorter than a length": (b"abc", "shorter than a header's length field"),
    "header past the end": (
        build({"a": A}, 0, 1000),
        r"is cut short: a header of 1000 bytes in a file of \d+",
    ),
    "huge header": (
        build({"a": A}, 8, 1 << 63),
        r"a header of 9223372036854775808 bytes \(100000000 is the limit\): damaged",
    ),
    "header over the limit": (build({"a": A}, 8, HEADER_LIMIT + 1), "a header of 100000001 bytes"),
    "no brace": (build(b" {}", 8), "its header does not begin with {"),
    "header of 0 bytes": (build(b"", b"x"), "its header does not begin with {"),
    "broken JSON": (build(b'{"a": {', 8), r"header: broken JSON at line 1, column 8: "),
    "text after the JSON": (build(b"{} x"), "header: broken JSON at line 1, column 4: Extra data"),
    "zeros after the JSON": (build(b"{}\0\0"), "header: broken JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "header: not UTF-8 at byte 2"),
    "key twice": (build(b'{"a":' + json.dumps(A).encode() + b',"a":1}', 8), "header: the key a stands twice"),
    "key twice inside": (
        build(b'{"a":{"dtype":"F32","dtype":"F32"}}', 8),
        "header: the key dtype stands twice",
    ),
    "NaN": (build(b'{"a": NaN}'), "header: NaN is not JSON"),
    "infinite number": (build(b'{"a": 1e999}'), "header: the number 1e999 is too large"),
    "huge number": (
        build(b'{"a": ' + b"9" * 1_000_000 + b"}"),
        r"header: the number 9{30}\.\.\. is too large",
    ),
    "nesting": (build(b'{"a": ' + b"[" * 1_000_000 + b"}"), "header: JSON nested too deeply"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "__metadata__ is not a map of strings"),
    "metadata of a list": (build({"__metadata__": ["a"]}), "__metadata__ is not a map of strings"),
    "entry of a list": (build({"a": [1]}), "tensor a: its entry is not of the form"),
    "entry without a shape": (
        build({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
        "tensor a: its entry is not",
    ),
    "entry with more": (build({"a": {**A, "stride": 1}}, 8), "tensor a: its entry is not of the form"),
    "unknown dtype": (build({"a": entry([2], 0, 8, "F31")}, 8), "tensor a: the dtype F31 is not supported"),
    "F8": (build({"a": entry([8], 0, 8, "F8_E4M3")}, 8), "tensor a: the dtype F8_E4M3 is not supported"),
    "dtype of a list": (
        build({"a": entry([8], 0, 8, ["F32"])}, 8),
        "tensor a: the dtype .* is not supported",
    ),
    "small letters": (build({"a": entry([2], 0, 8, "f32")}, 8), "tensor a: the dtype f32 is not supported"),
    "shape of a number": (build({"a": entry(2, 0, 8)}, 8), "tensor a: its shape is not a list of sizes"),
    "negative size": (build({"a": entry([-2, -1], 0, 8)}, 8), "tensor a: its shape is not a list of sizes"),
    "float size": (build({"a": entry([2.0], 0, 8)}, 8), "tensor a: its shape is not a list of sizes"),
    "true size": (build({"a": entry([True, 2], 0, 8)}, 8), "tensor a: its shape is not a list of sizes"),
    "huge size": (build({"a": entry([1 << 63], 0, 8)}, 8), "tensor a: its shape is not a list of sizes"),
    "overflow": (build({"a": entry([1 << 62, 1 << 62, 0], 0, 0)}), "tensor a: its size overflows"),
    "many dimensions": (build({"a": entry([2] * 100_000, 0, 8)}, 8), "tensor a: its size overflows"),
    "one offset": (
        build({"a": {**A, "data_offsets": [0]}}, 8),
        "tensor a: its data_offsets are not two positions",
    ),
    "negative offset": (
        build({"a": entry([2], -8, 0)}, 8),
        "tensor a: its data_offsets are not two positions",
    ),
    "backward": (build({"a": entry([2], 8, 0)}, 8), "tensor a: its data, 8 to 0, lies outside"),
    "past the end": (build({"a": A}, 7), "tensor a: its data, 0 to 8, lies outside of the file's 7 bytes"),
    "far": (build({"a": entry([2], 1 << 62, (1 << 62) + 8)}, 8), "tensor a: its data, .*, lies outside"),
    "wrong shape": (
        build({"a": entry([3], 0, 8)}, 8),
        r"tensor a: shape \[3\] of F32 is 12 bytes; the file gives it 8",
    ),
    "wrong dtype": (build({"a": entry([2], 0, 8, "F64")}, 8), r"tensor a: shape \[2\] of F64 is 16 bytes"),
    "overlap": (build({"a": A, "b": entry([2], 4, 12)}, 12), "tensor b: overlaps the tensor before it"),
    "same place": (build({"a": A, "b": A}, 8), "tensor b: overlaps the tensor before it"),
    "inside": (
        build({"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, 16),
        "tensor b: overlaps the tensor before it",
    ),
    "empty inside": (
        build({"a": entry([4], 0, 16), "b": entry([0], 4, 4)}, 16),
        "tensor b: overlaps the tensor",
    ),
    "hole": (build({"a": A, "b": entry([1], 12, 16)}, 16), "tensor b: leaves a hole of 4 bytes before it"),
    "hole at the start": (
        build({"a": entry([2], 4, 12)}, 12),
        "tensor a: leaves a hole of 4 bytes before it",
    ),
    "bytes after": (build({"a": A}, 9), "holds 9 bytes of data; its tensors cover 8"),
    "long name": (build({"a" * 5000: A}, 7), r"tensor a{100}\.\.\.: its data"),
    "name of two lines": (build({"a\nb": A}, 7), r"tensor 'a\\nb': its data"),
    "name of half a character": (build(b'{"\\ud800": 1}'), r"tensor '\\ud800': its entry"),
    "name of nothing": (build({"": 1}), "tensor '': its entry"),
    "zip": (
        b"PK\3\4" + bytes(100),
        r"is not a safetensors file but a zip archive \(perhaps PyTorch's, a pickle",
    ),
    "pickle": (
        pickle.dumps({"a": list(range(100))}, 2),
        r"is not a safetensors file but a pickle \(opening one",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a git-lfs pointer, not the file itself",
    ),
    "HTML": (b"<!DOCTYPE html><title>404</title>", "is not a safetensors file but HTML"),
    "JSON": (b'{"weight_map": {}}', "is not a safetensors file but JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_refused(folder: Path, case: str) -> None:
    data, message = FILES[case]
    (folder / "model.safetensors").write_bytes(data)
    assert refused(folder, message).startswith(f"{folder}/model.safetensors: ")


def test_a_length_that_looks_like_a_pickle_is_no_fault(folder: Path) -> None:
    text = json.dumps({"a": A}).encode()
    text += b" " * (0x0280 - len(text))
    (folder / "model.safetensors").write_bytes(build(text, 8))
    assert (folder / "model.safetensors").read_bytes().startswith(b"\x80\x02")
    assert list(open_checkpoint(folder).tensors) == ["a"]


def test_every_truncation_is_refused(folder: Path) -> None:
    whole = build({"a": A, "b": entry([3], 8, 20)}, 20)
    for length in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder, "model.safetensors: ")


def test_a_pytorch_file_under_another_name_is_refused(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")
    refused(folder, "a zip archive")
    with zipfile.ZipFile(folder / "model.gguf", "w") as archive:
        archive.writestr("a", "b")
    refused(folder / "model.gguf", "is not a GGUF file but a zip archive")


# folders ---------------------------------------------------------------------------------------------


def test_what_is_not_a_regular_file_is_refused_without_waiting(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.mkfifo(path)
    for opened in (folder, path):
        assert refused(opened, "is not a regular file").startswith(str(path))
    path.unlink()
    path.mkdir()
    refused(folder, "model.safetensors: is not a regular file")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refused(folder, "model.safetensors: is not a regular file")
    path.unlink()
    path.symlink_to(path)
    refused(folder, "model.safetensors: Too many levels of symbolic links")
    path.unlink()
    path.symlink_to("nothing")
    refused(folder, "model.safetensors: No such file or directory")


def test_folders_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path, "holds no model: neither model.safetensors, nor")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "a.gguf: is cut short")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "holds 2 .gguf files: name one, such as a.gguf")
    refused(tmp_path / "none", "none: no such file or folder")
    refused(tmp_path / "a.gguf" / "b", "no such file or folder")
    refused(tmp_path / ("x" * 300), "File name too long")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: is missing: it says what model these weights are"),
        (b"", "config.json: is empty"),
        (b"[]", "config.json: a JSON object was expected"),
        (b"null", "config.json: a JSON object was expected"),
        (b'{\n "a": 1,\n}', "config.json: broken JSON at line 3, column 1"),
        (b'{"a": 1, "a": 2}', "config.json: the key a stands twice"),
        (b'{"a": -Infinity}', "config.json: -Infinity is not JSON"),
        (b'{"a": ' + b'{"a": ' * 100_000, "config.json: JSON nested too deeply"),
        (b'"' + b"a" * 16_000_000, "config.json: is 16000001 bytes long; 16000000 is the limit"),
        (b'\xef\xbb\xbf{"a": 1}', "config.json: broken JSON at line 1, column 1: Unexpected UTF-8 BOM"),
    ],
)
def test_config_files(tmp_path: Path, text: bytes | None, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(build({"a": A}, 8))
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path, message)
    refused(tmp_path / "model.safetensors", message)


# shards ----------------------------------------------------------------------------------------------

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / ONE).write_bytes(build({"a": A}, struct.pack("<2f", 1, 2)))
    (folder / TWO).write_bytes(build({"b": A, "c": entry([1], 8, 12)}, struct.pack("<3f", 3, 4, 5)))
    return folder


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
    return path


def test_shards_read_as_one(sharded: Path) -> None:
    write_index(sharded, {"c": TWO, "a": ONE, "b": TWO})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.files == (sharded / ONE, sharded / TWO)
    assert {name: tensor.data.cast("f").tolist() for name, tensor in checkpoint.tensors.items()} == {
        "a": [1, 2],
        "b": [3, 4],
        "c": [5],
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "index.json: weight_map is not a map"),
        ({}, "index.json: weight_map is not a map"),
        ({"a": 1}, "tensor a: the shard 1 is not a file name in this folder"),
        ({"a": "../" + ONE}, r"tensor a: the shard \.\./model-.* is not a file name in this folder"),
        ({"a": "/etc/passwd"}, "tensor a: the shard /etc/passwd is not a file name in this folder"),
        ({"a": ".."}, r"tensor a: the shard \.\. is not a file name in this folder"),
        ({"a": ""}, "tensor a: the shard '' is not a file name in this folder"),
        ({"a": "a\0b"}, "is not a file name in this folder"),
        ({"a": "model.safetensors.index.json"}, "tensor a: its shard is this index itself"),
        ({"a": "again.index.json"}, "again.index.json: is not a safetensors file but JSON"),
        ({"a": "missing.safetensors"}, "missing.safetensors: No such file or directory"),
        ({"a": "folder"}, "folder: is not a regular file"),
        ({"a": ONE, "b": TWO}, f"{TWO}: tensor c: .* does not say that it is in this shard"),
        ({"a": ONE, "b": TWO, "c": ONE}, f"{TWO}: tensor c: .* does not say that it is in this shard"),
        (
            {"a": ONE, "b": TWO, "c": TWO, "d": ONE},
            f"tensor d: is not in {ONE}, where the index says that it is",
        ),
        ({"a": ONE, "b": "three.safetensors"}, "three.safetensors: tensor a: is in another shard too"),
    ],
)
def test_wrong_indices_are_refused(sharded: Path, weight_map: Any, message: str) -> None:
    (sharded / "folder").mkdir()
    (sharded / "again.index.json").write_text('{"weight_map": {"a": "model.safetensors.index.json"}}')
    (sharded / "three.safetensors").write_bytes(build({"a": A, "b": entry([1], 8, 12)}, 12))
    write_index(sharded, weight_map)
    refused(sharded, message)


# the mapping -----------------------------------------------------------------------------------------


def in_a_child(code: str, *arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=prepare)


OPEN = (
    "import sys, os; from pronghorn.weights import open_checkpoint; "
    "t = open_checkpoint(sys.argv[1]).tensors['a'].data; "
)


@pytest.fixture
def large(folder: Path) -> Path:
    """64 MiB of zeros that take no room."""
    path = folder / "model.safetensors"
    path.write_bytes(build({"a": entry([1 << 24], 0, 1 << 26)}))
    os.truncate(path, path.stat().st_size + (1 << 26))
    return path


def test_opening_reads_the_header_alone(large: Path) -> None:
    code = "import resource; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; " + OPEN
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'numpy' in sys.modules)"
    grown, numpy = in_a_child(code, large).stdout.split()
    assert int(grown) < 16_000  # KB; the file is four times as large
    assert numpy == "False"


def test_a_replaced_file_keeps_its_contents_in_the_mapping(large: Path) -> None:
    code = OPEN + "os.replace(sys.argv[2], sys.argv[1]); print(sum(t[::4096]))"
    (large.parent / "new").write_bytes(b"new")
    assert in_a_child(code, large, large.parent / "new").stdout == "0\n"


def test_a_file_cut_short_while_mapped_ends_the_process_by_sigbus(large: Path) -> None:
    """The stated outcome, of the kernel's making: nothing wrong is ever computed."""
    done = in_a_child(OPEN + "os.truncate(sys.argv[1], 8192); print(t[1 << 25])", large)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == ""


def test_a_file_that_cannot_be_mapped_is_one_line(large: Path) -> None:
    os.truncate(large, 1 << 40)
    done = in_a_child(OPEN, large, limit=1 << 30)
    assert done.stderr.splitlines()[-1] == f"pronghorn.errors.CheckpointError: {large}: Cannot allocate memory"
