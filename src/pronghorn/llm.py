"""LLM: a model made ready, text in and text out."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, overload

from pronghorn.engine.engine import Engine, NoPages, Stats
from pronghorn.engine.sampling import FORMS, SamplingParams, number, whole
from pronghorn.engine.scheduler import Request, token_array
from pronghorn.errors import NoTokenizer, ParameterError, PromptError, PronghornError
from pronghorn.generation import Chunk, Cost, Generation, Interrupted, Job, Output, Stream
from pronghorn.loading import (
    SEQUENCES,
    STEP_TOKENS,
    bytes_read,
    check_options,
    describe,
    kv_bytes,
    kv_dtype_for,
    load_tokenizer,
    memory_of,
    open_model,
    own_rank,
    pages_for,
    runner_beside,
    runner_for,
    weights_for,
)
from pronghorn.models import Model, model_of
from pronghorn.ops import PAGE, Runner
from pronghorn.weights import Checkpoint, ahead
from pronghorn.weights.types import Dense, Module, Parameter, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pronghorn.engine.grammar import Vocabulary
    from pronghorn.engine.pages import PagePool
    from pronghorn.engine.speculate import ModelDraft
    from pronghorn.text.tokenizer import Tokenizer

IN_FLIGHT = 128  # samples of a list of prompts that the engine has before it at once

Prompt = str | Sequence[int]


class LLM:
    """A model, ready to generate.

    `model`: a folder in Hugging Face's layout, a `.safetensors` or `.gguf` file, or a name from `pronghorn pull`; None
    is the default model. `dtype`: "auto" runs the file's own format; f32, bf16, int8 and int4 convert. `device`:
    "cpu"; "reference", slow and obvious; or a torch device, such as "cuda" or "torch:cpu". `threads`: None is as
    many as this process may use. `kv_dtype`: "auto" is f32 for f32 and f16 weights, and bf16 for others;
    int8 takes half of bf16's memory.
    `kv_memory`: bytes for keys and values; None is room for one sequence of full length, and for more in a part of
    the free memory; none of it is touched before it is used. `use_cache=False` computes all from the beginning for
    every token, and `prefix_cache=False` never reuses what another prompt has computed: neither changes a token.
    `draft` has tokens proposed, of which the model verifies several at once, and changes no token either: "ngram"
    looks up what followed before, "self-int4" and "self-int8" are the model's own quantized copy, all else names
    another model of the same vocabulary. How many are proposed follows from what it gains, which may be nothing.
    `tensor_parallel`: ranks among which the model is divided, on so many GPUs of this machine (or, "torch:cpu",
    processes); under torchrun, those that it has started, of which all but the first end where they load the model.

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
        tensor_parallel: int = 1,
    ) -> None:
        started = time.perf_counter()
        self.dtype, self.device = dtype, device
        check_options(dtype, device, threads, draft, kv_dtype, kv_memory, tensor_parallel)
        if draft is not None and not use_cache:
            raise ParameterError(f"draft is {draft!r}: drafts need the cache, which use_cache=False does without")
        self._checkpoint = open_model(model)
        self.path = self._checkpoint.path
        self._tokenizer: Tokenizer | PronghornError
        try:
            self._tokenizer = load_tokenizer(self._checkpoint.tokenizer)
        except PronghornError as error:  # for whoever asks: without a tokenizer, ids in, ids out goes on
            self._tokenizer = error
        self.model, tensors = model_of(self._checkpoint)

        threads = None if threads is None else int(threads)
        ranked, parameters, self._group = self.model, self.model.parameters(), None
        part = 0, 1  # of the model, that this process has
        if tensor_parallel > 1:
            from pronghorn import parallel

            part = own_rank(tensor_parallel), tensor_parallel
            ranked = parallel.local_model(self.model, tensor_parallel)
            parameters, tensors = parallel.divided(parameters, tensors, *part)
        runs_ahead = None
        if draft not in (None, "ngram"):
            runs_ahead = DraftModel(str(draft), self, (ranked, parameters, tensors), part, device, threads)
        if tensor_parallel > 1:  # what cannot be divided has been said before there are others
            arguments: dict[str, Any] = {
                "model": str(self.path),
                "dtype": dtype,
                "device": device,
                "kv_dtype": kv_dtype,
                "draft": None if draft is None else str(draft),
            }
            arguments |= {"kv_memory": kv_memory, "use_cache": use_cache, "tensor_parallel": tensor_parallel}
            self._group = parallel.Group(tensor_parallel, device, arguments)
        weights = weights_for(device, self._checkpoint, parameters, tensors, dtype, threads, keep=self._group is None)
        config = ranked.config
        if kv_dtype == "auto":
            kv_dtype = kv_dtype_for(weights)
        self.kv_dtype = kv_dtype
        # All ranks must have as many pages, and the slow devices have no streams to serve.
        sequences = SEQUENCES if device == "cpu" or (device.startswith("cuda") and not self._group) else 1
        token_bytes = kv_bytes(config, kv_dtype)
        all_bytes = token_bytes + (runs_ahead.token_bytes(kv_dtype) if runs_ahead else 0)
        memory = memory_of(device, weights)
        n_pages = pages_for(all_bytes, config.context, sequences, kv_memory, memory)
        try:
            more = {"group": self._group, "waits": draft is not None, "ahead": draft is None}
            runner = runner_for(ranked, Module.of(weights), device, threads, n_pages, kv_dtype, **more)
            if runs_ahead:
                runs_ahead.start(runner, n_pages, kv_dtype)
        except MemoryError:
            n_tokens = n_pages * PAGE
            raise PronghornError(
                f"the memory has no room for {n_tokens * all_bytes} bytes of keys and values ({n_tokens} tokens): "
                "choose a smaller kv_memory"
            ) from None
        except RuntimeError as error:  # the environment asks for what the machine has not: PRONGHORN_ISA, a device
            raise PronghornError(str(error).partition("\n")[0]) from None
        if self._group and self._group.rank:
            self._group.follow()
            sys.exit(0)
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
            from pronghorn.engine.speculate import NgramDraft

            self._engine.speculate(NgramDraft())
        if runs_ahead:
            cost = runs_ahead.weight_bytes / bytes_read(self.model, weights)
            self._engine.speculate(runs_ahead.draft(self._engine.pool, cost))
        self.context = self._engine.context
        self._weights = weights
        self._headless: Runner | None = None  # whose logits are hidden states
        self._n_reading = 0  # threads in the middle of `logits` or `hidden`
        self._lock = threading.Lock()
        self._came: list[Request] = []  # that the engine has not been given yet
        self._ended: list[Request] = []  # that are no longer wanted, and may hold pages yet
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._driver: Driver | None = None  # who takes the steps, if not those who wait for them
        self._pid = os.getpid()
        ahead.end()
        self._cost = Cost(time.perf_counter() - started, bytes_read(self.model, weights), token_bytes)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises CheckpointError where the model's files have none, or a damaged one."""
        if isinstance(self._tokenizer, PronghornError):
            raise self._tokenizer
        return self._tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[Output]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Output | list[Output]:
        """Goes on from a prompt (text, or token ids as they are), or from each of a list, all at once.

        An empty text goes on from the beginning-of-sequence token alone. Raises PromptError for a prompt that cannot
        be run, before anything runs. Where others run too, the lowest `priority` goes first. `timeout`: seconds from
        now, after which no step is begun for it: it ends with what there is, and the finish_reason "timeout". Ctrl-C
        raises Interrupted, a KeyboardInterrupt whose `outputs` are what there was by then.
        """
        one = is_prompt(prompts)
        listed = cast("Sequence[Prompt]", [prompts] if one else prompts)
        many = params if isinstance(params, Sequence) else [params] * len(listed)
        if len(many) != len(listed):
            raise ParameterError(f"there are {len(listed)} prompts, but {len(many)} params")
        jobs = [self.job(prompt, p, priority, timeout) for prompt, p in zip(listed, many, strict=True)]
        try:
            for _, result in self.run(enumerate(jobs)):
                if isinstance(result, PronghornError):
                    raise result
        except KeyboardInterrupt:
            for job in jobs:
                job.end()
            raise Interrupted([job.output() for job in jobs]) from None
        outputs = [job.output() for job in jobs]
        return outputs[0] if one else outputs

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Stream:
        """The same as `generate`, in chunks as they come: their texts and ids joined are its text and ids.

        >>> llm = LLM(path)
        >>> "".join(chunk.text for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=8)))
        ', there was a little girl'
        """
        job = as_stream(self.job(prompt, params, priority, timeout))
        return Stream(job, self._chunks(job))

    def _chunks(self, job: Job) -> Generator[Chunk, None, None]:
        try:
            self._ready()
            self.submit(job)
            while not job.finished:
                self._step()
                yield from job.advance()
        finally:
            self.cancel(job)

    def run(
        self, jobs: Iterable[tuple[Key, Job | PronghornError]]
    ) -> Generator[tuple[Key, Output | PronghornError], None, None]:
        """Runs jobs (see `job`) that are asked for as they can be used -> each by its key, as they end.

        An error is given on in its place: that of making the job, or that of running it.
        """
        source, pending, n_samples = iter(jobs), list[tuple[Key, Job]](), 0
        try:
            while True:
                while n_samples < IN_FLIGHT and (entry := next(source, None)):
                    key, job = entry
                    if isinstance(job, PronghornError):
                        yield key, job
                        continue
                    self._ready()
                    pending.append((key, job))
                    n_samples += len(job.generations)
                    self.submit(job)
                if not pending:
                    return
                self._step()
                for entry in list(pending):
                    key, job = entry
                    result: Output | PronghornError | None = None
                    try:
                        job.advance()
                        result = job.output() if job.finished else None
                    except PronghornError as error:
                        self._ready()  # closed: all of them end
                        result = error
                    if result is not None:
                        self.cancel(job)  # of an error, the other samples
                        pending.remove(entry)
                        n_samples -= len(job.generations)
                        yield key, result
        finally:
            for _, job in pending:
                self.cancel(job)

    def stats(self) -> Stats:
        """What runs, what waits, and what has been done so far."""
        return self._ready().stats()

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each token, float32 [tokens, vocabulary]."""
        return self._rows(token_ids, self.model.config.vocab_size, lambda engine: engine.runner)

    def hidden(self, token_ids: Sequence[int], stop: threading.Event | None = None) -> NDArray[np.float32]:
        """What the head would read after each token (the last norm's output), float32 [tokens, embd].

        Once `stop` is set, from another thread, it ends with a PronghornError.
        """
        if self._group:
            raise ParameterError("tensor_parallel: hidden states are not available from several ranks")
        return self._rows(token_ids, self.model.config.embd, self._without_head, stop)

    def _rows(
        self,
        token_ids: Sequence[int],
        width: int,
        runner_of: Callable[[Engine], Runner],
        stop: threading.Event | None = None,
    ) -> NDArray[np.float32]:
        """A runner's rows, float32 [tokens, width], in chunks, between which others may have their steps."""
        import numpy as np

        ids = token_array(token_ids)
        result = np.empty((len(ids), width), np.float32)
        with self._lock:
            engine = self._ready()
            chunks = engine.logits(ids, runner_of(engine))
            self._n_reading += 1
        start = 0
        try:
            while start < len(ids):
                if stop and stop.is_set():
                    raise PronghornError("it was stopped")
                with self._lock:
                    self._ready()
                    chunk = np.frombuffer(next(chunks), np.float32).reshape(-1, width)
                    result[start : start + len(chunk)] = chunk
                    start += len(chunk)
        finally:
            with self._lock:
                self._n_reading -= 1
                chunks.close()
        return result

    def _without_head(self, engine: Engine) -> Runner:
        """The model with the identity for its head, on the same keys and values if it is a native program."""
        if self._headless is None:
            import copy

            import numpy as np

            model = copy.copy(self.model)
            model.config = config = copy.copy(model.config)
            config.tied, config.vocab_size = False, config.embd
            identity = memoryview(np.eye(config.embd, dtype=np.float32).tobytes())
            weights = {name: w for name, w in self._weights.items() if not name.startswith("lm_head.")}
            weights["lm_head.weight"] = Dense(identity, "f32", (config.embd, config.embd))
            self._headless = runner_beside(
                engine.runner, model, Module.of(weights), self.device, None, engine.pool.n_pages, self.kv_dtype
            )
        return self._headless

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """The token ids of a conversation, `[{"role": "user", "content": "..."}, ...]`, in the model's template.

        They end where the assistant's turn begins, ready to be generated. The template writes BOS and the like.
        `tools` are JSON schemas of functions, `options` the template's own variables.
        """
        from pronghorn.text.chat import encode_chat

        return encode_chat(self.tokenizer, messages, tools=tools, **options)

    def info(self) -> dict[str, Any]:
        """What the model is and the memory that it needs: see `describe`."""
        return describe(self._checkpoint, self.dtype)

    def close(self) -> None:
        """Ends what runs, and lets go of weights and memory. `with LLM(...) as llm:` does it at the end."""
        if self._driver:
            self._driver.close()
        with self._lock:
            if self._engine:
                self._ended += [*self._engine.scheduler.running, *self._engine.scheduler.waiting, *self._came]
                self._settle()
            if self._engine and self._group:
                self._group.close()
            self._headless, self._weights = None, {}
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
        """A step, by this thread or by the driver's."""
        self._ready()
        driver = self._driver
        if driver:
            driver.wait_round()
        else:
            self.take_step()

    def take_step(self) -> list[Request]:
        """A step, by this thread -> the requests that have something new, or have ended."""
        with self._lock:
            self._settle()
            try:
                return self._ready().step()
            except NoPages:
                if not self._n_reading:  # who ends soon
                    raise
        time.sleep(0.001)  # without the lock, which the reader wants
        return []

    def drive(self, driver: Driver) -> bool:
        """Leaves the steps to a driver from now on; False if there is one."""
        with self._lock:
            self._ready()
            free = self._driver is None
            self._driver = self._driver or driver
            return free

    def undrive(self) -> None:
        """Takes the steps back."""
        self._driver = None

    def fail(self, error: Exception) -> list[Request]:
        """Ends what an error has hit: what was running, or else what could not begin -> these requests."""
        with self._lock:
            engine = self._engine
            if engine is None:
                return []
            hit = list(engine.scheduler.running or engine.scheduler.waiting)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            for request in hit:
                request.error = error if isinstance(error, PronghornError) else PronghornError(text)
                engine.finish(request, "error")
            return hit

    def n_unfinished(self) -> int:
        """Samples that run or wait."""
        engine = self._engine
        if engine is None:
            return 0
        return len(engine.scheduler.running) + len(engine.scheduler.waiting) + len(self._came)

    def n_cancelled(self) -> int:
        """Samples among the unfinished that nobody wants any more, and that end with the step that is running."""
        return sum(request.finish_reason is None for request in {*self._ended})

    @property
    def max_sequences(self) -> int:
        """Samples that run at once; others wait."""
        return self._ready().scheduler.max_sequences

    def submit(self, job: Job) -> None:
        """Hands a job's requests to the engine: now, or where a step is running, before the next one.

        It never waits for the lock, and so for no step.
        """
        self._came += job.requests
        self._settle_if_free()

    def cancel(self, job: Job) -> None:
        """Ends a job's requests, now or after the step that is running; no effect on those that have ended.

        It never waits for the lock: an abandoned stream may be collected, and closed, amid a step of this thread.
        """
        self._cancel(*job.requests)

    def _cancel(self, *requests: Request) -> None:
        self._ended += requests
        self._settle_if_free()

    def _settle_if_free(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Gives the engine what came, and takes from it what is no longer wanted."""
        while self._came:
            request = self._came.pop(0)
            if self._engine and request.finish_reason is None:
                self._engine.add(request)
        while self._ended:
            request = self._ended.pop()
            if self._engine:
                self._engine.finish(request, "cancelled")

    def job(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Job:
        """A prompt on its way, checked, for `run` and `submit`. Its time begins now."""
        started = time.perf_counter()
        engine, checkpoint = self._ready(), self._checkpoint
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ParameterError(f"params is {params!r}: expected SamplingParams")
        priority = whole("priority", priority, -1_000_000, 1_000_000)
        seconds = None if timeout is None else number("timeout", timeout, 0, 1e9, above=True)
        tokenizer: Tokenizer | None = None
        formed = any(getattr(params, name) is not None for name in FORMS)
        try:
            tokenizer = self.tokenizer
            bos_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            eos_ids: Sequence[int] = tokenizer.eos_ids
        except NoTokenizer:
            if isinstance(prompt, str) or params.stop or formed:  # ids in, ids out does without
                raise
            from pronghorn.text.tokenizer import token_ids

            bos_ids, eos_ids = (token_ids(checkpoint.path, checkpoint.config, name) for name in ("bos", "eos"))
        ids = token_array(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        if not ids and not bos_ids:
            raise PromptError("the prompt is empty, and the model has no beginning-of-sequence token to start from")
        requests: list[Request] = []
        deadline = None if seconds is None else engine.clock() + seconds
        for index in range(params.best_of or params.n):
            first = requests[0] if requests else None
            request = Request(
                ids or bos_ids[:1], params, eos_ids, priority=priority, deadline=deadline, first=first, index=index
            )
            if not first:
                engine.check(request)
                if formed:
                    from pronghorn.engine.grammar import Grammar

                    request.grammar = Grammar(self._grammar_vocabulary(), params)
            elif first.grammar:
                request.grammar = first.grammar.copy()
            requests.append(request)
        return Job(
            [
                Generation(request, tokenizer.stream() if tokenizer else None, self._cost, self._cancel, started)
                for request in requests
            ],
            params.n,
        )

    def _grammar_vocabulary(self) -> Vocabulary:
        """The tokenizer for grammars, made the first time that one is wanted."""
        with self._vocabulary_lock:
            if self._vocabulary is None:
                from pronghorn.engine.grammar import Vocabulary

                tokenizer = self.tokenizer
                size = max(self.model.config.vocab_size, tokenizer.vocab_size)
                ends = [index for index in tokenizer.eos_ids if index < size]  # configurations name others, too
                self._vocabulary = Vocabulary(tokenizer.to_json(), size, ends)
            return self._vocabulary


Key = TypeVar("Key")


class Driver(Protocol):
    """A thread that takes an LLM's steps."""

    def wait_round(self) -> None:
        """Waits until whatever has been submitted had a step, or has none to take."""

    def close(self) -> None:
        """Takes no more steps."""


class DraftModel:
    """The model that runs ahead: the LLM's own in fewer bits, or another of the same vocabulary.

    The own one works on the LLM's keys and values, but for the reference; another has its own.
    """

    def __init__(
        self,
        name: str,
        llm: LLM,
        target: tuple[Model, Mapping[str, Parameter], Mapping[str, Tensor]],
        part: tuple[int, int],
        device: str,
        threads: int | None,
    ) -> None:
        own = name in ("self-int4", "self-int8")
        checkpoint = llm._checkpoint if own else open_model(name)
        self.device, self.threads = device, threads
        self.shared = own and device != "reference"
        if own:
            self.model, parameters, tensors = target
        else:
            self.model, tensors = model_of(checkpoint)
            parameters = self.model.parameters()
            check_vocabulary(name, checkpoint, self.model, llm)
            if part[1] > 1:
                from pronghorn import parallel

                self.model = parallel.local_model(self.model, part[1])
                parameters, tensors = parallel.divided(parameters, tensors, *part)
        dtype, heads = name if own else "auto", (self.model.EMBEDDING, "lm_head.weight")
        self.weights = weights_for(device, checkpoint, parameters, tensors, dtype, threads, heads, keep=part[1] == 1)
        self.weight_bytes = bytes_read(self.model, self.weights)

    def token_bytes(self, kv_dtype: str) -> int:
        """Bytes of keys and values of its own for a token."""
        return 0 if self.shared else kv_bytes(self.model.config, kv_dtype)

    def start(self, target: Runner, n_pages: int, kv_dtype: str) -> None:
        """Makes it ready, beside the runner that it drafts for."""
        weights = Module.of(self.weights)
        self.runner: Runner = runner_beside(
            target, self.model, weights, self.device, self.threads, n_pages, kv_dtype, shared=self.shared
        )

    def draft(self, pages: PagePool, cost: float) -> ModelDraft:
        """What the engine speculates with; `cost` is that of a token against the LLM's."""
        from pronghorn.engine.speculate import ModelDraft

        config = self.model.config
        return ModelDraft(
            self.runner, pages, shared=self.shared, context=config.context, max_tokens=STEP_TOKENS, cost=cost,
        )  # fmt: skip


def check_vocabulary(name: str, checkpoint: Checkpoint, model: Model, llm: LLM, what: str = "draft") -> None:
    """ParameterError for a draft, or another model, whose token ids are not the LLM's."""
    sizes = model.config.vocab_size, llm.model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ParameterError(f"{what} is {name!r}: its vocabulary has {sizes[0]} tokens, and the model's {sizes[1]}")
    try:
        ours, its = llm.tokenizer, load_tokenizer(checkpoint.tokenizer)
    except NoTokenizer:  # ids in, ids out
        return
    for index in range(max(ours.vocab_size, its.vocab_size)):
        tokens = [t.id_to_token(index) if index < t.vocab_size else None for t in (its, ours)]
        if tokens[0] != tokens[1]:
            raise ParameterError(
                f"{what} is {name!r}: its token {index} is {tokens[0]!r}, and the model's {tokens[1]!r}"
            )


def as_stream(job: Job) -> Job:
    """A job whose tokens are read as they come. Raises ParameterError for what cannot be streamed."""
    params = job.generations[0].request.params
    if params.best_of is not None and params.best_of > params.n:
        raise ParameterError(f"best_of is {params.best_of}: which {params.n} are best is known at the end of a stream")
    for request in job.requests:
        request.streamed = True
    return job


def is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, and not a list of them (which an empty list is)."""
    if isinstance(prompts, (str, bytes, bytearray)):
        return True
    if isinstance(prompts, Mapping) or not all(hasattr(prompts, name) for name in ("__len__", "__getitem__")):
        kind = type(prompts).__name__
        raise PromptError(f"the prompt is of type {kind}: expected a text, a list of token ids, or a list of these")
    return len(prompts) > 0 and not hasattr(prompts[0], "__len__")
