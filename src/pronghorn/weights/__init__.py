"""Files to named tensors: `open_checkpoint` maps a model's files, and checks headers before trusting them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pronghorn.weights.ahead import mapped
from pronghorn.weights.files import fail, nature, read_json, shown
from pronghorn.weights.types import Made, Tensor

__all__ = ["Checkpoint", "TokenizerSource", "open_checkpoint", "open_source"]

_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"


class TokenizerSource(NamedTuple):
    """Where a model's tokenizer is: in a folder's files, or in a GGUF file's metadata (decoded when read)."""

    folder: Path | None = None
    gguf: Mapping[str, Any] | None = None


class Checkpoint(NamedTuple):
    """A model's files, mapped.

    `config` is in the vocabulary of Hugging Face's config.json, and `tensors` have the names that transformers
    gives them, for GGUF files too. These add two keys: `rope_interleaved` (true where rows of q and k are in
    Meta's order, pairs side by side) and `conv1d_transposed` (false where GPT-2's matrices are [n_out, n_in]).
    """

    path: Path
    files: tuple[Path, ...]
    format: str  # "safetensors" | "gguf" | "torch" | "meta" | "tensorflow" | "llama2.c"
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: TokenizerSource


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Maps a folder in Hugging Face's layout, a `.safetensors` or `.gguf` file, or a model known by name.

    PyTorch's `.bin` and `.pth` (Hugging Face's and Meta's), OpenAI's TensorFlow checkpoints, and llama2.c's `.bin` are
    mapped too. What a file is follows from its contents, not from its name. CheckpointError, in one line, for what is
    missing, damaged or of another kind, or has to be converted first.
    """
    checkpoint = open_source(path)
    if made := [name for name, tensor in checkpoint.tensors.items() if isinstance(tensor, Made)]:
        others = f" and {len(made) - 1} more" if len(made) > 1 else ""
        fault = f"tensor {shown(made[0])}{others} cannot be mapped as they lie: `pronghorn convert` puts them in order"
        fail(checkpoint.path, fault)
    return checkpoint


def open_source(path: str | Path) -> Checkpoint:
    """The same, for converting: tensors may be `Made`, of what no engine could run on as it lies."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        from pronghorn.weights import hub

        path = hub.resolve(str(path))
        mode = path.stat().st_mode
    except OSError as error:
        fail(path, error.strerror or str(error))
    path = Path(path)
    if stat.S_ISDIR(mode):
        return _open_folder(path)
    return _open_file(path, path)


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        fail(folder, error.strerror or str(error))
    if "model.safetensors" in names:
        return _open_file(folder, folder / "model.safetensors")
    if _INDEX in names:
        from pronghorn.weights.safetensors import read_index, read_safetensors

        config = _config(folder)
        files, tensors = read_index(folder / _INDEX, read_safetensors, strict=True)
        return Checkpoint(folder, files, "safetensors", config, tensors, TokenizerSource(folder=folder))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return _open_file(folder, folder / ggufs[0])
    if ggufs:
        fail(folder, f"holds {len(ggufs)} .gguf files: name one, such as {shown(ggufs[0])}")
    if found := _open_other(folder, names):
        return found
    fail(folder, f"holds no model: neither model.safetensors, nor {_INDEX}, nor a .gguf file, nor an older format's")


def _open_other(folder: Path, names: list[str]) -> Checkpoint | None:
    """A folder in another layout than safetensors' and GGUF's."""
    source = TokenizerSource(folder=folder)
    if _TORCH in names:
        return _open_file(folder, folder / _TORCH)
    if f"{_TORCH}.index.json" in names:
        from pronghorn.weights import torch
        from pronghorn.weights.safetensors import read_index

        config = _config(folder)
        index = folder / f"{_TORCH}.index.json"
        files, tensors = read_index(index, torch.read_torch, strict=False)
        return Checkpoint(folder, files, "torch", config, tensors, source)
    if "params.json" in names and any(name.startswith("consolidated.") for name in names):
        return _open_meta(folder)
    if "hparams.json" in names:
        from pronghorn.weights import tensorflow

        files, config, tensors = tensorflow.read_gpt2(folder)
        return Checkpoint(folder, files, "tensorflow", config, tensors, source)
    return None


def _open_meta(folder: Path) -> Checkpoint:
    from pronghorn.weights.meta import read_meta

    shards = sorted(folder.glob("consolidated.*.pth"))
    config, tensors = read_meta(folder, shards)
    above = not (folder / "tokenizer.model").exists() and (folder.parent / "tokenizer.model").is_file()  # Llama 1's
    source = TokenizerSource(folder=folder.parent if above else folder)
    return Checkpoint(folder, tuple(shards), "meta", config, tensors, source)


def _open_file(path: Path, file: Path) -> Checkpoint:
    view = mapped(file)
    head = bytes(view[:32])
    if head.startswith(b"GGUF"):
        from pronghorn.weights.gguf import read_gguf

        config, tensors, metadata = read_gguf(file, view)
        return Checkpoint(path, (file,), "gguf", config, tensors, TokenizerSource(gguf=metadata))
    if file.suffix == ".gguf":
        fail(file, f"is not a GGUF file{' but ' + known if (known := nature(head)) else ''}")
    folder = file.parent
    pickled = head.startswith((b"PK\3\4", *(bytes([0x80, protocol]) for protocol in range(2, 6))))
    if pickled and file.suffix != ".safetensors" and head[8:9] != b"{":
        from pronghorn.weights.torch import read_torch

        source = TokenizerSource(folder=folder)
        if file.name.startswith("consolidated.") and (folder / "params.json").is_file():
            return _open_meta(folder)
        tensors = read_torch(file, view)
        return Checkpoint(path, (file,), "torch", _config(folder), tensors, source)
    if file.suffix == ".bin" and head[8:9] != b"{" and not nature(head):
        from pronghorn.weights.llama2c import read_llama2c

        config, tensors = read_llama2c(file, view)
        return Checkpoint(path, (file,), "llama2.c", config, tensors, TokenizerSource(folder=folder))
    from pronghorn.weights.safetensors import read_safetensors

    tensors = read_safetensors(file, view)
    return Checkpoint(path, (file,), "safetensors", _config(folder), tensors, TokenizerSource(folder=folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.lexists(path):
        fail(path, "is missing: it says what model these weights are, and belongs beside them")
    return read_json(path, 16_000_000)
