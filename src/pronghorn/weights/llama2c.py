"""llama2.c's `.bin` files (github.com/karpathy/llama2.c, export.py): version 0, which has no magic number, and 1.

Little-endian: a header of seven int32 (and in version 1 a magic number and a flag), then float32 tensors, those of
one kind for all layers together.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from pronghorn.weights.files import fail
from pronghorn.weights.types import Tensor

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42"
_HEADER_1 = 256
_LAYER = "model.layers.*."
_ATTENTION = {
    "wq": _LAYER + "self_attn.q_proj", "wk": _LAYER + "self_attn.k_proj", "wv": _LAYER + "self_attn.v_proj",
    "wo": _LAYER + "self_attn.o_proj",
}  # fmt: skip
_MLP = {"w1": _LAYER + "mlp.gate_proj", "w2": _LAYER + "mlp.down_proj", "w3": _LAYER + "mlp.up_proj"}
_NORM_1, _NORM_2 = _LAYER + "input_layernorm", _LAYER + "post_attention_layernorm"
_ORDER_0 = ("model.embed_tokens", _NORM_1, *_ATTENTION.values(), _NORM_2, *_MLP.values(), "model.norm", "frequencies")
_ORDER_1 = (_NORM_1, _NORM_2, "model.norm", "model.embed_tokens", *_ATTENTION.values(), *_MLP.values())


def read_llama2c(path: Path, view: memoryview) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A mapped file -> (config, tensors by transformers' names). CheckpointError for what is wrong."""
    begin, order, version = 28, _ORDER_0, 0
    if bytes(view[:4]) == MAGIC:
        if len(view) < _HEADER_1:
            fail(path, "is cut short: it ends within its header")
        (version,) = struct.unpack_from("<i", view, 4)
        if version == 2:
            fail(path, "is a llama2.c file of version 2 (int8), which is not supported: export version 0 or 1")
        if version != 1:
            fail(path, f"is a llama2.c file of version {version}; 0 and 1 are supported")
        begin, order = _HEADER_1, _ORDER_1
    if len(view) < 36:
        fail(path, "is neither PyTorch's nor llama2.c's: it is shorter than a header")
    sizes, shared = _sizes(view, 8 if version else 0)
    if version:
        shared = view[36] == 1
    if min(sizes.values()) <= 0 or sizes["dim"] % sizes["n_heads"] or sizes["n_heads"] % sizes["n_kv_heads"]:
        what = ", ".join(f"{key} {n}" for key, n in sizes.items())
        fail(path, f"is not PyTorch's, and makes no sense as llama2.c's: {what}")
    places = _places(sizes, order, shared)
    if (expected := begin + 4 * sum(count for *_, count in places)) != len(view):
        fail(path, f"is {len(view)} bytes long; its header asks for {expected}")
    tensors: dict[str, Tensor] = {}
    at = begin
    for name, shape, count in places:
        layers = sizes["n_layers"] if "*" in name else 1
        size = 4 * count // layers
        for layer in range(layers):
            full = name.replace("*", str(layer)) + ".weight"
            if name != "frequencies":  # of the rotation, which follow from the sizes
                tensors[full] = Tensor(full, "f32", shape, view[at : at + size])
            at += size
    config = {
        "model_type": "llama",
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["hidden_dim"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"],
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": sizes["max_seq_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shared,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_interleaved": True,
    }
    return config, tensors


def _sizes(view: memoryview, at: int) -> tuple[dict[str, int], bool]:
    """The header's numbers, and whether the head is the embedding: version 0 writes its vocabulary negative if not."""
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    sizes = dict(zip(names, struct.unpack_from("<7i", view, at), strict=True))
    shared = sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    return sizes, shared


def _places(sizes: dict[str, int], order: tuple[str, ...], shared: bool) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape of one layer's, elements of all layers') in the file's order."""
    dim, inner, vocabulary = sizes["dim"], sizes["hidden_dim"], sizes["vocab_size"]
    head_dim = dim // (sizes["n_heads"] or 1)
    kv = head_dim * sizes["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, dim), "lm_head": (vocabulary, dim), "model.norm": (dim,),
        _NORM_1: (dim,), _NORM_2: (dim,), "frequencies": (2, sizes["max_seq_len"], head_dim // 2),
        _ATTENTION["wq"]: (dim, dim), _ATTENTION["wk"]: (kv, dim), _ATTENTION["wv"]: (kv, dim),
        _ATTENTION["wo"]: (dim, dim), _MLP["w1"]: (inner, dim), _MLP["w2"]: (dim, inner), _MLP["w3"]: (inner, dim),
    }  # fmt: skip
    places = []
    for name in order if shared else (*order, "lm_head"):
        count = sizes["n_layers"] if "*" in name else 1
        for n in shapes[name]:
            count *= n
        places.append((name, shapes[name], count))
    return places
