"""`pronghorn serve`: the process. It listens before the models are there, and ends when it has answered."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from pronghorn import _native
from pronghorn.async_llm import AsyncLLM
from pronghorn.engine.sampling import number, whole
from pronghorn.errors import ParameterError, PronghornError
from pronghorn.llm import LLM
from pronghorn.serve.app import Served, Service, app_of
from pronghorn.serve.operation import PATIENCE, Settings, log, names_of, read_keys, set_up_logs
from pronghorn.weights.files import map_file

TCP_OPTIONS = (
    ("TCP_KEEPIDLE", PATIENCE // 4),
    ("TCP_KEEPINTVL", PATIENCE // 4),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", PATIENCE * 1000),
)
HEADERS = 64 << 10  # bytes that a request's head may have


def run(args: argparse.Namespace, load: Callable[[str | None], LLM]) -> None:
    """Serves until a signal says otherwise."""
    keys = read_keys(Path(args.api_keys) if args.api_keys else None, os.environ.get("PRONGHORN_API_KEYS"))
    if args.max_per_key is not None and not keys:
        raise ParameterError("--max-per-key is given, but there are no API keys")
    for name, low in (("max_tokens", 1), ("max_waiting", 0), ("max_per_key", 1)):
        if (value := getattr(args, name)) is not None:
            whole(f"--{name.replace('_', '-')}", value, low)
    settings = Settings(
        keys=keys,
        cors=tuple(args.cors or ()),
        hosts=tuple(name.lower() for name in args.allow_host) if args.allow_host else None,
        max_body=args.max_body,
        max_tokens=args.max_tokens,
        max_waiting=args.max_waiting,
        max_per_key=args.max_per_key,
        timeout=number("--timeout", args.timeout, 0, 1e9, above=True),
        pooling=args.pooling,
        log_prompts=args.log_prompts,
    )
    names = names_of(args.model or [])
    if args.tls_key and not args.tls_cert:
        raise ParameterError("--tls-key is given, but no --tls-cert")
    for file in filter(None, (args.tls_cert, args.tls_key)):
        if not Path(file).is_file():
            raise ParameterError(f"{file}: there is no such file")
    if args.tls_cert:
        check_certificate(args.tls_cert, args.tls_key)
    set_up_logs(args.log_format)
    with listen(args.host, args.port) as sock:
        if not keys and not args.allow_host and is_loopback(sock):
            settings = settings._replace(hosts=())
        asyncio.run(serve(args, settings, names, load, sock))


def check_certificate(certificate: str, key: str | None) -> None:
    """Raises ParameterError where TLS could not be had with these, before anything is loaded."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
        files = f"{certificate} and {key}" if key else f"{certificate} (no --tls-key)"
        fault = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ParameterError(f"{files}: not a certificate and its key, as PEM without a password: {fault}") from None


def is_loopback(sock: socket.socket) -> bool:
    """Whether it can be reached from this machine alone."""
    return ipaddress.ip_address(sock.getsockname()[0]).is_loopback


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """The socket. Connections inherit that a client which is gone without a word, or never reads, is given up."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = stack.enter_context(socket.socket(family, kind))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in TCP_OPTIONS:
                if hasattr(socket, name):  # Linux's
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            sock.bind(address)
            sock.listen(2048)
        except (OSError, OverflowError) as error:
            raise PronghornError(f"{host}, port {port}: {getattr(error, 'strerror', None) or error}") from None
        yield sock


async def serve(
    args: argparse.Namespace,
    settings: Settings,
    names: dict[str, str | None],
    load: Callable[[str | None], LLM],
    sock: socket.socket,
) -> None:
    """The server, from listening to its end."""
    service = Service(settings)
    config = uvicorn.Config(
        app_of(service),
        http="h11",  # which has a limit for headers
        h11_max_incomplete_event_size=HEADERS,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        ssl_certfile=args.tls_cert,
        ssl_keyfile=args.tls_key,
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # ours are below
            yield

    server, loop, asked = Server(config), asyncio.get_running_loop(), asyncio.Event()
    loaded: asyncio.Future[None] = loop.create_future()

    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(128 + number)
        loop.call_soon_threadsafe(asked.set)

    # Not by the loop's add_signal_handler: it loses a signal when its pipe is full of the engine's words.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def load_all() -> None:  # a thread that does not keep the process from ending
        error = None
        try:
            for name, model in names.items():
                llm = load(model)
                name = llm.path.name.removesuffix(".gguf") if model is None else name
                engine = AsyncLLM(llm, max_waiting=settings.max_waiting)
                service.models[name] = Served(name, engine, int(time.time()), fingerprint(llm))
        except BaseException as fault:
            error = fault
        loop.call_soon_threadsafe(lambda: loaded.set_exception(error) if error else loaded.set_result(None))

    host, port = sock.getsockname()[:2]
    address = f"http{'s' if args.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("%s: loading", address)
    threading.Thread(target=load_all, name="pronghorn-load", daemon=True).start()
    serving = asyncio.create_task(server.serve([sock]))
    waiting = asyncio.create_task(asked.wait())
    try:
        either: list[asyncio.Future[Any]] = [loaded, waiting, serving]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not loaded.done():
            if asked.is_set():
                os._exit(0)  # nobody has been promised anything
            return
        loaded.result()
        service.status = "ok"
        log.info("%s: serving %s", address, ", ".join(service.models))
        if not settings.keys and not is_loopback(sock):
            log.warning("anyone who reaches %s may use this server: it has no API keys", host)
        await asyncio.wait(either[1:], return_when=asyncio.FIRST_COMPLETED)
        service.status = "draining"
        log.info("draining: up to %g seconds", args.drain)
        ends = loop.time() + args.drain
        engines = [served.engine for served in service.models.values()]
        drained = await asyncio.gather(*(engine.drain(args.drain) for engine in engines))
        while service.n_open and loop.time() < ends:  # until clients have read what was made for them
            await asyncio.sleep(0.02)
        log.info("drained" if all(drained) and not service.n_open else "ended what was still running")
    finally:
        for served in service.models.values():
            await asyncio.to_thread(served.engine.close)
        server.should_exit = True
        waiting.cancel()
        await serving
        for served in service.models.values():
            served.llm.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def find_version(package: str) -> str | None:
    """Of what is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fingerprint(llm: LLM) -> str:
    """A name for all that the answers depend on: what is in the model's files, and how they are run."""
    parts: list[object] = [_native.isa(), llm.dtype, llm.kv_dtype, llm.device, llm.context]
    files = {Path(_native.__file__), *map(Path, llm.info()["files"])}
    if llm.path.suffix != ".gguf":  # which has all in it
        folder = llm.path if llm.path.is_dir() else llm.path.parent
        files |= {file for suffix in ("json", "txt", "model", "bpe", "jinja") for file in folder.glob(f"*.{suffix}")}
    computing = {"cpu": (), "reference": ("numpy",)}.get(llm.device, ("torch", "triton"))
    parts += [(name, find_version(name)) for name in ("tokenizers", "jinja2", "llguidance", *computing)]
    parts += [(file.name, _native.checksum(map_file(file))) for file in sorted(files, key=lambda file: file.name)]
    parts.append(sys.modules["pronghorn"].__version__)
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
