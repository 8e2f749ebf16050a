"""What every model is: a configuration, the parameters it needs, and a function over operations."""

from __future__ import annotations

import re
from typing import ClassVar

from pronghorn.errors import CheckpointError
from pronghorn.models.config import Config
from pronghorn.ops import Ops, X
from pronghorn.weights.types import FORMATS, Module, Parameter, Tensor, packed_bytes


class Model:
    """A model of one configuration; its weights come separately, as a Module of what `parameters` names."""

    PREFIX: ClassVar[str]  # which checkpoints may or may not put before the base model's names
    EMBEDDING: ClassVar[str]  # what the head is tied to
    NOT_WEIGHTS: ClassVar[re.Pattern[str]]  # what old checkpoints carry besides: masks, frequencies

    def __init__(self, config: Config) -> None:
        self.config = config

    def parameters(self) -> dict[str, Parameter]:
        """Every weight by its name in the Module tree, in the order of use."""
        raise NotImplementedError

    def forward(self, ops: Ops[X], w: Module) -> X:
        """The paper, in code -> logits [len(batch.logits_rows), vocabulary]."""
        raise NotImplementedError

    def resolve(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors by parameter name: all that are needed, in their shapes, and nothing else.

        Raises CheckpointError, naming the tensor, for what is missing, misshapen, unknown, or there twice.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            short = name.removeprefix(self.PREFIX)
            if self.NOT_WEIGHTS.fullmatch(short):
                continue
            if short in found:
                raise CheckpointError(f"tensor {name} is there with and without the prefix {self.PREFIX}")
            found[short] = tensor
        if self.config.tied and (head := found.pop("lm_head.weight", None)):
            # Files may carry a tied head twice, or (safetensors keeps one name of two) under the head's name.
            embedding = found.setdefault(self.EMBEDDING, head)
            if not equal(embedding, head):
                differs = f"tensor lm_head.weight differs from {self.EMBEDDING}"
                raise CheckpointError(f"{differs}, but config.json says that they are tied")

        wanted = self.parameters()
        complain("is missing", [name for name in wanted if name not in found])
        complain("is not part of this model", [name for name in found if name not in wanted])
        for name, parameter in wanted.items():
            tensor = found[name]
            if tensor.shape != parameter.shape:
                sides = f"{list(tensor.shape)}, but the configuration asks for {list(parameter.shape)}"
                raise CheckpointError(f"tensor {tensor.name} is {sides}")
            if re.fullmatch(r"[iu]\d+|bool", tensor.dtype):
                raise CheckpointError(f"tensor {tensor.name} holds {tensor.dtype}, which is no weight")
            packed = FORMATS.get(tensor.dtype)
            if packed and (parameter.kind != "matrix" or tensor.data.nbytes < packed_bytes(parameter, packed)):
                raise CheckpointError(f"tensor {tensor.name} is not as long as its shape in {tensor.dtype} asks for")
        return {name: found[name] for name in wanted}


def complain(fault: str, names: list[str]) -> None:
    """Raises an error that names the first tensor, and counts the others."""
    if names:
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(f"tensor {names[0]} {fault}{others}")


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes; a megabyte at a time, so that no large copy is made."""
    step = 1 << 20
    return a is b or (
        (a.dtype, a.shape, a.data.nbytes) == (b.dtype, b.shape, b.data.nbytes)
        and all(bytes(a.data[i : i + step]) == bytes(b.data[i : i + step]) for i in range(0, a.data.nbytes, step))
    )


def linear(name: str, n_out: int, n_in: int, bias: bool, transposed: bool = False) -> dict[str, Parameter]:
    """The parameters of a linear layer."""
    shape = (n_in, n_out) if transposed else (n_out, n_in)
    named = {f"{name}.weight": Parameter(shape, "matrix", transposed)}
    return named | ({f"{name}.bias": Parameter((n_out,), "vector")} if bias else {})


def norm(name: str, width: int, bias: bool = False) -> dict[str, Parameter]:
    """The parameters of a norm."""
    named = {f"{name}.weight": Parameter((width,), "vector")}
    return named | ({f"{name}.bias": Parameter((width,), "vector")} if bias else {})
