"""GGUF files: against the gguf package, on real files, and with every kind of damage to a header."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pronghorn import _native
from pronghorn.errors import CheckpointError
from pronghorn.models import model_for
from pronghorn.weights import open_checkpoint
from pronghorn.weights.gguf import BLOCKS

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 32,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
QWEN2 = {key.replace("llama", "qwen2"): "qwen2" if value == "llama" else value for key, value in LLAMA.items()}
GPT2 = {
    "general.architecture": "gpt2",
    "gpt2.block_count": 1,
    "gpt2.context_length": 32,
    "gpt2.embedding_length": 8,
    "gpt2.feed_forward_length": 16,
    "gpt2.attention.head_count": 2,
    "gpt2.attention.layer_norm_epsilon": 1e-5,
}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """Type and value, as the format writes them."""
    match item:
        case bool():
            return struct.pack("<IB", 7, item)
        case int():
            return struct.pack("<II", 4, item) if item < 1 << 32 else struct.pack("<IQ", 10, item)
        case float():
            return struct.pack("<If", 6, item)
        case str():
            return struct.pack("<I", 8) + string(item)
        case list():
            values = [value(element) for element in item]
            kind = values[0][:4] if values else struct.pack("<I", 4)
            return struct.pack("<I", 9) + kind + struct.pack("<Q", len(item)) + b"".join(v[4:] for v in values)
        case bytes():
            return item
    raise TypeError(item)


def build(
    keys: dict[str, Any] | list[tuple[str, Any]],
    tensors: list[tuple[str, tuple[int, ...], int, int]] = (),  # type: ignore[assignment]
    data: int | bytes = 0,
    head: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these pairs and tensor infos (name, dims as written, type, offset), however wrong."""
    pairs = list(keys.items()) if isinstance(keys, dict) else keys
    out = head + struct.pack("<QQ", *(counts or (len(tensors), len(pairs))))
    for key, item in pairs:
        out += string(key) + value(item)
    for name, dims, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + bytes(-len(out) % 32) + (bytes(data) if isinstance(data, int) else data)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    def open_bytes(data: bytes) -> Any:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return open_checkpoint(path)

    return open_bytes


# the block formats -----------------------------------------------------------------------------------

SCALES = [
    0x0000,
    0x8000,
    0x0001,
    0x83FF,
    0x0400,
    0x3C00,
    0xBC00,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E00,
    0xFE01,
]
"""f16: zeros, the smallest and largest subnormal, the smallest normal, +-1, the largest, infinities, NaNs."""
SCALE_OFFSETS = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}


def dequantize(name: str, source: Any, destination: Any) -> None:
    """One row of blocks to f32, by the native core."""
    n = memoryview(destination).nbytes // 4
    _native.pack(source, name, 1, n, False, destination, "f32", 0, False, _native.Pool(1))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, on infinite scales
def test_blocks_decode_bit_for_bit_as_gguf_does(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    values, size = BLOCKS[name]
    assert (values, size) == gguf.GGML_QUANT_SIZES[kind]

    rng = np.random.default_rng(len(name) + size)
    blocks = rng.integers(0, 256, (len(SCALES) ** 2 + 500, size), dtype=np.uint8)
    offsets = SCALE_OFFSETS.get(name, (0,))
    for row in range(len(SCALES) ** 2):
        for offset, scale in zip(offsets, (SCALES[row % len(SCALES)], SCALES[row // len(SCALES)]), strict=False):
            blocks[row, offset : offset + 2] = np.frombuffer(struct.pack("<H", scale), np.uint8)
    # One byte in, so that nothing is aligned.
    source = memoryview(b"x" + blocks.tobytes())[1:]
    out = np.full(len(blocks) * values, 7, np.float32)
    dequantize(name, source, out)

    expected = gguf.quants.dequantize(blocks.ravel(), kind).ravel()
    assert np.isfinite(expected).sum() > out.size // 2
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(out), nan)
    assert np.array_equal(out[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("name", ["q2_k", "", "f32", "Q4_0"])
def test_unknown_block_formats_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        dequantize(name, bytes(1024), bytearray(4096))


def test_sizes_that_do_not_agree_are_refused() -> None:
    for source, destination in ((17, 128), (18, 124), (36, 128)):
        with pytest.raises(ValueError, match=r"size|long"):
            dequantize("q4_0", bytes(source), bytearray(destination))


# reading what the gguf package writes ----------------------------------------------------------------


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars = {
        "a.u8": (writer.add_uint8, 200),
        "a.i8": (writer.add_int8, -100),
        "a.u16": (writer.add_uint16, 60000),
        "a.i16": (writer.add_int16, -30000),
        "a.u32": (writer.add_uint32, 4_000_000_000),
        "a.i32": (writer.add_int32, -2_000_000_000),
        "a.u64": (writer.add_uint64, 1 << 63),
        "a.i64": (writer.add_int64, -(1 << 62)),
        "a.f32": (writer.add_float32, 0.5),
        "a.f64": (writer.add_float64, 0.1),
        "a.bool": (writer.add_bool, True),
        "a.text": (writer.add_string, "déjà 字"),
        "a.strings": (writer.add_array, ["", "a", "日本", "\n"]),
        "a.ints": (writer.add_array, [1, -2, 3]),
        "a.floats": (writer.add_array, [1.0, -2.5]),
        "a.bools": (writer.add_array, [True, False]),
    }
    for key, (add, item) in scalars.items():
        add(key, item)
    writer.add_key_value("a.nested", [[1, 2], [3]], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.ARRAY)
    for key, item in LLAMA.items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(item, float) else writer.add_uint32)(key, item)
    matrix = np.arange(24, dtype=np.float32).reshape(3, 8)
    writer.add_tensor("token_embd.weight", matrix)
    writer.add_tensor("output_norm.weight", np.arange(8, dtype=np.float16))
    blocks = gguf.quants.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_checkpoint(path)
    metadata = checkpoint.tokenizer.gguf
    assert metadata is not None
    assert {key: metadata[key] for key in scalars} == {key: item for key, (_, item) in scalars.items()}
    assert metadata["a.nested"] == [[1, 2], [3]]
    assert "b" not in metadata
    assert metadata.get("b") is None
    assert len(metadata) == len(list(metadata)) == len(scalars) + len(LLAMA) + 1

    embedding, norm, q = (
        checkpoint.tensors[name]
        for name in (
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.0.self_attn.q_proj.weight",
        )
    )
    assert (embedding.dtype, embedding.shape) == ("f32", (3, 8))
    assert np.array_equal(np.frombuffer(embedding.data, "<f4").reshape(3, 8), matrix)
    assert (norm.dtype, norm.shape, bytes(norm.data)) == ("f16", (8,), np.arange(8, dtype="<f2").tobytes())
    assert (q.dtype, q.shape, bytes(q.data)) == ("q8_0", (2, 64), blocks.tobytes())
    assert checkpoint.config["vocab_size"] == 3


def test_version_2_and_another_alignment_are_read(opened: Any) -> None:
    keys = {"general.alignment": 64, **LLAMA}
    file = build(keys, [("output_norm.weight", (4,), 0, 64)], head=b"GGUF\2\0\0\0")
    file += bytes(-len(file) % 64) + bytes(64) + struct.pack("<4f", 1, 2, 3, 4)
    assert opened(file).tensors["model.norm.weight"].data.cast("f").tolist() == [1, 2, 3, 4]


# into transformers' vocabulary -----------------------------------------------------------------------


def test_llama_configuration(opened: Any) -> None:
    config = opened(build(LLAMA, [("token_embd.weight", (8, 5), 0, 0)], 160)).config
    assert config == {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "hidden_act": "silu",
        "rms_norm_eps": pytest.approx(1e-5),
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 32,
        "vocab_size": 5,
        "tie_word_embeddings": True,
        "rope_interleaved": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_llama_options(opened: Any) -> None:
    keys = {
        "llama.attention.head_count_kv": [1],
        "llama.attention.key_length": 6,
        "llama.attention.value_length": 6,
        "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": 7,
        "llama.attention.sliding_window": 16,
        "llama.expert_count": 0,
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    tensors = [
        ("output.weight", (8, 7), 0, 0),
        ("blk.0.attn_q.bias", (8,), 0, 224),
        ("rope_freqs.weight", (3,), 0, 256),
    ]
    factors = struct.pack("<3f", 1.0, 2.5, 8.0)
    checkpoint = opened(build(LLAMA | keys, tensors, bytes(256) + factors + bytes(20)))
    expected = {
        "rope_factors": [1.0, 2.5, 8.0],
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_theta": 500000.0,
        "vocab_size": 7,
        "sliding_window": 16,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": False,
    }
    assert expected.items() <= checkpoint.config.items()
    assert set(checkpoint.tensors) == {
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.bias",
    }
    rope = model_for(checkpoint.config | {"model_type": "llama", "sliding_window": None}).config.attention[0].rope
    plain = [500000.0 ** (-2 * i / 6) for i in range(3)]
    assert rope.frequencies == pytest.approx([f / by for f, by in zip(plain, (1.0, 2.5, 8.0), strict=True)])
    assert rope.interleaved


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({SCALING + "type": "none", SCALING + "factor": 8.0}, None),
        ({SCALING + "type": "linear", SCALING + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({SCALING + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({SCALING + "factor": 1.0, SCALING + "original_context_length": 16}, None),
        (
            {
                SCALING + "type": "yarn",
                SCALING + "factor": 4.0,
                SCALING + "original_context_length": 8,
                SCALING + "yarn_beta_fast": 16.0,
                SCALING + "yarn_beta_slow": 2.0,
                SCALING + "finetuned": True,
                SCALING + "attn_factor": 1.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        ),
    ],
)
def test_rope_scaling(opened: Any, keys: dict[str, Any], expected: Any) -> None:
    assert opened(build(LLAMA | keys)).config["rope_scaling"] == expected


def test_qwen2_configuration(opened: Any) -> None:
    config = opened(build(QWEN2)).config
    assert config["model_type"] == "qwen2"
    assert config["rope_interleaved"] is False
    assert "attention_bias" not in config


def test_gpt2_configuration_and_names(opened: Any) -> None:
    stems = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    tensors = [(f"blk.0.{stem}.bias", (8,), 0, 32 * i) for i, stem in enumerate(stems)]
    tensors += [("position_embd.weight", (8, 1), 0, 192), ("token_embd.weight", (8, 3), 0, 224)]
    checkpoint = opened(build(GPT2, tensors, 320))
    assert checkpoint.config == {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 16,
        "n_positions": 32,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": pytest.approx(1e-5),
        "vocab_size": 3,
        "tie_word_embeddings": True,
        "conv1d_transposed": False,
    }
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert list(checkpoint.tensors) == [*(f"h.0.{name}.bias" for name in names), "wpe.weight", "wte.weight"]


# refused ---------------------------------------------------------------------------------------------

NORM = ("output_norm.weight", (8,), 0, 0)
HUGE = (1 << 63) + 1

REFUSED: dict[str, tuple[bytes, str]] = {
    "version 1": (build(LLAMA, head=b"GGUF\1\0\0\0"), "GGUF file of version 1; versions 2 and 3"),
    "version 4": (build(LLAMA, head=b"GGUF\4\0\0\0"), "version 4"),
    "version 0": (build(LLAMA, head=b"GGUF\0\0\0\0"), "version 0"),
    "big-endian": (build(LLAMA, head=b"GGUF\0\0\0\3"), "big-endian"),
    "only a magic": (b"GGUF", "cut short"),
    "not GGUF": (b"PK\3\4" + bytes(100), "not a GGUF file but a zip archive"),
    "many tensors": (build(LLAMA, counts=(1 << 60, 7)), "claims 1152921504606846976 tensors"),
    "many keys": (build(LLAMA, counts=(0, (1 << 64) - 1)), "claims 0 tensors and 18446744073709551615 keys"),
    "a few more keys": (build(LLAMA, counts=(0, 9)), "."),
    "key twice": (
        build([*LLAMA.items(), ("llama.block_count", 1)]),
        "the key llama.block_count stands twice",
    ),
    "key not UTF-8": (build([("a", 1)]).replace(b"a", b"\xff"), "not UTF-8 at byte 32"),
    "long key": (b"GGUF\3\0\0\0" + struct.pack("<QQQ", 0, 1, HUGE) + bytes(100), "cut short"),
    "unknown type": (build({**LLAMA, "x": struct.pack("<I", 13)}), "unknown type 13 of a value"),
    "long string": (build({**LLAMA, "x": struct.pack("<IQ", 8, HUGE)}), "cut short"),
    "long list": (build({**LLAMA, "x": struct.pack("<IIQ", 9, 4, 1 << 62)}), "cut short"),
    "long list of strings": (build({**LLAMA, "x": struct.pack("<IIQ", 9, 8, HUGE)}), "cut short"),
    "long string in a list": (build({**LLAMA, "x": struct.pack("<IIQQ", 9, 8, 1, HUGE)}), "cut short"),
    "long list of lists": (build({**LLAMA, "x": struct.pack("<IIQ", 9, 9, 1 << 61)}), "cut short"),
    "deep lists": (
        build({**LLAMA, "x": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9}),
        "nested too deeply",
    ),
    "list of an unknown type": (
        build({**LLAMA, "x": struct.pack("<IIQ", 9, 99, 1) + bytes(8)}),
        "unknown type 99",
    ),
    "alignment 0": (build({**LLAMA, "general.alignment": 0}), "general.alignment is 0"),
    "alignment 12": (build({**LLAMA, "general.alignment": 12}), "general.alignment is 12"),
    "alignment of text": (build({**LLAMA, "general.alignment": "32"}), "general.alignment is 32"),
    "dimensions": (build(LLAMA, [("output_norm.weight", (1,) * 5, 0, 0)], 4), "5 dimensions; 4 is the limit"),
    "tensor twice": (build(LLAMA, [NORM, (*NORM[:3], 32)], 64), "tensor output_norm.weight: stands twice"),
    "overlap": (build(LLAMA, [NORM, ("output.weight", (8,), 0, 0)], 64), "tensor output.weight: overlaps"),
    "overlap in part": (
        build(LLAMA, [("output.weight", (16,), 0, 0), (*NORM[:3], 32)], 64),
        "overlaps the tensor",
    ),
    "past the end": (
        build(LLAMA, [NORM], 31),
        "tensor output_norm.weight: its data, 0 to 32, ends after the file",
    ),
    "far offset": (build(LLAMA, [(*NORM[:3], (1 << 64) - 32)], 32), "ends after the file"),
    "odd offset": (build(LLAMA, [(*NORM[:3], 4)], 64), "its offset 4 is no multiple of 32"),
    "overflow": (
        build(LLAMA, [("output.weight", (1 << 32, 1 << 32), 0, 0)], 64),
        "tensor output.weight: its size overflows",
    ),
    "q2_k": (
        build(LLAMA, [("output.weight", (256,), 10, 0)], 84),
        "tensor output.weight: the type q2_k is not supported",
    ),
    "iq4_xs": (build(LLAMA, [("output.weight", (256,), 23, 0)], 136), "the type iq4_xs is not supported"),
    "type 4": (build(LLAMA, [("output.weight", (256,), 4, 0)], 136), "the type number 4 is not supported"),
    "part of a block": (
        build(LLAMA, [("output.weight", (48,), 2, 0)], 64),
        "48 values are not whole q4_0 blocks",
    ),
    "scalar of a block": (build(LLAMA, [("output.weight", (), 2, 0)], 64), "a single value cannot be q4_0"),
    "unknown tensor": (
        build(LLAMA, [("blk.0.attn_z.weight", (8,), 0, 0)], 32),
        "tensor blk.0.attn_z.weight: unknown to",
    ),
    "unknown kind": (
        build(LLAMA, [("output_norm.scale", (8,), 0, 0)], 32),
        "tensor output_norm.scale: unknown to",
    ),
    "layer 01": (
        build(LLAMA, [("blk.01.attn_q.weight", (8,), 0, 0)], 32),
        "tensor blk.01.attn_q.weight: unknown to",
    ),
    "layer -1": (
        build(LLAMA, [("blk.-1.attn_q.weight", (8,), 0, 0)], 32),
        "unknown to the architecture llama",
    ),
    "no layer": (build(LLAMA, [("blk.weight", (8,), 0, 0)], 32), "unknown to the architecture llama"),
    "name with a line end": (build(LLAMA, [("a\nb", (8,), 0, 0)], 32), r"tensor 'a\\nb': unknown"),
    "no architecture": (build({"a": 1}), "general.architecture is missing"),
    "architecture": (
        build({"general.architecture": "mamba"}),
        "the architecture mamba is not supported; these are: llama",
    ),
    "architecture of a list": (
        build({"general.architecture": ["llama"]}),
        "architecture .* is not supported",
    ),
    "adapter": (build({**LLAMA, "general.type": "adapter"}), "is not a model but: adapter"),
    "a part": (build({**LLAMA, "split.count": 3}), "one of 3 parts"),
    "missing key": (
        build({k: v for k, v in LLAMA.items() if "block" not in k}),
        "llama.block_count is missing",
    ),
    "text for a number": (
        build({**LLAMA, "llama.block_count": "1"}),
        "llama.block_count: 1 is not a positive whole number",
    ),
    "no layers": (build({**LLAMA, "llama.block_count": 0}), "llama.block_count: 0 is not a positive whole number"),
    "truth for a number": (
        build({**LLAMA, "llama.block_count": True}),
        "llama.block_count: True is not a positive",
    ),
    "infinite eps": (
        build({**LLAMA, "llama.rope.freq_base": float("inf")}),
        "rope.freq_base: inf is not a positive",
    ),
    "layers that differ": (
        build({**LLAMA, "llama.attention.head_count_kv": [1, 2]}),
        r"head_count_kv: \[1, 2\] is not",
    ),
    "heads": (
        build({**LLAMA, "llama.attention.head_count": 3}),
        "embedding_length: 8 is no multiple of the 3 heads",
    ),
    "values' width": (
        build({**LLAMA, "llama.attention.value_length": 8}),
        "attention.value_length: values as wide",
    ),
    "part of a head": (
        build({**LLAMA, "llama.rope.dimension_count": 2}),
        "rope.dimension_count: rotation of whole",
    ),
    "longrope": (build({**LLAMA, SCALING + "type": "longrope"}), "scaling.type: longrope is not implemented"),
    "experts": (
        build({**LLAMA, "llama.expert_count": 8}),
        "llama.expert_count: 8 asks for what is not implemented",
    ),
    "softcap": (
        build({**LLAMA, "llama.attn_logit_softcapping": 50.0}),
        "attn_logit_softcapping: 50.0 asks for",
    ),
    "logit scale": (build({**LLAMA, "llama.logit_scale": 0.5}), "llama.logit_scale: 0.5 asks for"),
    "qwen's window": (
        build({**QWEN2, "qwen2.attention.sliding_window": 8}),
        "attention.sliding_window: 8 asks for",
    ),
    "unknown key": (build({**LLAMA, "llama.wings": 2}), "llama.wings: 2 asks for what is not implemented"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(opened: Any, case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(data)
    assert "\n" not in str(caught.value)
    assert re.match(r"/.*/model\.gguf: ", str(caught.value))


def test_every_truncation_is_refused(opened: Any) -> None:
    keys = {**LLAMA, "tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.scores": [0.5, 1.0]}
    whole = build(keys, [NORM], 32)
    opened(whole)
    for length in range(4, len(whole)):
        with pytest.raises(CheckpointError):
            opened(whole[:length])


def test_strings_that_are_not_utf8_are_refused_when_read(opened: Any) -> None:
    metadata = opened(
        build({**LLAMA, "x": ["aa", "bb"], "y": "cc", "z": True}).replace(b"bb", b"b\xff").replace(b"cc", b"\xffc")
    )
    for key in ("x", "y"):
        with pytest.raises(CheckpointError, match="not UTF-8"):
            metadata.tokenizer.gguf[key]


def test_truth_values_are_0_or_1(opened: Any) -> None:
    metadata = opened(
        build({**LLAMA, "x": struct.pack("<IB", 7, 2), "y": struct.pack("<IIQBB", 9, 7, 2, 1, 3)})
    ).tokenizer.gguf
    for key in ("x", "y"):
        with pytest.raises(CheckpointError, match="neither 0 nor 1"):
            metadata[key]


# real files ------------------------------------------------------------------------------------------


def test_stories260k_is_the_same_in_both_formats(test_data: Path) -> None:
    folder = test_data / "models" / "stories260K"
    one, other = open_checkpoint(folder), open_checkpoint(folder / "stories260K.gguf")
    assert one.format == "safetensors"
    assert other.format == "gguf"
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "rope_theta",
    ):
        assert one.config[key] == other.config[key]
    assert set(other.tensors) - set(one.tensors) == {"lm_head.weight"}
    for name, tensor in one.tensors.items():
        assert other.tensors[name].shape == tensor.shape
        if "q_proj" not in name and "k_proj" not in name:  # whose rows are in another order
            assert other.tensors[name].data == tensor.data
    assert other.tensors["lm_head.weight"].data == one.tensors["model.embed_tokens.weight"].data


def test_the_default_model_reads_as_the_gguf_package_reads_it(default_model: Path) -> None:
    checkpoint = open_checkpoint(default_model)
    reader = gguf.GGUFReader(default_model)
    assert len(checkpoint.tensors) == len(reader.tensors)
    for ours, theirs in zip(checkpoint.tensors.values(), reader.tensors, strict=True):
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.dtype == theirs.tensor_type.name.lower()
        assert ours.data == theirs.data.tobytes()
    metadata = checkpoint.tokenizer.gguf
    assert metadata is not None
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert metadata[key] == field.contents()
