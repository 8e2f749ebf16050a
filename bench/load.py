"""A server under load: streaming clients, bursts of more, and some that leave; all others get the offline answers.

    pronghorn serve -m MODEL --port 8000 &
    python bench/load.py -m MODEL --url http://127.0.0.1:8000 --clients 64 --burst 512 --leave 0.33 --seconds 120

With `--saturate N`, N more keep the handlers busy in every second tenth of the time, by requests that the engine has
nothing to do with: what streams notice of them is told apart.

`--url` may be another server's with OpenAI's /v1/completions, such as llama-server; its answers are its own then, and
--unchecked says so. Exit status 1: an answer was wrong or cut, or a refusal was no 429.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

from pronghorn import LLM, SamplingParams

WORDS = ["the", "pronghorn", "runs", "over", "open", "ground", "and", "keeps", "its", "pace", "for", "many", "miles"]


class Load:
    """What is asked, and what came of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.address = urlsplit(args.url)
        self.random = random.Random(1)
        texts = [" ".join(self.random.choices(WORDS, k=4 * args.prompt)) for _ in range(args.prompts)]
        with LLM(args.model, dtype=args.dtype) as llm:
            self.prompts = [llm.tokenizer.encode(text)[: args.prompt] for text in texts]
            params = SamplingParams(max_tokens=args.new, temperature=0.8, seed=1, ignore_eos=True)
            self.answers = [] if args.unchecked else [out.text for out in llm.generate(self.prompts, params)]
        self.first: list[float] = []  # seconds to a first token
        self.gaps: tuple[list[float], list[float]] = [], []  # and from message to message; while handlers are saturated
        self.saturated = False
        self.n_handled = 0  # requests that have saturated them
        self.ends: Counter[str] = Counter()
        self.n_tokens = 0

    async def request(self, *, leaves: bool) -> None:
        """One client's: a stream, read to its end, or left amid it."""
        index = self.random.randrange(len(self.prompts))
        wanted = {"prompt": self.prompts[index], "max_tokens": self.args.new, "temperature": 0.8, "seed": 1}
        body = json.dumps({**wanted, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}})
        head = f"Host: {self.address.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        last = time.perf_counter()
        stop_at = self.random.randrange(1, self.args.new) if leaves else None
        text, n_messages, usage = "", 0, None
        reader, writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        try:
            writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
            status = int((await reader.readline()).split()[1])
            if status != 200:
                self.ends[str(status)] += 1
                await asyncio.sleep(self.random.uniform(0.5, 1.5))  # as Retry-After says
                return
            while not (line := await reader.readline()).startswith(b"data: [DONE]"):
                if not line:
                    self.ends["cut off"] += 1
                    return
                if not line.startswith(b"data: "):
                    continue
                message = json.loads(line[6:])
                usage = message.get("usage") or usage
                if "error" in message:
                    self.ends["error"] += 1
                    return
                for choice in message["choices"]:
                    now = time.perf_counter()
                    (self.gaps[self.saturated] if n_messages else self.first).append(now - last)
                    last, n_messages, text = now, n_messages + 1, text + choice["text"]
                if stop_at is not None and n_messages >= stop_at:
                    self.ends["left"] += 1
                    return
            self.n_tokens += usage["completion_tokens"] if usage else self.args.new
            self.ends["right" if not self.answers or text == self.answers[index] else "wrong"] += 1
        finally:
            writer.close()

    async def client(self, until: float) -> None:
        """Request after request."""
        while time.perf_counter() < until:
            await self.request(leaves=self.random.random() < self.args.leave)

    async def saturate(self, until: float) -> None:
        """One more's requests: large bodies, large answers, and refusals."""
        text = " ".join(self.random.choices(WORDS, k=20_000))
        bodies = ("/tokenize", {"content": text}), ("/detokenize", {"tokens": [1] * 20_000})
        asked = [(path, json.dumps(body).encode()) for path, body in bodies]
        asked += [
            ("/openapi.json", b""),
            ("/metrics", b""),
            ("/v1/completions", b'{"prompt": "' + 100_000 * b"a" + b'"'),
        ]
        while time.perf_counter() < until:
            if self.saturated:
                await self.ask(*self.random.choice(asked))
                self.n_handled += 1
            else:
                await asyncio.sleep(0.01)

    async def run(self) -> dict[str, object]:
        """All clients; a burst beside them in every fifth of the time."""
        args, started = self.args, time.perf_counter()
        before = await self.resident()
        clients = [asyncio.create_task(self.client(started + args.seconds)) for _ in range(args.clients)]
        clients += [asyncio.create_task(self.saturate(started + args.seconds)) for _ in range(args.saturate)]
        for _ in range(10 if args.saturate else 0):
            await asyncio.sleep(args.seconds / 10)
            self.saturated = not self.saturated
        for _ in range(4 if args.burst else 0):
            await asyncio.sleep(args.seconds / 5)
            burst = (self.request(leaves=self.random.random() < args.leave) for _ in range(args.burst - args.clients))
            clients += map(asyncio.create_task, burst)
        await asyncio.gather(*clients)
        seconds = time.perf_counter() - started
        return {
            "seconds": round(seconds, 1),
            "ends": dict(self.ends),
            "tokens_s": round(self.n_tokens / seconds, 1),
            "ttft_ms": percentiles(self.first),
            "between_messages_ms": percentiles(self.gaps[False]),
            **({"saturated_ms": percentiles(self.gaps[True]), "handled": self.n_handled} if args.saturate else {}),
            "resident_mb": [before, await self.resident()],
            "running_after": await self.metric(r"num_requests_running{[^}]*} (\S+)"),
        }

    async def resident(self) -> float | None:
        """The server's memory, in MB, if it tells."""
        found = await self.metric(r"^process_resident_memory_bytes (\S+)$")
        return found and round(found / 1e6, 1)

    async def metric(self, pattern: str) -> float | None:
        """A value of /metrics, if there is one."""
        found = re.search(pattern, (await self.ask("/metrics")).decode(), re.MULTILINE)
        return float(found[1]) if found else None

    async def ask(self, path: str, data: bytes = b"") -> bytes:
        """The answer to a request, with its head."""
        head = f"{'POST' if data else 'GET'} {path} HTTP/1.1\r\nHost: {self.address.netloc}\r\nConnection: close"
        reader, writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        try:
            writer.write(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            return await reader.read()
        finally:
            writer.close()


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(values) or [0.0]
    return {f"p{p}": round(1000 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 2) for p in (50, 90, 99)}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("--dtype", default="auto", help="as the server has it")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--burst", type=int, default=0, help="clients at once, four times")
    parser.add_argument("--saturate", type=int, default=0, help="clients that keep handlers busy, half of the time")
    parser.add_argument("--leave", type=float, default=0.0, help="part of the requests that are left amid their stream")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--prompts", type=int, default=64, help="different ones")
    parser.add_argument("--unchecked", action="store_true", help="answers are the server's own")
    load = Load(parser.parse_args())
    print(json.dumps(asyncio.run(load.run()), indent=1))
    return int(bool(set(load.ends) - {"right", "left", "429"}))


if __name__ == "__main__":
    sys.exit(main())
