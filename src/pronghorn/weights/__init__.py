"""Files to named tensors: `open_checkpoint` maps a model's files, and checks headers before trusting them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pronghorn.weights.ahead import mapped
from pronghorn.weights.files import fail, nature, read_json, shown
from pronghorn.weights.types import Tensor

__all__ = ["Checkpoint", "TokenizerSource", "open_checkpoint"]

_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt")


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
    format: str  # "safetensors" | "gguf"
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer: TokenizerSource


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Maps a folder in Hugging Face's layout, a `.safetensors` or `.gguf` file, or a model known by name.

    What a file is follows from its contents, not from its name. CheckpointError, in one line, for what is
    missing, damaged or of another kind.
    """
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
        from pronghorn.weights.safetensors import read_index

        config = _config(folder)
        files, tensors = read_index(folder / _INDEX)
        return Checkpoint(folder, files, "safetensors", config, tensors, TokenizerSource(folder=folder))
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return _open_file(folder, folder / ggufs[0])
    if ggufs:
        fail(folder, f"holds {len(ggufs)} .gguf files: name one, such as {shown(ggufs[0])}")
    for name in names:
        if name in _PICKLES:
            fail(
                folder,
                f"holds {name} but no model.safetensors: convert it (opening a pickle can run any code)",
            )
    fail(folder, f"holds no model: neither model.safetensors, nor {_INDEX}, nor a .gguf file")


def _open_file(path: Path, file: Path) -> Checkpoint:
    view = mapped(file)
    head = bytes(view[:32])
    if head.startswith(b"GGUF"):
        from pronghorn.weights.gguf import read_gguf

        config, tensors, metadata = read_gguf(file, view)
        return Checkpoint(path, (file,), "gguf", config, tensors, TokenizerSource(gguf=metadata))
    if file.suffix == ".gguf":
        fail(file, f"is not a GGUF file{' but ' + known if (known := nature(head)) else ''}")
    from pronghorn.weights.safetensors import read_safetensors

    tensors = read_safetensors(file, view)
    folder = file.parent
    return Checkpoint(path, (file,), "safetensors", _config(folder), tensors, TokenizerSource(folder=folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not os.path.lexists(path):
        fail(path, "is missing: it says what model these weights are, and belongs beside them")
    return read_json(path, 16_000_000)
