"""`pronghorn serve`: what clients rely on, against servers of their own; and every fault with its stated outcome."""

from __future__ import annotations

import asyncio
import base64
import http.client
import itertools
import json
import os
import queue
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pronghorn import LLM, AsyncLLM, PronghornError, SamplingParams
from tiny import save_tiny

openai = pytest.importorskip("openai", reason="the extra `test` has it")
pytest.importorskip("uvicorn", reason="the extra `serve` has it")

LONG = 100_000  # tokens: what runs until something ends it
HERMES = (
    "{% if tools %}By: <tool_call>{\"name\": ..., \"arguments\": ...}</tool_call>: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)  # fmt: skip


class Server:
    """A server process. `ask` and the like are plain HTTP, without a client's own ideas."""

    key = ""  # that these send

    def __init__(self, *args: str, keys: str = "", ready: str = ": serving ", **options: Any) -> None:
        env = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        env |= {"PRONGHORN_API_KEYS": keys, **options.pop("env", {})}
        command = [sys.executable, "-m", "pronghorn", "serve", "--port", "0", *args]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, **options)
        self.lines: list[str] = []
        self.clients: list[Any] = []
        self.news: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.port = int(re.search(r":(\d+): ", self.line(ready))[1])  # type: ignore[index]

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr:
            for line in self.process.stderr:
                self.lines.append(line)
                self.news.put(line)
        self.news.put(None)

    def line(self, text: str) -> str:
        """The next line of the log that has this in it."""
        while (line := self.news.get(timeout=60)) is not None:
            if text in line:
                return line
        raise AssertionError(f"no line has {text!r}: {self.lines}")

    def client(self, *, strict: bool = True) -> Any:
        """OpenAI's own, which is closed with the server."""
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.key or "none", max_retries=0,
            _strict_response_validation=strict,
        )  # fmt: skip
        self.clients.append(client)
        return client

    def ask(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """A request -> status, JSON (or bytes), headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        named = {"authorization": f"Bearer {self.key}"} if self.key else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data, named)
        response = connection.getresponse()
        found = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(found) if is_json else found, response.headers

    def refused(self, path: str, body: Any, status: int, message: str, **headers: str) -> None:
        """Asserts that a request is refused, in OpenAI's shape."""
        found, answer, heads = self.ask(path, body, **headers)
        assert (found, answer.keys(), heads["x-request-id"] != "") == (status, {"error"}, True), answer
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert re.search(message, answer["error"]["message"]), answer

    def open_stream(self, **body: Any) -> socket.socket:
        """The connection of a stream that has begun, and whose answer nobody has read on from there."""
        data = json.dumps(
            {"model": "long", "prompt": "a", "max_tokens": LONG, "ignore_eos": True, "stream": True} | body
        )
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or else the kernel would read for it
        sock.settimeout(60)
        sock.connect(("127.0.0.1", self.port))
        head = f"Host: localhost\r\nX-API-Key: {self.key}\r\nContent-Length: {len(data)}"
        sock.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{data}".encode())
        assert b"HTTP/1.1 200" in sock.recv(100)
        return sock

    def leave(self) -> None:
        """A request that is no stream, whose client leaves while it runs."""
        with self.open_stream() as sock:  # beside another
            data = json.dumps({"model": "long", "prompt": "a", "max_tokens": LONG, "ignore_eos": True})
            head = f"Host: localhost\r\nX-API-Key: {self.key}\r\nContent-Length: {len(data)}"
            with socket.create_connection(sock.getpeername()) as other:
                other.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{data}".encode())
                self.until(lambda: self.metric("num_requests_running") == 2)
            self.until(lambda: self.metric("num_requests_running") == 1)

    def metric(self, name: str, model: str = "long") -> float:
        text = self.ask("/metrics")[1].decode()
        found = re.search(rf'^pronghorn:{name}(?:_total)?{{model_name="{model}"}} (\S+)$', text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits for what is sure to come; how long it takes is no matter."""
        for _ in range(6000):
            if holds():
                return
            time.sleep(0.01)
        raise AssertionError("it has not come to pass")

    def idle(self, model: str = "long") -> bool:
        return self.metric("num_requests_running", model) + self.metric("num_requests_waiting", model) == 0 and (
            self.metric("kv_cache_usage_perc", model) == 0
        )

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.process.kill()
        self.process.wait()
        self.reader.join()


@contextmanager
def serving(*args: str, **options: Any) -> Iterator[Server]:
    server = Server(*args, "--threads", "1", **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {
        "tiny": save_tiny(folder / "tiny"),
        "long": save_tiny(folder / "long", max_position_embeddings=LONG),
        "tools": save_tiny(folder / "tools", max_position_embeddings=1000),
    }
    path = found["tools"] / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": HERMES}))
    return found


@pytest.fixture(scope="module")
def llm(models: dict[str, Path]) -> Iterator[LLM]:
    with LLM(models["tiny"], threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    with serving(*(f"-m{name}={path}" for name, path in models.items()), "--max-body", "100K") as server:
        yield server


# Answers --------------------------------------------------------------------------------------------------------


def test_completions_are_the_offline_ones(server: Server, llm: LLM) -> None:
    client = server.client()
    for n, stop, temperature in ((1, None, 0.0), (3, None, 1.0), (2, ["a", "\n"], 2.0)):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=5, n=n, stop=stop or ())
        prompts = ["Once upon", "", "x" * 100]
        outs = [out for whole in llm.generate(prompts, params) for out in whole.samples]
        asked = {
            "model": "tiny",
            "prompt": prompts,
            "max_tokens": 40,
            "temperature": temperature,
            "seed": 5,
            "n": n,
            "stop": stop,
        }
        found = client.completions.create(**asked)
        assert [(c.index, c.text, c.finish_reason) for c in found.choices] == [
            (i, out.text, out.finish_reason) for i, out in enumerate(outs)
        ]
        assert found.usage.completion_tokens == sum(len(out.token_ids) for out in outs)
        assert found.seed == 5
        texts = [""] * len(outs)
        # Not strictly: OpenAI's schema forbids the null that its own streams have as finish_reason.
        loose = server.client(strict=False).completions
        *chunks, last = loose.create(**asked, stream=True, stream_options={"include_usage": True})
        for chunk in chunks:
            assert chunk.usage is None
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [out.text for out in outs]
        assert (last.choices, last.usage.completion_tokens, last.seed) == ([], found.usage.completion_tokens, 5)
        assert last.timings.keys() == {"ttft_s", "decode_tok_s", "draft_proposed", "draft_accepted"}


def test_chats_are_the_offline_ones(server: Server, llm: LLM) -> None:
    client, messages = server.client(), [{"role": "user", "content": "Hi"}]
    out = llm.generate(llm.chat_prompt(messages), SamplingParams(max_tokens=30, temperature=1.0, seed=2, logprobs=2))
    asked = {
        "model": "tiny",
        "messages": messages,
        "max_completion_tokens": 30,
        "seed": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    found = client.chat.completions.create(**asked)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (out.text, out.finish_reason)
    assert found.usage.prompt_tokens == len(out.prompt_token_ids)
    content, finish, reasons = "", [], []
    for chunk in client.chat.completions.create(**asked, stream=True):
        content += chunk.choices[0].delta.content or ""
        finish += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
        reasons.append(chunk.choices[0].finish_reason)
    assert (content, reasons[-1], chunk.seed) == (out.text, out.finish_reason, 2)
    assert out.logprobs
    for told in (choice.logprobs.content, finish):
        assert [t.logprob for t in told] == [entry.logprob for entry in out.logprobs]
        assert [[o.logprob for o in t.top_logprobs] for t in told] == [[p for _, p in e.top] for e in out.logprobs]
        shown = b"".join(bytes(t.bytes) for t in told if t.bytes is not None)
        assert shown.decode("utf-8", "replace") == out.text
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    again = client.chat.completions.create(**{**asked, "messages": [{"role": "user", "content": parts}]})
    assert again.choices[0].message.content == out.text
    assert again.usage.prompt_tokens_details.cached_tokens == len(out.prompt_token_ids) // 32 * 32


def test_echo_and_logprobs_of_the_prompt(server: Server, llm: LLM) -> None:
    """What harnesses score by; tokens, offsets and text agree."""
    for prompt in ("Once upon", [256, 72, 105, 0, 200]):
        out = llm.generate(prompt, SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=1))
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True, "max_tokens": 3}
        choice = server.ask("/v1/completions", body)[1]["choices"][0]
        told, text = choice["logprobs"], choice["text"]
        assert text == llm.tokenizer.decode(out.prompt_token_ids) + out.text
        entries = [*(out.prompt_logprobs or []), *(out.logprobs or [])]
        assert told["token_logprobs"] == [entry and entry.logprob for entry in entries]
        assert len(told["tokens"]) == len(told["text_offset"]) == len(told["top_logprobs"]) == len(entries)
        ends = [*told["text_offset"][1:], len(text)]
        for token, start, end in zip(told["tokens"], told["text_offset"], ends, strict=True):
            whole = token not in ("<s>", "</s>") and not token.startswith("bytes:\\x")
            assert text[start:end].endswith(token) or not whole
        body |= {"stream": True}
        streamed = [
            json.loads(line[6:]) for line in server.ask("/v1/completions", body)[1].splitlines() if b"{" in line
        ]
        assert "".join(s["choices"][0]["text"] for s in streamed) == text
        assert [x for s in streamed for x in s["choices"][0]["logprobs"]["token_logprobs"]] == told["token_logprobs"]
        body |= {"stream": False, "max_tokens": 0}
        scored = server.ask("/v1/completions", body)[1]
        n = len(out.prompt_token_ids)
        assert scored["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"][:n]
        assert scored["usage"]["completion_tokens"] == 0
        assert scored["choices"][0]["text"] == llm.tokenizer.decode(out.prompt_token_ids)


def test_best_of(server: Server, llm: LLM) -> None:
    out = llm.generate("a", SamplingParams(max_tokens=9, temperature=1.0, seed=3, n=2, best_of=6))
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 9, "seed": 3, "n": 2, "best_of": 6}
    found = server.client().completions.create(**asked)
    assert [choice.text for choice in found.choices] == [sample.text for sample in out.samples]
    with pytest.raises(openai.BadRequestError, match="best_of is 6"):
        server.client().completions.create(**asked, stream=True)


def test_every_slot_gives_the_same_answer_cached_or_not(server: Server, llm: LLM) -> None:
    """What llama.cpp's own tests have to skip: 40 at once, of many lengths, among them one that all know."""
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=7, ignore_eos=True)
    prompts = ["The same prompt, longer than a page of 32 tokens is." + "!" * (i % 5) for i in range(40)]
    offline = {prompt: llm.generate(prompt, params).text for prompt in set(prompts)}

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0)
        async with client:
            for _ in range(2):
                asked = [
                    client.completions.create(
                        model="tiny", prompt=p, max_tokens=60, seed=7, extra_body={"ignore_eos": True}
                    )
                    for p in prompts
                ]
                found = await asyncio.gather(*asked)
                assert [one.choices[0].text for one in found] == [offline[p] for p in prompts]
        assert found[-1].usage.prompt_tokens_details.cached_tokens == 32

    asyncio.run(main())


def test_what_clients_of_llama_cpp_rely_on(server: Server, llm: LLM) -> None:
    """The ground of its server's tests that no other test here has: biases, the context's end, what is left out."""
    ask = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    plain = server.ask("/v1/completions", ask)[1]["choices"][0]["text"]
    ids = llm.generate("Once", SamplingParams(max_tokens=8, ignore_eos=True)).token_ids
    (letter,) = llm.tokenizer.encode("A", add_special=False)
    for bias in ({str(ids[0]): -100}, {str(letter): 100}):
        found = server.ask("/v1/completions", {**ask, "logit_bias": bias, "logprobs": 0})[1]["choices"][0]
        params = SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={int(k): v for k, v in bias.items()})
        assert found["text"] == llm.generate("Once", params).text != plain
        assert (str(letter) in bias) == (found["text"] == "A" * 8)
    # More than the context has room for is not refused: the answer ends with it, and says so.
    full = server.ask("/v1/completions", {**ask, "max_tokens": 10_000})[1]
    assert full["usage"]["total_tokens"] == 300
    assert full["choices"][0]["finish_reason"] == "length"
    # The same seed is the same answer, another one is another, and without one they differ.
    warm = {**ask, "temperature": 1.5, "max_tokens": 40}
    texts = [
        server.ask("/v1/completions", {**warm, **more})[1]["choices"][0]["text"]
        for more in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {}, {})
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    # A prompt of tokens is that of its text; several are answered in their order.
    both = server.ask("/v1/completions", {**ask, "prompt": [llm.tokenizer.encode("Once"), [256, 72]]})[1]["choices"]
    assert (both[0]["text"], len(both)) == (plain, 2)
    # What it has beside is refused by its name: fields, and routes.
    for name in ("cache_prompt", "n_probs", "n_predict", "lora", "id_slot", "typical_p", "mirostat", "dry_multiplier"):
        server.refused("/v1/completions", {**ask, name: 1}, 400, f"^{name} is not supported$")
    for path in ("/infill", "/rerank", "/v1/rerank", "/apply-template", "/completion", "/v1/responses"):
        server.refused(path, {}, 404, f"^POST {path}: Not Found$")
    for path in ("/slots", "/props", "/lora-adapters"):
        server.refused(path, None, 404, f"^GET {path}: Not Found$")
    server.refused("/v1/completions", {**ask, "stream": True, "temperature": -1}, 400, "temperature")  # and no stream


def test_cache_against_no_cache(models: dict[str, Path]) -> None:
    """The same text and logprobs of a prompt that nobody has asked before, of one that is known in part, and whole."""
    prompt = "".join(chr(65 + i % 23) for i in range(200))
    body = {"max_tokens": 30, "seed": 1, "logprobs": 3, "ignore_eos": True}
    told = []
    for before in ((prompt,), (prompt[:70], prompt)):  # each time a server that knows nothing
        with serving("-m", str(models["long"])) as server:
            found = [server.ask("/v1/completions", {**body, "prompt": text})[1] for text in (*before, prompt)]
        told += [one for one in found if one["usage"]["prompt_tokens"] == 201]
    assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in told] == [0, 192, 64, 192]
    assert all(one["choices"] == told[0]["choices"] for one in told)
    with LLM(models["long"], threads=1) as llm:
        params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
        assert llm.generate(prompt, params).text == told[0]["choices"][0]["text"]


def test_metrics_are_prometheus_text(server: Server) -> None:
    """By the parser of Prometheus's own client: every name that docs/serving.md stands for, its kind and its model."""
    from prometheus_client.parser import text_string_to_metric_families

    server.ask("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "ignore_eos": True})
    status, text, heads = server.ask("/metrics")
    assert (status, heads.get_content_type()) == (200, "text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    kinds = {
        "histogram": ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        "gauge": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        "counter": (
            "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
            "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "request_success", "engine_steps",
        ),
    }  # fmt: skip
    for kind, names in kinds.items():
        for name in names:
            family = families[f"pronghorn:{name}"]
            assert (family.type, bool(family.documentation)) == (kind, True)
            assert "tiny" in {sample.labels["model_name"] for sample in family.samples}
    assert families["pronghorn:http_requests"].type == "counter"
    for name in kinds["histogram"]:
        of = [sample for sample in families[f"pronghorn:{name}"].samples if sample.labels["model_name"] == "tiny"]
        buckets = [(float(s.labels["le"]), s.value) for s in of if s.name.endswith("_bucket")]
        (count,) = [sample.value for sample in of if sample.name.endswith("_count")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == (float("inf"), count)
        assert sorted(value for _, value in buckets) == [value for _, value in buckets]
        # Neighbours are at most 2.5 times apart, from below a fast step to above the longest of what is awaited.
        bounds = [bound for bound, _ in buckets[:-1]]
        assert max(b / a for a, b in itertools.pairwise(bounds)) < 2.6
        assert bounds[0] <= 0.001
        assert bounds[-1] >= 5


def test_response_formats(server: Server) -> None:
    pytest.importorskip("llguidance")
    client, asked = server.client(), {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1}
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    found = client.chat.completions.create(**asked, response_format=form).choices[0]
    assert (json.loads(found.message.content)["a"] in "xy", found.finish_reason) == (True, "stop")
    found = client.completions.create(model="tiny", prompt="a", extra_body={"choice": ["yes", "no"]}).choices[0]
    assert found.text in ("yes", "no")
    text = client.chat.completions.create(**asked, response_format={"type": "json_object"}, max_tokens=5)
    assert text.choices[0].message.content.lstrip().startswith("{")
    with pytest.raises(openai.BadRequestError, match="regex"):
        client.completions.create(model="tiny", prompt="a", extra_body={"regex": "("})


def test_tool_calls(server: Server) -> None:
    pytest.importorskip("llguidance")
    client = server.client()
    parameters = {
        "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("f", "g")]
    asked = {"model": "tools", "messages": [{"role": "user", "content": "a"}], "tools": tools, "seed": 1}
    for choice, names in (("required", "fg"), ({"type": "function", "function": {"name": "g"}}, "g")):
        found = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        (call,) = found.message.tool_calls
        assert (found.finish_reason, found.message.content) == ("tool_calls", None)
        assert call.function.name in names
        assert json.loads(call.function.arguments)["n"] in (1, 2)
        deltas = [c.choices[0] for c in client.chat.completions.create(**asked, tool_choice=choice, stream=True)]
        assert deltas[-1].finish_reason == "tool_calls"
        (streamed,) = [call for delta in deltas for call in delta.delta.tool_calls or []]
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        assert not any(delta.delta.content for delta in deltas)
    answered = [
        *asked["messages"],
        found.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    assert client.chat.completions.create(**{**asked, "messages": answered}, max_tokens=4).usage.completion_tokens == 4
    assert (
        client.chat.completions.create(**asked, tool_choice="none", max_tokens=4).choices[0].finish_reason == "length"
    )
    with pytest.raises(openai.BadRequestError, match="no form of calls that is known"):
        client.chat.completions.create(**{**asked, "model": "tiny"})
    with pytest.raises(openai.BadRequestError, match="not in tools"):
        client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "h"}})


CALL = '{"name": "f", "arguments": {"a": "</tool_call> é"}}'
TOOL_TEXTS = [
    ("hermes", "no call at all <tool", "no call at all <tool", 0),
    ("hermes", f"I think.\n<tool_call>\n{CALL}\n</tool_call>", "I think.\n", 1),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", 2),
    ("hermes", "<tool_call>{broken", "<tool_call>{broken", 0),
    ("hermes", f"<tool_call>{CALL}", "", 1),  # cut off after it
    ("hermes", f"<tool_call>{CALL} and more", f"<tool_call>{CALL} and more", 0),
    ("llama3", '{"name": "f", "parameters": {"a": "</tool_call> é"}}', "", 1),
    ("llama3", f"{CALL.replace('arguments', 'parameters')}; {CALL.replace('arguments', 'parameters')}", "", 2),
    ("llama3", 'Say {"name": "f"}', 'Say {"name": "f"}', 0),
    ("llama3", "{not JSON", "{not JSON", 0),
    ("llama3", "  ", "  ", 0),
    ("forced", CALL, "", 1),
]


@pytest.mark.parametrize(("form", "text", "shown", "n_calls"), TOOL_TEXTS)
def test_calls_are_read_wherever_the_text_is_cut(form: str, text: str, shown: str, n_calls: int) -> None:
    from pronghorn.serve.tools import FORCED, HERMES, LLAMA3, CallReader

    for cut in range(len(text) + 1):
        for pieces in ([text[:cut], text[cut:]], list(text)):
            reader = CallReader({"hermes": HERMES, "llama3": LLAMA3, "forced": FORCED}[form])
            found = "".join(map(reader.push, pieces))
            rest, calls = reader.finish()
            assert (found + rest, len(calls)) == (shown, n_calls)
            for call in calls:
                assert (call["name"], json.loads(call["arguments"])) == ("f", {"a": "</tool_call> é"})


def test_which_templates_have_a_form_of_calls() -> None:
    from pronghorn.serve.tools import HERMES as FORM
    from pronghorn.serve.tools import LLAMA3, form_of

    llama = "<|start_header_id|> {\"name\": function name, \"parameters\": dictionary}"  # fmt: skip
    assert (form_of(HERMES), form_of(HERMES.replace('"', '\\"')), form_of(llama)) == (FORM, FORM, LLAMA3)
    for template in (None, "", "{{ messages }}", "[TOOL_CALLS]"):
        with pytest.raises(PronghornError, match="no form of calls"):
            form_of(template)


def test_embeddings(server: Server, llm: LLM) -> None:
    client, texts = server.client(), ["Hello", "x" * 200, "Hello"]
    found = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for entry, text in zip(found.data, texts, strict=True):
        mean = llm.hidden(llm.tokenizer.encode(text)).mean(axis=0, dtype=np.float64)
        assert np.array_equal(entry.embedding, (mean / np.linalg.norm(mean)).astype(np.float32))
    assert found.usage.prompt_tokens == sum(len(llm.tokenizer.encode(text)) for text in texts)
    packed = server.ask("/v1/embeddings", {"model": "tiny", "input": texts, "encoding_format": "base64"})[1]
    for entry, packed_entry in zip(found.data, packed["data"], strict=True):
        unpacked = np.frombuffer(base64.b64decode(packed_entry["embedding"]), np.float32)
        assert np.array_equal(unpacked, np.array(entry.embedding, np.float32))
    as_ids = client.embeddings.create(model="tiny", input=llm.tokenizer.encode("Hello"), encoding_format="float")
    assert as_ids.data[0].embedding == found.data[0].embedding
    server.refused(
        "/v1/embeddings", {"model": "tiny", "input": "x" * 300}, 400, "301 tokens, but the context holds 300"
    )
    server.refused(
        "/v1/embeddings", {"model": "tiny", "input": "x", "dimensions": 3}, 400, "dimensions is not supported"
    )
    server.refused("/v1/embeddings", {"model": "tiny", "input": []}, 400, "input")
    server.refused("/v1/embeddings", {"model": "tiny", "input": [300]}, 400, "is 300: outside")


@pytest.mark.parametrize("device", ["cpu", "reference", "torch:cpu"])
def test_hidden_states_are_what_the_head_reads(models: dict[str, Path], device: str) -> None:
    with LLM(models["tiny"], device=device, dtype="f32") as llm:
        ids = [256, *range(100)]
        head = np.frombuffer(llm._weights["embed_tokens.weight"].data, np.float32).reshape(258, 32)
        before = llm.logits(ids)
        assert np.allclose(llm.hidden(ids) @ head.T, before, rtol=1e-4, atol=1e-4)
        assert np.array_equal(llm.logits(ids), before)
        assert llm.stats().held_pages == 0


def test_left_embeddings_end_and_others_go_on(server: Server) -> None:
    data = json.dumps({"input": ["a" * 2000] * 30, "model": "long"})
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = f"Host: localhost\r\nContent-Length: {len(data)}"
            sock.sendall(f"POST /v1/embeddings HTTP/1.1\r\n{head}\r\n\r\n{data}".encode())
    assert server.ask("/v1/embeddings", {"input": "a", "model": "long"})[0] == 200
    server.until(server.idle)


def test_models_and_tokens(server: Server, llm: LLM) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "long", "tools"]
    assert client.models.retrieve("tiny").context == 300
    with pytest.raises(openai.NotFoundError, match="no model 'nope': expected one of tiny, long, tools"):
        client.models.retrieve("nope")
    text = "héllo 🙂"
    pieces = server.ask("/tokenize", {"model": "tiny", "content": text, "with_pieces": True})[1]["tokens"]
    assert [piece["id"] for piece in pieces] == llm.tokenizer.encode(text, add_special=False)
    data = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert data.decode() == text
    ids = server.ask("/tokenize", {"model": "tiny", "content": text, "add_special": True})[1]["tokens"]
    assert ids == llm.tokenizer.encode(text)
    assert server.ask("/detokenize", {"model": "tiny", "tokens": ids})[1] == {"content": text}
    assert server.ask("/health")[:2] == (200, {"status": "ok"})
    assert server.ask("/v1/completions", {"prompt": "a"})[0] == 400  # which model, is not said


def test_fast_gpt2s_route(models: dict[str, Path], llm: LLM) -> None:
    options = ("--max-tokens", "50", "--log-format", "json", "--log-prompts")
    with serving("-m", str(models["tiny"]), *options) as server:
        out = llm.generate("Once", SamplingParams(max_tokens=20)).text
        for body in (b"Once", b'{"inputs": "Once"}'):
            assert server.ask("/", body)[:2] == (200, [{"generated_text": "Once" + out}])
        server.refused("/", b"\xff", 400, "no UTF-8")
        server.refused("/", b'{"inputs": 5}', 400, "inputs", content_type="application/json")
        # No max_tokens is the server's limit, and more than that is refused.
        found = server.ask(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
        )[1]
        assert found["usage"]["completion_tokens"] == 50
        server.refused("/v1/completions", {"prompt": "a", "max_tokens": 51}, 400, "is 51: this server gives at most 50")
        line = json.loads(server.line('"prompt": '))
        assert {"request_id", "path", "status", "seconds", "prompt_tokens", "completion_tokens"} <= line.keys()


# Refusals -------------------------------------------------------------------------------------------------------


def test_refusals(server: Server) -> None:
    for path, body, status, message in (
        ("/v1/completions", b"{", 400, "no JSON"),
        ("/v1/completions", b"[]", 400, "object"),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, "no JSON object.*(UTF-8|unicode)"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "hex escape"),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ("/v1/completions", b"[" * 10_000, 400, "recursion"),
        ("/v1/completions", {}, 400, "prompt: Field required"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "^suffix is not supported$"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature: .*number"),
        ("/v1/completions", {"prompt": "a", "top_p": 2}, 400, "top_p"),
        ("/v1/completions", {"prompt": ["a", 5]}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1, 258], "model": "tiny"}, 400, "is 258: outside"),
        ("/v1/completions", {"prompt": "x" * 300, "model": "tiny"}, 400, "has 301 tokens, but the context holds 300"),
        ("/v1/completions", {"prompt": "a", "model": "tiny", "n": 2, "best_of": 1}, 400, "best_of is 1"),
        ("/v1/completions", {"prompt": "a", "model": "tiny", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "a", "model": "tiny", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "model": "tiny", "stream_options": {}}, 400, "stream_options"),
        ("/v1/completions", {"prompt": ["a"] * 161, "model": "tiny", "n": 2}, 400, "322 samples: at most 320"),
        ("/v1/completions", {"prompt": [{}] * 20_000}, 400, "prompt"),
        ("/v1/completions", dict.fromkeys(map(str, range(5000)), 0), 400, "the body has 5001 faults"),
        ("/v1/completions", {"prompt": "a", "model": "tiny", "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias"),
        ("/v1/embeddings", {"input": ["a"] * 2049, "model": "tiny"}, 400, "input has 2049 elements"),
        ("/v1/completions", {"prompt": "a", "model": "nope"}, 404, "no model 'nope'"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "elf", "content": "a"}]}, 400, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}], "functions": []}, 400, "functions is not supported"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user"}], "top_logprobs": 1, "model": "tiny"},
            400,
            "top_logprobs",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user"}], "chat_template_kwargs": {"messages": []}, "model": "tiny"},
            400,
            "chat_template_kwargs: messages is not",
        ),
        ("/v1/completions", b"x" * 200_000, 413, "more than 102400 bytes"),
        ("/nope", {}, 404, "POST /nope: Not Found"),
        ("/health", {}, 405, "Method Not Allowed"),
    ):
        server.refused(path, body, status, message)
    found = server.ask("/v1/completions", {"prompt": "x" * 300, "model": "tiny"})[1]
    assert found["error"]["code"] == "context_length_exceeded"
    message = {"role": "user", "content": "a"}
    for body, param in (  # by the body's own names, not by the types that were tried
        ({}, "messages"),
        (
            {"messages": [{**message, "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url",
        ),
        ({"messages": [{**message, "content": 5}]}, "messages.0.content"),
        ({"messages": [message], "stop": [1]}, "stop"),
        ({"messages": [message], "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"messages": [message], "tool_choice": {"type": "function", "function": {"x": 1}}}, "tool_choice.function.x"),
        ({"messages": [message], "logit_bias": {"5": "much"}}, "logit_bias.5"),
    ):
        assert server.ask("/v1/chat/completions", body)[1]["error"]["param"] == param


def test_pages_of_elsewhere(server: Server, models: dict[str, Path]) -> None:
    body = {"prompt": "a", "model": "tiny", "max_tokens": 1}
    for origin in ("http://example.org", "null", f"http://127.0.0.1:{server.port + 1}"):
        server.refused("/v1/completions", body, 403, f"pages of {origin} may not", origin=origin)
    assert server.ask("/v1/completions", body, origin=f"http://127.0.0.1:{server.port}")[0] == 200
    with serving("-m", str(models["tiny"]), "--cors", "http://example.org", "--allow-host", "A.example") as other:
        status, _, heads = other.ask("/v1/completions", body, origin="http://example.org")
        assert (status, heads["access-control-allow-origin"]) == (200, "http://example.org")
        for host in ("a.example", "a.EXAMPLE.:80", "localhost"):
            assert other.ask("/health", host=host)[0] == 200
        other.refused("/health", None, 403, "Host is 'b.example'", host="b.example")


def test_names_of_elsewhere(server: Server) -> None:
    """A page whose own name leads here is no stranger to its browser. Addresses are no names, and localhost is ours."""
    for host in ("example.org", "example.org:8000", "127.0.0.1.example.org", "localhost.example.org", "alocalhost", ""):
        for path, body in (("/", None), ("/v1/completions", {"prompt": "a", "model": "tiny", "max_tokens": 1})):
            server.refused(path, body, 403, f"Host is '{host}'", host=host, origin=f"http://{host}")
    for host in ("localhost", f"LocalHost:{server.port}", "a.localhost.", "127.0.0.1", "192.168.1.2:80", "[::1]:80"):
        assert server.ask("/health", host=host)[0] == 200


def test_a_path_has_one_line_in_the_log(server: Server) -> None:
    assert server.ask("/a%0A2000-01-01 b".replace(" ", "%20"))[0] == 404
    assert "/a%0A2000-01-01%20b" in server.line("2000-01-01")


def test_request_ids(server: Server) -> None:
    assert server.ask("/v1/models", x_request_id="my-id.1")[2]["x-request-id"] == "my-id.1"
    assert server.ask("/v1/models", x_request_id="no id")[2]["x-request-id"].startswith("req-")
    server.line("my-id.1 GET /v1/models")


def test_openapi_is_true(models: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with serving("-m", str(models["tiny"]), "--max-tokens", "8") as server:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json",
            "--phases", "examples,fuzzing", "--checks", f"{checks},negative_data_rejection", "--seed", "1",
            "--max-examples", os.environ.get("PRONGHORN_FUZZ", "10"), "--generation-database", "none",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stdout
        assert server.ask("/health")[0] == 200


# Operation, and faults -------------------------------------------------------------------------------------------


def test_keys_and_shares_and_the_queue(models: dict[str, Path], tmp_path: Path) -> None:
    """And clients that leave, in whatever way, while they run and while they wait."""
    (tmp_path / "keys").write_text("# ours\n\ngood\n")
    options = ("--api-keys", str(tmp_path / "keys"), "--max-waiting", "2", "--max-per-key", "66", "--cors", "http://a")
    with serving("-m", str(models["long"]), *options, keys="second") as server:
        server.key = "good"
        body = {"prompt": "a", "max_tokens": 2}
        for key in ("", "wrong", "goo", "good\u00e9"):
            server.refused("/v1/completions", body, 401, "key", authorization=f"Bearer {key}".encode().decode("latin1"))
        server.refused("/metrics", None, 401, "key is needed", authorization="")
        server.refused("/v1/models", None, 401, "key is wrong", x_api_key="no", authorization="")
        for name in ("good", "second"):
            assert server.ask("/v1/completions", body, x_api_key=name, authorization="")[0] == 200
        for path in ("/health", "/openapi.json"):
            assert server.ask(path, authorization="", host="example.org")[0] == 200  # with keys, by any name
        assert server.ask("/health", origin="http://a")[2]["access-control-allow-origin"] == "http://a"
        assert "access-control-allow-origin" not in server.ask("/health", origin="http://b")[2]
        assert server.ask("/v1/models", method="OPTIONS", origin="http://a", authorization="",
                          access_control_request_method="GET")[0] == 200  # fmt: skip

        running = [server.open_stream() for _ in range(64)]
        server.until(lambda: server.metric("num_requests_running") == 64)
        waiting = [server.open_stream() for _ in range(2)]
        server.until(lambda: server.metric("num_requests_waiting") == 2)
        server.refused("/v1/completions", body, 429, "this key has 66 requests")
        server.refused("/v1/completions", body, 429, "66 samples run or wait", authorization="Bearer second")
        assert server.ask("/v1/completions", body, authorization="Bearer second")[2]["retry-after"] == "1"
        waiting[0].close()
        waiting[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        waiting[1].close()  # by a reset
        server.until(lambda: server.metric("num_requests_waiting") == 0)
        assert server.metric("num_requests_running") == 64
        for sock in running:
            sock.close()
        server.until(server.idle)
        text = server.ask("/metrics")[1].decode()
        assert re.search(r'http_requests_total{route="/v1/completions",status="499"} 66.0', text)
        whole = threading.Thread(target=server.leave)
        whole.start()
        whole.join()
        server.until(server.idle)


def test_a_killed_client(server: Server) -> None:
    code = "import sys; sys.path[:0] = sys.argv[2:]; import openai\n"
    code += "client = openai.OpenAI(base_url=f'http://127.0.0.1:{sys.argv[1]}/v1', api_key='a')\n"
    code += "stream = client.completions.create(model='long', prompt='a', max_tokens=99_000, stream=True, "
    code += "extra_body={'ignore_eos': True})\nprint(next(iter(stream)).id, flush=True)\nfor _ in stream: pass"
    with subprocess.Popen([sys.executable, "-c", code, str(server.port), *sys.path], stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline().startswith(b"cmpl-")
        client.kill()
    server.until(server.idle)


def test_a_cancelled_task_ends_its_request(server: Server) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x") as client:
            asked = {"model": "long", "prompt": "a", "max_tokens": LONG, "extra_body": {"ignore_eos": True}}
            task = asyncio.create_task(client.completions.create(**asked))
            while await asyncio.to_thread(server.metric, "num_requests_running") == 0:
                pass
            task.cancel()
            await asyncio.to_thread(server.until, server.idle)
            stream = await client.completions.create(**asked, stream=True)
            await anext(aiter(stream))
            await stream.close()
            await asyncio.to_thread(server.until, server.idle)

    asyncio.run(main())


def test_a_slow_reader_gets_all_of_it(server: Server) -> None:
    """The engine does not wait for it, nor pile up messages: what it has not read is one message then."""
    body = {"max_tokens": 4_000, "seed": 1, "temperature": 1.0}
    before = server.metric("generation_tokens")
    sock = server.open_stream(**body)
    server.until(lambda: server.metric("generation_tokens") == before + 4_000)
    data = b""
    while part := sock.recv(1 << 20):
        data += part
        if b"[DONE]" in data[-50:]:
            break
    sock.close()
    events = [json.loads(e) for e in re.findall(rb"data: ({.*})", data)]
    whole = server.ask("/v1/completions", {"model": "long", "prompt": "a", "ignore_eos": True, **body})[1]
    assert "".join(e["choices"][0]["text"] for e in events) == whole["choices"][0]["text"]


def test_connections_are_given_up_in_the_end() -> None:
    """Half-open sockets, and those whose window stays shut: the kernel ends them, as the listener's options say."""
    from pronghorn.serve.main import PATIENCE, is_loopback, listen

    with listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == PATIENCE * 1000
        assert is_loopback(sock)
    with listen("0.0.0.0", 0) as sock:
        assert not is_loopback(sock)
    with pytest.raises(PronghornError, match=r"256\.0\.0\.1"), listen("256.0.0.1", 0):
        pass


def test_bytes_that_are_no_request(server: Server) -> None:
    for data in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",  # and nothing more
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
            answer = b""
            with suppress(OSError):  # such as a reset, where not all was read
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while part := sock.recv(1000):
                    answer += part
            assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    assert server.ask("/health")[0] == 200


def test_timeouts(models: dict[str, Path]) -> None:
    with serving("-m", str(models["long"]), "--timeout", "0.2") as server:
        body = {"prompt": "a", "max_tokens": LONG, "ignore_eos": True}
        server.refused("/v1/completions", body, 504, "longer than 0.2 seconds")
        with pytest.raises(openai.APIError, match=r"longer than 0\.2 seconds"):
            for _ in server.client(strict=False).completions.create(
                model="long", prompt="a", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            ):
                pass
        server.until(server.idle)


def test_kv_exhaustion(models: dict[str, Path], llm: LLM) -> None:
    """Eight that need twice the memory that there is: they give way to each other, and all are whole."""
    with serving("-m", str(models["tiny"]), "--kv-memory", "300K") as server:
        params = SamplingParams(max_tokens=280, temperature=1.0, ignore_eos=True, seed=1, n=8)
        body = {"prompt": "a", "max_tokens": 280, "ignore_eos": True, "seed": 1, "n": 8}
        found = server.ask("/v1/completions", body)[1]["choices"]
        assert [choice["text"] for choice in found] == [out.text for out in llm.generate("a", params).samples]
        assert server.metric("num_preemptions_total", "tiny") > 0
        assert server.idle("tiny")


def test_the_files_go_away_and_the_disk_is_full(models: dict[str, Path], llm: LLM, tmp_path: Path) -> None:
    """What is mapped stays; what cannot be written to the cache is held in memory."""
    folder = tmp_path / "gone"
    shutil.copytree(models["tiny"], folder)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    with serving(
        "-m", str(folder), "--dtype", "int8", env={"PRONGHORN_CACHE": str(tmp_path)}, preexec_fn=full
    ) as server:
        shutil.rmtree(folder)
        found = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 20, "temperature": 0})[1]
        with LLM(models["tiny"], dtype="int8", threads=1) as offline:
            assert found["choices"][0]["text"] == offline.generate("a", SamplingParams(max_tokens=20)).text
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size >= 1000]


def test_a_file_that_is_cut_short(models: dict[str, Path], tmp_path: Path) -> None:
    """In place, by another process: what it held is gone, so the process ends, in a line that names it."""
    folder = tmp_path / "cut"
    shutil.copytree(models["tiny"], folder)
    with serving("-m", str(folder), "--dtype", "f32") as server:
        os.truncate(folder / "model.safetensors", 4096)
        with pytest.raises((OSError, http.client.HTTPException)):  # the connection ends without an answer
            server.ask("/v1/completions", {"prompt": "a", "max_tokens": 20})
        assert f"error: {folder / 'model.safetensors'}: cannot be read any more: it was cut short" in server.line(
            "error"
        )
        assert server.process.wait(60) == 2


def test_draining(models: dict[str, Path]) -> None:
    """SIGTERM: what runs ends, what is new is refused; --drain has an end, and a second signal waits for none."""
    with serving("-m", str(models["long"]), "--drain", "60") as server:
        asked = {
            "model": "long",
            "prompt": "a",
            "max_tokens": 4_000,
            "stream": True,
            "extra_body": {"ignore_eos": True, "seed": 1},
        }
        stream = iter(server.client(strict=False).completions.create(**asked))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        server.line("draining")
        assert server.ask("/health")[:2] == (503, {"status": "draining"})
        server.refused("/v1/completions", {"prompt": "a"}, 503, "shutting down")
        server.refused("/v1/embeddings", {"input": "a"}, 503, "shutting down")
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.process.wait(60) == 0
    with serving("-m", str(models["long"]), "--drain", "60") as server:
        with server.open_stream(max_tokens=2000, logprobs=100) as sock:  # 10 MB, that nobody has read
            server.until(lambda: server.metric("generation_tokens") == 2000)
            server.process.send_signal(signal.SIGTERM)
            server.line("draining")
            data = b""
            while part := sock.recv(1 << 20):
                data += part
            assert b"[DONE]" in data[-50:]
        assert server.process.wait(60) == 0
    with serving("-m", str(models["long"]), "--drain", "0.1") as server:
        stream = iter(server.client(strict=False).completions.create(**{**asked, "max_tokens": LONG}))
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.process.wait(60) == 0
    with serving("-m", str(models["long"]), "--drain", "1000") as server:
        server.open_stream().detach()
        server.process.send_signal(signal.SIGTERM)
        server.line("draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM


def test_what_does_not_start(
    models: dict[str, Path], tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    from pronghorn.cli import main

    (tmp_path / "empty").touch()
    for args, message in (
        (["-m", str(tmp_path / "nothing")], "nothing"),
        (["-m", str(models["tiny"]), "-m", str(models["tiny"])], "another model has its name"),
        (["--api-keys", str(tmp_path / "empty")], "there are no keys"),
        (["--api-keys", str(tmp_path / "nothing")], "No such file"),
        (["--max-per-key", "1"], "no API keys"),
        (["--timeout", "0"], "--timeout is 0.0: expected a number above 0"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--port", str(server.port)], "Address already in use"),
        (["--tls-cert", str(tmp_path / "nothing")], "nothing"),
        (["--tls-key", str(tmp_path / "empty")], "--tls-key is given, but no --tls-cert"),
        (["--tls-cert", str(tmp_path / "empty")], "empty (no --tls-key): not a certificate and its key"),
    ):
        assert main(["serve", "-m", f"a={models['tiny']}", "--port", "0", *args]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("pronghorn: error: ")
        assert message in last


def test_tls(models: dict[str, Path], tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not there, to make a certificate")
    both = str(tmp_path / "both.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", both + "1", "-out", both + "2"]
    subprocess.run([*command, "-days", "1", "-subj", "/CN=localhost"], check=True, capture_output=True)
    with serving("-m", str(models["tiny"]), "--tls-cert", both + "2", "--tls-key", both + "1") as server:
        context = ssl.create_default_context(cafile=both + "2")
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()


async def served_here(app: Any, path: str, method: str, *, whole: bool = True, after: float = 0) -> tuple[int, bytes]:
    """An answer of the application in this process; the request's body comes `after` seconds."""
    messages: list[Any] = []
    parts = iter([{"type": "http.request", "body": b'{"prompt": "a", "max_tokens": 1}', "more_body": not whole}])

    async def receive() -> Any:
        await asyncio.sleep(after)
        return next(parts, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        messages.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}, receive, send)
    return messages[0]["status"], messages[1]["body"]


def test_a_first_tokens_time_begins_with_its_request(llm: LLM) -> None:
    """Not when the body has come, or the prompt is made into tokens."""
    from pronghorn.serve.app import Served, Service, app_of
    from pronghorn.serve.operation import Settings

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            service = Service(Settings())
            service.models["tiny"], service.status = Served("tiny", engine, 0, ""), "ok"
            assert (await served_here(app_of(service), "/v1/completions", "POST", after=0.1))[0] == 200
            name = "pronghorn:time_to_first_token_seconds_sum"
            assert service.metrics.registry.get_sample_value(name, {"model_name": "tiny"}) >= 0.1

    asyncio.run(main())


def test_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a body that never comes."""
    from pronghorn.serve import app
    from pronghorn.serve.operation import Settings

    async def ask(path: str, method: str, *, whole: bool = True) -> tuple[int, bytes]:
        return await served_here(app.app_of(app.Service(Settings())), path, method, whole=whole)

    assert asyncio.run(ask("/health", "GET")) == (503, b'{"status":"loading"}')
    status, body = asyncio.run(ask("/v1/completions", "POST"))
    assert (status, json.loads(body)["error"]["code"]) == (503, "loading")
    monkeypatch.setattr(app, "PATIENCE", 0.01)
    status, body = asyncio.run(ask("/v1/completions", "POST", whole=False))
    assert (status, json.loads(body)["error"]["type"]) == (408, "timeout_error")


def test_a_fingerprint_is_the_contents_and_how_they_are_run(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pronghorn import _native
    from pronghorn.serve import main
    from pronghorn.serve.main import fingerprint

    def of(path: Path, **options: Any) -> str:
        with LLM(path, **options) as llm:
            return fingerprint(llm)

    own = of(models["tiny"])
    shutil.copytree(models["tiny"], tmp_path / "moved")
    assert own == of(tmp_path / "moved") == of(models["tiny"], threads=2, draft="ngram")
    path = tmp_path / "moved" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    others = [
        of(tmp_path / "moved"),
        of(models["tiny"], dtype="int8"),
        of(models["tiny"], kv_dtype="int8"),
        of(models["long"]),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(_native, "isa", lambda: "another")
        others.append(of(models["tiny"]))
    for package in ("tokenizers", "torch"):  # another version of it; the CPU's answers do not depend on torch
        with monkeypatch.context() as patched:
            patched.setattr(main, "find_version", lambda name, of=package: "0" if name == of else None)
            others.append(of(models["tiny"]))
    with monkeypatch.context() as patched:
        patched.setattr(main, "find_version", lambda name: None)
        assert of(models["tiny"]) == others[-1]
    assert len({own, *others}) == 8


def test_real_models(test_data: Path, default_model: Path) -> None:
    """What stories260K is known to say, by a stream; and SmolLM2's answer is the offline one."""
    folder, messages = test_data / "models" / "stories260K", [{"role": "user", "content": "Why is the sky blue?"}]
    with serving("-m", str(folder), "-m", f"smol={default_model}") as server:
        client = server.client(strict=False)
        stream = client.completions.create(
            model="stories260K", prompt=[1], max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        text = "".join(chunk.choices[0].text for chunk in stream)
        assert text.strip() == (folder / "golden.txt").read_text(encoding="utf-8").strip()
        found = client.chat.completions.create(model="smol", messages=messages, max_tokens=40, temperature=0)
    with LLM(default_model, threads=1) as offline:
        out = offline.generate(offline.chat_prompt(messages), SamplingParams(max_tokens=40))
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (out.text, out.finish_reason)
