"""The models, by the name that checkpoints give them (`model_type`): one file an architecture."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pronghorn.errors import ConfigError
from pronghorn.models.base import Model, Parameter
from pronghorn.models.config import Config, shown

__all__ = ["ARCHITECTURES", "Config", "Model", "Parameter", "model_for"]

ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
"""The file of each `model_type`; variants of one architecture share a file, and are rows of a table there."""


def model_for(config: dict[str, Any]) -> Model:
    """The model that a config.json describes. Raises ConfigError for what is wrong or not implemented."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(f"config.json: model_type is {shown(model_type)}: expected one of {', '.join(ARCHITECTURES)}")
    model: Model = import_module(f"{__name__}.{ARCHITECTURES[model_type]}").model(config)
    return model
