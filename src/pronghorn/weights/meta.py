"""Meta's Llama checkpoints: `params.json` and `consolidated.NN.pth` (github.com/meta-llama/llama, llama/model.py)."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any

from pronghorn.weights.files import fail, map_file, read_json, shown
from pronghorn.weights.torch import read_torch
from pronghorn.weights.types import DTYPES, Made, Tensor

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers.*.attention_norm": "model.layers.*.input_layernorm",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.attention.wq": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.wk": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.wv": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.wo": "model.layers.*.self_attn.o_proj",
    "layers.*.feed_forward.w1": "model.layers.*.mlp.gate_proj",
    "layers.*.feed_forward.w2": "model.layers.*.mlp.down_proj",
    "layers.*.feed_forward.w3": "model.layers.*.mlp.up_proj",
}
_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip


def read_meta(folder: Path, files: list[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder and its `consolidated.NN.pth`, one for each rank of tensor parallelism -> (config, tensors).

    The ranks' parts are joined when they are used (`Made`).
    """
    params = read_json(folder / "params.json", 1_000_000)
    for key in sorted(params.keys() - _KEYS):
        fail(folder / "params.json", f"{shown(key)} is {shown(str(params[key]))}, which is not implemented")
    for key, value in params.items():
        if not isinstance(value, (int, float, NoneType)):
            fail(folder / "params.json", f"{key} is {shown(str(value))}, which is no number")
    if not files or [file.name for file in files] != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        fail(folder, "the files consolidated.00.pth, consolidated.01.pth, ... are not all there")
    shards = [read_torch(file, map_file(file)) for file in files]
    tensors: dict[str, Tensor] = {}
    for name in shards[0]:
        if name == "rope.freqs":  # what the code works out for itself
            continue
        layer = re.match(r"layers\.(\d{1,4})\.", name)
        stem = name.removesuffix(".weight")
        general = f"layers.*.{stem[layer.end() :]}" if layer else stem
        if general not in _NAMES or stem == name:
            fail(files[0], f"tensor {shown(name)}: is not part of a Llama model")
        full = _NAMES[general].replace("*", layer[1] if layer else "") + ".weight"
        parts = []
        for file, shard in zip(files, shards, strict=True):
            if name not in shard:
                fail(file, f"tensor {shown(name)}: is missing; {files[0].name} has it")
            parts.append(shard[name])
        tensors[full] = _joined(files[0], full, parts, params)
    inner = tensors.get("model.layers.0.mlp.gate_proj.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    if inner is None or embedding is None:
        fail(files[0], "lacks the embedding, or the first layer")
    theta = params.get("rope_theta") or 10000.0
    # What params.json does not say: the length that Llama 2, Llama 3 and Code Llama were trained for.
    context = {500000.0: 131072 if params.get("use_scaled_rope") else 8192, 1000000.0: 16384}.get(theta, 4096)
    config = {
        "model_type": "llama",
        "hidden_size": params.get("dim"),
        "intermediate_size": inner.shape[0] if inner.shape else 0,
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": params.get("n_heads"),
        "num_key_value_heads": params.get("n_kv_heads") or params.get("n_heads"),
        "rms_norm_eps": params.get("norm_eps"),
        "rope_theta": theta,
        "max_position_embeddings": params.get("max_seq_len") or context,
        "vocab_size": embedding.shape[0] if embedding.shape else 0,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "hidden_act": "silu",
        "rope_interleaved": True,
    }
    if params.get("use_scaled_rope"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor") or 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config, tensors


def _joined(path: Path, name: str, parts: list[Tensor], params: dict[str, Any]) -> Tensor:
    """One tensor of its ranks' parts: whole in each (norms), or cut by rows or by columns."""
    first = parts[0]
    if any((part.dtype, part.shape) != (first.dtype, first.shape) for part in parts):
        fail(path, f"tensor {shown(name)}: has another shape or type in another file")
    if len(parts) == 1:
        return first
    if len(first.shape) != 2:
        if any(part.data != first.data for part in parts):
            fail(path, f"tensor {shown(name)}: differs from the same in another file")
        return first
    rows, columns = first.shape
    by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
    if "embed_tokens" in name:  # Llama 1 and 2 cut its columns, Llama 3 its rows
        by_columns = columns * len(parts) == params.get("dim")
    size = DTYPES[first.dtype]

    def make() -> memoryview:
        import numpy as np

        arrays: Any = [np.frombuffer(part.data, f"V{size}").reshape(part.shape) for part in parts]
        return np.concatenate(arrays, axis=1 if by_columns else 0).view(np.uint8).reshape(-1).data

    shape = (rows, columns * len(parts)) if by_columns else (rows * len(parts), columns)
    return Made.of(name, first.dtype, shape, make)
