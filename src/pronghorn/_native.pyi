"""The compiled core. Private: ops.cpu, weights and engine.sampling are its callers.

A Buffer is anything contiguous with the buffer protocol (bytes, memoryview, array, NumPy); it is read in place.
"""

from collections.abc import Sequence

from typing_extensions import Buffer

from pronghorn.ops import Choice, Chosen

PAGE: int
"""Tokens in a page of the KV cache: ops.PAGE."""

def isa() -> str:
    """The instruction set in use: PRONGHORN_ISA, or the best. RuntimeError if the machine has not got it."""

def available_isas() -> list[str]:
    """The instruction sets that this machine can run, best first."""

class Pool:
    """Threads that run programs together."""

    def __init__(self, threads: int) -> None: ...
    @property
    def size(self) -> int: ...

def read_memory(data: Buffer, pool: Pool) -> int:
    """Reads all bytes, on all threads, as fast as the machine can -> their sum, which is of no further use."""

class KvCache:
    """Keys and values of all layers, in pages. `format` is f32 or bf16. Memory is taken when it is first touched."""

    def __init__(self, n_layers: int, n_pages: int, n_kv_heads: int, head_dim: int, format: str, /) -> None: ...
    def copy_page(self, source: int, target: int) -> None:
        """Makes a page equal to another, in all layers. IndexError for one that is not there."""

class View:
    """Columns of a program's buffer: what recorded operations take and give."""

    def columns(self, begin: int, end: int, /) -> View: ...

class Program:
    """A recorded model. Operations take weights by the numbers that `matrix` and `vector` gave, -1 for none.

    ValueError for what does not fit together.
    """

    def __init__(self, max_tokens: int, vocab_size: int) -> None: ...
    def matrix(
        self,
        data: Buffer,
        format: str,
        order: str,
        n_out: int,
        n_in: int,
        group: int = 0,
        symmetric: bool = False,
    ) -> int: ...
    def vector(self, data: Buffer, n: int) -> int: ...
    def embed(self, table: int, /) -> View: ...
    def positions(self, x: View, table: int, /) -> View: ...
    def layer_norm(self, x: View, weight: int, bias: int, eps: float, /) -> View: ...
    def rms_norm(self, x: View, weight: int, eps: float, /) -> View: ...
    def linear(self, x: View, matrix: int, bias: int, activation: str, residual: View | None) -> View: ...
    def gate(self, gate: View, up: View, activation: str, /) -> View: ...
    def add(self, x: View, y: View, /) -> View: ...
    def rope(self, frequencies: tuple[float, ...], interleaved: bool, magnitude: float, /) -> int: ...
    def attention(
        self,
        q: View,
        k: View,
        v: View,
        layer: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        rope: int,
    ) -> View: ...
    def logits(self, x: View, matrix: int, bias: int, /) -> None: ...
    def finish(self) -> None: ...
    def run(
        self,
        token_ids: Buffer,
        positions: Buffer,
        sequence: Buffer,
        page_table: Buffer,
        table_width: int,
        logits_rows: Buffer,
        cache: KvCache,
        pool: Pool,
    ) -> memoryview:
        """Executes a batch (see ops.Batch) without the interpreter lock -> float32 [len(logits_rows), vocab_size]."""

def packed_size(format: str, n_out: int, n_in: int, group: int, symmetric: bool) -> int:
    """Bytes of an int8 or int4 matrix."""

def pack(
    source: Buffer,
    dtype: str,
    n_out: int,
    n_in: int,
    transposed: bool,
    destination: Buffer,
    format: str,
    group: int,
    symmetric: bool,
    pool: Pool,
) -> None:
    """Converts a matrix of a file (any dtype, GGUF's blocks too) to f32, f16, bf16 (in its order), int8 or int4.

    ValueError where sizes do not fit, or for values that cannot be quantized.
    """

def checksum(data: Buffer) -> int:
    """64 bits; by this thread alone, unlike ReadAhead's."""

class ReadAhead:
    """Threads of its own read the bytes at once: their pages are mapped, and, where asked for, summed up."""

    def __init__(self, data: Buffer, sums: bool, threads: int) -> None: ...
    def finish(self) -> int:
        """The checksum, where sums were asked for; this thread takes its part of what is left. Lets go of the lock."""

def crc32c(data: Buffer) -> int:
    """CRC-32C, as TensorFlow's checkpoints have it (before its mask)."""

def gguf_skip_strings(buffer: Buffer, offset: int, count: int) -> int:
    """The position after `count` GGUF strings, or -1 if they go past the end."""

def gguf_strings(buffer: Buffer, offset: int, count: int) -> list[str]:
    """That many GGUF strings. ValueError if they go past the end, UnicodeDecodeError if one is not UTF-8."""

class Sampler:
    """The parameters of sampling, ready for use: see engine.sampling."""

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: int,
        logit_bias: Sequence[tuple[int, float]],
        withheld: Sequence[int],
        min_tokens: int,
    ) -> None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def plain(self) -> bool:
        """Whether a token needs its row of logits alone, and a mask: no history, no biases."""
    def choose(
        self,
        logits: Buffer,
        row: int,
        vocabulary: int,
        history: Buffer,
        n_prompt: int,
        allowed: Buffer | None = None,
    ) -> int:
        """`allowed`: a bit for each token, in words of 32, the lowest first; tokens past its end are not allowed."""

def choose_rows(logits: Buffer, vocabulary: int, wanted: Sequence[Choice], pool: Pool | None = None) -> list[Chosen]:
    """See ops.Runner.choose."""

def log_probabilities(
    logits: Buffer, row: int, vocabulary: int, chosen: int, n_top: int
) -> list[tuple[int, float]]: ...
def philox(c0: int, c1: int, c2: int, c3: int, key: int, /) -> tuple[int, int, int, int]:
    """Four words of the counter-based generator."""

def build_tokenizer(
    tokens: list[str | None],
    in_model: Buffer,
    merges: Buffer,
    bytes: Buffer,
    added: Buffer,
    classes: Buffer,
    rules: list[int],
    about: bytes,
) -> bytes:
    """The file of a MappedTokenizer; native/tokenizer.h says what its parts are. ValueError if they do not fit."""

def tokenizer_checksum(data: Buffer) -> int:
    """What a file's header should say; for tests, which forge files."""

class MappedTokenizer:
    """A tokenizer in a file's bytes, which are read in place. ValueError for what is not such a file, whole."""

    def __init__(self, data: Buffer) -> None: ...
    @property
    def about(self) -> bytes: ...
    def encode(self, text: str) -> list[int] | None:
        """Token ids; None where only the library knows them. TypeError for a lone surrogate. Lets go of the lock."""
    def token(self, token_id: int) -> str | None: ...
    def find(self, text: str) -> int | None: ...

def explain_bus_errors() -> None:
    """Has a mapped file's SIGBUS end the process with status 2, in one line on standard error that names the file."""
