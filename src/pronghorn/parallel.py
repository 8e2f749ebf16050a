"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): a model's matrices divided among ranks.

q, k, v and what opens an MLP are divided by outputs, so that each rank has heads and inner dimensions of its own; what
closes them by inputs, and the ranks' parts are summed; embedding and head by the vocabulary. Every rank reads its part
of the mapped file alone, and quantizes what it has read. Rank 0 has the engine; the others repeat its runner's calls.

The ranks are started by torchrun, or by rank 0 itself. They talk by NCCL on CUDA, else by gloo.
"""

# PyTorch's interface is typed as Any in part.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pronghorn.errors import ConfigError, ParameterError, PronghornError
from pronghorn.ops import Batch
from pronghorn.weights.types import DTYPES, Parameter, Tensor

if TYPE_CHECKING:
    import torch

    from pronghorn.models import Model

OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc")
INPUTS = ("o_proj", "down_proj", "c_proj")
VOCABULARY = ("embed_tokens", "wte", "lm_head")


class Group:
    """The ranks of a model, `rank` of `size`, of which there is one in a process.

    `crew`: the others, if this one has started them, for which `arguments` are LLM's.
    """

    def __init__(self, size: int, device: str, arguments: dict[str, Any]) -> None:
        try:
            import torch
            from torch import distributed
        except ImportError as error:
            raise PronghornError("PyTorch is not installed: pip install 'pronghorn[gpu]'") from error

        device = device.removeprefix("torch:")
        self.size, self.crew, method = size, None, "env://"
        self.amid = False  # whether a step has begun that has not ended
        self.runners: list[Any] = []  # of all ranks in the same order: the model's, and a draft's
        if "WORLD_SIZE" in os.environ:  # torchrun, or another process's crew
            self.rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
            if int(os.environ["WORLD_SIZE"]) != size:
                raise ParameterError(f"tensor_parallel is {size}, but there are {os.environ['WORLD_SIZE']} ranks")
        else:
            self.rank = local = 0
            if distributed.is_initialized():
                raise ParameterError("tensor_parallel: this process has another model's ranks already")
            if device == "cuda" and torch.cuda.device_count() < size:
                raise ParameterError(f"tensor_parallel is {size}: there are {torch.cuda.device_count()} CUDA devices")
            self.crew = Crew(size, arguments)
            method = self.crew.method
        self.device = f"cuda:{local}" if device == "cuda" else device
        if device == "cuda":
            torch.cuda.set_device(local)
        self.distributed, place = distributed, {"rank": self.rank, "world_size": size}
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", init_method=method, **place)
        # What is said to the others goes by the host, and they may wait for long until it comes.
        self.words = distributed.new_group(backend="gloo", timeout=timedelta(days=30))

    def divides_inputs(self, name: str) -> bool:
        """Whether the weight of this name gives a part of a sum on each rank."""
        return name.split(".")[-2] in INPUTS

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks', in place."""
        self.together("all_reduce", x)
        return x

    def together(self, name: str, *arguments: Any, **more: Any) -> None:
        """What all ranks do at once. PronghornError where one of them is gone."""
        try:
            getattr(self.distributed, name)(*arguments, **more)
        except RuntimeError as error:
            if self.crew or self.rank:
                time.sleep(10)  # who watches the ranks says what has happened, and ends this process
            raise PronghornError(f"rank {self.rank} has lost another: {str(error).splitlines()[0]}") from None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' columns, side by side."""
        import torch

        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.together("all_gather", parts, x.contiguous())
        return torch.cat(parts, dim=1)

    def send(self, runner: int, kind: int, *arrays: array[int]) -> None:
        """From rank 0, what a runner of the others does next: a batch of `kind` pages, -1 to copy a page, -2 to end."""
        import numpy as np
        import torch

        if self.rank:
            return
        head = torch.tensor([runner, kind, *(len(a) for a in arrays), *[0] * (5 - len(arrays))])
        self.together("broadcast", head, 0, group=self.words)
        if arrays:
            body = torch.from_numpy(np.concatenate([np.array(a, np.int32) for a in arrays]))
            self.together("broadcast", body, 0, group=self.words)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What all ranks do together; who leaves amid it leaves the others waiting."""
        self.amid = True
        yield
        self.amid = False

    def follow(self) -> None:
        """On the other ranks: does what rank 0's runners do, until it ends."""
        import torch

        while True:
            head = torch.empty(7, dtype=torch.int64)
            self.together("broadcast", head, 0, group=self.words)
            number, kind, *sizes = head.tolist()
            if kind == -2:
                return
            body = torch.empty(sum(sizes), dtype=torch.int32)
            self.together("broadcast", body, 0, group=self.words)
            arrays = [array("i", part.numpy().tobytes()) for part in body.split(sizes)]
            if kind == -1:
                self.runners[number].copy_page(*arrays[0])
            else:
                token_ids, positions, sequence, rows, table = arrays
                self.runners[number].run(Batch(token_ids, positions, sequence, table, kind, rows, logits_here=False))

    def close(self) -> None:
        """Ends the others, and leaves."""
        self.runners.clear()  # and their memory with them
        if self.crew:
            self.crew.done = True
        if self.amid and self.crew:  # they cannot be told
            for process in self.crew.processes:
                process.kill()
            return
        self.send(0, -2)
        self.distributed.destroy_process_group()
        for process in self.crew.processes if self.crew else ():
            process.wait()


def local_model(model: Model, size: int) -> Model:
    """The model as one rank of `size` has it. ConfigError where it cannot be divided so."""
    cfg = copy.copy(model.config)
    for what, n in (("heads", cfg.n_heads), ("key-value heads", cfg.n_kv_heads), ("inner dimensions", cfg.inner)):
        if n % size:
            raise ConfigError(f"tensor_parallel is {size}: this model's {n} {what} cannot be divided so")
    cfg.n_heads, cfg.n_kv_heads = cfg.n_heads // size, cfg.n_kv_heads // size
    cfg.attention = tuple(
        spec._replace(n_heads=spec.n_heads // size, n_kv_heads=spec.n_kv_heads // size) for spec in cfg.attention
    )
    local = copy.copy(model)
    local.config = cfg
    return local


def divided(
    parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor], rank: int, size: int
) -> tuple[dict[str, Parameter], dict[str, Tensor]]:
    """A rank's part of the parameters and of their tensors."""
    parts: dict[str, Parameter] = {}
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        module, leaf = name.split(".")[-2:]
        tensor, outputs, times = tensors[name], int(parameter.transposed), 1
        if module in VOCABULARY:
            axis = 0
        elif module in OUTPUTS:
            axis, times = outputs, 3 if module == "c_attn" else 1  # q, k and v
        elif module in INPUTS and leaf == "weight":
            axis = 1 - outputs
        else:
            parts[name], found[name] = parameter, tensor
            continue
        if leaf == "bias":
            axis = 0
        found[name] = part_of(tensor, axis, rank, size, times)
        parts[name] = parameter._replace(shape=found[name].shape)
    return parts, found


def part_of(tensor: Tensor, axis: int, rank: int, size: int, times: int = 1) -> Tensor:
    """One of `size` equal parts of a tensor along an axis, or of each of `times` tensors that are one.

    A part of the first axis may be filled up with zeros: a vocabulary needs not be divisible. The bytes of no other
    part are read.
    """
    import numpy as np

    if tensor.dtype in DTYPES:
        block, block_bytes = 1, DTYPES[tensor.dtype]
    else:
        from pronghorn.weights.gguf import BLOCKS

        if tensor.dtype not in BLOCKS:
            raise ConfigError(f"tensor {tensor.name} is {tensor.dtype}: packed weights cannot be divided among ranks")
        block, block_bytes = BLOCKS[tensor.dtype]
    shape = list(tensor.shape)
    inner = axis == len(shape) - 1
    unit = block if inner else 1  # elements that cannot be parted
    n = -(-shape[axis] // size)
    if (shape[axis] % size and (axis or times > 1)) or n % (unit * times) or shape[-1] % block:
        raise ConfigError(f"tensor {tensor.name} is {shape} {tensor.dtype}: it cannot be divided by {size}")
    n //= times
    sizes = [*shape[:-1], shape[-1] // block, block_bytes]
    data = np.frombuffer(tensor.data, np.uint8).reshape(sizes)
    wide = n // unit
    each = sizes[axis] // times
    pieces = []
    for start in range(0, times * each, each):
        begin, end = (min(start + r * wide, start + each) for r in (rank, rank + 1))
        pieces.append(data[(slice(None),) * axis + (slice(begin, end),)])
    part = np.ascontiguousarray(pieces[0]) if times == 1 else np.concatenate(pieces, axis)
    if lacking := times * wide - part.shape[axis]:
        part = np.concatenate((part, np.zeros((lacking, *part.shape[1:]), np.uint8)))
    shape[axis] = n * times
    return tensor._replace(shape=tuple(shape), data=part.reshape(-1).data)


class Crew:
    """The other ranks of this machine, as processes of rank 0's.

    Should one of them end before it is told to, all end, with one line that says which: a rank that waits for another
    cannot be woken otherwise. They end too when rank 0 is gone, as they read from it.
    """

    def __init__(self, size: int, arguments: dict[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.method = f"tcp://127.0.0.1:{port}"
        place = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        command = [sys.executable, "-c", LOAD, json.dumps(arguments)]
        self.processes = [
            subprocess.Popen(
                command,
                env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(1, size)
        ]
        self.done = False  # whether they have been told to end
        for rank, process in enumerate(self.processes, 1):
            threading.Thread(target=self.watch, args=(rank, process), daemon=True).start()

    def watch(self, rank: int, process: subprocess.Popen[str]) -> None:
        """Waits for the end of a rank."""
        assert process.stderr
        said = process.stderr.read().strip()
        process.wait()
        if self.done:
            return
        self.done = True
        how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"status {process.returncode}"
        reason = said.splitlines()[-1] if said else "it said nothing"
        which = f"rank {rank} of {len(self.processes) + 1}"
        print(f"pronghorn: {which} ended ({how}): {reason}", file=sys.stderr, flush=True)
        for other in self.processes:
            other.kill()
        os._exit(1)


LOAD = """import json, sys
from pronghorn import LLM, parallel
parallel.obey(lambda: LLM(**json.loads(sys.argv[1])))"""
"""What the processes of a crew run: LLM, on another rank than the first, follows as soon as it is loaded."""


def obey(load: Callable[[], object]) -> None:
    """Loads a model, and follows, until rank 0 is done or gone."""

    def read() -> None:
        sys.stdin.read()
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears it, and says what follows
    threading.Thread(target=read, daemon=True).start()
    try:
        load()
    except PronghornError as error:
        sys.exit(str(error))
