"""The operations that models are made of: one protocol, three houses.

- `reference`: NumPy, float64, eager and obvious; every fast path is tested against it.
- `cpu`: records a `Program` for the native runner.
- `gpu`: PyTorch.

A model function calls these and nothing else. `X` is an activation of shape `[tokens, width]`, float32 unless
said otherwise; the batch that it belongs to is known to the operations, not to the model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeVar

from pronghorn.weights.types import Matrix, Module

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from pronghorn import _native

PAGE = 32
"""Tokens in a page of the KV cache. Attention's sums are formed page by page: it is part of the numerics."""

KV_DTYPES = ("f32", "bf16", "int8")
"""How keys and values may be kept. int8: whole numbers within 127, with an f32 scale for each token and head."""

ACTIVATIONS = ("gelu", "gelu_new", "silu", "relu")
"""gelu: x/2 (1 + erf(x/sqrt 2)). gelu_new: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). silu: x sigmoid(x)."""


class Rope(NamedTuple):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Pair i of a head turns by position * frequencies[i], and is multiplied by `magnitude` (YaRN's factor).
    Pairs are (i, i + n/2), as Hugging Face stores them, or (2i, 2i + 1) where `interleaved`. Dimensions past
    2 * len(frequencies) pass unchanged.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False
    magnitude: float = 1.0


class Attention(NamedTuple):
    """One layer's attention: scores are scale * (q . k), softmax over the keys that a query may see.

    Query head h reads key head h // (n_heads / n_kv_heads). A query at position p sees keys 0..p, or with a
    `window` the last `window` of these (its own included).
    """

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None


X = TypeVar("X")


class Ops(Protocol[X]):
    """What a model may do. Weights are `Dense`, `Int8` or `Int4`; modules hold `.weight` and maybe `.bias`."""

    def embed(self, table: Matrix) -> X:
        """Rows of `table [vocabulary, embd]` for the batch's token ids -> [tokens, embd]."""

    def positions(self, x: X, table: Matrix) -> X:
        """Gives x + table[position] for learned positions -> [tokens, embd]."""

    def layer_norm(self, x: X, norm: Module, eps: float) -> X:
        """(x - mean) / sqrt(var + eps) * norm.weight + norm.bias (bias optional)."""

    def rms_norm(self, x: X, norm: Module, eps: float) -> X:
        """Gives x / sqrt(mean(x^2) + eps) * norm.weight, over each run of len(weight) values of a row.

        A weight as long as the row is the usual norm; one of head_dim is Qwen3's norm of every head.
        """

    def linear(self, x: X, module: Module, activation: str | None = None, residual: X | None = None) -> X:
        """activation(x @ weight.T + bias) + residual -> [tokens, n_out]."""

    def split(self, x: X, widths: Sequence[int]) -> tuple[X, ...]:
        """Views of consecutive columns."""

    def attention(self, q: X, k: X, v: X, spec: Attention) -> X:
        """Rotates q and k if asked, writes k and v into the pages, attends -> [tokens, n_heads * head_dim].

        q is [tokens, n_heads * head_dim]; k and v are [tokens, n_kv_heads * head_dim].
        """

    def gate(self, gate: X, up: X, activation: str) -> X:
        """activation(gate) * up."""

    def add(self, x: X, y: X) -> X:
        """X + y."""

    def logits(self, x: X, module: Module) -> X:
        """Gives x[batch.logits_rows] @ weight.T + bias -> [len(logits_rows), vocabulary], float32."""


class Batch:
    """What one step computes, flat: prompt chunks and decoding tokens of many sequences side by side.

    All are arrays of 32-bit integers (`array("i")`), so that native code reads them without a copy; N tokens of R
    sequences, L rows of logits.
    """

    __slots__ = ("logits_here", "logits_rows", "page_table", "positions", "sequence", "table_width", "token_ids")

    def __init__(
        self,
        token_ids: array[int] | None = None,  # [N]
        positions: array[int] | None = None,  # [N] absolute, from 0
        sequence: array[int] | None = None,  # [N] row of the page table
        page_table: array[int] | None = None,  # [R, table_width] flat
        table_width: int = 0,  # pages that a sequence may have
        logits_rows: array[int] | None = None,  # [L] indices into N, ascending
        logits_here: bool = True,  # whether `run` has to give the logits: else `choose` alone reads them
    ) -> None:
        self.token_ids = array("i") if token_ids is None else token_ids
        self.positions = array("i") if positions is None else positions
        self.sequence = array("i") if sequence is None else sequence
        self.page_table = array("i") if page_table is None else page_table
        self.table_width = table_width
        self.logits_rows = array("i") if logits_rows is None else logits_rows
        self.logits_here = logits_here


class Choice(NamedTuple):
    """A token to choose from a row of logits."""

    sampler: _native.Sampler
    row: int
    history: array[int]  # prompt and output so far
    n_prompt: int
    allowed: Buffer | None = None  # a bit for each token, in words of 32, the lowest first
    n_top: int | None = None  # likeliest tokens that are wanted beside the chosen one; None: no probabilities at all


Chosen: TypeAlias = "tuple[int, list[tuple[int, float]]] | str"
"""The token and the logarithms of the probabilities of itself and of the likeliest ones; or why there is none."""


class Runner(Protocol):
    """A model made ready on one device: weights in place, a KV cache of `n_pages` pages."""

    def run(self, batch: Batch) -> memoryview:
        """Executes the batch -> logits, float32 `[len(logits_rows), vocabulary]`, valid until the next run.

        Without `batch.logits_here` it may return before it is done, and give none.
        """

    def copy_page(self, source: int, target: int) -> None:
        """Makes a page of the KV cache equal to another, in all layers."""

    def choose(self, logits: memoryview, choices: Sequence[Choice]) -> list[Chosen]:
        """Chooses tokens from what `run` gave."""
