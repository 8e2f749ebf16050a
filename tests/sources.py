"""Writers of the formats that `convert` reads, made from their descriptions, independent of the readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def crc32c(data: bytes) -> int:
    """Bit by bit (RFC 3720)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


# TensorFlow ---------------------------------------------------------------------------------------------------

TF_TYPES = {"float32": 1, "float64": 2, "int32": 3, "float16": 19}


def snappy(data: bytes) -> bytes:
    """A correct compression: what stood in the last 60 bytes is copied, by each kind of copy in turn."""
    out = bytearray(varint(len(data)))
    at = turn = 0
    while at < len(data):
        best = (0, 0)
        for offset in range(1, min(at, 60) + 1):
            size = 0
            while at + size < len(data) and size < 11 and data[at + size] == data[at + size - offset]:
                size += 1
            best = max(best, (size, offset))
        size, offset = best
        if size >= 4:
            turn += 1
            if turn % 3 == 0:
                out += bytes([size - 4 << 2 | 1, offset])
            elif turn % 3 == 1:
                out += bytes([size - 1 << 2 | 2]) + struct.pack("<H", offset)
            else:
                out += bytes([size - 1 << 2 | 3]) + struct.pack("<I", offset)
            at += size
        else:
            piece = data[at : at + 70]  # longer than what fits into a tag
            cut = next(
                (i for i in range(1, len(piece)) if data[at + i : at + i + 4] in data[max(0, at + i - 60) : at + i]),
                len(piece),
            )
            piece = piece[:cut]
            out += bytes([len(piece) - 1 << 2]) if len(piece) <= 60 else bytes([60 << 2, len(piece) - 1])
            out += piece
            at += len(piece)
    return bytes(out)


def block(entries: list[tuple[bytes, bytes]], interval: int = 16) -> bytes:
    """A table's block: keys share beginnings, except where one starts anew."""
    out, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))


def table(entries: list[tuple[bytes, bytes]], per_block: int = 7, compress: bool = False) -> bytes:
    out = bytearray()

    def put(data: bytes, kind: int = 0) -> bytes:
        handle = varint(len(out)) + varint(len(data))
        out.extend(data + bytes([kind]) + struct.pack("<I", masked(data + bytes([kind]))))
        return handle

    index = []
    for i in range(0, len(entries), per_block):
        part = entries[i : i + per_block]
        data = block(part, 3)
        index.append((part[-1][0] + b"~", put(snappy(data), 1) if compress else put(data)))
    footer = put(block([])) + put(block(index, 1))
    return bytes(out) + footer + bytes(40 - len(footer)) + struct.pack("<Q", 0xDB4775248B80FB57)


def entry(array: np.ndarray, shard: int, offset: int, data: bytes) -> bytes:
    """BundleEntryProto."""
    dims = b"".join(b"\x12" + varint(len(dim)) + dim for dim in (b"\x08" + varint(n) for n in array.shape))
    out = b"\x08" + varint(TF_TYPES[str(array.dtype)]) + b"\x12" + varint(len(dims)) + dims
    out += b"\x18" + varint(shard) if shard else b""
    out += b"\x20" + varint(offset) if offset else b""
    return out + b"\x28" + varint(len(data)) + b"\x35" + struct.pack("<I", masked(data))


def save_bundle(prefix: Path, arrays: Arrays, shards: int = 1, compress: bool = False) -> None:
    """A checkpoint as TensorFlow lays it out."""
    files = [bytearray() for _ in range(shards)]
    entries = [(b"", b"\x08" + varint(shards) + b"\x1a\x02\x08\x01")]
    for i, (name, array) in enumerate(sorted(arrays.items())):
        data, file = array.tobytes(), files[i % shards]
        entries.append((name.encode(), entry(array, i % shards, len(file), data)))
        file += data
    prefix.with_name(prefix.name + ".index").write_bytes(table(entries, compress=compress))
    for i, file in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}").write_bytes(file)


def openai_names(arrays: Arrays) -> dict[str, np.ndarray]:
    """GPT-2 of transformers in OpenAI's names and shapes."""
    named = {}
    for name, array in arrays.items():
        path = name.removeprefix("transformer.").split(".")
        if path[0] == "h":
            path[0:2] = ["h" + path[1]]
        norm = path[-2].startswith("ln_")
        last = {"weight": "g" if norm else "w", "bias": "b"}[path[-1]]
        path = path[:-1] if path[0] in ("wte", "wpe") else [*path[:-1], last]
        named["/".join(["model", *path])] = array[None] if last == "w" and len(path) > 1 else array
    return named


def save_openai(folder: Path, arrays: Arrays, config: Mapping[str, Any], **options: Any) -> Path:
    folder.mkdir()
    save_bundle(folder / "model.ckpt", openai_names(arrays), **options)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    sizes = {"n_vocab": "vocab_size", "n_ctx": "n_positions"} | {n: n for n in ("n_embd", "n_head", "n_layer")}
    (folder / "hparams.json").write_text(json.dumps({key: config[name] for key, name in sizes.items()}))
    return folder


# Llama --------------------------------------------------------------------------------------------------------

META = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip


def in_pairs(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of q or k in Meta's order: of each head, the first of either half, then the second, ..."""
    rows, columns = array.shape
    return array.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def meta_names(arrays: Arrays, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    named = {}
    for name, array in arrays.items():
        stem = name.removesuffix(".weight")
        if "q_proj" in name:
            array = in_pairs(array, config["num_attention_heads"])
        if "k_proj" in name:
            array = in_pairs(array, config["num_key_value_heads"])
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            named[f"layers.{layer}.{META[part]}.weight"] = array
        else:
            named[f"{META[stem]}.weight"] = array
    return named


def save_meta(folder: Path, arrays: Arrays, config: Mapping[str, Any], ranks: int = 1, rows: bool = False) -> Path:
    """Meta's folder. `rows`: the embedding is cut by rows, as in Llama 3."""
    import torch

    folder.mkdir()
    shards: list[dict[str, Any]] = [{} for _ in range(ranks)]
    for name, array in meta_names(arrays, config).items():
        axis = 1 if ".wo." in name or ".w2." in name or ("tok_embeddings" in name and not rows) else 0
        parts = np.split(array, ranks, axis) if array.ndim == 2 else [array] * ranks
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = torch.from_numpy(np.ascontiguousarray(part))
    for i, shard in enumerate(shards):
        shard["rope.freqs"] = torch.zeros(4)
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    params = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "norm_eps": config["rms_norm_eps"],
        "n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"],
        "multiple_of": 256, "vocab_size": -1,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def llama2c(arrays: Arrays, config: Mapping[str, Any], version: int = 0) -> bytes:
    """llama2.c's file."""
    named = meta_names(arrays, config)
    shared, layers, context = (
        "output.weight" not in named,
        config["num_hidden_layers"],
        config["max_position_embeddings"],
    )
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    sizes = [config["hidden_size"], config["intermediate_size"], layers, config["num_attention_heads"]]
    sizes += [config["num_key_value_heads"], config["vocab_size"] * (1 if shared or version else -1), context]

    def of(*kinds: str) -> bytes:
        return b"".join(named[f"layers.{i}.{kind}.weight"].tobytes() for kind in kinds for i in range(layers))

    attention = of(*(f"attention.w{x}" for x in "qkvo"))
    mlp = of(*(f"feed_forward.w{i}" for i in (1, 2, 3)))
    embedding, norm = named["tok_embeddings.weight"].tobytes(), named["norm.weight"].tobytes()
    head = b"" if shared else named["output.weight"].tobytes()
    if version:
        out = (b"24ka" + struct.pack("<i7iB", version, *sizes, shared)).ljust(256, b"\0")
        return out + of("attention_norm", "ffn_norm") + norm + embedding + attention + mlp + head
    out = struct.pack("<7i", *sizes) + embedding + of("attention_norm") + attention + of("ffn_norm") + mlp + norm
    return out + np.full(context * head_dim, 7, np.float32).tobytes() + head


# fastGPT ------------------------------------------------------------------------------------------------------


def save_fastgpt(path: Path, arrays: Arrays, config: Mapping[str, Any], tokens: list[str], merges: list[str]) -> Path:
    """A model.gguf of fastGPT, version 2, by the gguf package as fastGPT does."""
    import gguf

    named = {name.removeprefix("transformer."): array for name, array in arrays.items()}

    def of(kind: str) -> np.ndarray:
        return np.stack([named[f"h.{i}.{kind}"] for i in range(config["n_layer"])])

    def joined(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [text.encode() for text in texts]
        return np.cumsum([0, *map(len, data)]).astype(np.int32), np.frombuffer(b"".join(data), np.int8)

    (at, text), (merges_at, merges_text) = joined(tokens), joined([*merges, ""])
    sizes = [config[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")]
    header = [0xFA51697, 2, *sizes, len(at), len(text), len(merges_at), len(merges_text), 256]
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # the package adds an architecture, which fastGPT's files do not have
    writer.add_int32("general.data_offset", 1234)
    tensors = {"header": np.array(header, np.int32), "wte": named["wte.weight"], "wpe": named["wpe.weight"]}
    for own, kind in (
        ("mlp_fc", "mlp.c_fc"), ("mlp_proj", "mlp.c_proj"), ("attn", "attn.c_attn"), ("attn_proj", "attn.c_proj")
    ):  # fmt: skip
        tensors |= {f"{own}_w": of(f"{kind}.weight"), f"{own}_b": of(f"{kind}.bias")}
    for i in (1, 2):
        tensors |= {f"ln{i}_b": of(f"ln_{i}.bias"), f"ln{i}_g": of(f"ln_{i}.weight")}
    tensors |= {"lnf_b": named["ln_f.bias"], "lnf_g": named["ln_f.weight"]}
    tensors |= {"idx": at, "decoder_txt": text, "vocab_idx": merges_at, "vocab_txt": merges_text}
    tensors["byte_decoder"] = np.arange(256, dtype=np.int32)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
