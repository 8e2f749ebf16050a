"""The GGUF format, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md), in Hugging Face's vocabulary.

A file is: magic, version, counts; key-value pairs; tensor infos; padding; data. All is little-endian.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pronghorn.weights.files import fail, shown
from pronghorn.weights.types import DTYPES, Tensor

BLOCKS: dict[str, tuple[int, int]] = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
"""Block formats: (values, bytes) of a block. `native/gguf.cpp` says what the bytes mean."""

TENSOR_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_k",
    11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs",
    19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32",
    27: "i64", 28: "f64", 29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4",
    41: "q1_0",
}  # fmt: skip

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    i: struct.Struct("<" + code)
    for i, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "B",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_COUNTS = struct.Struct("<QQ")
_ELEMENTS = struct.Struct("<IQ")  # an array's type and length
_PLACE = struct.Struct("<IQ")  # a tensor's type and offset
_DIMS = tuple(struct.Struct(f"<{n}Q") for n in range(5))


class _Reader:
    """A position in a file's header. `struct.error` at its end; `fail` for what is wrong before that."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path, self.view, self.at = path, view, 4

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        values = form.unpack_from(self.view, self.at)
        self.at += form.size
        return values

    def string(self) -> str:
        (length,) = self.unpack(_U64)
        data = self.view[self.at : self.at + length]
        if len(data) < length:
            raise struct.error
        self.at += length
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            fail(self.path, f"holds a string that is not UTF-8 at byte {self.at - length}")

    def value(self, kind: int) -> Any:
        if form := _SCALARS.get(kind):
            (value,) = self.unpack(form)
            return self._bools([value])[0] if kind == _BOOL else value
        if kind == _STRING:
            return self.string()
        element, count = self.unpack(_ELEMENTS)
        if element == _STRING:
            from pronghorn._native import gguf_strings

            try:
                return gguf_strings(self.view, self.at, count)
            except UnicodeDecodeError:
                fail(self.path, "holds a list with a string that is not UTF-8")
        if element == _ARRAY:
            lists = []
            for _ in range(count):
                start = self.at
                lists.append(self.value(_ARRAY))
                self.at = start
                self.skip(_ARRAY)
            return lists
        form = _SCALARS[element]
        values: array[Any] = array(form.format[1:])
        values.frombytes(self.view[self.at : self.at + form.size * count])
        return self._bools(values.tolist()) if element == _BOOL else values.tolist()

    def _bools(self, values: list[int]) -> list[bool]:
        if any(value > 1 for value in values):
            fail(self.path, f"holds a truth value that is neither 0 nor 1 at byte {self.at}")
        return [value == 1 for value in values]

    def skip(self, kind: int, depth: int = 0) -> None:
        """Past a value, which then is known to lie in the file."""
        if form := _SCALARS.get(kind):
            self._past(form.size)
        elif kind == _STRING:
            (length,) = self.unpack(_U64)
            self._past(length)
        elif kind == _ARRAY:
            element, count = self.unpack(_ELEMENTS)
            if form := _SCALARS.get(element):
                self._past(form.size * count)
            elif element == _STRING:
                # 100,000 strings take 15 ms in Python, and 0.2 ms here.
                from pronghorn._native import gguf_skip_strings

                self.at = gguf_skip_strings(self.view, self.at, count)
                if self.at < 0:
                    raise struct.error
            elif depth >= 4:
                fail(self.path, "arrays nested too deeply")
            else:
                if 12 * count > len(self.view) - self.at:
                    raise struct.error
                for _ in range(count):
                    self.skip(element, depth + 1)
        else:
            fail(self.path, f"unknown type {kind} of a value at byte {self.at}")

    def _past(self, length: int) -> None:
        self.at += length
        if self.at > len(self.view):
            raise struct.error


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a file. A value is decoded when it is asked for, each time anew."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path, self._view = path, view
        self._places: dict[str, tuple[int, int]] = {}  # key -> (type, position)

    def __getitem__(self, key: str) -> Any:
        kind, at = self._places[key]
        reader = _Reader(self.path, self._view)
        reader.at = at
        return reader.value(kind)

    def raw(self, key: str) -> memoryview:
        """A value's type and bytes, as they stand in the file."""
        kind, at = self._places[key]
        reader = _Reader(self.path, self._view)
        reader.at = at
        reader.skip(kind)
        return self._view[at - 4 : reader.at]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places


def read_gguf(path: Path, view: memoryview) -> tuple[dict[str, Any], dict[str, Tensor], Mapping[str, Any]]:
    """A mapped file -> (config as in config.json, tensors by transformers' names, metadata).

    CheckpointError for what is damaged, and for what would change the computation and is not implemented.
    """
    try:
        metadata, raw = _read(path, view)
    except struct.error:
        fail(path, "is cut short: its header goes past the end of the file")
    if "general.architecture" not in metadata:
        from pronghorn.weights.fastgpt import is_fastgpt, read_fastgpt

        if is_fastgpt(raw):
            return read_fastgpt(path, raw)
    return *translate(metadata, raw), metadata


def _read(path: Path, view: memoryview) -> tuple[Metadata, dict[str, Tensor]]:
    reader = _Reader(path, view)
    (version,) = reader.unpack(_U32)
    if version and version & 0xFFFF == 0:
        fail(path, "is a big-endian GGUF file, which is not supported")
    if version not in (2, 3):
        fail(path, f"is a GGUF file of version {version}; versions 2 and 3 are supported")
    n_tensors, n_pairs = reader.unpack(_COUNTS)
    # The least that they can take: no loop below is longer than the file.
    if n_tensors * 24 + n_pairs * 13 > len(view):
        fail(path, f"claims {n_tensors} tensors and {n_pairs} keys, more than {len(view)} bytes can hold")

    metadata = Metadata(path, view)
    for _ in range(n_pairs):
        key = reader.string()
        if key in metadata:
            fail(path, f"the key {shown(key)} stands twice")
        (kind,) = reader.unpack(_U32)
        metadata._places[key] = kind, reader.at
        reader.skip(kind)

    infos = []
    for _ in range(n_tensors):
        name = reader.string()
        (n_dims,) = reader.unpack(_U32)
        if n_dims > 4:
            fail(path, f"tensor {shown(name)}: {n_dims} dimensions; 4 is the limit")
        infos.append((name, reader.unpack(_DIMS[n_dims]), *reader.unpack(_PLACE)))

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment % 8:
        fail(path, f"general.alignment is {shown(str(alignment))}, not a multiple of 8")
    data = view[reader.at + -reader.at % alignment :]

    tensors: dict[str, Tensor] = {}
    end = 0
    for name, dims, kind, offset in sorted(infos, key=lambda info: info[3]):
        tensor = _tensor(path, name, dims, kind, offset, data)
        if name in tensors:
            fail(path, f"tensor {shown(name)}: stands twice")
        if offset % alignment:
            fail(path, f"tensor {shown(name)}: its offset {offset} is no multiple of {alignment}")
        if offset < end:
            fail(path, f"tensor {shown(name)}: overlaps the tensor before it")
        end = offset + len(tensor.data)
        tensors[name] = tensor
    return metadata, tensors


def _tensor(path: Path, name: str, dims: tuple[int, ...], kind: int, offset: int, data: memoryview) -> Tensor:
    dtype = TENSOR_TYPES.get(kind, f"number {kind}")
    values, size = BLOCKS.get(dtype) or (1, DTYPES.get(dtype, 0))
    if not size:
        fail(path, f"tensor {shown(name)}: the type {dtype} is not supported")
    if dims and dims[0] % values:
        fail(
            path,
            f"tensor {shown(name)}: rows of {dims[0]} values are not whole {dtype} blocks of {values}",
        )
    count = 1
    for n in dims:
        count *= n
        if count >= 1 << 60:
            fail(path, f"tensor {shown(name)}: its size overflows")
    if not dims and values > 1:
        fail(path, f"tensor {shown(name)}: a single value cannot be {dtype}")
    length = count // values * size
    if offset + length > len(data):
        fail(
            path,
            f"tensor {shown(name)}: its data, {offset} to {offset + length}, ends after the file",
        )
    return Tensor(name, dtype, dims[::-1], data[offset : offset + length])


# Into Hugging Face's vocabulary -----------------------------------------------------------------------------

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.*.attn_norm": "model.layers.*.input_layernorm",
    "blk.*.attn_q": "model.layers.*.self_attn.q_proj",
    "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
    "blk.*.attn_v": "model.layers.*.self_attn.v_proj",
    "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
    "blk.*.attn_q_norm": "model.layers.*.self_attn.q_norm",
    "blk.*.attn_k_norm": "model.layers.*.self_attn.k_norm",
    "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj",
    "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
    "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
    "rope_freqs": "rope_freqs",
}
_GPT2_NAMES = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "output": "lm_head",
    "blk.*.attn_norm": "h.*.ln_1",
    "blk.*.attn_qkv": "h.*.attn.c_attn",
    "blk.*.attn_output": "h.*.attn.c_proj",
    "blk.*.ffn_norm": "h.*.ln_2",
    "blk.*.ffn_up": "h.*.mlp.c_fc",
    "blk.*.ffn_down": "h.*.mlp.c_proj",
}
NAMES = {"llama": _LLAMA_NAMES, "qwen2": _LLAMA_NAMES, "qwen3": _LLAMA_NAMES, "gpt2": _GPT2_NAMES}

# Keys that say nothing when they have these values (None: any), and are refused otherwise.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "pooling_type": 0,
    "residual_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.finetuned": None,
    "rope.scaling.original_context_length": None,
    "tensor_data_layout": None,
    "use_parallel_residual": False,
}


class _Keys:
    """The keys of one architecture: each is taken once, and what is left at the end is refused."""

    def __init__(self, metadata: Metadata, arch: str) -> None:
        self.metadata, self.prefix = metadata, arch + "."
        self.left = {key for key in metadata if key.startswith(self.prefix)}

    def wrong(self, key: str, fault: str) -> NoReturn:
        fail(self.metadata.path, f"the key {self.prefix}{shown(key)}: {fault}")

    def take(self, key: str, kind: Any, default: Any = None) -> Any:
        """A value of this kind (numbers: positive, finite), or the default; missing with no default, an error."""
        full = self.prefix + key
        if full not in self.metadata:
            if default is None:
                fail(self.metadata.path, f"the key {full} is missing")
            return default
        self.left.discard(full)
        value = self.metadata[full]
        # Some writers give a number for every layer; models here have one for all.
        if isinstance(value, list) and kind is int and value and value.count(value[0]) == len(value):
            value = value[0]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is not str and not 0 < value < float("inf")):
            expected = {int: "a positive whole number", float: "a positive number", str: "text"}[kind]
            self.wrong(key, f"{shown(str(value))} is not {expected}")
        return value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def finish(self) -> None:
        for full in sorted(self.left):
            key, value = full[len(self.prefix) :], self.metadata[full]
            if key not in _NEUTRAL or _NEUTRAL[key] not in (None, value):
                self.wrong(key, f"{shown(str(value))} asks for what is not implemented")


def translate(metadata: Any, raw: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors by GGUF's names -> (config, tensors) in transformers' vocabulary."""
    path = metadata.path
    arch = metadata.get("general.architecture")
    if arch is None:
        fail(path, "the key general.architecture is missing")
    if not isinstance(arch, str) or arch not in NAMES:
        fail(path, f"the architecture {shown(str(arch))} is not supported; these are: {', '.join(NAMES)}")
    if (kind := metadata.get("general.type", "model")) != "model":
        fail(path, f"is not a model but: {shown(str(kind))}")
    if (parts := metadata.get("split.count", 0)) not in (0, 1):
        fail(path, f"is one of {shown(str(parts))} parts of a split file: merge them with `gguf-split --merge`")

    tensors = {}
    for name, tensor in raw.items():
        name = _rename(NAMES[arch], name) or fail(path, f"tensor {shown(name)}: unknown to the architecture {arch}")
        tensors[name] = Tensor(name, tensor.dtype, tensor.shape, tensor.data)
    keys = _Keys(metadata, arch)
    config = (_gpt2_config if arch == "gpt2" else _llama_config)(keys, arch, tensors)
    keys.finish()
    return config, tensors


def _rename(names: dict[str, str], name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    layer = ""
    if stem.startswith("blk."):
        _, layer, rest = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", "")
        if not (layer.isascii() and layer.isdecimal() and str(int(layer[:9])) == layer):
            return None
        stem = f"blk.*.{rest}"
    if kind not in ("weight", "bias") or stem not in names:
        return None
    return f"{names[stem].replace('*', layer)}.{kind}"


def _vocab_size(keys: _Keys, embedding: Tensor | None) -> int:
    """As the key says; else the embedding's rows."""
    rows = embedding.shape[0] if embedding and embedding.shape else 0
    size: int = keys.take("vocab_size", int, rows)
    return size


def _llama_config(keys: _Keys, arch: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    embd: int = keys.take("embedding_length", int)
    n_heads: int = keys.take("attention.head_count", int)
    head_dim = keys.take("attention.key_length", int, embd // n_heads)
    if embd % n_heads and not keys.has("attention.key_length"):
        keys.wrong("embedding_length", f"{embd} is no multiple of the {n_heads} heads")
    if keys.take("attention.value_length", int, head_dim) != head_dim:
        keys.wrong("attention.value_length", "values as wide as the keys are implemented, and no others")
    if keys.take("rope.dimension_count", int, head_dim) != head_dim:
        keys.wrong("rope.dimension_count", f"rotation of whole heads ({head_dim}) is implemented, and no other")
    config: dict[str, Any] = {
        "model_type": arch,
        "hidden_size": embd,
        "num_hidden_layers": keys.take("block_count", int),
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", int, n_heads),
        "head_dim": head_dim,
        "intermediate_size": keys.take("feed_forward_length", int),
        "hidden_act": "silu",
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": keys.take("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(keys),
        "max_position_embeddings": keys.take("context_length", int),
        "vocab_size": _vocab_size(keys, tensors.get("model.embed_tokens.weight")),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "rope_interleaved": arch == "llama",
    }
    if arch != "qwen2":  # whose biases are part of the architecture
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    if factors := tensors.pop("rope_freqs.weight", None):  # Llama 3.1's scaling, worked out by the converter
        if factors.dtype != "f32":
            fail(keys.metadata.path, f"tensor rope_freqs.weight: {factors.dtype} where f32 is expected")
        config["rope_factors"] = factors.data.cast("f").tolist()
    if arch == "llama" and keys.has("attention.sliding_window"):
        config["model_type"] = "mistral"
        config["sliding_window"] = keys.take("attention.sliding_window", int)
    return config


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.take("rope.scaling.type", str, "linear")
    factor = keys.take("rope.scaling.factor", float, keys.take("rope.scale_linear", float, 1.0))
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind not in ("linear", "yarn"):
        keys.wrong("rope.scaling.type", f"{shown(kind)} is not implemented")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn" and keys.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = keys.take("rope.scaling.original_context_length", int)
    for name in ("beta_fast", "beta_slow") if kind == "yarn" else ():
        if keys.has(f"rope.scaling.yarn_{name}"):
            scaling[name] = keys.take(f"rope.scaling.yarn_{name}", float)
    return scaling


def _gpt2_config(keys: _Keys, arch: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "model_type": arch,
        "n_embd": keys.take("embedding_length", int),
        "n_layer": keys.take("block_count", int),
        "n_head": keys.take("attention.head_count", int),
        "n_inner": keys.take("feed_forward_length", int),
        "n_positions": keys.take("context_length", int),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": keys.take("attention.layer_norm_epsilon", float),
        "vocab_size": _vocab_size(keys, tensors.get("wte.weight")),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "conv1d_transposed": False,
    }
