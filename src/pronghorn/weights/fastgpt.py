"""fastGPT's `model.gguf` (github.com/certik/fastGPT, create_model.py): GPT-2 in GGUF's container, in names of its own.

The sizes and the tokenizer are tensors too; weights of one kind are one tensor for all layers, [n_layer, n_in, n_out].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from pronghorn.weights.files import fail, shown
from pronghorn.weights.types import DENSE, DTYPES, Tensor

MARK = 0xFA51697
END = "<|endoftext|>"
_HEADER = (
    "mark", "version", "n_vocab", "n_ctx", "n_embd", "n_layer", "n_head", "n_decoder_idx", "n_decoder_txt",
    "n_vocab_idx", "n_vocab_txt", "n_byte_encoder",
)  # fmt: skip
_NAMES = {
    "wte": "wte.weight", "wpe": "wpe.weight", "lnf_g": "ln_f.weight", "lnf_b": "ln_f.bias",
    "ln1_g": "h.*.ln_1.weight", "ln1_b": "h.*.ln_1.bias", "ln2_g": "h.*.ln_2.weight", "ln2_b": "h.*.ln_2.bias",
    "attn_w": "h.*.attn.c_attn.weight", "attn_b": "h.*.attn.c_attn.bias",
    "attn_proj_w": "h.*.attn.c_proj.weight", "attn_proj_b": "h.*.attn.c_proj.bias",
    "mlp_fc_w": "h.*.mlp.c_fc.weight", "mlp_fc_b": "h.*.mlp.c_fc.bias",
    "mlp_proj_w": "h.*.mlp.c_proj.weight", "mlp_proj_b": "h.*.mlp.c_proj.bias",
}  # fmt: skip


def is_fastgpt(raw: Mapping[str, Tensor]) -> bool:
    """Whether a GGUF file's tensors are fastGPT's."""
    header = raw.get("header")
    return header is not None and header.dtype == "i32" and bytes(header.data[:4]) == MARK.to_bytes(4, "little")


def read_fastgpt(path: Path, raw: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """A GGUF file's tensors -> (config, tensors by transformers' names, metadata with the tokenizer)."""

    def wrong(name: str, fault: str) -> NoReturn:
        fail(path, f"tensor {shown(name)}: {fault}")

    numbers = raw["header"].data.cast("i").tolist()
    if len(numbers) != len(_HEADER):
        wrong("header", f"holds {len(numbers)} numbers, not {len(_HEADER)}")
    header = dict(zip(_HEADER, numbers, strict=True))
    if header["version"] not in (1, 2):
        fail(path, f"is a fastGPT file of version {header['version']}; 1 and 2 are supported")
    for name, n in header.items():
        if not 0 < n < 1 << 30:
            wrong("header", f"{name} is {n}")
    config = {
        "model_type": "gpt2",
        "vocab_size": header["n_vocab"],
        "n_positions": header["n_ctx"],
        "n_embd": header["n_embd"],
        "n_layer": header["n_layer"],
        "n_head": header["n_head"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, full in _NAMES.items():
        tensor = raw.get(name)
        if tensor is None:
            wrong(name, "is missing")
        if tensor.dtype not in DENSE:
            wrong(name, f"holds {tensor.dtype}, which is no weight here")
        if "*" not in full:
            tensors[full] = tensor._replace(name=full)
            continue
        n_layers, *shape = tensor.shape or (0,)
        if n_layers != header["n_layer"]:
            wrong(name, f"has {n_layers} layers; the header says {header['n_layer']}")
        size = math.prod(shape) * DTYPES[tensor.dtype]
        for i in range(n_layers):
            layer = full.replace("*", str(i))
            tensors[layer] = Tensor(layer, tensor.dtype, tuple(shape), tensor.data[i * size : (i + 1) * size])

    def texts(offsets: str, joined: str) -> list[str]:
        """A list of texts, kept as one text and the positions between them."""
        places, text = raw.get(offsets), raw.get(joined)
        if places is None or text is None or places.dtype != "i32" or text.dtype != "i8":
            wrong(offsets, f"and {joined}: are missing, or not of their types")
        at = places.data.cast("i").tolist()
        if not at or at[0] != 0 or at[-1] != len(text.data) or any(a > b for a, b in pairwise(at)):
            wrong(offsets, f"its positions do not lie in {joined}")
        try:
            return [str(text.data[a:b], "utf-8") for a, b in pairwise(at)]
        except UnicodeDecodeError:
            wrong(joined, "is not UTF-8")

    tokens = texts("idx", "decoder_txt")
    metadata: dict[str, Any] = {
        "general.architecture": "gpt2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [merge for merge in texts("vocab_idx", "vocab_txt") if merge],
        "tokenizer.ggml.token_type": [3 if token == END else 1 for token in tokens],
    }
    if END in tokens:
        metadata |= dict.fromkeys(("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"), tokens.index(END))
    return config, tensors, metadata
