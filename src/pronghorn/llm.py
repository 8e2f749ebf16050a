"""LLM: a model made ready, text in and text out."""

from __future__ import annotations

import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from pronghorn.engine.engine import Engine
from pronghorn.engine.sampling import SamplingParams, whole
from pronghorn.engine.scheduler import Request, token_array
from pronghorn.engine.speculate import ModelDraft, NgramDraft
from pronghorn.errors import NoTokenizer, ParameterError, PromptError, PronghornError
from pronghorn.generation import Chunk, Cost, Generation, Output, Stream
from pronghorn.models import Model, model_of
from pronghorn.ops import PAGE, Runner
from pronghorn.weights import Checkpoint, open_checkpoint
from pronghorn.weights.types import Dense, Matrix, Module, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pronghorn.engine.pages import PagePool
    from pronghorn.text.tokenizer import Tokenizer

DTYPES = ("auto", "f32", "f16", "bf16", "int8", "int4")
KV_SIZES = {"f32": 4, "bf16": 2}
DEVICES = "cpu, reference, or a device of PyTorch's, such as cuda or torch:cpu"
DRAFTS = "self-int4, self-int8, ngram, or another model"
STEP_TOKENS = 512  # prompt tokens that a step computes: also how long Ctrl-C may wait
SEQUENCES = 16  # of full context, that the KV cache has room for by default, if the memory does

Prompt = str | Sequence[int]


class LLM:
    """A model, ready to generate.

    `model`: a folder in Hugging Face's layout, a `.safetensors` or `.gguf` file, or a name from `pronghorn pull`; None
    is the default model. `dtype`: "auto" runs the file's own format; f32, bf16, int8 and int4 convert. `device`:
    "cpu"; "reference", slow and obvious; or a torch device, such as "cuda" or "torch:cpu". `threads`: None is as
    many as this process may use. `kv_dtype`: "auto" is f32 for f32 and f16 weights, and bf16 for others.
    `kv_memory`: bytes for keys and values; None is room for one sequence of full length, and for more in a part of
    the free memory; none of it is touched before it is used. `use_cache=False` computes all from the beginning for
    every token, and `prefix_cache=False` never reuses what another prompt has computed: neither changes a token.
    `draft` has tokens proposed, of which the model verifies several at once, and changes no token either: "ngram"
    looks up what followed before, "self-int4" and "self-int8" are the model's own quantized copy, all else names
    another model of the same vocabulary. How many are proposed follows from what it gains, which may be nothing.

    Generations may overlap, in one thread or in several: they share steps, and no token depends on the company.

    >>> from pronghorn import LLM, SamplingParams
    >>> llm = LLM(path)
    >>> out = llm.generate("Once upon a time", SamplingParams(max_tokens=8))
    >>> out.text
    ', there was a little girl'
    >>> out.finish_reason, len(out.token_ids)
    ('length', 8)
    >>> llm.close()
    """

    def __init__(
        self,
        model: str | Path | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        draft: str | Path | None = None,
        kv_dtype: str = "auto",
        kv_memory: int | None = None,
        *,
        use_cache: bool = True,
        prefix_cache: bool = True,
    ) -> None:
        started = time.perf_counter()
        self.dtype = dtype
        check_options(dtype, device, threads, draft, kv_dtype, kv_memory)
        if draft is not None and not use_cache:
            raise ParameterError(f"draft is {draft!r}: drafts need the cache, which use_cache=False does without")
        self._checkpoint = open_model(model)
        self.path = self._checkpoint.path
        source = self._checkpoint.tokenizer
        self._tokenizer = Later(lambda: load_tokenizer(source))
        self.model, tensors = model_of(self._checkpoint)

        from pronghorn.weights.quantize import prepare

        threads = None if threads is None else int(threads)
        weights = prepare(self._checkpoint, self.model.parameters(), tensors, dtype, threads)
        config = self.model.config
        if kv_dtype == "auto":
            wide = all(isinstance(w, Dense) and w.dtype != "bf16" for w in weights.values())
            kv_dtype = "f32" if wide else "bf16"
        self.kv_dtype = kv_dtype
        sequences = SEQUENCES if device == "cpu" else 1
        token_bytes = kv_bytes(self.model, kv_dtype)
        ahead = None if draft in (None, "ngram") else DraftModel(str(draft), self, tensors, device, threads)
        all_bytes = token_bytes + (ahead.token_bytes(kv_dtype) if ahead else 0)
        n_pages = pages_for(all_bytes, config.context, sequences, kv_memory)
        try:
            runner = runner_for(self.model, Module.of(weights), device, threads, n_pages, kv_dtype)
            if ahead:
                ahead.start(runner, n_pages, kv_dtype)
        except MemoryError:
            n_tokens = n_pages * PAGE
            raise PronghornError(
                f"the memory has no room for {n_tokens * all_bytes} bytes of keys and values ({n_tokens} tokens): "
                "choose a smaller kv_memory"
            ) from None
        except RuntimeError as error:  # the environment asks for what the machine has not: PRONGHORN_ISA, a device
            raise PronghornError(str(error).partition("\n")[0]) from None
        self._engine: Engine | None = Engine(
            runner,
            n_pages=n_pages,
            context=config.context,
            vocabulary=config.vocab_size,
            max_tokens=STEP_TOKENS,
            prefix_cache=prefix_cache,
            use_cache=use_cache,
        )
        if draft == "ngram":
            self._engine.speculate(NgramDraft())
        if ahead:
            cost = ahead.weight_bytes / bytes_read(self.model, weights)
            self._engine.speculate(ahead.draft(self._engine.pool, cost))
        self.context = self._engine.context
        self._lock = threading.Lock()
        self._ended: list[Request] = []  # that are no longer wanted, and may hold pages yet
        self._pid = os.getpid()
        self._cost = Cost(time.perf_counter() - started, bytes_read(self.model, weights), token_bytes)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises CheckpointError where the model's files have none, or a damaged one."""
        return self._tokenizer.get()

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None
    ) -> Output: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Output | list[Output]:
        """Goes on from a prompt (text, or token ids as they are), or from each of a list, all at once.

        An empty text goes on from the beginning-of-sequence token alone. Raises PromptError for a prompt that cannot
        be run, before anything runs.
        """
        one = is_prompt(prompts)
        listed = cast("Sequence[Prompt]", [prompts] if one else prompts)
        many = params if isinstance(params, Sequence) else [params] * len(listed)
        if len(many) != len(listed):
            raise ParameterError(f"there are {len(listed)} prompts, but {len(many)} params")
        engine = self._ready()
        generations = [self._generation(prompt, p) for prompt, p in zip(listed, many, strict=True)]
        try:
            with self._lock:
                for generation in generations:
                    engine.add(generation.request)
            pending = generations
            while pending:
                self._step()
                for generation in pending:
                    generation.advance()
                pending = [generation for generation in pending if not generation.finish_reason]
        finally:
            self._cancel(*(generation.request for generation in generations))
        outputs = [generation.output() for generation in generations]
        return outputs[0] if one else outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """The same as `generate`, in chunks as they come: their texts and ids joined are its text and ids.

        >>> llm = LLM(path)
        >>> "".join(chunk.text for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=8)))
        ', there was a little girl'
        """
        generation = self._generation(prompt, params)
        return Stream(generation, self._chunks(generation))

    def _chunks(self, generation: Generation) -> Generator[Chunk, None, None]:
        try:
            with self._lock:
                self._ready().add(generation.request)
            while not generation.finish_reason:
                self._step()
                if chunk := generation.advance():
                    yield chunk
        finally:
            self._cancel(generation.request)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each token, float32 [tokens, vocabulary]."""
        import numpy as np

        engine, ids = self._ready(), token_array(token_ids)
        result = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        start = 0
        with self._lock:
            for rows in engine.logits(ids):
                chunk = np.frombuffer(rows, np.float32).reshape(-1, result.shape[1])
                result[start : start + len(chunk)] = chunk
                start += len(chunk)
        return result

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation, `[{"role": "user", "content": "..."}, ...]`, in the model's template.

        They end where the assistant's turn begins, ready to be generated. The template writes BOS and the like.
        """
        from pronghorn.text.chat import encode_chat

        return encode_chat(self.tokenizer, messages)

    def info(self) -> dict[str, Any]:
        """What the model is and the memory that it needs: see `describe`."""
        return describe(self._checkpoint, self.dtype)

    def close(self) -> None:
        """Ends what runs, and lets go of weights and memory. `with LLM(...) as llm:` does it at the end."""
        with self._lock:
            if self._engine:
                self._ended += [*self._engine.scheduler.running, *self._engine.scheduler.waiting]
                self._reap()
            self._engine = None  # and with it the runner, the KV cache and the weights

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self) -> Engine:
        if self._engine is None:
            raise PronghornError("this LLM is closed")
        if os.getpid() != self._pid:  # native threads do not follow a fork
            raise PronghornError("this LLM was loaded before the process forked: load it in the child")
        return self._engine

    def _step(self) -> None:
        with self._lock:
            self._reap()
            self._ready().step()

    def _cancel(self, *requests: Request) -> None:
        """Ends requests: now, or where a step is running, after it.

        It never waits for the lock: an abandoned stream may be collected, and closed, amid a step of this thread.
        """
        self._ended += requests
        if self._lock.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._lock.release()

    def _reap(self) -> None:
        while self._ended:
            request = self._ended.pop()
            if self._engine:
                self._engine.finish(request, "cancelled")

    def _generation(self, prompt: Prompt, params: SamplingParams | None) -> Generation:
        """A prompt on its way, checked."""
        started = time.perf_counter()
        engine, checkpoint = self._ready(), self._checkpoint
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ParameterError(f"params is {params!r}: expected SamplingParams")
        tokenizer: Tokenizer | None = None
        try:
            tokenizer = self.tokenizer
            bos_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            eos_ids: Sequence[int] = tokenizer.eos_ids
        except NoTokenizer:
            if isinstance(prompt, str) or params.stop:  # ids in, ids out does without
                raise
            from pronghorn.text.tokenizer import token_ids

            bos_ids, eos_ids = (token_ids(checkpoint.path, checkpoint.config, name) for name in ("bos", "eos"))
        ids = token_array(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids and not bos_ids:
            raise PromptError("the prompt is empty, and the model has no beginning-of-sequence token to start from")
        request = Request(ids or bos_ids[:1], params, eos_ids)
        engine.check(request)
        decoder = tokenizer.stream() if tokenizer else None
        return Generation(request, decoder, self._cost, self._cancel, started)


class DraftModel:
    """The model that runs ahead: the LLM's own in fewer bits, or another of the same vocabulary.

    The own one works on the LLM's keys and values, where both are native programs; else it has its own.
    """

    def __init__(self, name: str, llm: LLM, tensors: Mapping[str, Tensor], device: str, threads: int | None) -> None:
        from pronghorn.weights.quantize import prepare

        own = name in ("self-int4", "self-int8")
        checkpoint = llm._checkpoint if own else open_model(name)
        self.device, self.threads = device, threads
        self.shared = own and device == "cpu"
        if own:
            self.model = llm.model
        else:
            self.model, tensors = model_of(checkpoint)
            check_vocabulary(name, checkpoint, self.model, llm)
        dtype, heads = name if own else "auto", (self.model.EMBEDDING, "lm_head.weight")
        self.weights = prepare(checkpoint, self.model.parameters(), tensors, dtype, threads, heads)
        self.weight_bytes = bytes_read(self.model, self.weights)

    def token_bytes(self, kv_dtype: str) -> int:
        """Bytes of keys and values of its own for a token."""
        return 0 if self.shared else kv_bytes(self.model, kv_dtype)

    def start(self, target: Runner, n_pages: int, kv_dtype: str) -> None:
        """Makes it ready, beside the runner that it drafts for."""
        weights = Module.of(self.weights)
        if self.device == "cpu":
            from pronghorn.ops.cpu import CpuRunner

            assert isinstance(target, CpuRunner)
            cache = target.cache if self.shared else None
            self.runner: Runner = CpuRunner(
                self.model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS, pool=target.pool,
                cache=cache,
            )  # fmt: skip
        else:
            self.runner = runner_for(self.model, weights, self.device, self.threads, n_pages, kv_dtype)

    def draft(self, pages: PagePool, cost: float) -> ModelDraft:
        """What the engine speculates with; `cost` is that of a token against the LLM's."""
        config = self.model.config
        return ModelDraft(
            self.runner, pages, shared=self.shared, context=config.context, vocabulary=config.vocab_size,
            max_tokens=STEP_TOKENS, cost=cost,
        )  # fmt: skip


def check_vocabulary(name: str, checkpoint: Checkpoint, model: Model, llm: LLM) -> None:
    """ParameterError for a draft whose token ids are not the LLM's."""
    sizes = model.config.vocab_size, llm.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ParameterError(f"draft is {name!r}: its vocabulary has {sizes[0]} tokens, and the model's {sizes[1]}")
    try:
        ours, its = llm.tokenizer, load_tokenizer(checkpoint.tokenizer)
    except NoTokenizer:  # ids in, ids out
        return
    for index in range(max(ours.vocab_size, its.vocab_size)):
        tokens = [t.id_to_token(index) if index < t.vocab_size else None for t in (its, ours)]
        if tokens[0] != tokens[1]:
            raise ParameterError(
                f"draft is {name!r}: its token {index} is {tokens[0]!r}, and the model's {tokens[1]!r}"
            )


T = TypeVar("T")


class Later(Generic[T]):
    """A value that a thread of its own makes; whoever needs it first waits for it, or gets its error."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no more threads: then it is made at once
            self._run()

    def _run(self) -> None:
        try:
            self._value = self._make()
        except BaseException as error:
            self._error = error

    def get(self) -> T:
        """The value."""
        if self._thread.ident:
            self._thread.join()
        if self._error:
            raise self._error
        return self._value


def is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, and not a list of them (which an empty list is)."""
    if isinstance(prompts, (str, bytes, bytearray)):
        return True
    if isinstance(prompts, Mapping) or not all(hasattr(prompts, name) for name in ("__len__", "__getitem__")):
        kind = type(prompts).__name__
        raise PromptError(f"the prompt is of type {kind}: expected a text, a list of token ids, or a list of these")
    return len(prompts) > 0 and not hasattr(prompts[0], "__len__")


def check_options(
    dtype: str,
    device: str = "cpu",
    threads: int | None = None,
    draft: str | Path | None = None,
    kv_dtype: str = "auto",
    kv_memory: int | None = None,
) -> None:
    """Raises ParameterError for what no model can make good."""
    if dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if kv_dtype not in ("auto", *KV_SIZES):
        raise ParameterError(f"kv_dtype is {kv_dtype!r}: expected one of auto, {', '.join(KV_SIZES)}")
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


def runner_for(model: Model, weights: Module, device: str, threads: int | None, n_pages: int, kv_dtype: str) -> Runner:
    """The model made ready on a device."""
    if device == "cpu":
        from pronghorn.ops.cpu import CpuRunner

        return CpuRunner(model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS, threads=threads)
    if device == "reference":
        from pronghorn.ops.reference import ReferenceRunner

        return ReferenceRunner(model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS)
    name = device.removeprefix("torch:")
    try:
        from pronghorn.ops.gpu import TorchRunner

        return TorchRunner(model, weights, n_pages=n_pages, kv_dtype=kv_dtype, max_tokens=STEP_TOKENS, device=name)
    except PronghornError as error:  # PyTorch is not there, or has no such device
        raise ParameterError(f"device is {device!r}: expected {DEVICES} ({error})") from None


def pages_for(token_bytes: int, context: int, sequences: int, kv_memory: int | None) -> int:
    """Pages of KV cache: what `kv_memory` holds; or else a full context's, however little memory there is.

    `sequences` full contexts have room where they need no more than a quarter of the free memory.
    """
    page_bytes, full = token_bytes * PAGE, -(-context // PAGE)
    if kv_memory is None:
        return max(full, min(free_memory() // 4 // page_bytes, sequences * full))
    kv_memory = int(kv_memory)
    if kv_memory > physical_memory():
        raise ParameterError(f"kv_memory is {kv_memory}: this machine has {physical_memory()} bytes")
    if kv_memory < page_bytes:
        raise ParameterError(f"kv_memory is {kv_memory}: {PAGE} tokens alone need {page_bytes} bytes")
    return kv_memory // page_bytes


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where one sets a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free: float = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = physical_memory() // 2
    try:
        name = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = Path("/sys/fs/cgroup" + name.rstrip())
        free = min(free, *(room_of(folder) for folder in [group, *group.parents]))
    except (OSError, StopIteration):
        pass  # no such groups here
    room = resource.getrlimit(resource.RLIMIT_AS)[0]
    if room != resource.RLIM_INFINITY and (statm := Path("/proc/self/statm")).exists():
        free = min(free, room - int(statm.read_text().split()[0]) * resource.getpagesize())
    return max(int(free), 0)


def room_of(group: Path) -> float:
    """Bytes that a control group (v2) may still take: what it holds of files can be read again, and counts as free."""
    try:
        limit, held = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        lines = map(str.split, (group / "memory.stat").read_text().splitlines())
        files = sum(int(size) for name, size in lines if name in ("active_file", "inactive_file"))
        return int(limit) - int(held) + files
    except (OSError, ValueError):  # the root has no limit, nor has "max"
        return math.inf


def kv_bytes(model: Model, kv_dtype: str) -> int:
    """Bytes of a token's keys and values."""
    config = model.config
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * KV_SIZES[kv_dtype]


def bytes_read(model: Model, weights: Mapping[str, Matrix]) -> int:
    """Bytes of weights that decoding a token reads."""
    kinds = {name: parameter.kind for name, parameter in model.parameters().items()}
    looked_up = set() if model.config.tied else {model.EMBEDDING}
    return sum(
        weight.data.nbytes for name, weight in weights.items() if kinds[name] != "table" and name not in looked_up
    )


def describe(checkpoint: Checkpoint, dtype: str = "auto") -> dict[str, Any]:
    """What `pronghorn info` shows: the configuration, what becomes of the weights, and the memory of each context."""
    from pronghorn.weights import quantize

    check_options(dtype)
    model, tensors = model_of(checkpoint)
    parameters, config = model.parameters(), model.config
    groups: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
    for name, (*form, size) in quantize.describe(parameters, tensors, dtype).items():
        own, target, how = form
        groups.setdefault((own, target, how), []).append((tensors[name].data.nbytes, size))
    weight_bytes = sum(size for sizes in groups.values() for _, size in sizes)
    token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    lengths = [n for n in (2**i for i in range(7, 30)) if n < config.context] + [config.context]
    kv_bytes = {dtype: {str(n): n * token_bytes * size for n in lengths} for dtype, size in KV_SIZES.items()}
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
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "total_bytes": {
            dtype: {length: weight_bytes + size for length, size in row.items()} for dtype, row in kv_bytes.items()
        },
    }
