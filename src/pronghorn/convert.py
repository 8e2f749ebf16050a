"""`pronghorn convert`: a model from any source, as a folder in Hugging Face's layout or as a GGUF file.

Tensors go through one at a time, so that memory is bounded by the largest; what is written takes its place when it is
complete. What the other format has no place for is an error before anything is written, never a silent change: the
configuration is read back from the keys that are about to be written, and compared.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pronghorn._native import Pool, pack
from pronghorn.errors import CheckpointError, ConfigError, ParameterError
from pronghorn.machine import usable_processors
from pronghorn.models import Config, Model, model_for, model_of
from pronghorn.models.config import Fields
from pronghorn.models.positions import llama3
from pronghorn.text import export
from pronghorn.weights import Checkpoint, files, gguf, open_source
from pronghorn.weights.files import fail, shown
from pronghorn.weights.quantize import plain
from pronghorn.weights.types import DENSE, DTYPES, Parameter, Tensor
from pronghorn.weights.writing import QUANTIZED, Part, quantize, write_gguf, write_safetensors

TYPES = ("auto", *DENSE, *QUANTIZED)
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}
"""`general.file_type` (llama.cpp's LLAMA_FTYPE)."""
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
"""transformers' class for each model_type."""
ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")
STRIPE = 1 << 22  # elements that are quantized at once


def convert(source: str | Path, destination: str | Path, dtype: str = "auto", *, force: bool = False) -> list[str]:
    """Converts a model into `destination`: a GGUF file if it ends in .gguf, else a folder -> remarks, a line each.

    `dtype`: "auto" keeps each weight's own (a folder has block formats in f32); f32, f16 or bf16; and in GGUF q8_0,
    q4_0 or q4_1 for matrices. Raises CheckpointError for what is wrong in the source, or has no place in the other.
    """
    path = Path(destination)
    to_gguf = path.suffix == ".gguf"
    if dtype not in TYPES:
        raise ParameterError(f"the type is {dtype!r}: expected one of {', '.join(TYPES)}")
    if dtype in QUANTIZED and not to_gguf:
        raise ParameterError(f"{dtype} is a type of GGUF files, but {shown(str(path))} does not end in .gguf")
    checkpoint = open_for(source, path, folder=not to_gguf, force=force)
    model, tensors = model_of(checkpoint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return (_to_gguf if to_gguf else _to_folder)(checkpoint, model, tensors, path, dtype)
    except OSError as error:
        fail(error.filename or path, error.strerror or str(error))


def open_for(source: str | Path, path: Path, *, folder: bool, force: bool) -> Checkpoint:
    """The source's files, where `path` may be written; ParameterError where it may not."""
    if os.path.lexists(path) and not force:
        raise ParameterError(f"{shown(str(path), 4096)} exists already: choose another name, or --force")
    if force and path.is_dir() != folder and os.path.lexists(path):
        raise ParameterError(f"{shown(str(path), 4096)} is {'no folder' if folder else 'a folder'}")
    checkpoint = open_source(source)
    if path.exists() and any(is_on_the_way(path, file) for file in checkpoint.files):
        raise ParameterError(f"{shown(str(path), 4096)} is the source itself")
    return checkpoint


def is_on_the_way(path: Path, file: Path) -> bool:
    """Whether a file would be lost with `path`: which it is, or lies under, however either is spelled or linked."""
    places = [file, *Path(os.path.abspath(file)).parents, *file.resolve().parents]  # noqa: PTH100 (links kept, no "..")
    return any(place.exists() and place.samefile(path) for place in places)


# Tensors ------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a format has matrices: GPT-2's as [n_in, n_out] or not; rows of q and k in pairs or in halves."""

    transposed: bool
    interleaved: bool


FOLDER = Form(transposed=True, interleaved=False)


class Arranged(NamedTuple):
    """What becomes of one weight: its rows in another order, or turned; then its type changed."""

    model: Model
    parameter: Parameter
    tensor: Tensor
    dtype: str
    order: NDArray[np.int64] | None  # of the rows
    turned: bool
    pool: Pool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.turned else self.tensor.shape

    def make(self) -> memoryview:
        """The bytes to be written."""
        tensor = plain(self.parameter, self.tensor)
        data, dtype = tensor.data, tensor.dtype
        if dtype == self.dtype and self.order is None and not self.turned:
            return data
        rows = self.shape[0] if len(self.shape) > 1 else 1
        if dtype not in DENSE and dtype != self.dtype:
            data, dtype = self.cast(data, dtype, "f32"), "f32"
        if self.order is not None or self.turned:
            if self.turned:
                table = np.frombuffer(data, f"u{DTYPES[dtype]}").reshape(tensor.shape).T
            elif len(self.shape) > 1:
                table = np.frombuffer(data, np.uint8).reshape(rows, -1)[self.order]
            else:
                table = np.frombuffer(data, f"u{DTYPES[dtype]}")[self.order]
            data = flat(table)
        if self.dtype in QUANTIZED and dtype != self.dtype:
            return self.quantized(data if dtype == "f32" else self.cast(data, dtype, "f32"))
        return data if dtype == self.dtype else self.cast(data, dtype, self.dtype)

    def cast(self, data: memoryview, dtype: str, to: str) -> memoryview:
        """Another type of element, in the same order."""
        shape = self.tensor.shape
        n_in = shape[-1] if shape else 1
        n_out = math.prod(shape) // n_in
        out = np.empty(n_out * n_in * DTYPES[to], np.uint8)
        try:
            pack(data, dtype, n_out, n_in, False, out.data, to, 0, False, self.pool)
        except ValueError as error:
            raise CheckpointError(f"tensor {self.tensor.name} ({dtype}) {error}") from None
        if to == "f16" and dtype != "f16" and not np.isfinite(out.view(np.float16)).all():
            raise CheckpointError(
                f"tensor {self.tensor.name} ({dtype}) holds values too large for f16: use bf16 or f32"
            )
        return out.data

    def quantized(self, data: memoryview) -> memoryview:
        """f32 to blocks, some rows at a time."""
        n_out, n_in = self.shape
        values = np.frombuffer(data, np.float32).reshape(n_out, n_in)
        step = max(1, STRIPE // n_in)
        try:
            blocks = [quantize(values[i : i + step], self.dtype) for i in range(0, n_out, step)]
        except ValueError as error:
            raise CheckpointError(f"tensor {self.tensor.name} {error}: it cannot be {self.dtype}") from None
        return flat(np.concatenate(blocks))


def arrange(model: Model, tensors: dict[str, Tensor], form: Form, dtype: str, vectors: str) -> dict[str, Arranged]:
    """The weights by parameter name. `vectors`: the type of norms, biases and positions, if not their own ("auto")."""
    pool = Pool(usable_processors())
    arranged: dict[str, Arranged] = {}
    rope = model.config.attention[0].rope
    for name, parameter in model.parameters().items():
        tensor = tensors[name]
        order = None
        if rope and rope.interleaved != form.interleaved and name.split(".")[-2] in ROTATED:
            order = row_order(tensor.shape[0], model.config.head_dim, form.interleaved)
        turned = parameter.kind == "matrix" and name.startswith("h.") and parameter.transposed != form.transposed
        own = tensor.dtype if tensor.dtype in (*DENSE, *(gguf.BLOCKS if vectors != "auto" else ())) else "f32"
        target = own if dtype == "auto" else dtype
        if parameter.kind != "matrix":
            target = target if vectors == "auto" else vectors
        arranged[name] = Arranged(model, parameter, tensor, target, order, turned, pool)
    return arranged


def row_order(rows: int, head_dim: int, interleaved: bool) -> NDArray[np.int64]:
    """Where each row comes from: a head's halves put side by side in pairs (Meta's order), or pairs put in halves."""
    sides = (2, head_dim // 2) if interleaved else (head_dim // 2, 2)
    head = np.arange(head_dim).reshape(sides).T.reshape(-1)
    order: NDArray[np.int64] = (np.arange(0, rows, head_dim)[:, None] + head).reshape(-1)
    return order


def flat(array: NDArray[Any]) -> memoryview:
    """An array's bytes in their order."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def progress(parts: Iterable[Part]) -> Iterable[Part]:
    """The parts, as they are written."""
    return files.progress(((part, part.nbytes) for part in parts), "converting")


# A folder in Hugging Face's layout ----------------------------------------------------------------------------


def _to_folder(checkpoint: Checkpoint, model: Model, tensors: dict[str, Tensor], path: Path, dtype: str) -> list[str]:
    arranged = arrange(model, tensors, FOLDER, dtype, "auto")
    types = {item.dtype for item in arranged.values() if item.parameter.kind == "matrix"}

    def write(file: Path, model: Model) -> None:
        parts = [Part(full_name(model, name), item.dtype, item.shape, item.make) for name, item in arranged.items()]
        write_safetensors(file, parts, progress)

    return save_folder(checkpoint, model, path, types.pop() if len(types) == 1 else "f32", write)


def full_name(model: Model, name: str) -> str:
    """A parameter's name as checkpoints have it."""
    return name if name.startswith("lm_head") else model.PREFIX + name


def save_folder(
    checkpoint: Checkpoint, model: Model, path: Path, dtype: str, write: Callable[[Path, Model], None]
) -> list[str]:
    """A folder of a model's configuration, its tokenizer, and what `write` makes -> remarks, a line each.

    `write` is given a file's name and the model as that configuration has it. All is there in the end, or nothing.
    """
    remarks = []
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".converting-"))
    old = temporary.with_name(temporary.name + "-old")
    try:
        tokenizer = export.save(checkpoint.tokenizer, temporary)
        if tokenizer is None:
            remarks.append("the model comes without a tokenizer: it will take token ids only")
        config = _config(checkpoint, dtype)
        if tokenizer and "eos_token_id" not in config:
            config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": next(iter(tokenizer.eos_ids), None)}
        new = model_for(config, "config.json")
        _compare(checkpoint, model.config, new.config, "config.json")
        (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write(temporary / "model.safetensors", new)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if path.exists():  # with --force
            path.rename(old)
            temporary.rename(path)
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
        else:
            temporary.rename(path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return remarks


def _config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json, as transformers has it."""
    config = dict(checkpoint.config)
    for own in ("rope_interleaved", "conv1d_transposed"):
        config.pop(own, None)
    if factors := config.pop("rope_factors", None):
        config["rope_scaling"] = _llama3(checkpoint, config, factors)
    config.setdefault("architectures", [ARCHITECTURES[config["model_type"]]])
    config.pop("dtype", None)
    config["torch_dtype"] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    return config


def _llama3(checkpoint: Checkpoint, config: dict[str, Any], factors: list[float]) -> dict[str, Any]:
    """Llama 3.1's scaling, of which GGUF keeps the result only: the parameters that give these factors."""
    head_dim, theta = 2 * len(factors), config["rope_theta"]
    plain = [theta ** (-2 * i / head_dim) for i in range(len(factors))]
    for original in (8192, 4096, 16384, 32768):
        scaling = {
            "factor": float(max(factors)), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        scaled, _ = llama3(Fields(scaling), plain, theta, original)
        if all(math.isclose(p / s, f, rel_tol=1e-5) for p, s, f in zip(plain, scaled, factors, strict=True)):
            return {"rope_type": "llama3", **scaling}
    fail(checkpoint.path, "its rope_freqs are not those of Llama 3.1, and have no place in a config.json")


def _compare(checkpoint: Checkpoint, old: Config, new: Config, where: str) -> None:
    """Raises CheckpointError if what was said in the other format would be read as another model."""

    def differs(name: str, a: object, b: object) -> None:
        fail(checkpoint.path, f"{name} is {shown(str(a))}, which has no place in {where} (it would be {shown(str(b))})")

    for name, a in vars(old).items():
        b = getattr(new, name, None)
        if name in ("transposed", "attention") or (name == "model_type" and {a, b} == {"mistral", "llama"}):
            continue
        if a != b and not (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6)):
            differs(name, a, b)
    for a, b in zip(old.attention, new.attention, strict=True):
        for name in ("window", "scale"):
            if getattr(a, name) != getattr(b, name):
                differs(name, getattr(a, name), getattr(b, name))
        if a.rope is None or b.rope is None:
            continue
        scales = (a.rope.magnitude, *a.rope.frequencies), (b.rope.magnitude, *b.rope.frequencies)
        if not all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(*scales, strict=True)):
            differs("the scaling of its rotation", a.rope.magnitude, b.rope.magnitude)


# GGUF ---------------------------------------------------------------------------------------------------------


class _Planned(dict[str, Any]):
    """Keys that will be written, as gguf.translate reads them."""

    def __init__(self, path: Path, keys: dict[str, Any]) -> None:
        super().__init__(keys)
        self.path = path


def _to_gguf(checkpoint: Checkpoint, model: Model, tensors: dict[str, Tensor], path: Path, dtype: str) -> list[str]:
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    arranged = arrange(model, tensors, Form(transposed=False, interleaved=arch == "llama"), dtype, "f32")
    remarks = []
    blocks = {name: item for name, item in arranged.items() if item.dtype in QUANTIZED}
    narrow = [name for name, item in blocks.items() if item.tensor.dtype != item.dtype and item.shape[1] % 32]
    for name in narrow:
        arranged[name] = arranged[name]._replace(dtype="f16")
    if narrow:
        remarks.append(f"{len(narrow)} matrices stay in f16: their rows are no multiple of 32, as {dtype} asks for")

    names = {full: own for own, full in gguf.NAMES[arch].items()}
    parts = []
    for name, item in arranged.items():
        full = name if name.startswith("lm_head") or arch == "gpt2" else model.PREFIX + name
        stem, _, kind = full.rpartition(".")
        layer = next((part for part in stem.split(".") if part.isdecimal()), "")
        general = stem.replace(f".{layer}.", ".*.", 1) if layer else stem
        parts.append(Part(f"{names[general].replace('*', layer)}.{kind}", item.dtype, item.shape, item.make))
    keys = _keys(checkpoint, config, arch)
    if factors := _factors(checkpoint, config, keys):
        data = flat(np.array(factors, np.float32))
        parts.append(Part("rope_freqs.weight", "f32", (len(factors),), lambda: data))
    sizes: dict[str, int] = {}
    for part in parts:
        if part.dtype in FILE_TYPES:
            sizes[part.dtype] = sizes.get(part.dtype, 0) + part.nbytes
    if sizes:
        keys["general.file_type"] = FILE_TYPES[max(sizes, key=lambda name: sizes[name])]
    if any(part.dtype in gguf.BLOCKS for part in parts):
        keys["general.quantization_version"] = 2
    _check(checkpoint, model, path, keys, parts)
    keys |= export.gguf_keys(checkpoint.tokenizer, config.vocab_size, remarks)
    if keys["tokenizer.ggml.model"] == "no_vocab":
        remarks.append("the model comes without a tokenizer: it will take token ids only")
    write_gguf(path, keys, parts, progress)
    return remarks


def _keys(checkpoint: Checkpoint, config: Config, arch: str) -> dict[str, Any]:
    """The configuration in GGUF's words (github.com/ggml-org/ggml, docs/gguf.md)."""
    place = checkpoint.path.resolve()
    name = (checkpoint.tokenizer.gguf or {}).get("general.name") or (place.stem if place.is_file() else place.name)
    keys: dict[str, Any] = {"general.architecture": arch, "general.type": "model", "general.name": name}
    own: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context,
        "embedding_length": config.embd,
        "block_count": config.n_layers,
        "feed_forward_length": config.inner,
        "attention.head_count": config.n_heads,
    }
    if arch == "gpt2":
        return keys | {f"gpt2.{key}": n for key, n in {**own, "attention.layer_norm_epsilon": config.eps}.items()}
    source = checkpoint.config
    scaling = source.get("rope_scaling") or source.get("rope_parameters") or {}
    theta = scaling.get("rope_theta") or source.get("rope_theta") or 10000.0
    own |= {
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(theta),
    }
    if (window := config.attention[0].window) is not None:
        own["attention.sliding_window"] = window
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("linear", "yarn"):
        own |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling.get("factor", 0.0))}
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings", config.context)
        own["rope.scaling.factor"] = float(scaling.get("factor") or config.context / original)
        own["rope.scaling.original_context_length"] = original
        for key in ("beta_fast", "beta_slow"):
            if key in scaling:
                own[f"rope.scaling.yarn_{key}"] = float(scaling[key])
    return keys | {f"{arch}.{key}": n for key, n in own.items()}


def _factors(checkpoint: Checkpoint, config: Config, keys: dict[str, Any]) -> list[float]:
    """By what each frequency is divided, where the keys alone do not say it: Llama 3.1's."""
    rope = config.attention[0].rope
    arch = keys["general.architecture"]
    if rope is None or f"{arch}.rope.scaling.type" in keys:
        return []
    theta, n = keys[f"{arch}.rope.freq_base"], config.head_dim
    factors = [theta ** (-2 * i / n) / f for i, f in enumerate(rope.frequencies)]
    return factors if any(not math.isclose(f, 1.0, rel_tol=1e-9) for f in factors) else []


def _check(checkpoint: Checkpoint, model: Model, path: Path, keys: dict[str, Any], parts: list[Part]) -> None:
    """Reads the configuration back from what is about to be written."""
    empty = memoryview(b"")
    raw = {
        part.name: Tensor(part.name, part.dtype, part.shape, part.make() if part.name.startswith("rope") else empty)
        for part in parts
    }
    try:
        again = model_for(gguf.translate(_Planned(path, keys), raw)[0], "GGUF").config
    except (CheckpointError, ConfigError) as error:
        fail(checkpoint.path, f"has no place in GGUF ({error})")
    _compare(checkpoint, model.config, again, "GGUF")
