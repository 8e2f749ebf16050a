"""A tiny random model with a tokenizer, for what needs the whole stack and no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.models import model_for

STORY = "Once upon a time, there was a little girl named Lily."
BOS, EOS = 256, 257


def save_tiny(folder: Path, **config: Any) -> Path:
    """A random Llama over bytes, with its tokenizer: ids 0..255 are bytes, 256 begins and 257 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    values = {
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 300,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **config,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    model = model_for(values)
    rng = np.random.default_rng(0)
    header: dict[str, Any] = {}
    data = b""
    for name, parameter in model.parameters().items():
        tensor = rng.standard_normal(parameter.shape).astype(np.float32) * (0.4 if len(parameter.shape) == 2 else 1)
        header[f"model.{name}"] = {
            "dtype": "F32", "shape": list(parameter.shape), "data_offsets": [len(data), len(data) + tensor.nbytes]
        }  # fmt: skip
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder
