"""GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

from __future__ import annotations

import re

from pronghorn.errors import ConfigError
from pronghorn.models import base
from pronghorn.models.config import Config, Fields
from pronghorn.ops import Attention, Ops, X
from pronghorn.weights.types import Module, Parameter


class GPT2Config(Config):
    """What GPT-2 adds to the common sizes."""

    transposed: bool  # matrices are [n_in, n_out], as Hugging Face's Conv1D stores them; GGUF's are not


class GPT2(base.Model):
    """The model; its parts below read in the order of the paper."""

    PREFIX = "transformer."
    EMBEDDING = "wte.weight"
    NOT_WEIGHTS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")

    config: GPT2Config

    def forward(self, ops: Ops[X], w: Module) -> X:
        """The batch's tokens -> logits of the rows asked for."""
        cfg = self.config
        x = ops.positions(ops.embed(w.wte.weight), w.wpe.weight)  # [tokens, embd]
        for layer, spec in zip(w.h, cfg.attention, strict=True):
            x = block(ops, x, layer, spec, cfg)  # [tokens, embd]
        x = ops.layer_norm(x, w.ln_f, cfg.eps)  # [tokens, embd]
        return ops.logits(x, w.wte if cfg.tied else w.lm_head)  # [rows, vocabulary]

    def parameters(self) -> dict[str, Parameter]:
        """See Model.parameters."""
        cfg = self.config
        embd, turned = cfg.embd, cfg.transposed
        named = {
            "wte.weight": Parameter((cfg.vocab_size, embd), "matrix"),
            "wpe.weight": Parameter((cfg.context, embd), "table"),
        }
        for i in range(cfg.n_layers):
            named |= base.norm(f"h.{i}.ln_1", embd, bias=True)
            named |= base.linear(f"h.{i}.attn.c_attn", 3 * embd, embd, True, turned)
            named |= base.linear(f"h.{i}.attn.c_proj", embd, embd, True, turned)
            named |= base.norm(f"h.{i}.ln_2", embd, bias=True)
            named |= base.linear(f"h.{i}.mlp.c_fc", cfg.inner, embd, True, turned)
            named |= base.linear(f"h.{i}.mlp.c_proj", embd, cfg.inner, True, turned)
        named |= base.norm("ln_f", embd, bias=True)
        return named if cfg.tied else named | base.linear("lm_head", cfg.vocab_size, embd, bias=False)


def block(ops: Ops[X], x: X, w: Module, spec: Attention, cfg: GPT2Config) -> X:
    """One layer: two residual lines; each part's last linear adds x."""
    x = attention(ops, ops.layer_norm(x, w.ln_1, cfg.eps), w.attn, spec, residual=x)
    return mlp(ops, ops.layer_norm(x, w.ln_2, cfg.eps), w.mlp, cfg.activation, residual=x)


def attention(ops: Ops[X], x: X, w: Module, spec: Attention, residual: X) -> X:
    """Multi-head attention over what came before."""
    embd = spec.n_heads * spec.head_dim
    q, k, v = ops.split(ops.linear(x, w.c_attn), (embd, embd, embd))  # each [tokens, embd]
    return ops.linear(ops.attention(q, k, v, spec), w.c_proj, residual=residual)  # [tokens, embd]


def mlp(ops: Ops[X], x: X, w: Module, activation: str, residual: X) -> X:
    """Two layers: embd -> inner -> embd."""
    return ops.linear(ops.linear(x, w.c_fc, activation=activation), w.c_proj, residual=residual)


def model(fields: Fields, model_type: str) -> GPT2:
    """The model of a configuration. Raises ConfigError."""
    embd = fields.integer("n_embd")
    n_heads = fields.integer("n_head", high=1 << 12)
    if embd % n_heads:
        raise ConfigError(f"{fields.what}: n_embd {embd} is no multiple of n_head {n_heads}")
    head_dim = embd // n_heads
    n_layers = fields.integer("n_layer", high=1 << 10)
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    cfg = GPT2Config(
        model_type=model_type,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        embd=embd,
        vocab_size=fields.integer("vocab_size"),
        context=fields.integer("n_positions", high=1 << 24),
        inner=fields.optional("n_inner") or 4 * embd,
        activation=fields.activation("activation_function", "gelu_new"),
        eps=fields.number("layer_norm_epsilon", 1e-5, high=1.0),
        tied=fields.flag("tie_word_embeddings", True),
        transposed=fields.flag("conv1d_transposed", True),
        attention=tuple(
            Attention(i, n_heads, n_heads, head_dim, scale / (i + 1) if by_layer else scale) for i in range(n_layers)
        ),
    )
    fields.take("n_ctx", None)  # an older name of n_positions, no longer read by anyone
    fields.finish()
    return GPT2(cfg)
