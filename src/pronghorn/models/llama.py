"""Llama: Touvron et al. 2023, arXiv:2302.13971; and those that differ by a row of VARIANTS.

Mistral (arXiv:2310.06825), Qwen2 (arXiv:2407.10671), Qwen3 (arXiv:2505.09388), SmolLM, TinyLlama.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pronghorn.models import base
from pronghorn.models.config import Config, Fields
from pronghorn.models.positions import rope_of, windows_of
from pronghorn.ops import Attention, Ops, X
from pronghorn.weights.types import Module, Parameter


class LlamaConfig(Config):
    """What Llama adds to the common sizes."""

    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool  # q and k are normed head by head


class Variant(NamedTuple):
    """How a model_type differs, as transformers' configuration of that name has it."""

    biases: str = ""  # "asked": as attention_bias says; "qkv": always, but not in the output's projection
    mlp_bias: bool = False  # whether the config may ask for it
    head_norms: bool = False
    window: str = ""  # "all": in every layer where sliding_window is given; "layers": in those that it names
    head_dim: int | None = None  # where the config gives none; None: embd / heads


VARIANTS = {
    "llama": Variant(biases="asked", mlp_bias=True),
    "mistral": Variant(window="all"),
    "qwen2": Variant(biases="qkv", window="layers"),
    "qwen3": Variant(biases="asked", head_norms=True, window="layers", head_dim=128),
}


class Llama(base.Model):
    """The model; its parts below read in the order of the paper."""

    PREFIX = "model."
    EMBEDDING = "embed_tokens.weight"
    NOT_WEIGHTS = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

    config: LlamaConfig

    def forward(self, ops: Ops[X], w: Module) -> X:
        """The batch's tokens -> logits of the rows asked for."""
        cfg = self.config
        x = ops.embed(w.embed_tokens.weight)  # [tokens, embd]
        for layer, spec in zip(w.layers, cfg.attention, strict=True):
            x = block(ops, x, layer, spec, cfg)  # [tokens, embd]
        x = ops.rms_norm(x, w.norm, cfg.eps)  # [tokens, embd]
        return ops.logits(x, w.embed_tokens if cfg.tied else w.lm_head)  # [rows, vocabulary]

    def parameters(self) -> dict[str, Parameter]:
        """See Model.parameters."""
        cfg = self.config
        embd, q_width, kv_width = cfg.embd, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        named = {"embed_tokens.weight": Parameter((cfg.vocab_size, embd), "matrix")}
        for i in range(cfg.n_layers):
            attn, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            named |= base.norm(f"layers.{i}.input_layernorm", embd)
            named |= base.linear(f"{attn}.q_proj", q_width, embd, cfg.qkv_bias)
            named |= base.linear(f"{attn}.k_proj", kv_width, embd, cfg.qkv_bias)
            named |= base.linear(f"{attn}.v_proj", kv_width, embd, cfg.qkv_bias)
            if cfg.head_norms:
                named |= base.norm(f"{attn}.q_norm", cfg.head_dim) | base.norm(f"{attn}.k_norm", cfg.head_dim)
            named |= base.linear(f"{attn}.o_proj", embd, q_width, cfg.out_bias)
            named |= base.norm(f"layers.{i}.post_attention_layernorm", embd)
            named |= base.linear(f"{mlp}.gate_proj", cfg.inner, embd, cfg.mlp_bias)
            named |= base.linear(f"{mlp}.up_proj", cfg.inner, embd, cfg.mlp_bias)
            named |= base.linear(f"{mlp}.down_proj", embd, cfg.inner, cfg.mlp_bias)
        named |= base.norm("norm", embd)
        return named if cfg.tied else named | base.linear("lm_head", cfg.vocab_size, embd, bias=False)


def block(ops: Ops[X], x: X, w: Module, spec: Attention, cfg: LlamaConfig) -> X:
    """One layer: two residual lines; each part's last linear adds x."""
    x = attention(ops, ops.rms_norm(x, w.input_layernorm, cfg.eps), w.self_attn, spec, cfg, residual=x)
    return mlp(ops, ops.rms_norm(x, w.post_attention_layernorm, cfg.eps), w.mlp, cfg, residual=x)


def attention(ops: Ops[X], x: X, w: Module, spec: Attention, cfg: LlamaConfig, residual: X) -> X:
    """Grouped-query attention with rotary positions."""
    q = ops.linear(x, w.q_proj)  # [tokens, n_heads * head_dim]
    k = ops.linear(x, w.k_proj)  # [tokens, n_kv_heads * head_dim]
    v = ops.linear(x, w.v_proj)  # [tokens, n_kv_heads * head_dim]
    if cfg.head_norms:
        q, k = ops.rms_norm(q, w.q_norm, cfg.eps), ops.rms_norm(k, w.k_norm, cfg.eps)
    return ops.linear(ops.attention(q, k, v, spec), w.o_proj, residual=residual)  # [tokens, embd]


def mlp(ops: Ops[X], x: X, w: Module, cfg: LlamaConfig, residual: X) -> X:
    """SwiGLU: Shazeer 2020, arXiv:2002.05202."""
    x = ops.gate(ops.linear(x, w.gate_proj), ops.linear(x, w.up_proj), cfg.activation)  # [tokens, inner]
    return ops.linear(x, w.down_proj, residual=residual)  # [tokens, embd]


def model(fields: Fields, model_type: str) -> Llama:
    """The model of a configuration. Raises ConfigError."""
    variant = VARIANTS[model_type]
    n_layers = fields.integer("num_hidden_layers", high=1 << 10)
    embd, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 12)
    n_kv_heads = fields.integer("num_key_value_heads", n_heads, high=1 << 12)
    head_dim = fields.optional("head_dim", variant.head_dim, high=1 << 12)
    if n_heads % n_kv_heads:
        raise fields.fault("num_key_value_heads", n_kv_heads, f"a divisor of num_attention_heads, {n_heads}")
    if head_dim is None and embd % n_heads:
        raise fields.fault("hidden_size", embd, f"a multiple of num_attention_heads, {n_heads}")
    head_dim = head_dim or embd // n_heads
    context = fields.integer("max_position_embeddings", high=1 << 24)
    rope, windows = rope_of(fields, head_dim, context), windows_of(fields, variant.window, n_layers, context)
    asked = variant.biases == "asked" and fields.flag("attention_bias", False)
    cfg = LlamaConfig(
        model_type=model_type,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        embd=embd,
        vocab_size=fields.integer("vocab_size"),
        context=context,
        inner=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_act", "silu"),
        eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        tied=fields.flag("tie_word_embeddings", False),
        qkv_bias=asked or variant.biases == "qkv",
        out_bias=asked,
        mlp_bias=variant.mlp_bias and fields.flag("mlp_bias", False),
        head_norms=variant.head_norms,
        attention=tuple(
            Attention(i, n_heads, n_kv_heads, head_dim, head_dim**-0.5, rope, window)
            for i, window in enumerate(windows)
        ),
    )
    fields.finish()
    return Llama(cfg)
