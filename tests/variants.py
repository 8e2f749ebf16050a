"""Tiny random checkpoints of every variant of every model, as transformers saves them.

`save(name, folder)` writes config.json and model.safetensors; `logits(folder, token_ids)` is what
transformers computes from them. The weights are large enough, and the norms and biases uneven enough, that a
mistake in any of them shows: transformers' own initialization makes attention nearly uniform.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GPT2 = {"vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = LLAMA | {"num_key_value_heads": 2, "num_hidden_layers": 3, "tie_word_embeddings": True}


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    """A config's rope_parameters."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 20000.0} | values}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-gelu": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt2-inner-odd": ("GPT2", GPT2 | {"n_inner": 37}),
    "gpt2-inner-narrow-relu": ("GPT2", GPT2 | {"n_inner": 5, "activation_function": "relu"}),
    "gpt2-unscaled": ("GPT2", GPT2 | {"scale_attn_weights": False}),
    "gpt2-by-layer": (
        "GPT2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3},
    ),
    "gpt2-odd": ("GPT2", GPT2 | {"n_embd": 30, "n_head": 3, "vocab_size": 3, "n_positions": 11}),
    "llama": ("Llama", LLAMA),
    "llama-gqa": ("Llama", LLAMA | {"num_key_value_heads": 2}),
    "llama-mqa-gelu": ("Llama", LLAMA | {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", LLAMA | {"head_dim": 10, "num_key_value_heads": 2}),
    "llama-attention-bias": ("Llama", LLAMA | {"attention_bias": True}),
    "llama-mlp-bias": ("Llama", LLAMA | {"mlp_bias": True}),
    "llama-theta": ("Llama", LLAMA | rope("default", rope_theta=500000.0)),
    "llama3": (
        "Llama",
        LLAMA
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=40,
        )
        | {"head_dim": 16},
    ),
    "llama-linear": ("Llama", LLAMA | rope("linear", factor=4.0)),
    "llama-yarn": (
        "Llama",
        LLAMA | {"head_dim": 32} | rope("yarn", factor=4.0, original_max_position_embeddings=2000),
    ),
    "llama-yarn-mscale": (
        "Llama",
        LLAMA
        | {"head_dim": 32}
        | rope(
            "yarn",
            factor=3.0,
            original_max_position_embeddings=32,
            beta_fast=8.0,
            beta_slow=0.5,
            mscale=1.3,
            mscale_all_dim=0.6,
            truncate=False,
        ),
    ),
    "mistral": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("Mistral", LLAMA | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 37}),
    "mistral-narrow-window": ("Mistral", LLAMA | {"sliding_window": 1}),
    "qwen2": ("Qwen2", QWEN | {"sliding_window": 5}),  # not in use
    "qwen2-sliding": (
        "Qwen2",
        QWEN | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", QWEN | {"head_dim": 16}),
    "qwen3-sliding-bias": (
        "Qwen3",
        QWEN
        | {
            "head_dim": 14,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "smollm": (
        "Llama",
        LLAMA
        | {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "tinyllama": ("Llama", LLAMA | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}),
}

LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-124m": ("GPT2", {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}),
}


def save(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Writes the variant's checkpoint into `folder/name`, the same bytes each time."""
    import torch

    architecture, values = (VARIANTS | LARGE)[name]
    with quiet() as transformers:
        config = getattr(transformers, f"{architecture}Config")(**values)
        model = transformers.AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            for module in model.modules():
                for kind, parameter in module.named_parameters(recurse=False):
                    noise = torch.randn(parameter.shape, generator=generator)
                    if parameter.ndim == 1:
                        parameter.copy_(0.3 * noise + (kind == "weight"))
                    elif isinstance(module, torch.nn.Embedding):
                        parameter.copy_(noise)
                    else:  # [out, in], but GPT-2's Conv1D [in, out]
                        n_in = parameter.shape[isinstance(module, torch.nn.Linear)]
                        parameter.copy_(1.2 * noise / n_in**0.5)
        model.to(getattr(torch, dtype)).save_pretrained(folder / name)
    return folder / name


def logits(folder: Path, token_ids: Sequence[int], dtype: str = "float32", exact: bool = False) -> Any:
    """What transformers computes: a NumPy array [tokens, vocabulary].

    The weights are read as `dtype`; where `exact`, everything is then computed in float64.
    """
    import torch

    with quiet() as transformers, torch.no_grad():
        auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(folder, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
        tokens = torch.tensor([list(token_ids)])
        if not exact:
            return model(tokens).logits[0].float().numpy()
        with everything_in_float64():
            twin = auto.from_config(model.config, attn_implementation="eager").double().eval()
            twin.load_state_dict(model.state_dict())
            return twin(tokens).logits[0].numpy()


def prompt(name: str, length: int = 75) -> list[int]:
    """Token ids, all different from run to run of a variant's name only; cut to its context."""
    values = (VARIANTS | LARGE)[name][1]
    length = min(length, values.get("n_positions") or values["max_position_embeddings"])
    state, ids = zlib.crc32(name.encode()), []
    for _ in range(length):
        state = (state * 1103515245 + 12345) % (1 << 31)
        ids.append((state >> 16) % values["vocab_size"])
    return ids


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """The transformers module, with its progress bars and advice off."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """Norms, softmax and rotations of transformers name float32: here that name means float64."""
    import pytest
    import torch

    default = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
