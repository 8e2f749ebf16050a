"""From a checkpoint to what runs it: options, weights, runners, and the memory that they take."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pronghorn.engine.sampling import whole
from pronghorn.errors import CheckpointError, ParameterError, PronghornError
from pronghorn.machine import free_memory, physical_memory
from pronghorn.models import Config, Model, model_of
from pronghorn.ops import KV_DTYPES, PAGE, Runner
from pronghorn.weights import Checkpoint, open_checkpoint
from pronghorn.weights.types import Dense, Matrix, Module, Parameter, Tensor, Unquantized

if TYPE_CHECKING:
    from pronghorn.text.tokenizer import Tokenizer

DTYPES = ("auto", "f32", "f16", "bf16", "int8", "int4")
DEVICES = "cpu, reference, or a device of PyTorch's, such as cuda or torch:cpu"
DRAFTS = "self-int4, self-int8, ngram, or another model"
STEP_TOKENS = 512  # prompt tokens that a step computes: also how long Ctrl-C may wait
SEQUENCES = 16  # of full context, that the KV cache has room for by default, if the memory does

T = TypeVar("T")


def check_options(
    dtype: str,
    device: str = "cpu",
    threads: int | None = None,
    draft: str | Path | None = None,
    kv_dtype: str = "auto",
    kv_memory: int | None = None,
    tensor_parallel: int = 1,
) -> None:
    """Raises ParameterError for what no model can make good."""
    whole("tensor_parallel", tensor_parallel, 1, 1024)
    if tensor_parallel > 1 and device not in ("cuda", "torch:cpu"):
        raise ParameterError(f"tensor_parallel is {tensor_parallel}: device {device!r} has no ranks (cuda has)")
    if dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if kv_dtype not in ("auto", *KV_DTYPES):
        raise ParameterError(f"kv_dtype is {kv_dtype!r}: expected one of auto, {', '.join(KV_DTYPES)}")
    if not isinstance(device, str):
        raise ParameterError(f"device is {device!r}: expected {DEVICES}")
    if device.startswith("cpu") and device != "cpu":
        raise ParameterError(f"device is {device!r}: expected cpu, or torch:{device} to run it in PyTorch")
    if threads is not None:
        whole("threads", threads, 1, 1024)
        if device != "cpu":
            raise ParameterError(f"threads is {threads}: device {device!r} has no such choice")
    if draft is not None and not (isinstance(draft, (str, os.PathLike)) and str(draft)):
        raise ParameterError(f"draft is {draft!r}: expected {DRAFTS}")
    if kv_memory is not None:
        whole("kv_memory", kv_memory, 1, sys.maxsize)


def own_rank(n_ranks: int) -> int:
    """Which rank this process is: torchrun says it. ParameterError where that is none of them."""
    text = os.environ.get("RANK", "0")
    if text.isascii() and text.isdecimal() and int(text) < n_ranks:
        return int(text)
    raise ParameterError(f"RANK is {text!r} in the environment: expected a number from 0 to {n_ranks - 1}")


def open_model(model: str | Path | None) -> Checkpoint:
    """The model's files, mapped; None is the default model, which is fetched the first time."""
    if model is None:
        from pronghorn.weights.hub import default_model

        model = default_model()
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise ParameterError(f"model is {model!r}: expected a folder, a file, or a name")
    return open_checkpoint(model)


def load_tokenizer(source: Any) -> Tokenizer:
    """The tokenizer of a checkpoint."""
    from pronghorn.text import open_tokenizer

    return open_tokenizer(source)


def weights_for(
    device: str,
    checkpoint: Checkpoint,
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, Tensor],
    dtype: str,
    threads: int | None,
    heads: tuple[str, ...] = (),
    keep: bool = True,
) -> dict[str, Matrix | Unquantized]:
    """The weights ready to run (see weights.quantize.prepare); PyTorch's devices quantize themselves what they can."""
    from pronghorn.weights.quantize import prepare, unquantized

    there = {} if device in ("cpu", "reference") else unquantized(parameters, tensors, dtype, heads)
    rest = {name: parameter for name, parameter in parameters.items() if name not in there}
    return {**prepare(checkpoint, rest, tensors, dtype, threads, heads, keep), **there}


def runner_for(
    model: Model, weights: Module, device: str, threads: int | None, n_pages: int, kv_dtype: str, **more: Any
) -> Runner:
    """The model made ready on a device; `more` is for a TorchRunner."""
    if device == "cpu":
        from pronghorn.ops.cpu import CpuRunner

        return CpuRunner(model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS, threads=threads)
    if device == "reference":
        from pronghorn.ops.reference import ReferenceRunner

        return ReferenceRunner(model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS)
    name = device.removeprefix("torch:")
    try:
        from pronghorn.ops.gpu import TorchRunner

        return TorchRunner(
            model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS,
            device=name, **more,
        )  # fmt: skip
    except CheckpointError:  # of a weight that cannot be quantized there
        raise
    except PronghornError as error:  # PyTorch is not there, or has no such device
        raise ParameterError(f"device is {device!r}: expected {DEVICES} ({error})") from None


def runner_beside(
    own: Runner,
    model: Model,
    weights: Module,
    device: str,
    threads: int | None,
    n_pages: int,
    kv_dtype: str,
    *,
    shared: bool = True,
) -> Runner:
    """Another model on the device of `own`; `shared`: on its keys and values too, which the reference keeps apart."""
    cache = getattr(own, "cache", None) if shared else None
    if device != "cpu":
        more = {"cache": cache, "group": getattr(own, "group", None)}
        return runner_for(model, weights, device, threads, n_pages, kv_dtype, **more)
    from pronghorn.ops.cpu import CpuRunner

    assert isinstance(own, CpuRunner)
    return CpuRunner(
        model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS, pool=own.pool, cache=cache
    )


def kv_bytes(config: Config, kv_dtype: str) -> int:
    """Bytes of a token's keys and values in all layers; int8 ones have a scale of 4 bytes for each head."""
    head = {"f32": 4 * config.head_dim, "bf16": 2 * config.head_dim, "int8": config.head_dim + 4}[kv_dtype]
    return 2 * config.n_layers * config.n_kv_heads * head


def memory_of(device: str, weights: Mapping[str, Matrix | Unquantized]) -> tuple[int, int]:
    """Bytes of memory where a device's keys and values lie: all, and those that are free beside its weights."""
    if not device.startswith("cuda"):
        return physical_memory(), free_memory()
    try:
        import torch

        free, there = torch.cuda.mem_get_info(device)
    except (ImportError, RuntimeError, AssertionError):  # there is no such device: who makes the runner says so
        return sys.maxsize, 0
    return there, max(free - total_bytes(weights.values()), 0)


def pages_for(token_bytes: int, context: int, sequences: int, kv_memory: int | None, memory: tuple[int, int]) -> int:
    """Pages of KV cache: what `kv_memory` holds; or else a full context's, however little memory there is.

    `sequences` full contexts have room where they need no more than a quarter of the free `memory` (see memory_of).
    """
    page_bytes, full = token_bytes * PAGE, -(-context // PAGE)
    there, free = memory
    if kv_memory is None:
        return max(full, min(free // 4 // page_bytes, sequences * full))
    kv_memory = int(kv_memory)
    if kv_memory > there:
        raise ParameterError(f"kv_memory is {kv_memory}: this machine has {there} bytes")
    if kv_memory < page_bytes:
        raise ParameterError(f"kv_memory is {kv_memory}: {PAGE} tokens alone need {page_bytes} bytes")
    return kv_memory // page_bytes


def kv_dtype_for(weights: Mapping[str, Matrix | Unquantized]) -> str:
    """The dtype of keys and values by default."""
    return "f32" if all(isinstance(w, Dense) and w.dtype != "bf16" for w in weights.values()) else "bf16"


def weights_read(model: Model, weights: Mapping[str, T]) -> dict[str, T]:
    """The weights that decoding a token reads as a whole: not the tables of which it looks up a row."""
    kinds = {name: parameter.kind for name, parameter in model.parameters().items()}
    looked_up = set() if model.config.tied else {model.EMBEDDING}
    return {name: w for name, w in weights.items() if kinds[name] != "table" and name not in looked_up}


def bytes_read(model: Model, weights: Mapping[str, Matrix | Unquantized]) -> int:
    """Bytes of weights that decoding a token reads."""
    return total_bytes(weights_read(model, weights).values())


def total_bytes(weights: Iterable[Matrix | Unquantized]) -> int:
    """Bytes of weights as they are run."""
    return sum(weight.nbytes if isinstance(weight, Unquantized) else weight.data.nbytes for weight in weights)


def describe(checkpoint: Checkpoint, dtype: str = "auto", *, sparsity: bool = False) -> dict[str, Any]:
    """What `pronghorn info` shows: the configuration, what becomes of the weights, and the memory of each context.

    `sparsity` adds the share of zeros, for which all weights are read.
    """
    from pronghorn.weights import quantize
    from pronghorn.weights.sparsity import sparsity as sparsity_of

    check_options(dtype)
    model, tensors = model_of(checkpoint)
    parameters, config = model.parameters(), model.config
    groups: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    plan = quantize.describe(parameters, tensors, dtype)
    matrices = [name for name, parameter in parameters.items() if parameter.kind == "matrix"]
    for name, (*form, size) in plan.items():
        own, target, how = form
        groups.setdefault((own, target, how), []).append((tensors[name].data.nbytes, size))
    weight_bytes = sum(size for sizes in groups.values() for _, size in sizes)
    lengths = [n for n in (2**i for i in range(7, 30)) if n < config.context] + [config.context]
    kept = {dtype: {str(n): n * kv_bytes(config, dtype) for n in lengths} for dtype in KV_DTYPES}
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "files": [str(file) for file in checkpoint.files],
        "config": checkpoint.config,
        "parameters": sum(math.prod(parameter.shape) for parameter in parameters.values()),
        "bytes": sum(tensor.data.nbytes for tensor in tensors.values()),
        "weights": [
            {
                "dtype": own,
                "becomes": target,
                "how": how,
                "tensors": len(sizes),
                "bytes": sum(before for before, _ in sizes),
                "becomes_bytes": sum(after for _, after in sizes),
            }
            for (own, target, how), sizes in groups.items()
        ],
        "matrix_bits": 8
        * sum(plan[name][3] for name in matrices)
        / sum(math.prod(parameters[n].shape) for n in matrices),
        "weight_bytes": weight_bytes,
        "kv_bytes": kept,
        "total_bytes": {
            dtype: {length: weight_bytes + size for length, size in row.items()} for dtype, row in kept.items()
        },
        **({"sparsity": sparsity_of(parameters, tensors)} if sparsity else {}),
    }
