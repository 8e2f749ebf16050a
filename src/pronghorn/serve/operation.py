"""What stands before the routes: who may come, how much, how often; and what is written down of it."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from pronghorn.errors import ParameterError, PromptError, PromptTooLong, PronghornError, QueueFull, ShuttingDown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pronghorn.serve.app import Service

log = logging.getLogger("pronghorn.serve")

OPEN = ("/", "/health", "/openapi.json")  # and the page's files: what needs no key, if it is a GET
PATIENCE = 60  # seconds that a client may keep us waiting: for a body, or for its kernel's word
LEFT = 499  # nginx's status for a client that has left


class Settings(NamedTuple):
    """How a server behaves."""

    keys: tuple[str, ...] = ()  # none: everybody may come
    cors: tuple[str, ...] = ()  # origins
    hosts: tuple[str, ...] | None = None  # names by which it may be called, beside localhost and addresses; None: any
    max_body: int = 4 << 20  # bytes
    max_tokens: int | None = None  # that a request may ask for
    max_waiting: int | None = 256  # samples in the queue
    max_per_key: int | None = None  # requests at once
    timeout: float | None = 600.0  # seconds for a request
    pooling: str = "mean"  # of embeddings
    log_prompts: bool = False


class Refusal(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: PronghornError) -> Refusal:
        """What the engine refuses."""
        text = str(error)
        match error:
            case PromptTooLong():
                return cls(400, text, code="context_length_exceeded")
            case ParameterError() | PromptError():
                return cls(400, text)
            case QueueFull():
                return cls(429, text, "rate_limit_error", code="queue_full")
            case ShuttingDown():
                return cls(503, "the server is shutting down", "unavailable_error", code="shutting_down")
        return cls(500, text, "server_error")

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def read_keys(path: Path | None, variable: str | None) -> tuple[str, ...]:
    """API keys: a file's lines (empty ones and those that begin with # are none), and a variable's, with commas."""
    found: list[str] = []
    if path:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ParameterError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ParameterError(f"{path}: there are no keys in it")
    found += [key.strip() for key in (variable or "").split(",") if key.strip()]
    if any(not key.isascii() for key in found):
        raise ParameterError("API keys are made of ASCII characters")
    return tuple(dict.fromkeys(found))


class Door:
    """ASGI middleware: a request's name, key and share; its line in the log, and its count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings
        self.at_once: Counter[str] = Counter()  # requests by key
        self.names = {key: f"key{i}" for i, key in enumerate(service.settings.keys, 1)}  # for the log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        name = headers.get("x-request-id", "")
        name = name if re.fullmatch(r"[\w.:/+=-]{1,128}", name, re.ASCII) else f"req-{secrets.token_hex(12)}"
        about: dict[str, Any] = {"request_id": name, "method": scope["method"], "path": quote(scope["path"])}
        about["started"] = time.perf_counter()
        scope["pronghorn"] = about
        status, asks = 0, int(scope["method"] == "POST")
        self.service.n_open += asks

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            with self._let_in(scope, headers, about):
                await self.app(scope, receive, answer)
        except Refusal as refusal:
            await refusal.response()(scope, receive, answer)
        except Exception:
            log.exception("%s: a fault of the server", name)
            if status:  # the answer has begun: it ends unfinished, and the client sees so
                raise
            await Refusal(500, "a fault of the server", "server_error").response()(scope, receive, answer)
        finally:
            self.service.n_open -= asks
            seconds, route = time.perf_counter() - about.pop("started"), about.pop("route", "unknown")
            about |= {"status": about.pop("left", status or LEFT), "seconds": round(seconds, 4)}
            self.service.metrics.http.labels(route, str(about["status"])).inc()
            level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
            log.log(level, "%s", " ".join(map(str, about.values())), extra={"about": about})

    @contextlib.contextmanager
    def _let_in(self, scope: Scope, headers: Headers, about: dict[str, Any]) -> Iterator[None]:
        """Checks whom it calls, who asks, by which key, and that this has not too many requests already."""
        path, keys, cors = scope["path"], self.settings.keys, self.settings.cors
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.settings.hosts is not None and not is_own(host, self.settings.hosts):
            # A page of elsewhere may have let its own name lead here, so that its browser finds no fault.
            raise Refusal(
                403, f"Host is {host!r}: not a name of this server (--allow-host adds one)", code="foreign_host"
            )
        if origin and urlsplit(origin).netloc != host and not {origin, "*"}.intersection(cors):
            # A page of elsewhere can have a browser send it, though it could not read the answer.
            raise Refusal(403, f"pages of {origin} may not ask this server (--cors lets them)", code="foreign_origin")
        free = scope["method"] in ("GET", "HEAD") and (path in OPEN or path.startswith("/page/"))
        if not keys or free:
            yield
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        right = [key for key in keys if hmac.compare_digest(key.encode(), given.encode("utf-8", "replace"))]
        if not right:
            fault = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise Refusal(401, fault, "authentication_error", code="invalid_api_key")
        key, most, n = right[0], self.settings.max_per_key, int(scope["method"] == "POST")
        about["key"] = self.names[key]
        if n and most is not None and self.at_once[key] >= most:
            raise Refusal(429, f"this key has {most} requests running", "rate_limit_error", code="too_many_requests")
        self.at_once[key] += n
        try:
            yield
        finally:
            self.at_once[key] -= n


def is_own(host: str, names: Sequence[str]) -> bool:
    """Whether a request's Host is one of the names, or what no foreign name can lead to: an address, or localhost."""
    name = re.sub(r":\d*$", "", host).lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        return True
    return f".{name}".endswith(".localhost") or name in names or "*" in names


class JsonLines(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        about = getattr(record, "about", None) or {"message": record.getMessage()}
        if record.exc_info:
            about = {**about, "traceback": self.formatException(record.exc_info)}
        time_ = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        return json.dumps({"time": time_, "level": record.levelname.lower(), **about}, ensure_ascii=False)


def set_up_logs(form: str) -> None:
    """Ours and uvicorn's to standard error, as lines of text or of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
    for name, level in (("pronghorn.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def names_of(models: Sequence[str]) -> dict[str, str | None]:
    """Models by the names that they are served under: NAME=MODEL, or a MODEL's own name."""
    found: dict[str, str | None] = {}
    for text in models:
        name, sign, model = text.partition("=")
        if not sign or Path(text).exists():
            name, model = Path(text).name.removesuffix(".gguf").removesuffix(".safetensors"), text
        if not name or name in found:
            fault = "another model has its name" if name else "it has no name"
            raise ParameterError(f"-m {text}: {fault}: give it one by -m NAME=MODEL")
        found[name] = model
    return found or {"default": None}
