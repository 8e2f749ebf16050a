"""AsyncLLM: an engine thread that takes the steps, and streams for event loops."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from pronghorn.engine.engine import Stats
from pronghorn.engine.sampling import FORMS, SamplingParams, number, whole
from pronghorn.errors import ParameterError, PronghornError, QueueFull, ShuttingDown
from pronghorn.generation import Chunk, Job, Output, Timings
from pronghorn.llm import LLM, Prompt, as_stream

if TYPE_CHECKING:
    from pronghorn.engine.scheduler import Logprob, Request

SWITCH_INTERVAL = 0.0001  # seconds; CPython's own is 0.005
LONG = 4000  # characters of a prompt that is not made into tokens on the event loop's time


class AsyncLLM:
    """A loaded LLM whose steps are taken by one thread of its own, whatever its callers are busy with.

    Requests come from any number of event loops, and none of them ever waits for a step. While it is open, `generate`
    and `stream` of the LLM itself may still be called, from any thread: they share its steps. `max_waiting`: samples
    that may wait beside those that run; more are refused by QueueFull (None: any number).

    While it is open, the interpreter's switch interval is `switch_interval` seconds if it was longer: the thread comes
    back from each step to ask for the interpreter, and busy threads would let it wait. None leaves it as it is.

    The LLM is not closed with it.

        async with AsyncLLM(llm) as engine:
            async with await engine.submit("Once upon a time", params) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")
    """

    def __init__(
        self, llm: LLM, *, max_waiting: int | None = None, switch_interval: float | None = SWITCH_INTERVAL
    ) -> None:
        if switch_interval is not None:
            switch_interval = number("switch_interval", switch_interval, 1e-6, 1)
        if not isinstance(llm, LLM):
            raise ParameterError(f"llm is {llm!r}: expected an LLM")
        self.llm = llm
        self.max_waiting = None if max_waiting is None else whole("max_waiting", max_waiting, 0)
        self._streams: weakref.WeakValueDictionary[Request, AsyncStream] = weakref.WeakValueDictionary()
        self._by_id: weakref.WeakValueDictionary[str, AsyncStream] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._work = threading.Event()  # there is something to do, or to end
        self._passed = threading.Condition()  # the thread has gone round, n_rounds times
        self._n_rounds = 0
        self._draining = self._closed = False
        if not llm.drive(self):
            raise PronghornError("this LLM has an AsyncLLM already")
        self._interval_before = sys.getswitchinterval()
        if switch_interval is not None and switch_interval < self._interval_before:
            sys.setswitchinterval(switch_interval)
        self._interval = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="pronghorn-engine", daemon=True)
        self._thread.start()
        # A thread in native code must not outlive the interpreter.
        self._at_exit = functools.partial(close_if_there, weakref.ref(self))
        atexit.register(self._at_exit)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> AsyncStream:
        """Checks a prompt, and has it run -> its stream. It runs whether or not the stream is read.

        `priority` and `timeout` are those of `LLM.generate`; `request_id` is for `cancel`, and made up if None.
        Raises what `LLM.generate` raises for a bad prompt or parameter, QueueFull, and ShuttingDown.
        """
        job = as_stream(await self._job(prompt, params, priority, timeout))
        return self._submit(job, request_id)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Output:
        """The whole of it, as of `LLM.generate` for one prompt. Cancelling the task cancels it."""
        job = await self._job(prompt, params, priority, timeout)
        async with self._submit(job, request_id) as stream:
            async for _ in stream:
                pass
            return stream.output()

    def cancel(self, request_id: str) -> bool:
        """Ends a request, whose stream then raises; its pages are free before the next step. False: there is none."""
        stream = self._by_id.get(request_id)
        if stream is None or stream.finished:
            return False
        stream.cancel()
        return True

    def stats(self) -> Stats:
        """What runs, what waits, and what has been done so far. Any thread may ask."""
        return self.llm.stats()

    @property
    def max_sequences(self) -> int:
        """Samples that run at once; others wait."""
        return self.llm.max_sequences

    async def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits for those that there are -> False if they took longer than `timeout` s."""
        self._draining = True
        return await asyncio.to_thread(self._wait_idle, timeout)

    def close(self) -> None:
        """Ends what runs, and the thread, after the step that it is in. No effect the second time."""
        self._draining = True
        if self._closed:
            return
        self._closed = True
        self._work.set()
        self._thread.join()
        if sys.getswitchinterval() == self._interval:  # and nobody has changed it meanwhile
            sys.setswitchinterval(self._interval_before)
        self.llm.undrive()
        for stream in list(self._streams.values()):
            stream.cancel()
        with self._passed:
            self._passed.notify_all()
        atexit.unregister(self._at_exit)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def wait_round(self) -> None:
        """Waits for a round of the thread that begins from now on: how other faces of the LLM have a step taken."""
        with self._passed:
            before = self._n_rounds
            self._work.set()
            self._passed.wait_for(lambda: self._n_rounds != before or self._closed)

    def check_open(self, params: SamplingParams | None) -> None:
        """Raises ShuttingDown or QueueFull for a request that would not be taken now."""
        if self._draining:
            raise ShuttingDown("no more requests are taken")
        if self.max_waiting is not None:
            n_new = (params.best_of or params.n) if isinstance(params, SamplingParams) else 1
            n_there = self.llm.n_unfinished() - self.llm.n_cancelled()
            room = self.max_sequences + self.max_waiting
            if n_there + n_new > room:
                raise QueueFull(f"{n_there} samples run or wait, and at most {room} may: try again later")

    async def _job(self, prompt: Prompt, params: SamplingParams | None, priority: int, timeout: float | None) -> Job:
        """The prompt made into tokens, and its grammar compiled: elsewhere, where that takes long."""
        self.check_open(params)
        formed = isinstance(params, SamplingParams) and any(getattr(params, name) is not None for name in FORMS)
        if formed or (isinstance(prompt, str) and len(prompt) > LONG):
            return await asyncio.to_thread(self.llm.job, prompt, params, priority, timeout)
        return self.llm.job(prompt, params, priority, timeout)

    def _submit(self, job: Job, request_id: str | None) -> AsyncStream:
        self.check_open(job.generations[0].request.params)  # it took time to make the job
        request_id = f"request-{next(self._numbers)}" if request_id is None else request_id
        if (other := self._by_id.get(request_id)) and not other.finished:
            raise ParameterError(f"request_id is {request_id!r}: a request of this name is running")
        stream = AsyncStream(self.llm, job, request_id)
        for request in job.requests:
            self._streams[request] = stream
        self._by_id[request_id] = stream
        self.llm.submit(job)
        self._work.set()
        return stream

    def _wait_idle(self, timeout: float | None) -> bool:
        with self._passed:
            self._work.set()
            return self._passed.wait_for(lambda: self._closed or not self.llm.n_unfinished(), timeout)

    def _run(self) -> None:
        """The thread: a step, and a word to those who have something new, for as long as there is anything to do."""
        while not self._closed:
            self._work.wait()
            self._work.clear()
            busy = True
            while busy and not self._closed:
                busy = self.llm.n_unfinished() > 0
                if busy:
                    try:
                        advanced = self.llm.take_step()
                    except Exception as error:  # whatever it is, the others' requests are to go on
                        advanced = self.llm.fail(error)
                    self._tell(advanced)
                with self._passed:
                    self._n_rounds += 1
                    self._passed.notify_all()

    def _tell(self, advanced: Iterable[Request]) -> None:
        """Wakes the readers, by one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, dict[AsyncStream, None]] = {}
        for request in advanced:
            if stream := self._streams.get(request):
                by_loop.setdefault(stream.loop, {})[stream] = None
        for loop, streams in by_loop.items():
            try:
                loop.call_soon_threadsafe(wake, streams)
            except RuntimeError:  # the loop is closed, and nobody will read
                for stream in streams:
                    stream.cancel()


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of a request, for the event loop that has submitted it. A chunk has all that came since the last.

    Closing it, leaving its `async with`, or letting go of it ends the request, and frees its memory.
    """

    def __init__(self, llm: LLM, job: Job, request_id: str) -> None:
        self._llm = llm
        self._job = job
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._chunks: deque[Chunk] = deque()
        self._news = asyncio.Event()
        self._cancelled = False

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self.finished:
                raise StopAsyncIteration
            self._news.clear()
            try:
                if self._cancelled:  # the engine may be in a step, and end it afterwards
                    raise PronghornError("the request was cancelled")
                self._chunks.extend(self._job.advance())
            except PronghornError:  # one sample's error ends them all
                await self.aclose()
                raise
            if not self._chunks:
                await self._news.wait()
        return self._chunks.popleft()

    @property
    def finished(self) -> bool:
        """Whether all that it will be has been read, or the stream was closed."""
        return self._job.finished

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        request = self._job.generations[0].request
        return request.token_ids[: request.n_prompt].tolist()

    @property
    def prompt_logprobs(self) -> list[Logprob]:
        """Those of the prompt from its second token on, where they were asked for, once the first chunk is there."""
        return self._job.generations[0].request.prompt_logprobs

    def timings(self) -> Timings:
        """Those of the first sample, so far."""
        return self._job.generations[0].timings()

    def output(self) -> Output:
        """The whole, after the last chunk; after `aclose`, what had come by then."""
        return self._job.output()

    def cancel(self) -> None:
        """Ends the request: who waits for a chunk gets PronghornError. Any thread may call it."""
        self._cancelled = True
        self._llm.cancel(self._job)
        with contextlib.suppress(RuntimeError):  # where the loop is closed
            self.loop.call_soon_threadsafe(self._news.set)

    async def aclose(self) -> None:
        """Ends the request, if it is running."""
        if not self.finished:
            self._llm.cancel(self._job)
            self._job.end()
            self._news.set()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self.finished:
            self._llm.cancel(self._job)


def wake(streams: Iterable[AsyncStream]) -> None:
    """On the event loop: there is something to read."""
    for stream in streams:
        stream._news.set()


def close_if_there(reference: weakref.ref[AsyncLLM]) -> None:
    """At the interpreter's end."""
    if engine := reference():
        engine.close()
