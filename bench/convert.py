"""One GPT-2 checkpoint in the formats of other engines, so that all of them run the same weights.

    python bench/convert.py FOLDER gguf q4_0 FILE            # f32, bf16, q8_0, q4_0, q4_1; with the package gguf
    python bench/convert.py FOLDER ctranslate2 f32 FOLDER    # f32, int8; with ctranslate2, torch and transformers
    python bench/convert.py FOLDER openvino int4 FOLDER      # f32, int8, int4; with openvino and nncf

FOLDER is in Hugging Face's layout, in f32, as `shapes.py` writes it. What is quantized is every matrix, the head too,
as in pronghorn: then all engines read the same bytes a token, or nearly. `peers.py` calls it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]


def read(folder: Path) -> tuple[dict[str, Any], Weights]:
    """The configuration, and the weights by their names without "transformer.", matrices as [out, in]."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "gpt2":
        raise SystemExit(f"convert.py: {folder}: of type {config['model_type']}: expected gpt2")
    file = np.memmap(folder / "model.safetensors", np.uint8, "r")
    begin = 8 + int.from_bytes(file[:8].tobytes(), "little")
    weights: Weights = {}
    for name, entry in json.loads(file[8:begin].tobytes()).items():
        if name != "__metadata__":
            if entry["dtype"] != "F32":
                raise SystemExit(f"convert.py: {folder}: {name} is in {entry['dtype']}: expected F32")
            first, last = entry["data_offsets"]
            values = file[begin + first : begin + last].view(np.float32).reshape(entry["shape"])
            turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # [in, out] in the file
            weights[name.removeprefix("transformer.")] = np.ascontiguousarray(values.T) if turned else values
    return config, weights


LAYER = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
OUTER = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def gguf(folder: Path, dtype: str, path: Path) -> None:
    """A GGUF file. Positions and vectors stay in f32, as llama.cpp's own converter leaves them."""
    import gguf as package

    config, weights = read(folder)
    kind = package.GGMLQuantizationType[dtype.upper()]
    writer = package.GGUFWriter(path, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_file_type(package.LlamaFileType[{"F32": "ALL_F32"}.get(dtype.upper(), f"MOSTLY_{dtype.upper()}")])
    tokens, merges = vocabulary(folder, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, values in weights.items():
        stem, _, part = name.rpartition(".")
        if stem.startswith("h."):
            _, layer, inner = stem.split(".", 2)
            if inner not in LAYER:
                continue  # old files carry the causal mask
            name = f"blk.{layer}.{LAYER[inner]}.{part}"
        else:
            name = f"{OUTER[stem]}.{part}"
        if values.ndim == 2 and stem != "wpe":
            writer.add_tensor(name, package.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(folder: Path, size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of the folder's tokenizer; without one, tokens that only count."""
    if (folder / "vocab.json").exists():
        ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in merges if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").exists():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        ids = model["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    else:
        ids, merges = {}, ["a b"]
    tokens = sorted(ids, key=ids.__getitem__)
    return tokens + [f"<{i}>" for i in range(len(tokens), size)], merges


def ctranslate2(folder: Path, dtype: str, path: Path) -> None:
    """CTranslate2's folder, by its own converter's description of the model; tokens are named by their ids."""
    from ctranslate2.converters.transformers import GPT2Loader
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    model.config.activation_function = model.config.activation_function or "gelu_new"
    spec = GPT2Loader().get_model_spec(model)
    spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
    end = str(model.config.eos_token_id)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.validate()
    spec.optimize(quantization={"f32": "float32"}.get(dtype, dtype))
    path.mkdir(exist_ok=True)
    spec.save(str(path))


def openvino(folder: Path, dtype: str, path: Path) -> None:
    """OpenVINO's folder: the graph that its exporter makes (a state for keys and values, one attention operation), and
    nncf's 8-bit weights (asymmetric, one scale an output) or 4-bit weights (asymmetric, in groups of 32).
    """
    import openvino as ov
    import openvino.opset15 as op
    from openvino.op.util import Variable, VariableInfo

    config, weights = read(folder)
    width, n_heads = config["n_embd"], config["n_head"]
    eps = config.get("layer_norm_epsilon", 1e-5)

    def node(name: str) -> Any:
        return op.constant(weights[name], name=name)

    def normed(x: Any, name: str) -> Any:
        scaled = op.multiply(op.mvn(x, op.constant([-1]), True, eps, "INSIDE_SQRT"), node(f"{name}.weight"))
        return op.add(scaled, node(f"{name}.bias"))

    def linear(x: Any, name: str) -> Any:
        return op.add(op.matmul(x, node(f"{name}.weight"), False, True), node(f"{name}.bias"))

    def integers(name: str, kind: Any, rank: int) -> Any:
        parameter = op.parameter([-1] * rank, kind, name=name)
        parameter.output(0).set_names({name})
        return parameter

    ids, mask, positions = (integers(name, np.int64, 2) for name in ("input_ids", "attention_mask", "position_ids"))
    beams = integers("beam_idx", np.int32, 1)

    def length(x: Any, axis: int) -> Any:
        return op.gather(op.shape_of(x), op.constant([axis]), op.constant(0))

    def scalar(x: Any) -> Any:
        return op.squeeze(x, op.constant([0]))

    zero, one = op.constant(np.int64(0)), op.constant(np.int64(1))
    n_seen, n_new = scalar(length(mask, 1)), scalar(length(ids, 1))
    rows = op.unsqueeze(op.range(op.subtract(n_seen, n_new), n_seen, one, "i64"), op.constant([1]))
    before = op.less_equal(op.range(zero, n_seen, one, "i64"), rows)  # [new, seen]
    there = op.unsqueeze(op.not_equal(mask, zero), op.constant([1, 2]))  # [batch, 1, 1, seen]
    low = op.constant(np.float32(np.finfo(np.float32).min))
    bias = op.select(op.logical_and(before, there), op.constant(np.float32(0)), low)

    table = node("wte.weight")
    x = op.add(op.gather(table, ids, zero), op.gather(node("wpe.weight"), positions, zero))
    sinks = []
    empty = op.concat([length(ids, 0), op.constant([n_heads, 0, width // n_heads])], 0)
    for layer in range(config["n_layer"]):
        name = f"h.{layer}"
        qkv = op.variadic_split(linear(normed(x, f"{name}.ln_1"), f"{name}.attn.c_attn"), op.constant(-1), [width] * 3)
        heads = [
            op.transpose(op.reshape(part, [0, 0, n_heads, width // n_heads], True), [0, 2, 1, 3])
            for part in qkv.outputs()
        ]
        for i, part in enumerate(("key", "value"), 1):
            info = VariableInfo()
            info.data_shape, info.data_type = ov.PartialShape([-1, n_heads, -1, width // n_heads]), ov.Type.f32
            info.variable_id = f"past_key_values.{layer}.{part}present.{layer}.{part}"
            variable = Variable(info)
            past = op.read_value(op.broadcast(op.constant(np.float32(0)), empty), variable)
            heads[i] = op.concat([op.gather(past, beams, zero), heads[i]], 2)
            sinks.append(op.assign(heads[i], variable))
        seen = op.scaled_dot_product_attention(*heads, bias)
        joined = op.reshape(op.transpose(seen, [0, 2, 1, 3]), [0, 0, width], True)
        x = op.add(x, linear(joined, f"{name}.attn.c_proj"))
        inner = op.gelu(linear(normed(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), "tanh")
        x = op.add(x, linear(inner, f"{name}.mlp.c_proj"))
    logits = op.result(op.matmul(normed(x, "ln_f"), table, False, True))
    logits.output(0).set_names({"logits"})
    model = ov.Model([logits], sinks, [ids, mask, positions, beams], "gpt2")
    if dtype != "f32":
        import nncf

        if dtype == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        else:
            model = nncf.compress_weights(
                model, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=32, ratio=1.0, all_layers=True
            )
    path.mkdir(exist_ok=True)
    ov.save_model(model, path / "openvino_model.xml", compress_to_fp16=False)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))


FORMATS = {"gguf": gguf, "ctranslate2": ctranslate2, "openvino": openvino}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[2] not in FORMATS:
        sys.exit(f"usage: convert.py FOLDER {{{','.join(FORMATS)}}} DTYPE PATH")
    FORMATS[sys.argv[2]](Path(sys.argv[1]), sys.argv[3], Path(sys.argv[4]))
