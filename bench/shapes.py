"""Checkpoints of full-size shapes with random weights: for measuring speed where the real ones are not at hand.

    python bench/shapes.py gpt2 /tmp/gpt2            # f32
    python bench/shapes.py llama-3.2-1b /tmp/1b bf16

Weights are normal with a deviation of 0.02 (norms about 1), as training starts. There is no tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.models import model_for


def gpt2(n_layer: int, n_embd: int, n_head: int) -> dict[str, Any]:
    """A GPT-2 configuration."""
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", "eos_token_id": 50256, "bos_token_id": 50256, **sizes}


def llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """A Llama configuration."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "bos_token_id": 1,
        **more,
    }


SHAPES = {
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True, rope_theta=1e5),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, rope_theta=5e5, head_dim=64),
    "llama-2-7b": llama(4096, 11008, 32, 32, 32, 32000),
    "llama-3.1-8b": llama(4096, 14336, 32, 32, 8, 128256, rope_theta=5e5),
    "llama-2-70b": llama(8192, 28672, 80, 64, 8, 32000),
}


def write(shape: str, folder: Path, dtype: str = "f32") -> Path:
    """Writes config.json and model.safetensors, the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    parameters = model_for(SHAPES[shape]).parameters()
    prefix = "transformer." if shape.startswith("gpt2") else "model."
    header: dict[str, Any] = {}
    end, size = 0, {"f32": 4, "bf16": 2}[dtype]
    for name, parameter in parameters.items():
        begin, end = end, end + size * int(np.prod(parameter.shape))
        full = name if name.startswith("lm_head") else prefix + name
        header[full] = {"dtype": dtype.upper(), "shape": parameter.shape, "data_offsets": [begin, end]}
    text = json.dumps(header)
    text += " " * (-(8 + len(text)) % 64)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        for name, parameter in parameters.items():
            values = rng.standard_normal(parameter.shape, np.float32) * np.float32(0.02)
            if parameter.kind == "vector" and name.endswith("weight"):
                values += 1
            file.write((values if dtype == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16)).tobytes())
    return folder


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: shapes.py {{{','.join(SHAPES)}}} FOLDER [f32|bf16]")
    write(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
