"""Reading a model's config.json strictly: each key is used, known to be harmless, or refused by name.

A config is hostile input like any file, and a key that is not understood may change what the model computes.
"""

from __future__ import annotations

import math
from typing import Any

from pronghorn.errors import ConfigError
from pronghorn.ops import ACTIVATIONS, Attention
from pronghorn.weights.files import shown

REQUIRED: Any = object()

# Keys that do not change the logits: training, housekeeping, other tasks' heads, and generation's defaults
# (those that matter are read with the tokenizer). `chunk_size_feed_forward` and `pretraining_tp` cut a
# product into parts, `reorder_and_upcast_attn` scales before instead of after: the same function.
KEYS = """
model_type architectures transformers_version torch_dtype dtype name_or_path use_cache initializer_range
attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop gradient_checkpointing
neftune_noise_alpha bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
mask_token_id decoder_start_token_id tokenizer_class task_specific_params finetuning_task problem_type
id2label label2id num_labels summary_type summary_use_proj summary_activation summary_proj_to_labels
summary_first_dropout summary_hidden_size return_dict return_dict_in_generate output_hidden_states
output_attentions output_scores output_past use_return_dict torchscript use_bfloat16 tf_legacy_loss
predict_special_tokens is_decoder chunk_size_feed_forward pretraining_tp reorder_and_upcast_attn
tie_encoder_decoder tie_last_hidden_states max_length min_length do_sample early_stopping num_beams
num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences prefix
forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
suppress_tokens begin_suppress_tokens is_llama_config transformers.js_config unsloth_fixed unsloth_version
"""
HARMLESS = frozenset(KEYS.split())

# Other names of the same functions. `gelu_fast` is gelu_new with its constant cut to ten digits.
ACTIVATION_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
}


class Config:
    """What every model has. Sizes are in elements, `context` in tokens. (A dataclass would cost 7 ms at the start.)"""

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    embd: int
    vocab_size: int
    context: int
    inner: int  # the MLP's width
    activation: str
    eps: float  # of the norms
    tied: bool  # the head is the embedding
    attention: tuple[Attention, ...]  # [n_layers]

    def __init__(self, *values: Any, **named: Any) -> None:
        names = [name for part in reversed(type(self).__mro__) for name in vars(part).get("__annotations__", ())]
        named |= dict(zip(names, values, strict=False))
        assert named.keys() == set(names), f"a {type(self).__name__} is made of {names}"
        self.__dict__.update(named)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)


class Fields:
    """A config's keys, each read once; `finish` refuses what was not read and may matter.

    Every reader raises ConfigError, in one line that names the key, the value and what was expected.
    """

    def __init__(self, config: dict[str, Any], what: str = "config.json") -> None:
        self.left = dict(config)
        self.what = what

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The raw value; `default` where the key is absent or (for keys that may be) null."""
        value = self.left.pop(key, default)
        if value is REQUIRED or (value is None and default is REQUIRED):
            raise ConfigError(f"{self.what}: {key} is missing")
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, low: int = 1, high: int = 1 << 20) -> int:
        """A whole number in [low, high]."""
        value = self.take(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fault(key, value, f"a whole number from {low} to {high}")
        return value

    def optional(self, key: str, absent: int | None = None, high: int = 1 << 20) -> int | None:
        """A whole number in [1, high], or None where the key is null; `absent` where it is not there."""
        if self.left.get(key, absent) is None:
            self.left.pop(key, None)
            return None
        return self.integer(key, absent, high=high)

    def number(self, key: str, default: Any = REQUIRED, low: float = 0.0, high: float = 1e15) -> float:
        """A finite number in (low, high]."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not low < value <= high or not math.isfinite(value):
            raise self.fault(key, value, f"a number above {low:g}, at most {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self.take(key, default)
        if type(value) is not bool:
            raise self.fault(key, value, "true or false")
        return value

    def activation(self, key: str, default: str) -> str:
        """One of ops.ACTIVATIONS, or another name for one."""
        value = self.take(key, default)
        name = ACTIVATION_ALIASES.get(value, value) if isinstance(value, str) else None
        if name not in ACTIVATIONS:
            raise self.fault(key, value, f"one of {', '.join(ACTIVATIONS)}")
        return name

    def fields(self, key: str) -> Fields:
        """The object at `key` as fields of its own; empty where it is absent or null."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise self.fault(key, value, "an object")
        return Fields(value, f"{self.what}: {key}")

    def fault(self, key: str, value: object, expected: str) -> ConfigError:
        """The error for a value that is wrong or not implemented."""
        return ConfigError(f"{self.what}: {key} is {brief(value)}: expected {expected}")

    def finish(self) -> None:
        """Refuses every key that is left, unless it is harmless or its value switches nothing on."""
        for key, value in self.left.items():
            off = value is None or value is False or value in ("", [], {})
            if not (off or key in HARMLESS or key.startswith("_")):
                raise ConfigError(f"{self.what}: {brief(key)} is {brief(value)}, which is not implemented")


def brief(value: object) -> str:
    """The value on one line, cut to what a message can hold."""
    return shown(repr(value) if type(value) is not int or abs(value) < 1 << 64 else "a huge number", 60)
