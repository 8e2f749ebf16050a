"""Broken model files: each loads right or is refused in one line; none crashes, hangs or asks for much memory.

Each mutation follows from its number alone, so that a failure can be run again:
`python tests/test_fuzz_files.py KIND FOLDER FIRST COUNT`. `PRONGHORN_FUZZ` is how many mutations there are in all.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from pronghorn.errors import CheckpointError, PronghornError
from pronghorn.models import model_for
from pronghorn.weights import open_checkpoint, open_source
from pronghorn.weights.types import DTYPES

N_MUTATIONS = int(os.environ.get("PRONGHORN_FUZZ") or 500)
SHARES = {"safetensors": 0.35, "folder": 0.1, "gguf": 0.3, "zip": 0.2, "stream": 0.2, "meta": 0.1, "bundle": 0.2}
SHARES |= {"llama2c": 0.1, "fastgpt": 0.1}  # tokenizers are in their own test
BATCH = 500
MEMORY = 256 << 20  # bytes that a batch may take beyond what Python and its imports do
SECONDS = 10  # for one file

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
SHAPES = {
    "model.embed_tokens.weight": (3, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.self_attn.v_proj.weight": (8, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (32, 8),
    "model.layers.0.mlp.up_proj.weight": (32, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 32),
}

# As the tensors stand in the GGUF file below.
_LAYER = "model.layers.0."
ORDER = ["model.embed_tokens.weight", "model.norm.weight", f"{_LAYER}input_layernorm.weight"]
ORDER += [f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkvo"]
ORDER += [f"{_LAYER}post_attention_layernorm.weight", *(f"{_LAYER}mlp.{x}_proj.weight" for x in ("gate", "up", "down"))]

# Whole files ---------------------------------------------------------------------------------------------


def safetensors(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> tuple[dict[str, Any], bytes]:
    """A right header and its data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end += math.prod(shape) * DTYPES[dtype.lower()]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return header, bytes(range(251)) * (end // 251) + bytes(end % 251)


def pack(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Gguf:
    """A right file, with a tokenizer and a tensor of blocks; `fields` are where its numbers are: (position, size)."""

    def __init__(self) -> None:
        self.out = bytearray(b"GGUF")
        self.fields: list[tuple[int, int]] = []
        numbers = {"block_count": 1, "context_length": 32, "embedding_length": 8, "feed_forward_length": 32}
        numbers["attention.head_count"] = 2
        self.put("IQQ", 3, len(SHAPES), len(numbers) + 6)
        for key, number in numbers.items():
            self.text(f"llama.{key}").put("II", 4, number)
        self.text("llama.attention.layer_norm_rms_epsilon").put("If", 6, 1e-5)
        self.text("general.architecture").put("I", 8).text("llama")
        self.text("general.alignment").put("II", 4, 32)
        self.text("tokenizer.ggml.tokens").put("IIQ", 9, 8, 3).text("<s>").text("▁a").text("é")
        self.text("tokenizer.ggml.scores").put("IIQfff", 9, 6, 3, 0, -1, -2)
        self.text("tokenizer.ggml.add_bos_token").put("IB", 7, 1)
        names = ("token_embd", "output_norm", *(f"blk.0.attn_{x}" for x in ("norm", "q", "k", "v", "output")))
        names += tuple(f"blk.0.ffn_{x}" for x in ("norm", "gate", "up", "down"))
        shapes = (SHAPES[name] for name in ORDER)
        data = 0
        for name, shape in zip(names, shapes, strict=True):
            blocks = name.endswith("down")
            self.text(f"{name}.weight").put("I" + "Q" * len(shape), len(shape), *reversed(shape))
            self.put("IQ", 8 if blocks else 0, data)
            data += math.prod(shape) // 32 * 34 if blocks else math.prod(shape) * 4
            data += -data % 32
        self.header = len(self.out)
        self.out += bytes(-self.header % 32 + data)

    def put(self, form: str, *values: float) -> Gguf:
        for code, value in zip(form, values, strict=True):
            self.fields.append((len(self.out), struct.calcsize(code)))
            self.out += struct.pack("<" + code, value)
        return self

    def text(self, text: str) -> Gguf:
        self.put("Q", len(text.encode()))
        self.out += text.encode()
        return self


# Mutations -----------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 3, 7, 8, 31, 33, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
NUMBERS += [(1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    "..",
    "F32",
    "I8",
    "a\nb",
    "\ud800",
    1.5,
    -0.0,
    -1,
    -8,
    [],
    {},
    [[]],
    [0, 0],
]
VALUES += [*NUMBERS, 1 << 64, 10**40, [0, 1 << 62, 1 << 62], [2] * 70, {"a": {}}, [1, 32], [32, 1]]


def mutate_bytes(rng: random.Random, data: bytes, header: int) -> bytes:
    """One to three edits of the bytes, most of them within the first `header`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(min(header, len(out)) if out and rng.random() < 0.8 else len(out) + 1)
        match rng.randrange(8):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at if rng.random() < 0.5 else rng.randrange(len(out) + 1) :]
            case 3:
                del out[at : at + rng.choice((1, 4, 8, 32))]
            case 4:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32)))
            case 5:
                size = rng.choice((4, 8, 16, 64))
                other = rng.randrange(len(out) + 1)
                out[at : at + size] = out[other : other + size]
            case 6:
                field = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
                out[at : at + 4] = field
            case _:
                near = [len(data), len(data) - header, len(data) - at, at]
                number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.choice(near) + rng.randrange(-1, 2)
                out[at : at + 8] = struct.pack("<Q", number % (1 << 64))
    return bytes(out)


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """One to three edits of the structure; then, at times, of the text."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        nodes = list(containers(value))
        node = rng.choice(nodes)
        if isinstance(node, dict):
            key = rng.choice([*node, "new"])
            match rng.randrange(4):
                case 0:
                    node.pop(key, None)
                case 1:
                    node[rng.choice(["", "a\nb", "x" * 300, "__metadata__", *node])] = node.get(key)
                case _:
                    node[key] = rng.choice(VALUES)
        elif node:
            at = rng.randrange(len(node))
            if isinstance(node[at], int) and rng.random() < 0.5:
                node[at] += rng.choice((-8, -4, -1, 1, 4, 8))
            else:
                node[at] = rng.choice(VALUES)
        else:
            node.append(rng.choice(VALUES))
    text = json.dumps(value)
    match rng.randrange(12):
        case 0:
            text = text.replace(rng.choice("0123456789"), rng.choice(("NaN", "1e999", "-", "9" * 5000)), 1)
        case 1:
            text = text.replace("[", "[" * rng.choice((2, 100, 100_000)), 1)
        case 2:
            text = text.replace("{", text[:-1] + ",", 1)
        case 3:
            text = text + rng.choice((" " * 64, "\0", "{}", "]"))
    return text.encode()


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from containers(child)


def mutated_safetensors(rng: random.Random, folder: Path) -> Path:
    header, data = safetensors(SHAPES)
    if rng.random() < 0.6:
        file = pack(mutate_json(rng, header), data)
    else:
        whole = pack(header, data)
        file = mutate_bytes(rng, whole, len(whole) - len(data))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(file)
    return folder


def mutated_folder(rng: random.Random, folder: Path) -> Path:
    """Two shards, an index and a config, of which one or two are wrong."""
    names = list(SHAPES)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    index = {"metadata": {"total_size": 0}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    files = {"config.json": CONFIG, "model.safetensors.index.json": index}
    written = {name: json.dumps(value).encode() for name, value in files.items()}
    for name, part in shards.items():
        written[name] = pack(*safetensors({n: SHAPES[n] for n in part}))
    for name in rng.sample(list(written), rng.choice((1, 1, 2))):
        match rng.randrange(4):
            case 0:
                written[name] = mutate_bytes(rng, written[name], 500)
            case 1:
                written[name] = written[rng.choice(list(written))]
            case 2:
                index["weight_map"][rng.choice(names)] = rng.choice(
                    ("a.safetensors", "b.safetensors", "../a", ".", "c")
                )
                written["model.safetensors.index.json"] = json.dumps(index).encode()
            case _:
                if name in files:
                    written[name] = mutate_json(rng, files[name])
                else:
                    written[name] = b""
    for name, data in written.items():
        (folder / name).write_bytes(data)
    return folder


def mutated_gguf(rng: random.Random, folder: Path) -> Path:
    whole = Gguf()
    if rng.random() < 0.7:
        for at, size in rng.sample(whole.fields, rng.choice((1, 1, 2))):
            old = int.from_bytes(whole.out[at : at + size], "little")
            small = old + rng.choice((-32, -8, -1, 1, 2, 8, 32)) if rng.random() < 0.5 else rng.randrange(45)
            new = rng.choice((small, small, rng.choice(NUMBERS)))
            whole.out[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        file = bytes(whole.out)
    else:
        file = mutate_bytes(rng, bytes(whole.out), whole.header)
    (folder / "model.gguf").write_bytes(file)
    return folder / "model.gguf"


# Older formats: each is written right once, in a folder beside that of the mutations (named FOLDER-KIND), by the test
# itself, since PyTorch does not fit into a child's memory. One of its files is mutated.

GPT2 = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 8, "n_embd": 4, "n_head": 2, "n_layer": 1}
EIGHT = CONFIG | {"num_key_value_heads": 2}


def arrays_of(config: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    model = model_for(config)
    shapes = {model.PREFIX + name: parameter.shape for name, parameter in model.parameters().items()}
    return {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}


def write_right(kind: str, folder: Path) -> None:
    import sources

    if kind in ("zip", "stream"):
        import torch

        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        state = {name: torch.from_numpy(array) for name, array in arrays_of(CONFIG).items()}
        state["model.layers.0.self_attn.q_proj.weight"] = torch.ones(8, 8).t()
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    elif kind == "meta":
        sources.save_meta(folder, arrays_of(EIGHT), EIGHT)
    elif kind == "bundle":
        sources.save_openai(folder, arrays_of(GPT2), GPT2, compress=True)
    elif kind == "llama2c":
        folder.mkdir()
        (folder / "model.bin").write_bytes(sources.llama2c(arrays_of(EIGHT), EIGHT, 0))
        (folder / "other.bin").write_bytes(sources.llama2c(arrays_of(EIGHT), EIGHT, 1))
    else:
        folder.mkdir()
        sources.save_fastgpt(folder / "model.gguf", arrays_of(GPT2), GPT2, ["<|endoftext|>", *"abc", "ab"], ["a b"])


def sealed(rng: random.Random) -> bytes:
    """A bundle's index with faults behind right checksums, as someone malicious would write it."""
    import numpy as np

    import sources

    entries, at = [(b"", b"\x08\x01\x1a\x02\x08\x01")], 0
    for name, array in sorted(sources.openai_names(arrays_of(GPT2)).items()):
        data = np.ascontiguousarray(array).tobytes()
        entries.append((name.encode(), sources.entry(array, 0, at, data)))
        at += len(data)
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.randrange(len(entries))
        key, value = entries[number]
        entries[number] = (key, mutate_bytes(rng, value, len(value))) if rng.random() < 0.8 else (key[:-1], value)
    if rng.random() < 0.3:
        whole = mutate_bytes(rng, sources.block(entries), 4000)  # a block as such
        kind = rng.randrange(2)
        stored = whole + bytes([kind]) + struct.pack("<I", sources.masked(whole + bytes([kind])))
        handle = sources.varint(0) + sources.varint(len(whole))
        index = sources.block([(b"~", handle)])
        end = index + b"\0" + struct.pack("<I", sources.masked(index + b"\0"))
        footer = handle + sources.varint(len(stored)) + sources.varint(len(index))
        return stored + end + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return sources.table(entries, compress=rng.random() < 0.3)


def mutated_other(kind: str) -> Callable[[random.Random, Path], Path]:
    def make(rng: random.Random, folder: Path) -> Path:
        right = folder.with_name(f"{folder.name}-{kind}")
        files = sorted(path for path in right.iterdir() if path.stat().st_size)
        chosen = rng.choice([path for path in files if path.name != "config.json"])
        for path in files:
            data = path.read_bytes()
            if path == chosen:
                if path.suffix == ".json":
                    data = mutate_json(rng, json.loads(data))
                elif path.suffix == ".index" and rng.random() < 0.7:
                    data = sealed(rng)
                else:
                    data = mutate_bytes(rng, data, min(len(data), 1000 if kind != "zip" else 4000))
            (folder / path.name).write_bytes(data)
        return folder / chosen.name if kind in ("llama2c", "fastgpt") else folder

    return make


MAKERS: dict[str, Callable[[random.Random, Path], Path]] = {
    "safetensors": mutated_safetensors,
    "folder": mutated_folder,
    "gguf": mutated_gguf,
    **{kind: mutated_other(kind) for kind in ("zip", "stream", "meta", "bundle", "llama2c", "fastgpt")},
}

# What must hold ------------------------------------------------------------------------------------------

# What the format's own reader takes and we refuse: dtypes that no model here has, and keys that stand twice.
STRICTER = ("is not supported", "stands twice", "its entry is not of the form", "is not JSON", "too large", "nested")


def one_line(error: PronghornError) -> str:
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 1000, message
    return message


def check(path: Path) -> str:
    """Loads a file -> "loaded" or "refused"; raises if anything is not as it must be."""
    official = None
    if (file := path / "model.safetensors").exists():
        try:
            official = dict(deserialize(file.read_bytes()))
        except (SafetensorError, ValueError):
            official = {}
    try:
        checkpoint = open_source(path)
    except PronghornError as error:
        message = one_line(error)
        assert not official or "model.safetensors" not in message or any(text in message for text in STRICTER), message
        return "refused"
    sizes = sum(len(t.data) for t in checkpoint.tensors.values())
    # In a pickle many tensors may be views of one storage, none of them longer than it.
    assert sum(file.stat().st_size for file in checkpoint.files) >= sizes or checkpoint.format in ("torch", "meta")
    for tensor in checkpoint.tensors.values():
        assert all(isinstance(n, int) and n >= 0 for n in tensor.shape)
        assert sum(tensor.data) >= 0  # every byte can be read
        if tensor.dtype in DTYPES:
            assert len(tensor.data) == math.prod(tensor.shape) * DTYPES[tensor.dtype]
    if official is not None:
        assert checkpoint.tensors.keys() == official.keys()
        for name, tensor in checkpoint.tensors.items():
            assert tensor.data == official[name]["data"]
            assert list(tensor.shape) == official[name]["shape"]
            assert tensor.dtype == official[name]["dtype"].lower()
    for key in checkpoint.tokenizer.gguf or ():
        try:
            checkpoint.tokenizer.gguf[key]  # type: ignore[index]
        except CheckpointError as error:
            one_line(error)
    try:
        model_for(checkpoint.config).resolve(checkpoint.tensors)
    except PronghornError as error:
        one_line(error)
        return "refused"
    return "loaded"


def child(kind: str, folder: Path, first: int, count: int) -> None:
    """Mutations [first, first + count), under a limit of memory, and of time for each (SIGALRM ends the process)."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(first, first + count):
        print(number, file=sys.stderr, flush=True)
        for old in folder.iterdir():
            old.unlink()
        path = MAKERS[kind](random.Random(f"{kind} {number}"), folder)
        signal.alarm(SECONDS)
        try:
            outcomes[check(path)] += 1
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        finally:
            signal.alarm(0)
    print(json.dumps(outcomes))


@pytest.mark.parametrize("kind", MAKERS)
def test_mutated_files_load_right_or_are_refused(kind: str, tmp_path: Path) -> None:
    count = max(10, int(N_MUTATIONS * SHARES[kind]))
    if kind not in ("safetensors", "folder", "gguf"):
        write_right(kind, tmp_path.with_name(f"{tmp_path.name}-{kind}"))
    total = {"loaded": 0, "refused": 0}
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        command = [sys.executable, __file__, kind, str(tmp_path), str(first), str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + size)
        assert done.returncode == 0, f"{kind}: exit {done.returncode} at mutation {done.stderr[-3000:]}"
        for outcome, number in json.loads(done.stdout).items():
            total[outcome] += number
    assert sum(total.values()) == count
    assert total["refused"] > count // 4  # in older formats, most bytes are weights
    if count >= 100:
        assert total["loaded"] > 0


def test_the_files_are_right_before_they_are_mutated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(pack(*safetensors(SHAPES)))
    assert check(tmp_path) == "loaded"
    (tmp_path / "model.gguf").write_bytes(bytes(Gguf().out))
    assert check(tmp_path / "model.gguf") == "loaded"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


WRITTEN = st.dictionaries(st.text(), st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)


@given(shapes=WRITTEN, dtype=st.sampled_from([name.upper() for name in DTYPES]), order=st.randoms())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_right_header_loads(folder: Path, shapes: dict[str, Any], dtype: str, order: random.Random) -> None:
    shapes.pop("__metadata__", None)
    header, data = safetensors(shapes, dtype)
    items = list(header.items())
    order.shuffle(items)  # the order of the entries means nothing
    (folder / "model.safetensors").write_bytes(pack(dict(items), data))
    tensors = open_checkpoint(folder).tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        assert tensor.data == data[begin:end]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@given(header=JSON | st.dictionaries(st.text(), JSON) | st.binary(), data=st.binary(max_size=16))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_header_is_refused_in_one_line(folder: Path, header: Any, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(pack(header, data))
    check(folder)


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
