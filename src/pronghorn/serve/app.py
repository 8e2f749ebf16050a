"""The routes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pronghorn.batch import numbered
from pronghorn.engine.sampling import NAMES, SamplingParams, fresh_seed
from pronghorn.errors import PromptError, PronghornError, QueueFull, ShuttingDown
from pronghorn.serve import schemas as s
from pronghorn.serve.answers import Answers, Chats, Completions, Pieces, told
from pronghorn.serve.metrics import Meter, Metrics
from pronghorn.serve.openapi import OPERATIONS, document
from pronghorn.serve.operation import LEFT, PATIENCE, Door, Refusal, Settings
from pronghorn.serve.tools import FORCED, form_of, schema_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pronghorn.async_llm import AsyncLLM, AsyncStream
    from pronghorn.generation import Chunk, Output
    from pronghorn.llm import LLM, Prompt

MOST_INPUTS = 2048  # of a request for embeddings, as OpenAI has it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGE_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold events back

RESERVED = {"self", "messages", "tools", "template", "tokenizer", "special_tokens", "add_generation_prompt"}
"""Names that a template has from us."""

Handler = Callable[[Request], Awaitable[Response]]
B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")


class Served:
    """A model under its name."""

    def __init__(self, name: str, engine: AsyncLLM, created: int, fingerprint: str) -> None:
        self.name, self.engine, self.created, self.fingerprint = name, engine, created, fingerprint
        self.llm = engine.llm
        self.pieces = Pieces(engine.llm)
        self.embedding = asyncio.Lock()
        self.n_embedding = 0  # requests that hold it or wait for it

    def card(self) -> dict[str, Any]:
        """What /v1/models tells."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "pronghorn"}
        return {**about, "context": self.llm.context}


class Service:
    """The models, and what is asked of them. `status`: "loading" until all `models` are there; at last "draining"."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, Served] = {}
        self.status = "loading"
        self.n_open = 0  # POST requests whose answer has not gone out
        self.metrics = Metrics(self.models)
        self.clerks = ThreadPoolExecutor(2, "pronghorn-clerk", step_back)
        page = (resources.files("pronghorn.serve") / "page").iterdir()
        kinds = ((file, PAGE_TYPES.get(file.name.rpartition(".")[2])) for file in page)
        self.page_files = {file.name: (file.read_bytes(), kind) for file, kind in kinds if kind}

    def served(self, name: str | None) -> Served:
        """The model of that name; the only one, if it is not said."""
        if self.status == "loading":
            raise Refusal(503, "the model is being loaded", "unavailable_error", code="loading")
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            fault = "model is not given" if name is None else f"there is no model {name!r}"
            code = "model_not_found"
            raise Refusal(400 if name is None else 404, f"{fault}: expected one of {known}", param="model", code=code)
        return self.models[name]

    async def aside(self, work: Callable[..., T], *args: Any) -> T:
        """What may take long, and is nothing for the engine: by threads that leave the processors to its own."""
        return await asyncio.get_running_loop().run_in_executor(self.clerks, work, *args)

    async def body(self, request: Request) -> bytes:
        """A request's body, if it is not too long, and comes."""
        most, data = self.settings.max_body, bytearray()

        async def gather() -> None:
            nonlocal data
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise Refusal(413, f"the body has more than {most} bytes", code="body_too_large")

        try:
            await asyncio.wait_for(gather(), PATIENCE)
        except asyncio.TimeoutError:
            raise Refusal(408, f"the body did not come within {PATIENCE} seconds", "timeout_error") from None
        return bytes(data)

    async def read(self, request: Request, kind: type[B]) -> B:
        """A request's body, checked."""
        return parse(await self.body(request), kind)

    # Generation ----------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Goes on from prompts."""
        body = await self.read(request, s.CompletionRequest)
        served = self.served(body.model)
        prompts = prompts_of(body.prompt)
        scores = body.max_tokens == 0
        n_new = min(16, self.settings.max_tokens or 16) if body.max_tokens is None else body.max_tokens
        params = self.params(
            body,
            max_tokens=max(n_new, 1),
            logprobs=body.logprobs,
            best_of=body.best_of,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        texts = [""] * len(prompts)
        if body.echo or body.logprobs is not None:
            decode = served.llm.tokenizer.decode
            texts = [p if isinstance(p, str) else await self.aside(decode, p) for p in prompts]
        answers = Completions(served, texts, echo=bool(body.echo), n_top=body.logprobs, n=params.n, scores=scores)
        return await self.answer(request, served, answers, prompts, params, body)

    async def chat_completions(self, request: Request) -> Response:
        """The next message of a conversation."""
        body = await self.read(request, s.ChatRequest)
        served = self.served(body.model)
        functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools or ()]
        options: dict[str, Any] = {}
        match body.response_format:
            case s.JsonFormat():
                options["json_schema"] = {"type": "object"}
            case s.SchemaFormat(json_schema=asked):
                options["json_schema"] = asked.schema_
        form, choice = None, body.tool_choice or ("auto" if functions else "none")
        if choice != "none":
            if not functions:
                raise Refusal(400, "tool_choice is given, but no tools", param="tool_choice")
            form = form_of(template_of(served))
        if choice not in ("none", "auto"):
            wanted = [f for f in functions if not isinstance(choice, s.ToolChoice) or f["name"] == choice.function.name]
            if not wanted:
                raise Refusal(400, "tool_choice names a function that is not in tools", param="tool_choice")
            form, options["json_schema"] = FORCED, schema_of(wanted)
        if body.top_logprobs is not None and not body.logprobs:
            raise Refusal(400, "top_logprobs is given, but logprobs is not true", param="top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise Refusal(400, "max_tokens is given beside max_completion_tokens", param="max_tokens")
        n_new = body.max_completion_tokens or body.max_tokens
        n_top = (body.top_logprobs or 0) if body.logprobs else None
        params = self.params(body, max_tokens=n_new, logprobs=n_top, **options)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None
        messages = [message_of(message) for message in body.messages]
        variables = body.chat_template_kwargs or {}
        if taken := RESERVED.intersection(variables):
            raise Refusal(
                400, f"chat_template_kwargs: {min(taken)} is not the caller's to set", param="chat_template_kwargs"
            )
        served.engine.check_open(params)  # before it costs time
        ids = await unless_gone(
            request,
            asyncio.to_thread(served.llm.chat_prompt, messages, tools if choice != "none" else None, **variables),
        )
        answers = Chats(served, form, one_call=body.parallel_tool_calls is False or form is FORCED)
        return await self.answer(request, served, answers, [ids], params, body)

    async def inputs(self, request: Request) -> Response:
        """fast_gpt2's own route: the likeliest 20 tokens after a text, with it."""
        data, kind = await self.body(request), request.headers.get("content-type", "").partition(";")[0]
        if kind == "application/json" or data.lstrip().startswith(b'{"inputs"'):
            text = parse(data, s.InputsRequest).inputs
        else:
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise Refusal(400, f"the body is no UTF-8: {error}") from None
        params = SamplingParams(max_tokens=min(20, self.settings.max_tokens or 20))
        out = await unless_gone(request, self.whole(request, self.served(None), text, params))
        return JSONResponse([{"generated_text": text + out.text}])

    def params(self, body: s.Sampling, **own: Any) -> SamplingParams:
        """The request's SamplingParams. `own` is what is not said in their words."""
        most, values = self.settings.max_tokens, body.model_dump(include=set(NAMES), exclude_none=True)
        if most is not None and own["max_tokens"] is not None and own["max_tokens"] > most:
            message = f"max_tokens is {own['max_tokens']}: this server gives at most {most}"
            raise Refusal(400, message, param="max_tokens")
        own["max_tokens"] = own["max_tokens"] or most
        seed = fresh_seed() if body.seed is None else body.seed  # the same for all prompts: the answer names one
        if "json_schema" in own and "json_schema" in values:
            raise Refusal(400, "json_schema is given beside what asks for a form too", param="json_schema")
        return SamplingParams(**{"temperature": 1.0, **numbered(values), **own, "seed": seed})

    async def answer(
        self,
        request: Request,
        served: Served,
        answers: Answers,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        body: s.Sampling,
    ) -> Response:
        """The response: whole, or a stream."""
        note = request.scope["pronghorn"]
        note["model"] = served.name
        n_samples, most = len(prompts) * (params.best_of or params.n), self.settings.max_waiting
        if most is not None and n_samples > (most := most + served.engine.max_sequences):
            raise Refusal(400, f"the request asks for {n_samples} samples: at most {most} run and wait here")
        if self.settings.log_prompts:
            note["prompt"] = prompts
        if not body.stream:
            if body.stream_options:
                raise Refusal(400, "stream_options is given, but stream is not true", param="stream_options")
            outs = await unless_gone(request, all_of([self.whole(request, served, p, params) for p in prompts]))
            long = params.logprobs is not None
            found = await self.aside(answers.whole, outs) if long else answers.whole(outs)
            note_usage(note, found)
            return await self.aside(LongResponse, found) if long else JSONResponse(found)
        streams: list[AsyncStream] = []
        try:
            for prompt in prompts:
                streams.append(await served.engine.submit(prompt, params, timeout=self.settings.timeout))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = self.events(served, answers, streams, params.n, with_usage, note)
        return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)

    async def whole(self, request: Request, served: Served, prompt: Prompt, params: SamplingParams) -> Output:
        """All that becomes of a prompt."""
        meter = Meter(self.metrics, served.name, request.scope["pronghorn"]["started"])
        if params.best_of not in (None, params.n):
            out = await served.engine.generate(prompt, params, timeout=self.settings.timeout)
            for sample in out.samples:
                meter.end(sample.finish_reason)
        else:
            async with await served.engine.submit(prompt, params, timeout=self.settings.timeout) as stream:
                async for chunk in stream:
                    meter.saw(chunk)
                out = stream.output()
        self.check_time(*out.samples)
        return out

    def check_time(self, *ended: Output | Chunk) -> None:
        """Raises Refusal where time was up: OpenAI's finish_reason has no word for it."""
        if any(one.finish_reason == "timeout" for one in ended):
            raise self.too_late()

    def too_late(self) -> Refusal:
        """The answer where time is up."""
        message = f"the request took longer than {self.settings.timeout:g} seconds"
        return Refusal(504, message, "timeout_error", code="timeout")

    async def events(
        self,
        served: Served,
        answers: Answers,
        streams: list[AsyncStream],
        n: int,
        with_usage: bool,
        note: dict[str, Any],
    ) -> AsyncIterator[bytes]:
        """A stream's lines. Whoever reads slowly is waited for: tokens that come meanwhile are one chunk then."""
        meters = [Meter(self.metrics, served.name, note["started"]) for _ in streams]
        held: dict[str, Any] | None = None  # a choice's last message, which may be the whole's last
        try:
            async for at, chunk in merged(streams):
                meters[at].saw(chunk)
                self.check_time(chunk)
                data = b""  # one message for the network, whatever the number of events
                for choice in answers.deltas(at * n + chunk.sample, chunk, streams[at]):
                    if held:
                        data += event(held)
                    held = answers.message(choice)
                    if (so_far := streams[at].timings()).drafted_tokens:
                        held["timings"] = told(so_far)
                    if not choice["finish_reason"]:
                        data += event(held)
                        held = None
                if data:
                    yield data
            tail = answers.tail([stream.output() for stream in streams])
            note_usage(note, tail)
            data = b""
            if with_usage:  # in a message without choices, which only those can read who have asked for it
                data = event(held or {})
                held = {**answers.message({}), "choices": []}
            else:
                del tail["usage"]
            yield data + event({**(held or {}), **tail}) + b"data: [DONE]\n\n"
        except (Refusal, PronghornError) as error:
            refusal = error if isinstance(error, Refusal) else self.refusal(error)
            note["left"] = refusal.status
            yield event(refusal.body)
        except (asyncio.CancelledError, GeneratorExit):
            note["left"] = LEFT
            raise
        finally:
            for stream in streams:
                await stream.aclose()

    def refusal(self, error: PronghornError) -> Refusal:
        """The answer to an error of the engine; at the end it closes, and cancels what still runs."""
        return Refusal.of(ShuttingDown() if self.status == "draining" and type(error) is PronghornError else error)

    async def embeddings(self, request: Request) -> Response:
        """Texts as vectors: the last hidden states' mean, or the last of them, with length 1."""
        body = await self.read(request, s.EmbeddingRequest)
        served = self.served(body.model)
        inputs = prompts_of(body.input)
        if len(inputs) > MOST_INPUTS:
            raise Refusal(400, f"input has {len(inputs)} elements: expected at most {MOST_INPUTS}", param="input")
        vectors, n_tokens = await unless_gone(request, self.embed(served, inputs))
        request.scope["pronghorn"] |= {"model": served.name, "prompt_tokens": n_tokens}

        def told_of(index: int, vector: NDArray[np.float32]) -> dict[str, Any]:
            packed = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else None
            return {"object": "embedding", "index": index, "embedding": packed or vector.tolist()}

        def answer() -> Response:
            data = [told_of(index, vector) for index, vector in enumerate(vectors)]
            usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
            return LongResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

        return await self.aside(answer)

    async def embed(self, served: Served, prompts: Sequence[Prompt]) -> tuple[list[NDArray[np.float32]], int]:
        """The vectors, and how many tokens they are of. One request at a time; the others wait, up to a number."""
        most = self.settings.max_waiting
        if most is not None and served.n_embedding > most:
            raise QueueFull(f"{most} requests for embeddings wait: try again later")
        served.n_embedding += 1
        ends = time.monotonic() + (self.settings.timeout or math.inf)
        vectors, n_tokens = [], 0
        try:
            async with served.embedding:
                for prompt in prompts:
                    if time.monotonic() > ends:
                        raise self.too_late()
                    if self.status == "draining":
                        raise ShuttingDown
                    left = threading.Event()
                    work = asyncio.ensure_future(
                        asyncio.to_thread(embedded, served.llm, prompt, self.settings.pooling, left)
                    )
                    try:
                        vector, n = await asyncio.shield(work)
                    except asyncio.CancelledError:  # the client has left; the thread ends after its step
                        left.set()
                        await asyncio.wait([work])
                        work.exception()
                        raise
                    vectors.append(vector)
                    n_tokens += n
        finally:
            served.n_embedding -= 1
        return vectors, n_tokens

    # The rest --------------------------------------------------------------------------------------------------

    async def list_models(self, request: Request) -> Response:
        """What is served."""
        return JSONResponse({"object": "list", "data": [served.card() for served in self.models.values()]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self.served(request.path_params["model"]).card())

    async def tokenize(self, request: Request) -> Response:
        """Text to token ids."""
        body = await self.read(request, s.TokenizeRequest)
        served = self.served(body.model)

        def piece(token_id: int) -> dict[str, Any]:
            data = served.pieces.of(token_id)[1]
            try:
                return {"id": token_id, "piece": data.decode()}
            except UnicodeDecodeError:
                return {"id": token_id, "piece": list(data)}

        def answer() -> Response:
            ids = served.llm.tokenizer.encode(body.content, add_special=bool(body.add_special))
            return LongResponse({"tokens": list(map(piece, ids)) if body.with_pieces else ids})

        return await self.aside(answer)

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        body = await self.read(request, s.DetokenizeRequest)
        tokenizer = self.served(body.model).llm.tokenizer
        return JSONResponse({"content": await self.aside(tokenizer.decode, body.tokens)})

    async def health(self, request: Request) -> Response:
        """Whether requests are taken; a load balancer turns away while they are not."""
        return JSONResponse({"status": self.status}, 200 if self.status == "ok" else 503)

    async def metrics_text(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """The playground's files."""
        found = self.page_files.get(request.path_params.get("file", "index.html"))
        if found is None:
            raise HTTPException(404)
        return Response(found[0], media_type=found[1], headers=PAGE_HEADERS)


class LongResponse(JSONResponse):
    """JSON of lists that may be long: written in Python, as json's C code would keep the interpreter to itself."""

    def render(self, content: Any) -> bytes:
        """See Starlette."""
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return "".join(encoder.iterencode(content)).encode()


def step_back() -> None:
    """Has other threads go before this one, where the system gives a thread a priority of its own."""
    if sys.platform == "linux":
        os.nice(10)


def app_of(service: Service) -> Starlette:
    """The ASGI application."""
    routes = [
        Route(
            operation.path.replace("{model}", "{model:path}"),  # names may have slashes
            guarded(service, getattr(service, operation.name)),
            methods=[operation.method],
        )
        for operation in OPERATIONS
    ]
    spec = JSONResponse(document()).body

    async def openapi(request: Request) -> Response:
        return Response(spec, media_type="application/json")

    routes += [Route("/openapi.json", guarded(service, openapi))]
    routes += [Route(path, guarded(service, service.page)) for path in ("/", "/page/{file}")]
    middleware = [Middleware(Door, service=service)]
    if service.settings.cors:
        allowed: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        origins = list(service.settings.cors)
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=origins, expose_headers=["x-request-id"], **allowed)
        )

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        code = error.detail.lower().replace(" ", "_")
        response = Refusal(error.status_code, f"{what}: {error.detail}", code=code).response()
        response.headers.update(error.headers or {})
        return response

    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error})


def guarded(
    service: Service, handler: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose errors are answers."""

    async def guarded_handler(request: Request) -> Response:
        note = request.scope["pronghorn"]
        note["route"] = request.scope["route"].path
        try:
            return await handler(request)
        except Refusal as refusal:
            return refusal.response()
        except PronghornError as error:
            return service.refusal(error).response()
        except ClientDisconnect:
            note["left"] = LEFT
            return Response()

    return guarded_handler


def parse(data: bytes, kind: type[B]) -> B:
    """A body, checked; what is wrong with it names the field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        if error.error_count() > 1000:
            raise Refusal(400, f"the body has {error.error_count()} faults") from None
        found = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [e for e in found if e["type"] == "extra_forbidden"]
    first = (unknown or found)[0]
    loc = place(first, data)
    if unknown:
        message = f"{'.'.join(loc)} is not supported"
    elif loc:
        faults = dict.fromkeys(e["msg"] for e in found if e["loc"][:1] == first["loc"][:1])
        message = f"{loc[0] if len(faults) > 1 else '.'.join(loc)}: {'; or '.join([*faults][:4])}"
    else:
        message = f"the body is no JSON object: {first['msg']}"
    raise Refusal(400, message, param=".".join(loc) or None)


def place(fault: ErrorDetails, data: bytes) -> list[str]:
    """Where a fault is, by the body's own names: pydantic has those of the types that it tried between them."""
    parts, at, found = fault["loc"], from_json(data) if fault["loc"] else None, []
    for i, part in enumerate(parts):
        missing = fault["type"] == "missing" and i == len(parts) - 1
        if isinstance(at, list) and isinstance(part, int) and part < len(at):
            at = at[part]
        elif isinstance(at, dict) and (part in at or missing):
            at = at.get(part)
        else:
            continue
        found.append(str(part))
    return found


def prompts_of(given: Any) -> list[Any]:
    """The prompts of a request, one or several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def embedded(llm: LLM, prompt: Prompt, pooling: str, left: threading.Event) -> tuple[NDArray[np.float32], int]:
    """A prompt's vector [embd] and its tokens. The mean is taken in float64, in the tokens' order."""
    import numpy as np

    ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise PromptError("the input is empty: it needs at least one token")
    hidden = llm.hidden(ids, left)
    vector = hidden[-1].astype(np.float64) if pooling == "last" else hidden.mean(axis=0, dtype=np.float64)
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32), len(ids)


def template_of(served: Served) -> str | None:
    """The chat template that is used with tools."""
    tokenizer = served.llm.tokenizer
    return tokenizer.chat_templates.get("tool_use") or tokenizer.chat_template


def message_of(message: s.Message) -> dict[str, Any]:
    """A message as templates know it: texts joined, and calls' arguments as values."""
    found = message.model_dump(exclude_none=True)
    if message.role == "developer":
        found["role"] = "system"
    if isinstance(message.content, list):
        found["content"] = "".join(part.text for part in message.content)
    found.setdefault("content", "")
    for call in found.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            raise Refusal(400, "messages: the arguments of a tool call are no JSON", param="messages") from None
    return found


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def note_usage(note: dict[str, Any], found: dict[str, Any]) -> None:
    """For the log."""
    note |= {name: found["usage"][name] for name in ("prompt_tokens", "completion_tokens")}


async def merged(streams: Sequence[AsyncStream]) -> AsyncIterator[tuple[int, Chunk]]:
    """The chunks of several streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async for chunk in streams[0]:
            yield 0, chunk
        return
    pending = {asyncio.ensure_future(anext(stream)): at for at, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                at = pending.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    yield at, task.result()
                    pending[asyncio.ensure_future(anext(streams[at]))] = at
    finally:
        for task in pending:
            task.cancel()


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them give; an error of one ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled when the client leaves. The body has been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
