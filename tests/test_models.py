"""Models against transformers, on tiny random checkpoints of every variant; and configs that must be refused.

Each house of operations computes every variant: as a whole prompt, in chunks, and token by token. The reference
agrees with transformers to float64's rounding when both compute in it, so the others are held against it.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import variants
from houses import HOUSES, batch_of, dense, logits_of, runner_class, weights_of
from pronghorn.errors import CheckpointError, ConfigError
from pronghorn.models import model_for
from pronghorn.ops import Rope
from pronghorn.ops.reference import ReferenceRunner
from pronghorn.weights import open_checkpoint
from pronghorn.weights.types import Tensor

CHUNKS = {"whole": 1000, "chunks": 13, "tokens": 1}
GPT2 = variants.GPT2 | {"model_type": "gpt2"}
LLAMA = variants.LLAMA | {"model_type": "llama"}
QWEN3 = variants.QWEN | {"model_type": "qwen3", "head_dim": 16}


def prompt_logits(run: Callable[..., Any], token_ids: list[int], chunk: int) -> np.ndarray:
    """The logits of a whole prompt, run chunk by chunk; its pages lie in no order."""
    starts = range(0, len(token_ids), chunk)
    batches = (batch_of((token_ids[start : start + chunk], start, (3, 1, 0, 2))) for start in starts)
    return np.concatenate([logits_of(run, batch) for batch in batches])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("variants")
    return cache(lambda name: variants.save(name, folder))


@pytest.fixture(scope="module")
def exact(saved: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    """What transformers computes in float64 for a variant's prompt."""
    return cache(lambda name: variants.logits(saved(name), variants.prompt(name), exact=True))


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_reference_is_transformers(name: str, saved: Callable[[str], Path], exact: Callable[[str], np.ndarray]) -> None:
    checkpoint = open_checkpoint(saved(name))
    model = model_for(checkpoint.config)
    weights = weights_of(model, checkpoint.tensors)
    want = exact(name)
    for chunk in CHUNKS.values():
        runner = ReferenceRunner(model, weights, n_pages=4, round_inputs=False)
        got = prompt_logits(runner.logits, variants.prompt(name), chunk)
        assert np.abs(got - want).max() < 1e-12 * want.std()


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", variants.VARIANTS)
@pytest.mark.parametrize("house", HOUSES)
def test_houses_agree(
    house: str, name: str, chunk: int, saved: Callable[[str], Path], exact: Callable[[str], np.ndarray]
) -> None:
    checkpoint = open_checkpoint(saved(name))
    model = model_for(checkpoint.config)
    runner = runner_class(house)(model, weights_of(model, checkpoint.tensors), n_pages=4)
    want = exact(name)
    got = prompt_logits(runner.run, variants.prompt(name), chunk)
    assert np.abs(got - want).max() < 1e-5 * want.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_half_precision_files(name: str, dtype: str, tmp_path: Path) -> None:
    """Weights in halves, computed without rounding, are transformers' float64 of the same halves."""
    folder = variants.save(name, tmp_path, dtype)
    checkpoint = open_checkpoint(folder)
    model = model_for(checkpoint.config)
    assert {t.dtype for t in checkpoint.tensors.values()} == {{"bfloat16": "bf16", "float16": "f16"}[dtype]}
    weights = weights_of(model, checkpoint.tensors)
    runner = ReferenceRunner(model, weights, n_pages=4, round_inputs=False)
    want = variants.logits(folder, variants.prompt(name), dtype, exact=True)
    assert np.abs(prompt_logits(runner.logits, variants.prompt(name), 100) - want).max() < 1e-12 * want.std()


@pytest.mark.parametrize("file", ["", "stories260K.gguf"], ids=["safetensors", "gguf"])
@pytest.mark.parametrize("house", HOUSES)
def test_stories_are_told_greedily(house: str, file: str, test_data: Path) -> None:
    """200 tokens from BOS on; the GGUF file's q and k are in the interleaved order."""
    import tokenizers

    folder = test_data / "models" / "stories260K"
    checkpoint = open_checkpoint(folder / file if file else folder / "model.safetensors")
    model = model_for(checkpoint.config)
    assert model.config.attention[0].rope.interleaved == bool(file)
    runner = runner_class(house)(model, weights_of(model, checkpoint.tensors), n_pages=7)
    ids = [1]
    for position in range(200):
        logits = logits_of(runner.run, batch_of((ids[-1:], position, range(7))))
        ids.append(int(logits.argmax()))
    text = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids)
    golden = (folder / "golden.txt").read_text()
    assert golden.strip() == text.strip()


@pytest.mark.slow
@pytest.mark.parametrize("house", ["cpu"])
def test_gpt2_in_full_size(house: str, tmp_path: Path) -> None:
    """20 greedy tokens at the shape of GPT-2 124M, as far as the two best logits stand apart."""
    name = "gpt2-124m"
    folder = variants.save(name, tmp_path)
    checkpoint = open_checkpoint(folder)
    model = model_for(checkpoint.config)
    runner = runner_class(house)(model, weights_of(model, checkpoint.tensors), n_pages=2)
    ids, rows = variants.prompt(name, 30), []
    for start, stop in [(0, 30), *((i, i + 1) for i in range(30, 49))]:
        rows.append(logits_of(runner.run, batch_of((ids[start:stop], start, (1, 0))))[-1])
        ids.append(int(rows[-1].argmax()))
    want = variants.logits(folder, ids[:-1])[29:]
    assert np.abs(np.array(rows) - want).max() < 1e-4 * want.std()
    second, best = np.sort(want, axis=1)[:, -2:].T
    clear = best - second > 1e-3 * want.std()
    assert clear.sum() >= 15
    assert (want.argmax(axis=1) == ids[30:])[clear].all()


# Configurations


@pytest.mark.parametrize("name", ["llama-linear", "llama3", "llama-yarn-mscale", "llama-theta"])
def test_older_rope_keys_mean_the_same(name: str, saved: Callable[[str], Path]) -> None:
    config = json.loads((saved(name) / "config.json").read_text())
    older = copy.deepcopy(config)
    scaling = older.pop("rope_parameters")
    older["rope_theta"] = scaling.pop("rope_theta")
    older["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    assert model_for(older).config == model_for(config).config
    if older["rope_scaling"]:
        scaling["type"] = scaling.pop("rope_type")
        assert model_for(older).config == model_for(config).config


def rope_of(**keys: Any) -> Rope:
    """The rotation of a Llama with these keys."""
    rope = model_for(LLAMA | keys).config.attention[0].rope
    assert rope is not None
    return rope


def test_factors_of_gguf_files_divide_the_frequencies() -> None:
    plain = rope_of(head_dim=8)
    assert rope_of(head_dim=8, rope_factors=[1.0, 2.0, 4.0, 8.0]).frequencies == tuple(
        f / by for f, by in zip(plain.frequencies, (1, 2, 4, 8), strict=True)
    )
    scaled = {"rope_type": "linear", "factor": 2.0}
    for keys in ({"rope_factors": [1.0] * 3}, {"rope_factors": [1.0, 1.0, 0.0, 1.0]}, {"rope_factors": 3}):
        with pytest.raises(ConfigError, match="rope_factors"):
            rope_of(head_dim=8, **keys)
    with pytest.raises(ConfigError, match="rope_factors"):
        rope_of(head_dim=8, rope_factors=[1.0] * 4, rope_scaling=scaled)


def test_windows() -> None:
    def windows(**keys: Any) -> list[int | None]:
        return [spec.window for spec in model_for(keys).config.attention]

    mistral, full = LLAMA | {"model_type": "mistral"}, [None, None]
    assert windows(**mistral) == full  # 4096 by default, more than the context
    assert windows(**mistral, sliding_window=None) == full
    assert windows(**mistral, sliding_window=95) == [95, 95]
    assert windows(**mistral, sliding_window=96) == full  # the context: nothing is hidden
    on = QWEN3 | {"use_sliding_window": True, "sliding_window": 8}
    assert windows(**QWEN3, sliding_window=8, max_window_layers=0) == [None] * 3
    assert windows(**on, max_window_layers=1) == [None, 8, 8]
    assert windows(**on) == [None] * 3
    assert windows(**on, layer_types=["sliding_attention", *["full_attention"] * 2]) == [8, None, None]


def test_gguf_keeps_gpt2_matrices_as_n_out_n_in() -> None:
    shapes = {
        turned: {n: (p.shape, p.transposed) for n, p in model_for(GPT2 | keys).parameters().items()}
        for turned, keys in ((True, {}), (False, {"conv1d_transposed": False}))
    }
    assert shapes[True]["h.0.attn.c_attn.weight"] == ((32, 96), True)
    assert shapes[False]["h.0.attn.c_attn.weight"] == ((96, 32), False)
    assert shapes[True]["wte.weight"] == shapes[False]["wte.weight"] == ((97, 32), False)


def test_what_changes_nothing_is_accepted() -> None:
    plain = model_for(LLAMA).config
    harmless = {
        "architectures": ["LlamaForCausalLM"], "transformers_version": "4.31.0.dev0", "torch_dtype": "bfloat16",
        "_name_or_path": "x", "pretraining_tp": 2, "initializer_range": 0.5, "use_cache": False,
        "rope_interleaved": False, "is_llama_config": True, "quantization_config": None, "auto_map": {},
        "rope_scaling": None, "temperature": 0.6, "eos_token_id": [1, 2], "hidden_act": "swish",
        "attention_dropout": 0.1, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    assert model_for(LLAMA | harmless).config == plain
    gpt2 = {"n_ctx": 80, "summary_type": "cls_index", "task_specific_params": {"x": 1}, "resid_pdrop": 0.1}
    assert model_for(GPT2 | gpt2 | {"reorder_and_upcast_attn": True}).config == model_for(GPT2).config
    for alias in ("gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"):
        assert model_for(LLAMA | {"hidden_act": alias}).config.activation == "gelu_new"


YARN = {"rope_type": "yarn", "factor": 2.0}

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA, {"model_type": "mamba"}, "model_type is 'mamba'"),
    (LLAMA, {"model_type": ["llama"]}, "model_type"),
    (LLAMA, {"model_type": None}, "model_type"),
    (LLAMA, {"logit_scale": 0.5}, "'logit_scale' is 0.5, which is not implemented"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    (LLAMA, {"is_encoder_decoder": True}, "is_encoder_decoder"),
    (LLAMA, {"sliding_window": 12}, "sliding_window"),  # transformers' Llama has none
    (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
    (GPT2, {"rope_theta": 10000.0}, "rope_theta"),
    (GPT2, {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
    (GPT2, {"activation_function": ["gelu"]}, "activation_function"),
    (GPT2, {"n_head": 5}, "n_embd 32 is no multiple of n_head 5"),
    (GPT2, {"n_inner": 0}, "n_inner"),
    (GPT2, {"n_layer": "2"}, "n_layer is '2'"),
    (LLAMA, {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    (LLAMA, {"hidden_size": True}, "hidden_size is True"),
    (LLAMA, {"hidden_size": 48.0}, "hidden_size is 48.0"),
    (LLAMA, {"hidden_size": 10**9}, "hidden_size"),
    (LLAMA, {"hidden_size": 10**5000}, "hidden_size is a huge number"),
    (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
    (LLAMA, {"hidden_size": 50}, "hidden_size is 50"),
    (LLAMA, {"hidden_size": 36}, "head_dim is 9"),
    (LLAMA, {"vocab_size": 0}, "vocab_size is 0"),
    (LLAMA, {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    (LLAMA, {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    (LLAMA, {"head_dim": 0}, "head_dim is 0"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps"),
    (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps"),
    (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    (LLAMA, {"rope_theta": 1.0}, "rope_theta"),
    (LLAMA, {"rope_theta": math.inf}, "rope_theta"),
    (LLAMA, {"rope_scaling": "linear"}, "rope_scaling"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*change with the length"),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "longrope.*change with the length"),
    (LLAMA, {"rope_scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
    (LLAMA, {"rope_scaling": {"rope_type": {}}}, "rope_type"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, "beta_fast"),
    (LLAMA, {"rope_scaling": YARN, "rope_parameters": YARN}, "both given"),
    (LLAMA, {"rope_scaling": YARN | {"truncate": 0}}, "truncate"),
    (LLAMA, {"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    (LLAMA | {"model_type": "mistral"}, {"sliding_window": 0}, "sliding_window is 0"),
    (LLAMA | {"model_type": "mistral"}, {"attention_bias": True}, "attention_bias"),
    (LLAMA | {"model_type": "mistral"}, {"layer_types": ["full_attention"] * 2}, "layer_types"),
    (QWEN3, {"layer_types": ["full_attention"]}, "layer_types"),
    (QWEN3, {"layer_types": ["full_attention", "full_attention", []]}, "layer_types"),
    (QWEN3, {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 3}, "no window in use"),
    (QWEN3, {"mlp_bias": True}, "mlp_bias"),
    (QWEN3, {"use_sliding_window": "yes"}, "use_sliding_window"),
]


@pytest.mark.parametrize(("base", "keys", "fault"), REFUSED, ids=[fault for *_, fault in REFUSED])
def test_refused(base: dict[str, Any], keys: dict[str, Any], fault: str) -> None:
    model_for(base)
    with pytest.raises(ConfigError, match=fault) as caught:
        model_for(base | keys)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_every_key_that_matters_is_read(name: str, saved: Callable[[str], Path]) -> None:
    """A wrong type in any key of a saved config is refused, but for those known to be harmless."""
    from pronghorn.models.config import HARMLESS

    config = json.loads((saved(name) / "config.json").read_text())
    for key in set(config) - HARMLESS - {"n_ctx"}:
        with pytest.raises(ConfigError, match=re.escape(key)):
            model_for(config | {key: "\x00"})


# Tensors


def tensors_of(config: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Tensors of zeros for every parameter."""
    model = model_for(config)
    return {
        prefix + name: Tensor(prefix + name, "f32", p.shape, dense(np.zeros(p.shape)).data)
        for name, p in model.parameters().items()
    }


@pytest.mark.parametrize(("config", "prefix"), [(GPT2, "transformer."), (LLAMA, "model.")])
def test_resolve(config: dict[str, Any], prefix: str) -> None:
    tied = config | {"tie_word_embeddings": True}
    model, plain, prefixed = model_for(tied), tensors_of(tied, ""), tensors_of(tied, prefix)
    assert set(model.resolve(plain)) == set(model.resolve(prefixed)) == set(model.parameters())
    assert list(model.resolve(dict(reversed(plain.items())))) == list(model.parameters())
    first, *_, last = plain

    old = Tensor("", "bool", (1, 1, 9, 9), memoryview(bytes(81)))
    masks = ["h.1.attn.bias", "h.0.attn.masked_bias"]
    frequencies = ["layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"]
    for name in masks if config is GPT2 else frequencies:
        assert set(model.resolve(plain | {prefix + name: old})) == set(plain)
    for name in frequencies if config is GPT2 else masks:
        with pytest.raises(CheckpointError, match=f"tensor {name} is not part of this model"):
            model.resolve(plain | {name: old})

    with pytest.raises(CheckpointError, match=f"tensor {first} is missing$"):
        model.resolve({name: t for name, t in plain.items() if name != first})
    with pytest.raises(CheckpointError, match=rf"tensor {first} is missing \(and {len(plain) - 1} more\)"):
        model.resolve({})
    with pytest.raises(CheckpointError, match="with and without the prefix"):
        model.resolve(plain | {prefix + last: plain[last]})
    short = Tensor(last, "f32", (3,), memoryview(bytes(12)))
    with pytest.raises(CheckpointError, match=rf"tensor {last} is \[3\], but .* \[{config.get('n_embd', 48)}\]"):
        model.resolve(plain | {last: short})
    integers = Tensor(last, "i32", plain[last].shape, plain[last].data)
    with pytest.raises(CheckpointError, match=f"tensor {last} holds i32"):
        model.resolve(plain | {last: integers})


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_tied_heads(config: dict[str, Any]) -> None:
    model = model_for(config | {"tie_word_embeddings": True})
    plain = tensors_of(config | {"tie_word_embeddings": True}, "")
    table = plain[model.EMBEDDING]
    twice = plain | {"lm_head.weight": Tensor("lm_head.weight", "f32", table.shape, memoryview(bytes(table.data)))}
    assert set(model.resolve(twice)) == set(plain)
    alone = {name: t for name, t in twice.items() if name != model.EMBEDDING}
    assert model.resolve(alone)[model.EMBEDDING].name == "lm_head.weight"
    other = bytearray(table.data)
    other[-1] = 1
    twice["lm_head.weight"] = Tensor("lm_head.weight", "f32", table.shape, memoryview(other))
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight differs from {model.EMBEDDING}"):
        model.resolve(twice)

    untied = model_for(config | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        untied.resolve(plain)
    assert "lm_head.weight" in untied.resolve(twice)
