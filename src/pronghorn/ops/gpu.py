"""The operations in eager PyTorch, on any of its devices; activations are float32.

Dense weights stay in their format: bf16 ones are multiplied as the CPU does it, x rounded to bf16 and the
sums in float32. Int8 and Int4 are widened to float32 when they are loaded (and then x is not rounded).
"""

# PyTorch's functional interface is typed as Any in part.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from pronghorn import _native
from pronghorn.errors import ParameterError, PronghornError
from pronghorn.ops import KV_DTYPES, PAGE, Attention, Batch, Choice, Chosen, Rope
from pronghorn.weights.types import Dense, Matrix, Module

try:
    import torch
    from torch.nn import functional
except ImportError as error:
    raise PronghornError("PyTorch is not installed: pip install 'pronghorn[gpu]'") from error

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


class TorchRunner:
    """A model on a PyTorch device.

    `pages`: keys and values `[layer, page * PAGE + slot, kv head, dim]`; `scales`: of int8 ones, dim is 1.
    """

    def __init__(
        self,
        model: Model,
        weights: Module,
        *,
        n_pages: int,
        kv_dtype: str = "f32",
        max_tokens: int = 512,
        device: str = "cpu",
    ) -> None:
        if kv_dtype not in KV_DTYPES:
            raise ParameterError(f"kv_dtype is {kv_dtype!r}: expected one of {', '.join(KV_DTYPES)}")
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # how PyTorch says that it has no such device
            raise ParameterError(f"device {device}: {str(error).splitlines()[0]}") from None
        cfg = model.config
        self.model = model
        self.max_tokens = max_tokens

        def leaf(name: str) -> Any:
            return reduce(Module.get, name.split("."), weights)

        self.weights = Module.of({name: self.load(leaf(name)) for name in model.parameters()})
        shape = (2, cfg.n_layers, n_pages * PAGE, cfg.n_kv_heads, cfg.head_dim)
        self.pages = torch.zeros(shape, dtype=DTYPES[kv_dtype], device=self.device)
        self.scales = torch.zeros((*shape[:-1], 1), device=self.device) if kv_dtype == "int8" else None

    @torch.inference_mode()
    def run(self, batch: Batch) -> memoryview:
        """See ops.Runner."""
        if len(batch.token_ids) > self.max_tokens:
            raise ParameterError(f"{len(batch.token_ids)} tokens in a batch: at most {self.max_tokens}")
        logits = self.model.forward(TorchOps(self, batch), self.weights)
        return logits.cpu().contiguous().numpy().data

    def copy_page(self, source: int, target: int) -> None:
        """See ops.Runner."""
        pages = self.pages.view(*self.pages.shape[:2], -1, PAGE, *self.pages.shape[3:])
        pages[:, :, target] = pages[:, :, source]

    def choose(self, logits: memoryview, choices: Sequence[Choice]) -> list[Chosen]:
        """See ops.Runner."""
        return _native.choose_rows(logits, self.model.config.vocab_size, choices)

    def load(self, weight: Matrix) -> torch.Tensor:
        """The weight on the device, a matrix as `[n_out, n_in]`."""
        if not isinstance(weight, Dense):
            from pronghorn.ops.reference import to_array

            return torch.from_numpy(to_array(weight)).float().to(self.device)
        flat = torch.empty(weight.data.nbytes, dtype=torch.uint8)
        flat.numpy().data[:] = weight.data.cast("B")
        values = flat.view(DTYPES[weight.dtype]).view(weight.shape).to(self.device)
        return values.T if weight.transposed else values


class TorchOps:
    """The operations of one batch (see ops.Ops); activations are float32 tensors `[tokens, width]`."""

    def __init__(self, runner: TorchRunner, batch: Batch) -> None:
        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).to(runner.device)

        self.runner = runner
        self.batch = batch
        self.token_ids, self.at = tensor(batch.token_ids), tensor(batch.positions)
        self.logits_rows = tensor(batch.logits_rows)
        table = tensor(batch.page_table).view(-1, max(batch.table_width, 1))
        self.slots = table[tensor(batch.sequence), self.at // PAGE] * PAGE + self.at % PAGE  # [tokens]
        # For each sequence: its rows of the batch, the positions that they may see, and where these are kept.
        self.sequences = []
        for index in sorted(set(batch.sequence)):
            rows = [row for row, sequence in enumerate(batch.sequence) if sequence == index]
            seen = torch.arange(max(batch.positions[row] for row in rows) + 1, device=runner.device)
            self.sequences.append((tensor(rows), seen, table[index, seen // PAGE] * PAGE + seen % PAGE))
        self.rotations: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}

    def embed(self, table: Any) -> torch.Tensor:
        return table[self.token_ids].float()

    def positions(self, x: torch.Tensor, table: Any) -> torch.Tensor:
        return x + table[self.at].float()

    def layer_norm(self, x: torch.Tensor, norm: Module, eps: float) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[1:], norm.weight, norm.get("bias"), eps)

    def rms_norm(self, x: torch.Tensor, norm: Module, eps: float) -> torch.Tensor:
        runs = x.reshape(len(x), -1, len(norm.weight))
        return functional.rms_norm(runs, runs.shape[2:], norm.weight, eps).reshape(x.shape)

    def linear(
        self,
        x: torch.Tensor,
        module: Module,
        activation: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if module.weight.dtype == torch.bfloat16:
            x = x.bfloat16().float()
        y = functional.linear(x, module.weight.float(), module.get("bias"))
        if activation is not None:
            y = activate(y, activation)
        return y if residual is None else y + residual

    def split(self, x: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return torch.split(x, list(widths), dim=1)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Attention) -> torch.Tensor:
        q, k, v = (x.reshape(len(x), -1, spec.head_dim) for x in (q, k, v))
        if spec.rope is not None:
            q, k = self.rotate(q, spec.rope), self.rotate(k, spec.rope)
        self.keep(0, spec.layer, k)
        self.keep(1, spec.layer, v)

        y = torch.empty_like(q)
        for rows, seen, slots in self.sequences:
            at = self.at[rows, None]  # [rows, 1]
            hidden = seen > at if spec.window is None else (seen > at) | (seen <= at - spec.window)
            heads = q[rows].view(len(rows), spec.n_kv_heads, -1, spec.head_dim)
            scores = torch.einsum("rkgd,skd->kgrs", heads, self.kept(0, spec.layer, slots)) * spec.scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=3)
            y[rows] = torch.einsum("kgrs,skd->rkgd", weights, self.kept(1, spec.layer, slots)).reshape(q[rows].shape)
        return y.view(len(y), -1)

    def keep(self, part: int, layer: int, x: torch.Tensor) -> None:
        """Writes keys (part 0) or values (1), `[tokens, kv heads, dim]`, where the batch's tokens have their place."""
        pages, scales = self.runner.pages[part, layer], self.runner.scales
        if scales is not None:
            largest = x.abs().amax(dim=2, keepdim=True)
            scales[part, layer][self.slots] = largest / 127
            x = torch.where(largest > 0, x * (127 / largest), 0).round()
        pages[self.slots] = x.to(pages.dtype)

    def kept(self, part: int, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """What these slots hold, as float32."""
        x, scales = self.runner.pages[part, layer][slots].float(), self.runner.scales
        return x if scales is None else x * scales[part, layer][slots]

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        return activate(gate, activation) * up

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def logits(self, x: torch.Tensor, module: Module) -> torch.Tensor:
        return self.linear(x[self.logits_rows], module)

    def rotate(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Turns the pairs of each head of `x [tokens, heads, head_dim]`."""
        if rope not in self.rotations:
            # In float64, and on the CPU, as not every device has it.
            positions = torch.tensor(self.batch.positions, dtype=torch.float64)[:, None, None]
            angles = positions * torch.tensor(rope.frequencies, dtype=torch.float64)
            turns = ((rope.magnitude * part).float().to(x.device) for part in (angles.cos(), angles.sin()))
            self.rotations[rope] = (next(turns), next(turns))
        cos, sin = self.rotations[rope]  # [tokens, 1, pairs]
        n = len(rope.frequencies)
        first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rope.interleaved else (slice(0, n), slice(n, 2 * n))
        y = x.clone()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """One of ops.ACTIVATIONS."""
    if name == "gelu":
        return functional.gelu(x)
    if name == "gelu_new":
        return functional.gelu(x, approximate="tanh")
    if name == "silu":
        return functional.silu(x)
    if name == "relu":
        return functional.relu(x)
    raise ValueError(f"unknown activation {name}")


if TYPE_CHECKING:
    from pronghorn.models import Model
    from pronghorn.ops import Ops

    _: type[Ops[torch.Tensor]] = TorchOps
