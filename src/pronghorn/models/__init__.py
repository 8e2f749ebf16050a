"""The models, by the name that checkpoints give them (`model_type`): one file an architecture."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pronghorn.errors import CheckpointError
from pronghorn.models.base import Model
from pronghorn.models.config import Config, Fields
from pronghorn.weights import Checkpoint
from pronghorn.weights.types import Tensor

__all__ = ["ARCHITECTURES", "Config", "Model", "model_for", "model_of"]

ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
"""The file of each `model_type`; variants of one architecture share a file, and are rows of a table there."""


def model_for(config: dict[str, Any], what: str = "config.json") -> Model:
    """The model that a config.json describes. Raises ConfigError, beginning with `what`, for what is wrong in it."""
    fields = Fields(config, what)
    model_type = fields.take("model_type", None)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise fields.fault("model_type", model_type, f"one of {', '.join(ARCHITECTURES)}")
    model: Model = import_module(f"{__name__}.{ARCHITECTURES[model_type]}").model(fields, model_type)
    return model


def model_of(checkpoint: Checkpoint) -> tuple[Model, dict[str, Tensor]]:
    """The checkpoint's model, and its tensors by parameter name. Every error names the file."""
    file = checkpoint.files[0]
    sizes = {"tensorflow": "hparams.json", "meta": "params.json"}.get(checkpoint.format, "config.json")
    what = file if checkpoint.format in ("gguf", "llama2.c") else file.parent / sizes
    model = model_for(checkpoint.config, str(what))
    try:
        return model, model.resolve(checkpoint.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
